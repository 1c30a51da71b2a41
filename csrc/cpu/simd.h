// Fixed-width vectors in the compiler's own extension: one source for AVX-512, AVX2, NEON and plain C++.
//
// Operators, comparisons and `mask ? a : b` are the compiler's. A comparison gives lanes of 0 or -1.
#ifndef CCU_FAST_CPU_SIMD_H_
#define CCU_FAST_CPU_SIMD_H_

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

// How many lanes of a vector are in use: all (a compile-time constant), or the first n at the end of a row.
struct Full {
  static constexpr int n = kLanes;
};
struct Part {
  int n;
};

template <class V, class T>
inline V load(const T* p, Full = {}) {
  static_assert(sizeof(V) == kLanes * sizeof(T), "lane size");
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The lanes not in use are zero.
template <class V, class T>
inline V load(const T* p, Part part) {
  V v = {};
  std::memcpy(&v, p, part.n * sizeof(T));
  return v;
}

template <class V, class T>
inline void store(T* p, V v, Full = {}) {
  static_assert(sizeof(V) == kLanes * sizeof(T), "lane size");
  std::memcpy(p, &v, sizeof v);
}

template <class V, class T>
inline void store(T* p, V v, Part part) {
  std::memcpy(p, &v, part.n * sizeof(T));
}

// Calls step(j, lanes) over [begin, end) in vectors.
template <class Step>
inline void for_vectors(int64_t begin, int64_t end, const Step& step) {
  int64_t j = begin;
  for (; j + kLanes <= end; j += kLanes) step(j, Full{});
  if (j < end) step(j, Part{static_cast<int>(end - j)});
}

// The same for bf16 in memory.
template <class Lanes>
inline vf load_bf16(const uint16_t* p, Lanes lanes) {
  typedef uint16_t half __attribute__((vector_size(kLanes * 2)));
  typedef uint32_t word __attribute__((vector_size(kLanes * 4)));
  half bits = {};
  std::memcpy(&bits, p, lanes.n * sizeof(uint16_t));
  return (vf)(__builtin_convertvector(bits, word) << 16);
}

// Lanes of -1 where in use.
inline vi in_use(Full) { return vi{} - 1; }
inline vi in_use(Part part) {
  vi v;
  for (int i = 0; i < kLanes; ++i) v[i] = i < part.n ? -1 : 0;
  return v;
}

inline vf splat(float x) { return vf{} + x; }
inline vi splat(int32_t x) { return vi{} + x; }

inline vi iota() {
  vi v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// The second operand if either is NaN, like the instructions: a running maximum is that one, and passes NaN over.
inline vf max(vf a, vf b) { return a > b ? a : b; }
inline vf min(vf a, vf b) { return a < b ? a : b; }

inline bool any(vi mask) {
#if defined(__AVX512F__)
  __m512i m;
  std::memcpy(&m, &mask, sizeof m);
  return _mm512_test_epi32_mask(m, m) != 0;
#elif defined(__AVX2__)
  __m256i m;
  std::memcpy(&m, &mask, sizeof m);
  return _mm256_movemask_epi8(m) != 0;
#else
  uint64_t word[kLanes / 2], all = 0;
  std::memcpy(word, &mask, sizeof word);
  for (const uint64_t w : word) all |= w;
  return all != 0;
#endif
}

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

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer

// exp(x) without the power of two: shifted - kMagic is that power's exponent, an integer, also in the low bits.
inline vf exp_mantissa(vf x, vf* shifted) {
  // exp(x) = 2^n * exp(r), n = round(x / ln 2).
  *shifted = x * 1.44269504088896341f + kMagic;
  const vf n = *shifted - kMagic;
  vf r = x - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  vf poly = splat(1.9875691500e-4f);
  poly = poly * r + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  return poly * (r * r) + r + 1.0f;
}

// exp(x) to about 1 ulp; denormals and 0 below -87, inf above 88.7, NaN for NaN.
inline vf exp(vf x) {
  // Below -104 the result is always 0, above 89 always inf. A NaN is the second operand and passes through.
  x = max(splat(-104.0f), x);
  x = min(splat(89.0f), x);
  vf shifted;
  const vf mantissa = exp_mantissa(x, &shifted);
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)mantissa, (__m512)(shifted - kMagic));
#else
  // 2^n in two factors, because n may reach -150 and 129, beyond a single exponent.
  const vi exponent = (vi)shifted - (vi)splat(kMagic);
  const vi half = exponent >> 1;
  return mantissa * (vf)((half + 127) << 23) * (vf)((exponent - half + 127) << 23);
#endif
}

// The same with 0 for whatever is below e^-86, in fewer instructions. What x above 88 gives is not said.
inline vf exp_of_normal(vf x) {
  vf shifted;
  const vf mantissa = exp_mantissa(x, &shifted);
#if defined(__AVX512F__)
  const vf value = (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)mantissa, (__m512)(shifted - kMagic));
#else
  const vf value = mantissa * (vf)(((vi)shifted << 23) + (127 << 23));
#endif
  return x < -86.0f ? splat(0.0f) : value;
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
