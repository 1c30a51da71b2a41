// What topk_flips must know about a gradient row before its coarse scan, for CPU and GPU:
//
//     exponent = frexp(|grad|.max()).exponent;  scaled = grad * 2^-exponent
//     operand = scaled, or (scaled * 1024).half() for a library GEMM
//     about = [factor of a coarse score, factor of a penalty, bound of their error, path]
//
// The bound covers three roundings: of this gradient, measured here; of the table, measured when it was packed; and of
// the sum.
#ifndef CCU_FAST_COMMON_TOPK_ROW_H_
#define CCU_FAST_COMMON_TOPK_ROW_H_

#include <float.h>
#include <math.h>

#include "../ccu_fast.h"
#include "half.h"

namespace ccu {

constexpr float kFiner = 1024.0f;   // numbers in (-1, 1) times this are in the middle of fp16's range
constexpr int kMostExponent = 120;  // beyond it the scale or a score may not be a normal number

// The maximum of |grad|.max() and the next value; infinite once a value is not finite.
CCU_HD float larger(float largest, float value) {
  const float size = fabsf(value);
  return size <= FLT_MAX ? fmaxf(largest, size) : INFINITY;
}

struct TopkRow {
  float largest, unit;
  bool finite, near;
  double norm = 0.0, off = 0.0;  // sums of squares of the elements seen so far and of their rounding errors

  CCU_HD explicit TopkRow(float most) : largest(most), unit(1.0f), finite(most <= FLT_MAX), near(false) {
    int exponent = 0;
    if (finite) frexpf(largest, &exponent);
    near = finite && exponent >= -kMostExponent && exponent <= kMostExponent;
    if (near) unit = ldexpf(1.0f, -exponent);
  }

  // Writes one element to operand[at].
  CCU_HD void put(float grad, const ccu_topk_describe_args& a, int64_t at) {
    const float scaled = near ? grad * unit : 0.0f;
    float seen = scaled;
    if (a.half) {
      const f16 low = from_float<f16>(scaled * kFiner);
      static_cast<f16*>(a.operand)[at] = low;
      seen = to_float(low) / kFiner;
    } else {
      static_cast<float*>(a.operand)[at] = scaled;
    }
    const double lost = static_cast<double>(seen) - scaled;
    norm += static_cast<double>(scaled) * scaled;
    off += lost * lost;
  }

  // Call this once the sums cover the whole row.
  CCU_HD void tell(const ccu_topk_describe_args& a, float* about) const {
    const double inverse = a.coarse[0], table_error = a.coarse[1], table_norm = a.coarse[2];
    const double length = sqrt(norm), lost = sqrt(off);
    // Tensor cores truncate where fp32 rounds: four units instead of one.
    const double sums = 4.0 * static_cast<double>(a.dim + 2) * 0x1p-23 * (length + lost);
    const double error = length * table_error + (lost + sums) * table_norm + static_cast<double>(a.dim) * 0x1p-120;
    about[0] = static_cast<float>((a.maximize ? -inverse : inverse) / (a.half ? kFiner : 1.0f));
    about[1] = unit;
    about[2] = a.certify ? static_cast<float>(1.01 * error) : 0.0f;
    about[3] = static_cast<float>(!finite           ? CCU_TOPK_INVALID
                                  : largest == 0.0f ? CCU_TOPK_ZERO
                                  : near            ? CCU_TOPK_SCAN
                                                    : CCU_TOPK_EXACT);
  }
};

}  // namespace ccu

#endif  // CCU_FAST_COMMON_TOPK_ROW_H_
