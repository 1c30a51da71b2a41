// topk_flips on a GPU, after the coarse scores of csrc/cuda/topk_scores.cu or of a library GEMM:
//
//     select    per row the k tokens of lowest score in float64 order, from coarse scores and a bound of their error
//
// A block a row. One read of its scores keeps the lowest of each of 4096 groups of columns; the k-th lowest of those,
// found bit by bit from registers, is at or above the k-th lowest of all, because k groups hold one token each at or
// below it. A second read, from the level-2 cache, collects what is within the bound of it: k = 16 of 49408 tokens
// typically leaves 17 candidates, k = 1024 about 1200. They are scored in float64 from the embedding and sorted. Where
// more than 2048 are within the bound, or there is no bound, they are settled a part at a time: the best k of one part
// stay for the next. A row whose gradient is zero has its penalties for scores, and no products are made.
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
  return ordered(fmaf(penalty_scale, penalty_of(a, row, token), factor * scores[token]));
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

// The best k of all tokens that `take` lets through, in sorted order. Tokens come in ascending order, so that of equal
// ones the earlier stay.
template <class Take>
__device__ void settle_by_parts(const ccu_cuda_topk_args& a, int64_t row, bool zero, const Take& take,
                                Candidates& best) {
  double cutoff = INFINITY;  // the score of the k-th so far; an equal one that comes later has the higher token
  int settled = 0;
  if (threadIdx.x == 0) best.count = 0;
  __syncthreads();
  for (int64_t base = 0; base < a.tokens; base += kSelectThreads) {
    const int64_t token = base + threadIdx.x;
    if (token < a.tokens && take(token)) {
      const double penalty = penalty_of(a, row, token);
      if (!zero || penalty < cutoff) {
        const int at = atomicAdd(&best.count, 1);
        best.token[at] = static_cast<int32_t>(token);
        best.score[at] = penalty;
      }
    }
    __syncthreads();
    const int count = best.count;
    if (count > kCandidates - kSelectThreads || base + kSelectThreads >= a.tokens) {
      if (!zero) score_from(a, row, settled, best);
      sort(best);
      settled = count < a.k ? count : static_cast<int>(a.k);
      if (settled == a.k) cutoff = best.score[settled - 1];
      if (threadIdx.x == 0) best.count = settled;
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kSelectThreads) select(ccu_cuda_topk_args a) {
  __shared__ Candidates found;
  __shared__ int parts[kWarps];
  const int64_t row = a.first + blockIdx.x;
  const float* about = a.about + 4 * row;
  const float factor = about[0], penalty_scale = about[1];
  const int path = static_cast<int>(about[3]);
  if (threadIdx.x == 0) {
    found.count = 0;
    a.redo[row] = path == CCU_TOPK_EXACT;
  }
  __syncthreads();
  if (path == CCU_TOPK_INVALID) {
    write(a, row, found, false);
    return;
  }
  if (path != CCU_TOPK_SCAN) {
    settle_by_parts(a, row, path == CCU_TOPK_ZERO, [&](int64_t token) { return may_use(a, row, token); }, found);
    write(a, row, found, true);
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
  const auto within = [&](int64_t token) {
    return key(a, scores, row, factor, penalty_scale, token) <= cutoff && may_use(a, row, token);
  };
  for (int64_t token = threadIdx.x; token < a.tokens; token += kSelectThreads) {
    if (!within(token)) continue;
    const int at = atomicAdd(&found.count, 1);
    if (at < kCandidates) found.token[at] = static_cast<int32_t>(token);
  }
  __syncthreads();
  if (found.count > kCandidates) {
    if (threadIdx.x == 0) a.redo[row] = 1;
    __syncthreads();  // all have seen how many there are
    settle_by_parts(a, row, false, within, found);
  } else {
    score_from(a, row, 0, found);
    sort(found);
  }
  write(a, row, found, true);
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
  return ccu::launched();
}
