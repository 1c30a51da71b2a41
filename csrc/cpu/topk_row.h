// What the scan of topk_flips knows about a row before it starts: how its gradient is scaled, and how far a coarse
// score may be off.
#ifndef CCU_FAST_CPU_TOPK_ROW_H_
#define CCU_FAST_CPU_TOPK_ROW_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../ccu_fast.h"
#include "../common/select.h"
#include "simd.h"

namespace ccu {
namespace CCU_ISA {

constexpr double kLargest = 1e37;  // beyond it a coarse score might overflow

enum class Path : uint8_t { kScan, kExact, kInvalid };

struct Row {
  float penalty_scale;  // the power of two that brought the gradient's largest element into [1, 2)
  double err;           // bound of |coarse score - score|, both scaled
  bool strict;          // keep exactly k by (coarse score, token)
  Path path;
};

// The longest vector by which rounding to whole steps may have moved a token.
inline double largest_rounding(const ccu_topk_flips_args& a) {
  float step = 0.0f;
  for (int64_t v = 0; v < a.tokens; ++v) step = a.steps[v] > step ? a.steps[v] : step;
  return 0.5 * step * std::sqrt(static_cast<double>(a.dim));
}

// Row i, of gradient g.
inline Row describe(const ccu_topk_flips_args& a, double rounding, int64_t i, const float* g) {
  Row row{1.0f, 0.0, a.certify == 0, Path::kScan};
  float largest = 0.0f;
  bool finite = true;
  for (int64_t d = 0; d < a.dim; ++d) {
    const float m = std::fabs(g[d]);
    finite &= m < kInf;
    largest = m > largest ? m : largest;
  }
  if (!finite) {
    row.path = Path::kInvalid;
    return row;
  }
  double scale = 1.0;
  if (largest > 0.0f) {
    // The scale must be a normal fp32 number; gradients beyond go the float64 way.
    const int exponent = std::ilogb(largest);
    if (exponent < -120 || exponent > 120) {
      row.path = Path::kExact;
      return row;
    }
    scale = std::ldexp(1.0, -exponent);
    double squares = 0.0;
    for (int64_t d = 0; d < a.dim; ++d) squares += static_cast<double>(g[d]) * g[d];
    const double length = std::sqrt(squares) * scale, reach = length * (a.max_norm + rounding);
    // The fp32 sum, the rounding of the table, and underflow.
    row.err = 1.01 * ((a.dim + 2) * kUnit * reach + length * rounding) + a.dim * 0x1p-124;
    if (!(reach < kLargest)) row.path = Path::kExact;
  } else {
    row.strict = true;  // every product is an exact zero: nothing to certify
  }
  row.penalty_scale = static_cast<float>(scale);
  if (a.penalty != nullptr) {
    const float* p = a.penalty + i * a.penalty_stride;
    float most = 0.0f;
    for (int64_t v = 0; v < a.tokens; ++v) most = std::max(most, std::fabs(p[v]));
    if (!(most * scale < kLargest)) row.path = Path::kExact;
    row.err += scale * 0x1p-125;
  }
  return row;
}

}  // namespace CCU_ISA
}  // namespace ccu

#endif  // CCU_FAST_CPU_TOPK_ROW_H_
