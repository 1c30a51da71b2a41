// noise_update: noise[i] = clamp(noise[i] + sum of the deltas whose index is i, -eps, eps), in place.
//
// The index is sorted, so that the deltas of a row are adjacent and one task adds them in order: the result does not
// depend on the threads. Memory bound: one read of the deltas, one read and one write of their rows.
#include <algorithm>
#include <new>
#include <vector>

#include "../ccu_fast.h"
#include "../common/noise.h"
#include "parallel.h"

namespace ccu {
namespace CCU_ISA {
namespace {

constexpr int64_t kBlock = 1 << 15;
constexpr int64_t kChunk = 1 << 10;

template <class N, class D>
int update(const ccu_noise_update_args& a) {
  std::vector<int64_t> runs;
  for (int64_t p = 0; p < a.count; ++p)
    if (p == 0 || a.rows[p] != a.rows[p - 1]) runs.push_back(p);
  runs.push_back(a.count);
  const int64_t blocks = (a.size + kBlock - 1) / kBlock;
  const int threads = threads_for(a.threads, 1.0 * a.count * a.size * (2 * sizeof(N) + sizeof(D)));
  parallel_for(static_cast<int64_t>(runs.size() - 1) * blocks, threads, [&](int64_t task) {
    const int64_t run = task / blocks, first = runs[run], last = runs[run + 1];
    const int64_t begin = task % blocks * kBlock, end = std::min(begin + kBlock, a.size);
    N* noise = static_cast<N*>(a.noise) + a.rows[first] * a.size;
    typename Sum<N>::type sum[kChunk];
    for (int64_t from = begin; from < end; from += kChunk) {
      const int64_t n = std::min(kChunk, end - from);
      for (int64_t i = 0; i < n; ++i) sum[i] = Sum<N>::start(noise[from + i]);
      for (int64_t p = first; p < last; ++p) {
        const D* delta = static_cast<const D*>(a.delta) + a.order[p] * a.size + from;
        for (int64_t i = 0; i < n; ++i) sum[i] += Sum<N>::of(delta[i]);
      }
      for (int64_t i = 0; i < n; ++i) noise[from + i] = Sum<N>::end(sum[i], a.eps);
    }
  });
  return CCU_OK;
}

template <class N>
int with_delta(const ccu_noise_update_args& a) {
  switch (a.delta_dtype) {
    case CCU_I8:
      return update<N, int8_t>(a);
    case CCU_F16:
      return update<N, f16>(a);
    case CCU_F32:
      return update<N, float>(a);
    default:
      return CCU_BAD_ARGUMENT;
  }
}

}  // namespace

int noise_update(const ccu_noise_update_args& a) {
  if (a.count < 0 || a.size < 1) return CCU_BAD_ARGUMENT;
  try {
    switch (a.noise_dtype) {
      case CCU_I8:
        return with_delta<int8_t>(a);
      case CCU_F16:
        return with_delta<f16>(a);
      case CCU_F32:
        return with_delta<float>(a);
      default:
        return CCU_BAD_ARGUMENT;
    }
  } catch (const std::bad_alloc&) {
    return CCU_OUT_OF_MEMORY;
  }
}

}  // namespace CCU_ISA
}  // namespace ccu
