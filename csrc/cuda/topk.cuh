// How a block of topk_flips on a GPU holds candidates, scores them and sorts them.
#ifndef CCU_FAST_CUDA_TOPK_CUH_
#define CCU_FAST_CUDA_TOPK_CUH_

#include "../common/select.h"
#include "launch.cuh"

namespace ccu {

constexpr int kSelectThreads = 512;
constexpr int kWarps = kSelectThreads / 32;
constexpr int kCandidates = 2 * CCU_CUDA_MOST_FLIPS;

struct Candidates {
  double score[kCandidates];
  int32_t token[kCandidates];
  int count;
};

__device__ __forceinline__ int64_t id_of(const ccu_cuda_topk_args& a, int64_t token) {
  return a.token_ids != nullptr ? __ldg(a.token_ids + token) : token;
}

__device__ __forceinline__ float penalty_of(const ccu_cuda_topk_args& a, int64_t row, int64_t token) {
  return a.penalty != nullptr ? a.penalty[row * a.penalty_stride + token] : 0.0f;
}

// A penalty that is not finite forbids its token.
__device__ __forceinline__ bool may_use(const ccu_cuda_topk_args& a, int64_t row, int64_t token) {
  if (a.allowed != nullptr && !a.allowed[row * a.allowed_stride + token]) return false;
  if (a.penalty != nullptr && !isfinite(penalty_of(a, row, token))) return false;
  return !a.exclude_current || id_of(a, token) != a.current[row];
}

// Turns the coarse scores of a row, in the row's own unit, into keys to compare.
struct Keys {
  const ccu_cuda_topk_args& a;
  int64_t row;
  float factor, penalty_scale;

  __device__ __forceinline__ Keys(const ccu_cuda_topk_args& a, int64_t row)
      : a(a), row(row), factor(__ldg(a.about + 4 * row)), penalty_scale(__ldg(a.about + 4 * row + 1)) {}

  // kNever for a token that may not be used. Without a filter, every token may be used and has no penalty.
  template <bool kFiltered = true>
  __device__ __forceinline__ uint32_t of(int64_t token, float coarse) const {
    const float score = factor * coarse;
    if constexpr (!kFiltered) return ordered(score);
    if (!may_use(a, row, token)) return kNever;
    // An explicit fmaf, so that the scan and the selection derive the same key from a score.
    return ordered(a.penalty == nullptr ? score : fmaf(penalty_scale, penalty_of(a, row, token), score));
  }
};

__device__ __forceinline__ bool is_filtered(const ccu_cuda_topk_args& a) {
  return a.allowed != nullptr || a.penalty != nullptr || a.exclude_current;
}

__device__ __forceinline__ float element(const ccu_cuda_topk_args& a, int64_t at) {
  switch (a.embedding_dtype) {
    case CCU_F16:
      return to_float(static_cast<const f16*>(a.embedding)[at]);
    case CCU_BF16:
      return to_float(static_cast<const bf16*>(a.embedding)[at]);
    default:
      return static_cast<const float*>(a.embedding)[at];
  }
}

// The float64 dot product of an embedding row and a gradient, computed by one warp in a fixed order. Every lane gets
// it.
__device__ __forceinline__ double dot(const ccu_cuda_topk_args& a, int64_t id, int64_t row) {
  const float* g = a.grad + row * a.dim;
  const int64_t e = id * a.embedding_stride;
  double sum = 0.0;
  for (int64_t d = threadIdx.x % 32; d < a.dim; d += 32)
    sum += static_cast<double>(element(a, e + d * a.embedding_step)) * g[d];
  return over_warp(sum, Add());
}

__device__ __forceinline__ double score(const ccu_cuda_topk_args& a, int64_t row, int64_t token) {
  const double value = dot(a, id_of(a, token), row);
  return (a.maximize ? -value : value) + penalty_of(a, row, token);
}

// Sorts by (score, token), after padding to a power of two with entries that sort to the end.
__device__ inline void sort(Candidates& c) {
  const int n = c.count;
  int size = 2;
  while (size < n) size *= 2;
  for (int i = n + threadIdx.x; i < size; i += kSelectThreads) {
    c.score[i] = INFINITY;
    c.token[i] = INT32_MAX;
  }
  __syncthreads();
  for (int span = 2; span <= size; span *= 2)
    for (int stride = span / 2; stride > 0; stride /= 2) {
      for (int at = threadIdx.x; at < size / 2; at += kSelectThreads) {
        const Comparator p = comparator(at, span, stride);
        const double x = c.score[p.i], y = c.score[p.j];
        const int32_t s = c.token[p.i], t = c.token[p.j];
        if (before(y, t, x, s) == p.up) {
          c.score[p.i] = y;
          c.score[p.j] = x;
          c.token[p.i] = t;
          c.token[p.j] = s;
        }
      }
      __syncthreads();
    }
}

// Computes float64 scores of the candidates from number `first` on. It ends without a barrier, since sort starts with
// one.
__device__ inline void score_from(const ccu_cuda_topk_args& a, int64_t row, int first, Candidates& c) {
  for (int at = first + threadIdx.x / 32; at < c.count; at += kWarps) {
    const double exact = score(a, row, c.token[at]);
    if (threadIdx.x % 32 == 0) c.score[at] = exact;
  }
}

// Writes the first k of the sorted candidates.
__device__ inline void write(const ccu_cuda_topk_args& a, int64_t row, const Candidates& c, bool valid) {
  const int n = c.count < a.k ? c.count : static_cast<int>(a.k);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  double current = 0.0;
  if (a.current != nullptr && n > 0) {
    const int64_t id = a.current[row];
    if (id < 0 || id >= a.vocabulary) out_of_range("current_ids", id, a.vocabulary);
    current = dot(a, id, row);
  }
  for (int at = warp; at < a.k; at += kWarps) {
    const int64_t out = row * a.k + at, id = at < n ? id_of(a, c.token[at]) : -1;
    const double value = at < n ? dot(a, id, row) : 0.0;
    if (lane != 0) continue;
    a.ids[out] = id;
    a.delta[out] = at < n ? static_cast<float>(value - current) : NAN;
    a.score[out] = at < n ? c.score[at] - (a.maximize ? -current : current) : INFINITY;
  }
  if (threadIdx.x == 0) {
    a.count[row] = n;
    a.valid[row] = valid;
  }
}

}  // namespace ccu

#endif  // CCU_FAST_CUDA_TOPK_CUH_
