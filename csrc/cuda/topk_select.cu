// topk_flips on a GPU, behind the coarse scores of csrc/cuda/topk_scores.cu or of a library GEMM:
//
//     select    per row the k tokens of lowest score in float64 order, from coarse scores and a bound of their error
//     redo      the same from float64 scores of all tokens, for rows whose candidates do not fit, or have no bound
//
// A block a row. One read of its scores keeps the lowest of each of 4096 groups of columns; the k-th lowest of those,
// found bit by bit from registers, is at or above the k-th lowest of all, because k groups hold one token each at or
// below it. A second read, from the level-2 cache, collects what is within the bound of it: k = 16 of 49408 tokens
// typically leaves 17 candidates, k = 1024 about 1200. They are scored in float64 from the embedding and sorted. More
// than 2048 candidates: nothing is cut off, the row is left to `redo`, whose blocks look at one flag otherwise.
//
// Work: 8 bytes read a score; 2 D FLOP in fp64 a candidate. No pass over the scores sorts anything.
#include "topk.cuh"

namespace ccu {
namespace {

constexpr int kMine = 8;  // groups of a thread
constexpr int kGroups = kMine * kSelectThreads;

__device__ __forceinline__ uint32_t key(const ccu_cuda_topk_args& a, const float* scores, int64_t row, float factor,
                                        float penalty_scale, int64_t token) {
  if (!may_use(a, row, token)) return kNever;
  if (a.penalty == nullptr) return ordered(factor * scores[token]);
  // fmaf, so that both reads of a score make the same key of it.
  return ordered(fmaf(penalty_scale, a.penalty[row * a.penalty_stride + token], factor * scores[token]));
}

// How many threads' flags are set, times what each adds; the same in every thread.
__device__ __forceinline__ int block_sum(int value, int* parts) {
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  int all = 0;
  for (int w = 0; w < kWarps; ++w) all += parts[w];
  return all;
}

__global__ void __launch_bounds__(kSelectThreads) select(ccu_cuda_topk_args a) {
  __shared__ Candidates found;
  __shared__ int parts[kWarps];
  const int64_t row = a.first + blockIdx.x;
  const float* about = a.about + 4 * row;
  const float factor = about[0], penalty_scale = about[1];
  const int path = static_cast<int>(about[3]);
  if (threadIdx.x == 0) found.count = 0;
  __syncthreads();
  if (path == CCU_TOPK_INVALID) {
    write(a, row, found, false);
    if (threadIdx.x == 0) a.redo[row] = 0;
    return;
  }
  if (path == CCU_TOPK_EXACT) {
    if (threadIdx.x == 0) a.redo[row] = 1;
    return;
  }
  const float* scores = a.scores + static_cast<int64_t>(blockIdx.x) * a.tokens;

  uint32_t lowest[kMine];
#pragma unroll
  for (int m = 0; m < kMine; ++m) lowest[m] = kNever;
  for (int64_t base = 0; base < a.tokens; base += kGroups) {
#pragma unroll
    for (int m = 0; m < kMine; ++m) {
      const int64_t token = base + m * kSelectThreads + threadIdx.x;
      if (token < a.tokens) {
        const uint32_t mine = key(a, scores, row, factor, penalty_scale, token);
        lowest[m] = mine < lowest[m] ? mine : lowest[m];
      }
    }
  }
  const uint32_t kth = kth_key(a.k, [&](uint32_t bound) {
    int at_most = 0;
#pragma unroll
    for (int m = 0; m < kMine; ++m) at_most += lowest[m] <= bound;
    return block_sum(at_most, parts);
  });
  // Fewer than k groups have a token that may be used: all of them are candidates.
  const uint32_t cutoff = kth == kNever ? kNever - 1 : ordered(cutoff_above(unordered(kth), about[2]));
  for (int64_t token = threadIdx.x; token < a.tokens; token += kSelectThreads) {
    if (key(a, scores, row, factor, penalty_scale, token) > cutoff) continue;
    if (!may_use(a, row, token)) continue;
    const int at = atomicAdd(&found.count, 1);
    if (at < kCandidates) found.token[at] = static_cast<int32_t>(token);
  }
  __syncthreads();
  const int n = found.count;
  if (threadIdx.x == 0) a.redo[row] = n > kCandidates;
  if (n > kCandidates) return;
  for (int c = threadIdx.x / 32; c < n; c += kWarps) {
    const double exact = score(a, row, found.token[c]);
    if (threadIdx.x % 32 == 0) found.score[c] = exact;
  }
  __syncthreads();
  sort(found);
  write(a, row, found, true);
}

__global__ void __launch_bounds__(kSelectThreads) redo(ccu_cuda_topk_args a) {
  __shared__ Candidates best;
  const int64_t row = a.first + blockIdx.x;
  if (!a.redo[row]) return;
  if (threadIdx.x == 0) best.count = 0;
  __syncthreads();
  double cutoff = INFINITY;
  for (int64_t base = 0; base < a.tokens; base += kWarps) {
    const int64_t token = base + threadIdx.x / 32;
    if (token < a.tokens && may_use(a, row, token)) {
      const double exact = score(a, row, token);
      // An equal one later has the higher token.
      if (threadIdx.x % 32 == 0 && exact < cutoff) {
        const int at = atomicAdd(&best.count, 1);
        best.score[at] = exact;
        best.token[at] = static_cast<int32_t>(token);
      }
    }
    __syncthreads();
    if (best.count > kCandidates - kWarps) {
      sort(best);
      cutoff = best.score[a.k - 1];
      __syncthreads();
      if (threadIdx.x == 0) best.count = static_cast<int>(a.k);
    }
    __syncthreads();
  }
  sort(best);
  write(a, row, best, true);
}

}  // namespace
}  // namespace ccu

extern "C" int ccu_cuda_topk_select(const ccu_cuda_topk_args* args) {
  if (args == nullptr || args->rows < 0 || args->tokens < 1 || args->tokens > INT32_MAX - 64 || args->k < 1 ||
      args->k > CCU_CUDA_MOST_FLIPS)
    return CCU_BAD_ARGUMENT;
  if (args->rows == 0) return CCU_OK;
  const unsigned blocks = static_cast<unsigned>(args->rows);
  const cudaStream_t stream = static_cast<cudaStream_t>(args->stream);
  ccu::select<<<blocks, ccu::kSelectThreads, 0, stream>>>(*args);
  ccu::redo<<<blocks, ccu::kSelectThreads, 0, stream>>>(*args);
  return ccu::launched();
}
