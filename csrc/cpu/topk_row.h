// What the scan of topk_flips knows about a row before it starts: its gradient as integers, and the error bound of a
// coarse score.
#ifndef CCU_FAST_CPU_TOPK_ROW_H_
#define CCU_FAST_CPU_TOPK_ROW_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../ccu_fast.h"
#include "../common/select.h"
#include "simd.h"
#include "topk_panel.h"

namespace ccu {
namespace CCU_ISA {

constexpr double kLargest = 1e37;  // beyond it a coarse score might overflow

enum class Path : uint8_t { kScan, kExact, kInvalid };

struct Row {
  float scale;  // the power of two by which gradient and penalty are multiplied
  double err;   // bound of |coarse score - score|, both scaled
  bool strict;  // keep exactly k by (coarse score, token)
  Path path;
};

// The largest norm by which rounding to whole steps may have moved a token.
inline double largest_rounding(const ccu_topk_flips_args& a) {
  float step = 0.0f;
  for (int64_t v = 0; v < a.tokens; ++v) step = a.steps[v] > step ? a.steps[v] : step;
  return 0.5 * step * std::sqrt(static_cast<double>(a.dim));
}

// x rounded to a whole number, ties to even; |x| < 2^22.
inline float whole(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (x + kMagic) - kMagic;
}

// Row i with gradient g: scaled, rounded and, if the row takes the scan's path, written to `out`, one of `rows` in
// [pairs][rows][2].
inline Row describe(const ccu_topk_flips_args& a, double rounding, int64_t i, int16_t* out, int rows) {
  const float* g = a.grad + i * a.dim;
  Row row{1.0f, 0.0, false, Path::kScan};
  float largest = 0.0f;
  double most = 0.0;  // of the sums of a chunk
  for (int64_t begin = 0; begin < a.dim; begin += 2 * kChunkPairs) {
    const int64_t end = std::min(begin + 2 * kChunkPairs, a.dim);
    double sum = 0.0;
    for (int64_t d = begin; d < end; ++d) {
      sum += std::fabs(g[d]);
      largest = std::max(largest, std::fabs(g[d]));
    }
    if (!(sum < kInf)) {
      row.path = Path::kInvalid;
      return row;
    }
    most = std::max(most, sum);
  }
  if (largest > 0.0f) {
    // Rounding may add half a step per element.
    const int exponent = std::min(std::ilogb((kChunkSum - kChunkPairs) / most), 14 - std::ilogb(largest));
    // The scale must be a normal fp32 number; gradients beyond that take the float64 path.
    if (exponent < -126 || exponent > 126) {
      row.path = Path::kExact;
      return row;
    }
    row.scale = std::ldexp(1.0f, exponent);
    double size = 0.0, off = 0.0;  // sums of squares of the integers and of their rounding errors
    for (int64_t d = 0; d < a.dim; ++d) {
      const float x = g[d] * row.scale, n = std::min(whole(x), 32767.0f);
      size += static_cast<double>(n) * n;
      off += static_cast<double>(x - n) * (x - n);
      out[(d / 2) * rows * 2 + d % 2] = static_cast<int16_t>(a.maximize ? -n : n);
    }
    size = std::sqrt(size);
    const double reach = size * (a.max_norm + rounding);
    // The rounding of the gradient and of the table, the fp32 sum of the chunks, and underflow.
    row.err =
        1.01 * (std::sqrt(off) * a.max_norm + size * rounding + (a.dim / kChunkPairs + 2) * kUnit * reach) + 0x1p-124;
    if (!(reach < kLargest)) row.path = Path::kExact;
  } else {
    row.strict = true;  // every product is an exact zero: nothing to certify
  }
  if (a.penalty != nullptr) {
    const float* p = a.penalty + i * a.penalty_stride;
    float most = 0.0f;
    for (int64_t v = 0; v < a.tokens; ++v) most = std::max(most, std::fabs(p[v]));
    if (!(most * row.scale < kLargest)) row.path = Path::kExact;
    row.err += row.scale * 0x1p-125;
  }
  return row;
}

}  // namespace CCU_ISA
}  // namespace ccu

#endif  // CCU_FAST_CPU_TOPK_ROW_H_
