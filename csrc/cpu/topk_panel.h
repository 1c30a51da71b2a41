// The inner loop of topk_flips: gradients of a tile of rows against panels of 16 tokens, sums in registers.
#ifndef CCU_FAST_CPU_TOPK_PANEL_H_
#define CCU_FAST_CPU_TOPK_PANEL_H_

#include "../ccu_fast.h"
#include "simd.h"

namespace ccu {
namespace CCU_ISA {

constexpr int kPanel = CCU_TOKEN_PANEL;
constexpr int kVectors = kPanel / kLanes;  // of one panel
static_assert(kPanel % kLanes == 0, "a panel is whole vectors");

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

inline vf steps(const float* e) { return load<vf>(e); }

inline vf steps(const int16_t* e) {
  typedef int16_t half __attribute__((vector_size(kLanes * 2)));
  half narrow;
  std::memcpy(&narrow, e, sizeof narrow);
  return __builtin_convertvector(__builtin_convertvector(narrow, vi), vf);
}

// acc[r] = the P * 16 tokens of the panels at `e`, in their steps, times row r of the gradients g [dim][R].
template <int R, int P, class T>
inline void panel_scores(const float* __restrict g, const T* __restrict e, int64_t dim, vf (&acc)[R][P * kVectors]) {
  for (auto& row : acc)
    for (vf& sum : row) sum = vf{};
  for (int64_t d = 0; d < dim; ++d) {
    vf token[P * kVectors];
#pragma GCC unroll 24
    for (int v = 0; v < P * kVectors; ++v)
      token[v] = steps(e + (v / kVectors) * dim * kPanel + d * kPanel + (v % kVectors) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf grad = splat(g[d * R + r]);
#pragma GCC unroll 24
      for (int v = 0; v < P * kVectors; ++v) acc[r][v] += grad * token[v];
    }
  }
}

}  // namespace CCU_ISA
}  // namespace ccu

#endif  // CCU_FAST_CPU_TOPK_PANEL_H_
