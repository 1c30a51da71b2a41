// Fixed-width vectors in the compiler's own extension: one source for AVX-512, AVX2, NEON and plain C++.
//
// Operators, comparisons and `mask ? a : b` are the compiler's. A comparison gives lanes of 0 or -1.
#ifndef CCU_FAST_CPU_SIMD_H_
#define CCU_FAST_CPU_SIMD_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace ccu {
namespace CCU_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));

constexpr float kInf = std::numeric_limits<float>::infinity();

template <class V, class T>
inline V load(const T* p) {
  static_assert(sizeof(V) == kLanes * sizeof(T), "lane size");
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
inline void store(T* p, V v) {
  static_assert(sizeof(V) == kLanes * sizeof(T), "lane size");
  std::memcpy(p, &v, sizeof v);
}

// The first n lanes from memory, the others zero; n < kLanes.
template <class V, class T>
inline V load_part(const T* p, int n) {
  V v = {};
  std::memcpy(&v, p, n * sizeof(T));
  return v;
}

template <class V, class T>
inline void store_part(T* p, V v, int n) {
  std::memcpy(p, &v, n * sizeof(T));
}

inline vf splat(float x) { return vf{} + x; }
inline vi splat(int32_t x) { return vi{} + x; }

inline vi iota() {
  vi v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

inline vf max(vf a, vf b) { return a > b ? a : b; }

// Pairwise, so that the order of additions is the same for every caller.
inline float sum(vf v) {
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

inline float max(vf v) {
  float result = v[0];
  for (int i = 1; i < kLanes; ++i) result = v[i] > result ? v[i] : result;
  return result;
}

// exp(x) to about 1 ulp for x <= 88.7; 0 below -103 or so, by way of denormals; exp(-inf) = 0; NaN gives NaN
// (through poly, whatever the exponent bits are).
inline vf exp(vf x) {
  // exp(x) = 2^n * exp(r), n = round(x / ln 2). Below -104 the result is 0 whatever x is; above 89 it is inf.
  const vf clamped = x < -104.0f ? splat(-104.0f) : (x > 89.0f ? splat(89.0f) : x);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const vf shifted = clamped * 1.44269504088896341f + magic;
  const vf n = shifted - magic;
  vf r = clamped - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  vf poly = splat(1.9875691500e-4f);
  poly = poly * r + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = poly * (r * r) + r + 1.0f;
  // 2^n in two factors, because n may reach -150 and 129, beyond a single exponent.
  vi shifted_bits, magic_bits;
  const vf magic_vector = splat(magic);
  std::memcpy(&shifted_bits, &shifted, sizeof shifted);
  std::memcpy(&magic_bits, &magic_vector, sizeof magic_vector);
  const vi exponent = shifted_bits - magic_bits;
  const vi half = exponent >> 1;
  const vi first_bits = (half + 127) << 23;
  const vi second_bits = (exponent - half + 127) << 23;
  vf first, second;
  std::memcpy(&first, &first_bits, sizeof first);
  std::memcpy(&second, &second_bits, sizeof second);
  return poly * first * second;
}

// log(1 + exp(s)), to about 2 ulp, without overflow on either side.
inline vf softplus(vf s) {
  // max(s, 0) + log1p(e) with e = exp(-|s|) in (0, 1]; log1p(e) = 2 atanh(z), z = e / (2 + e) <= 1/3.
  const vf e = exp(s < 0.0f ? s : -s);
  const vf z = e / (e + 2.0f);
  const vf z2 = z * z;
  vf series = splat(1.0f / 15);
  for (const float odd : {13.0f, 11.0f, 9.0f, 7.0f, 5.0f, 3.0f, 1.0f}) series = series * z2 + 1.0f / odd;
  return (s > 0.0f ? s : splat(0.0f)) + 2.0f * z * series;
}

}  // namespace CCU_ISA
}  // namespace ccu

#endif  // CCU_FAST_CPU_SIMD_H_
