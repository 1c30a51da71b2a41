// The inner loop of topk_flips: gradients of a tile of rows against panels of 16 tokens, sums in registers.
//
// Both are integers, two dimensions in a 32-bit lane: an instruction multiplies and adds twice as many int16 as fp32. A
// chunk's sum always fits an int32, since tokens stay within 2^13 and the gradients of a chunk add to less than 2^18;
// chunks are added in fp32.
#ifndef CCU_FAST_CPU_TOPK_PANEL_H_
#define CCU_FAST_CPU_TOPK_PANEL_H_

#include <algorithm>

#include "../ccu_fast.h"
#include "simd.h"

namespace ccu {
namespace CCU_ISA {

constexpr int kPanel = CCU_TOKEN_PANEL;
constexpr int kVectors = kPanel / kLanes;  // of one pair of dimensions of a panel
static_assert(kPanel % kLanes == 0, "a panel is whole vectors");

constexpr int64_t kChunkPairs = 128;
constexpr double kChunkSum = (1 << (31 - CCU_TOKEN_BITS)) - 1;  // of the gradients of a chunk

// Accumulators that fit beside the operands, and rows of a full tile: 24 and 8 with 32 registers, 12 with 16.
#if defined(__AVX512F__)
constexpr int kAccumulators = 24, kRows = 8;
#elif defined(__aarch64__)
constexpr int kAccumulators = 24, kRows = 6;
#elif defined(__AVX2__)
constexpr int kAccumulators = 12, kRows = 6;
#else
constexpr int kAccumulators = 12, kRows = 3;
#endif

// Panels that a tile of R rows takes at once; each divides kGroup.
constexpr int panels_of(int rows) {
  const int fit = kAccumulators / (rows * kVectors);
  return fit >= 6 ? 6 : (fit >= 1 ? (fit == 5 ? 4 : fit) : 1);
}

// Which instruction adds the products of pairs. Only some AVX-512 CPUs have a dedicated one.
enum class Pairs { kPlain, kVnni };

inline bool has_vnni() {
#if defined(__AVX512F__)
  static const bool found = __builtin_cpu_supports("avx512vnni");
  return found;
#else
  return false;
#endif
}

// sum + the products of both halves of each lane. (By name in assembly: these files are compiled for every AVX-512.)
template <Pairs kPairs>
inline vi add_products(vi sum, vi a, vi b) {
#if defined(__AVX512F__)
  if (kPairs == Pairs::kVnni) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
  return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return sum + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
  return sum + ((vi)((vu)a << 16) >> 16) * ((vi)((vu)b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// acc[r] = the P * 16 tokens of the panels at `e` [P][pairs][16][2], in their steps, times row r of the gradients
// g [pairs][R][2].
template <Pairs kPairs, int R, int P>
inline void panel_scores(const int32_t* __restrict g, const int16_t* __restrict e, int64_t pairs,
                         vf (&acc)[R][P * kVectors]) {
  for (int64_t begin = 0; begin < pairs; begin += kChunkPairs) {
    vi sums[R][P * kVectors] = {};
    const int64_t end = std::min(begin + kChunkPairs, pairs);
    for (int64_t d = begin; d < end; ++d) {
      vi token[P * kVectors];
#pragma GCC unroll 24
      for (int v = 0; v < P * kVectors; ++v) {
        const int16_t* at = e + (((v / kVectors) * pairs + d) * kPanel + (v % kVectors) * kLanes) * 2;
        std::memcpy(&token[v], at, sizeof(vi));
        // Prefetches the next panels: P short streams, which hardware prefetchers follow badly.
        __builtin_prefetch(at + P * pairs * kPanel * 2, 0, 2);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vi grad = splat(g[d * R + r]);
#pragma GCC unroll 24
        for (int v = 0; v < P * kVectors; ++v) sums[r][v] = add_products<kPairs>(sums[r][v], token[v], grad);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
      for (int v = 0; v < P * kVectors; ++v) {
        const vf sum = __builtin_convertvector(sums[r][v], vf);
        acc[r][v] = begin == 0 ? sum : acc[r][v] + sum;
      }
  }
}

}  // namespace CCU_ISA
}  // namespace ccu

#endif  // CCU_FAST_CPU_TOPK_PANEL_H_
