// One element of a projected gradient step, for CPU and GPU.
#ifndef CCU_FAST_COMMON_PGD_H_
#define CCU_FAST_COMMON_PGD_H_

#include <math.h>

#include "../ccu_fast.h"
#include "half.h"

namespace ccu {

// A NaN value stays NaN, as with torch.clamp.
CCU_HD float clamp(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

struct PgdParameters {
  float step, eps, lower, upper;
};

CCU_HD PgdParameters pgd_parameters(const ccu_pgd_step_args& a, int64_t channel) {
  if (a.channel == nullptr) return {a.step, a.eps, a.lower, a.upper};
  const float* p = a.channel + channel;
  return {p[0], p[a.channels], p[2 * a.channels], p[3 * a.channels]};
}

// The image with the noise, clamped to the valid range.
CCU_HD float pgd_image(float delta, float image, const PgdParameters& p) {
  return clamp(delta + image, p.lower, p.upper);
}

// clamp(delta - step * sign(grad), -eps, eps); sign of 0 and of NaN is 0.
CCU_HD float pgd_linf(float delta, float grad, const PgdParameters& p) {
  const float move = grad > 0.0f ? p.step : (grad < 0.0f ? -p.step : 0.0f);
  return clamp(delta - move, -p.eps, p.eps);
}

CCU_HD float finite_or_zero(float x) { return x >= -3.4028235e38f && x <= 3.4028235e38f ? x : 0.0f; }

// delta - rate * grad; a rate is step / |grad| of the sample, 0 for a gradient of zeros. Where that is beyond fp32 the
// largest number takes its place: the step is shorter then, and not NaN.
CCU_HD float pgd_l2(float delta, float grad, float rate) { return delta - rate * finite_or_zero(grad); }
CCU_HD float pgd_rate(double grad_squares, float step) {
  const double rate = grad_squares > 0.0 ? step / sqrt(grad_squares) : 0.0;
  return rate < 3.4028234e38 ? static_cast<float>(rate) : 3.4028234e38f;
}
// The factor that projects a sample's noise back onto its ball.
CCU_HD float pgd_shrink(double squares, float eps) {
  return squares > static_cast<double>(eps) * eps ? static_cast<float>(eps / sqrt(squares)) : 1.0f;
}

}  // namespace ccu

#endif  // CCU_FAST_COMMON_PGD_H_
