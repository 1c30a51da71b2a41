// Conversions between stored noise and images, for CPU and GPU. int8 noise counts steps of 1/255.
#ifndef CCU_FAST_COMMON_NOISE_H_
#define CCU_FAST_COMMON_NOISE_H_

#include <math.h>

#include "half.h"
#include "pgd.h"

namespace ccu {

constexpr float kSteps = 255.0f;

// In the units of an image in [0, 1]: noise / 255, correctly rounded for every int8. Both products are exact, so it
// does not matter which of them the compiler fuses with the sum. A division would take several times as many
// instructions.
CCU_HD float noise_units(int8_t noise) {
  const float n = static_cast<float>(noise);
  return n * 0x1.0101p-8f + n * 0x1.0101p-32f;
}
template <class T>
CCU_HD float noise_units(T noise) {
  return to_float(noise);
}

// In whole steps, rounded to even, within +-255 (more changes no pixel).
CCU_HD int32_t noise_steps(int8_t noise) { return noise; }
template <class T>
CCU_HD int32_t noise_steps(T noise) {
  const float steps = rintf(to_float(noise) * kSteps);
  return static_cast<int32_t>(steps >= -kSteps ? (steps <= kSteps ? steps : kSteps) : -kSteps);
}

// clamp(image + noise, low, high); for uint8 in steps.
template <class N>
CCU_HD uint8_t noisy(uint8_t image, N noise, float low, float high) {
  const int32_t sum = static_cast<int32_t>(image) + noise_steps(noise), least = static_cast<int32_t>(low),
                most = static_cast<int32_t>(high);
  return static_cast<uint8_t>(sum < least ? least : (sum > most ? most : sum));
}
template <class T, class N>
CCU_HD T noisy(T image, N noise, float low, float high) {
  return from_float<T>(clamp(to_float(image) + noise_units(noise), low, high));
}

// The accumulator of an update of a row, and how a delta is added to it.
template <class N>
struct Sum {
  using type = float;
  template <class D>
  static CCU_HD float of(D delta) {
    return noise_units(delta);
  }
  static CCU_HD float start(N noise) { return to_float(noise); }
  static CCU_HD N end(float sum, float eps) { return from_float<N>(clamp(sum, -eps, eps)); }
};
template <>
struct Sum<int8_t> {
  using type = int32_t;
  template <class D>
  static CCU_HD int32_t of(D delta) {
    return noise_steps(delta);
  }
  static CCU_HD int32_t start(int8_t noise) { return noise; }
  static CCU_HD int8_t end(int32_t sum, float eps) {
    const int32_t most = static_cast<int32_t>(eps);
    return static_cast<int8_t>(sum < -most ? -most : (sum > most ? most : sum));
  }
};

}  // namespace ccu

#endif  // CCU_FAST_COMMON_NOISE_H_
