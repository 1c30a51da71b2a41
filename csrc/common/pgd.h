// One element of a projected gradient step, for CPU and GPU alike.
#ifndef CCU_FAST_COMMON_PGD_H_
#define CCU_FAST_COMMON_PGD_H_

#include "half.h"

namespace ccu {

// A NaN value stays NaN, as with torch.clamp.
CCU_HD float clamp(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

// The valid range applies to the image that the noise makes.
CCU_HD float pgd_range(float delta, float image, float lower, float upper) {
  return clamp(delta + image, lower, upper) - image;
}

// clamp(clamp(delta - step * sign(grad), -eps, eps) + image, lower, upper) - image; sign of 0 and of NaN is 0.
CCU_HD float pgd_linf(float delta, float grad, float image, float step, float eps, float lower, float upper) {
  const float move = grad > 0.0f ? step : (grad < 0.0f ? -step : 0.0f);
  return pgd_range(clamp(delta - move, -eps, eps), image, lower, upper);
}

}  // namespace ccu

#endif  // CCU_FAST_COMMON_PGD_H_
