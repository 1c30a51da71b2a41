// topk_flips on a GPU, after the coarse scores of csrc/cuda/topk_scores.cu or of a library GEMM:
//
//     select    per row the k tokens of lowest score in float64 order, from coarse scores and a bound of their error
//
// Each block takes one row. The tokens form at most 4096 groups, and the block needs the lowest score of each: the scan
// of few rows has written it, otherwise one read of the scores finds it. The k-th lowest of those, found bit by bit
// from registers, is at or above the k-th lowest of all, because k groups hold one token each at or below it. The
// tokens within the error bound of it are then collected from the few groups that reach so low: k = 16 of 49408 tokens
// typically leaves 17 candidates, k = 1024 about 1200. They are scored in float64 from the embedding and sorted. If
// more than 2048 are within the bound, or there is no bound, they are settled one part at a time, and the best k of
// each part stay for the next. If the gradient of a row is zero, its scores are its penalties and there are no
// products.
//
// Work: reads 4 bytes for each score, or for each group if the scan has written its lowest, and the scores of the
// groups that reach low; 2 D FLOP in fp64 for each candidate. No pass over the scores sorts anything.
#include "topk.cuh"

namespace ccu {
namespace {

constexpr int kMine = 8;  // groups per thread
constexpr int kGroups = CCU_CUDA_TOPK_GROUPS;
static_assert(kGroups == kMine * kSelectThreads);
constexpr float kLargest = 1e37f;  // a larger coarse score may be close to overflow

// Finds the best k of all tokens that `take` accepts, sorted. It visits tokens in ascending order, so that the earlier
// ones win ties.
template <class Take>
__device__ void settle_by_parts(const ccu_cuda_topk_args& a, int64_t row, bool zero, const Take& take,
                                Candidates& best) {
  double cutoff = INFINITY;  // the score of the k-th so far; a later token with an equal score loses the tie
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

// Finds the lowest key of each of a thread's groups. Group m holds every kGroups-th token from m * kSelectThreads +
// threadIdx.x on. Without a filter, a thread has kMine loads of scores in flight at a time.
template <bool kFiltered>
__device__ __forceinline__ void lowest_of_groups(const Keys& keys, const float* scores, uint32_t (&lowest)[kMine]) {
#pragma unroll
  for (int m = 0; m < kMine; ++m) lowest[m] = kNever;
  for (int64_t base = threadIdx.x; base < keys.a.tokens; base += kGroups) {
#pragma unroll
    for (int m = 0; m < kMine; ++m) {
      const int64_t token = base + m * kSelectThreads;
      if (token < keys.a.tokens) {
        const uint32_t mine = keys.template of<kFiltered>(token, scores[token]);
        lowest[m] = mine < lowest[m] ? mine : lowest[m];
      }
    }
  }
}

__global__ void __launch_bounds__(kSelectThreads) select(ccu_cuda_topk_args a) {
  __shared__ Candidates found;
  const int64_t row = a.first + blockIdx.x;
  const float* about = a.about + 4 * row;
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
  const auto usable = [&](int64_t token) { return may_use(a, row, token); };
  if (path != CCU_TOPK_SCAN) {
    settle_by_parts(a, row, path == CCU_TOPK_ZERO, usable, found);
    write(a, row, found, true);
    return;
  }
  const Keys keys(a, row);
  const float* scores = a.scores + static_cast<int64_t>(blockIdx.x) * a.tokens;
  uint32_t lowest[kMine];
  bool known = false;  // whether groups are those of the scan, `a.group` neighbouring tokens each
  if (a.lowest != nullptr) {
    const int64_t groups = (a.tokens + a.group - 1) / a.group;
    int usable = 0;
#pragma unroll
    for (int m = 0; m < kMine; ++m) {
      const int64_t group = threadIdx.x + m * kSelectThreads;
      lowest[m] = group < groups ? __ldg(a.lowest + blockIdx.x * groups + group) : kNever;
      usable += lowest[m] != kNever;
    }
    // With fewer usable groups than that, nearly all of them would reach below the bound.
    known = over_block<kSelectThreads>(usable, Add()) >= 2 * a.k;
  }
  if (!known) {
    if (is_filtered(a))
      lowest_of_groups<true>(keys, scores, lowest);
    else
      lowest_of_groups<false>(keys, scores, lowest);
  }
  const uint32_t kth = kth_key(a.k, [&](uint32_t bound) {
    int at_most = 0;
#pragma unroll
    for (int m = 0; m < kMine; ++m) at_most += lowest[m] <= bound;
    return over_block<kSelectThreads>(at_most, Add());
  });
  // If fewer than k groups have a usable token, all usable tokens are candidates.
  const bool all = kth == kNever;
  const uint32_t cutoff = all ? kNever - 1 : ordered(cutoff_above(unordered(kth), about[2]));
  // A penalty may overflow in the units of the scores, and the bound holds only below that.
  const bool bounded = all || fabsf(unordered(kth)) < kLargest;
  if (bounded) {
#pragma unroll
    for (int m = 0; m < kMine; ++m) {
      if (lowest[m] > cutoff) continue;
      const int64_t group = threadIdx.x + m * kSelectThreads, step = known ? 1 : kGroups;
      const int64_t first = known ? group * a.group : group, end = known ? first + a.group : a.tokens;
      for (int64_t token = first; token < end && token < a.tokens; token += step) {
        if (keys.of(token, scores[token]) > cutoff) continue;
        const int at = atomicAdd(&found.count, 1);
        if (at < kCandidates) found.token[at] = static_cast<int32_t>(token);
      }
    }
    __syncthreads();
  }
  if (!bounded || found.count > kCandidates) {
    if (threadIdx.x == 0) a.redo[row] = 1;
    __syncthreads();  // every thread has read the count
    if (bounded)
      settle_by_parts(a, row, false, [&](int64_t token) { return keys.of(token, scores[token]) <= cutoff; }, found);
    else
      settle_by_parts(a, row, false, usable, found);
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
      args->k > CCU_CUDA_MOST_FLIPS || (args->lowest != nullptr && args->group < 1) ||
      (args->lowest != nullptr && (args->tokens - 1) / args->group >= CCU_CUDA_TOPK_GROUPS))
    return CCU_BAD_ARGUMENT;
  if (args->rows == 0) return CCU_OK;
  const unsigned blocks = static_cast<unsigned>(args->rows);
  const cudaStream_t stream = static_cast<cudaStream_t>(args->stream);
  ccu::select<<<blocks, ccu::kSelectThreads, 0, stream>>>(*args);
  return ccu::launched();
}
