// The float64 scores that decide topk_flips.
#ifndef CCU_FAST_CPU_TOPK_DOT_H_
#define CCU_FAST_CPU_TOPK_DOT_H_

#include <algorithm>
#include <cstring>

#include "../ccu_fast.h"
#include "../common/half.h"
#include "simd.h"

namespace ccu {
namespace CCU_ISA {

using HalfVector = float __attribute__((vector_size(kLanes * 2)));
using DoubleVector = double __attribute__((vector_size(kLanes * 4)));
constexpr int kDoubles = kLanes / 2;

// Float64 dot product in one fixed order: equal rows of the embedding get equal scores.
class Dot {
 public:
  Dot(const ccu_topk_flips_args& a) : a_(a) {}

  double operator()(int64_t id, const float* grad) const {
    switch (a_.embedding_dtype) {
      case CCU_F16:
        return converted<f16>(id, grad);
      case CCU_BF16:
        return converted<bf16>(id, grad);
      default:
        if (a_.embedding_step != 1) return converted<float>(id, grad);
        return run(static_cast<const float*>(a_.embedding) + id * a_.embedding_stride, grad, a_.dim);
    }
  }

 private:
  static double run(const float* e, const float* g, int64_t n) {
    DoubleVector acc[4] = {};
    int64_t d = 0;
    for (; d + 4 * kDoubles <= n; d += 4 * kDoubles) {
      for (int v = 0; v < 4; ++v) {
        HalfVector x, y;
        std::memcpy(&x, e + d + v * kDoubles, sizeof x);
        std::memcpy(&y, g + d + v * kDoubles, sizeof y);
        acc[v] += __builtin_convertvector(x, DoubleVector) * __builtin_convertvector(y, DoubleVector);
      }
    }
    const DoubleVector all = (acc[0] + acc[1]) + (acc[2] + acc[3]);
    double total = 0.0;
    for (int l = 0; l < kDoubles; ++l) total += all[l];
    for (; d < n; ++d) total += static_cast<double>(e[d]) * g[d];
    return total;
  }

  template <class T>
  double converted(int64_t id, const float* grad) const {
    constexpr int64_t kChunk = 256;
    const T* e = static_cast<const T*>(a_.embedding) + id * a_.embedding_stride;
    float chunk[kChunk];
    double total = 0.0;
    for (int64_t d0 = 0; d0 < a_.dim; d0 += kChunk) {
      const int64_t n = std::min(kChunk, a_.dim - d0);
      for (int64_t d = 0; d < n; ++d) chunk[d] = to_float(e[(d0 + d) * a_.embedding_step]);
      total += run(chunk, grad + d0, n);
    }
    return total;
  }

  const ccu_topk_flips_args& a_;
};

}  // namespace CCU_ISA
}  // namespace ccu

#endif  // CCU_FAST_CPU_TOPK_DOT_H_
