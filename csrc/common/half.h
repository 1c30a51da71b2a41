// fp16 and bf16 as bits, to and from fp32 with round-to-nearest-even: branch-free, so that a loop over them vectorises,
// and the same on a CPU and a GPU.
#ifndef CCU_FAST_COMMON_HALF_H_
#define CCU_FAST_COMMON_HALF_H_

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define CCU_HD __host__ __device__ __forceinline__
#else
#define CCU_HD inline
#endif

namespace ccu {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

CCU_HD uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

CCU_HD float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

CCU_HD float to_float(float x) { return x; }

CCU_HD float to_float(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

CCU_HD float to_float(f16 x) {
  // The exponent moves to its place in fp32 and is re-biased by a multiplication, which is right for denormals too.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  return float_of(sign | (magnitude >= 0x0f800000u ? special : finite));
}

template <class T>
CCU_HD T from_float(float x);

template <>
CCU_HD float from_float<float>(float x) {
  return x;
}

template <>
CCU_HD bf16 from_float<bf16>(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t nan = (u >> 16) | 0x40u;
  return {static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}

template <>
CCU_HD f16 from_float<f16>(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  // Adding 0.5 leaves a value below 2^-14 rounded to fp16's denormal spacing in the low bits.
  const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? denormal : normal;
  return {static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? large : finite))};
}

}  // namespace ccu

#endif  // CCU_FAST_COMMON_HALF_H_
