// The gradient of all reductions with respect to a chunk of S, written as the left operand of two GEMMs.
//
//     G_ij = sum over row reductions r that chose (i, j):   lse: g_ri exp(S_ij - out_ri)   sum: g_ri
//                                                           softplus: g_ri / (1 + exp(-S_ij))
//          + the same over column reductions with g_cj, out_cj
//     grad = scale * G                        so that dX = grad Y and dY = grad^T X
//     scale_sums_i = sum_j G_ij dot_ij        bias_sums_i = sum_j G_ij
//
// Work: one exponential per pair and lse or softplus; 4 bytes read and 4 (bf16: 2) written per pair. All terms of a
// pair are added in fp32 before anything is rounded: on a positive pair they nearly cancel.
//
// A task is a block of rows of one bank, walked in stripes of columns whose accumulator stays in the L1 cache.
#include <algorithm>

#include "../ccu_fast.h"
#include "parallel.h"
#include "relations.h"
#include "simd.h"

namespace ccu {
namespace CCU_ISA {
namespace {

constexpr int64_t kStripe = 1024;
constexpr int64_t kRowBlock = 8;

// What a reduction says about a vector of columns: its incoming gradient and its forward result.
struct PerRow {
  float grad, out;
  vf grads(int64_t, int) const { return splat(grad); }
  vf outs(int64_t, int) const { return splat(out); }
};

struct PerColumn {
  const float *grad, *out;
  vf grads(int64_t j, int n) const { return n == kLanes ? load<vf>(grad + j) : load_part<vf>(grad + j, n); }
  vf outs(int64_t j, int n) const { return n == kLanes ? load<vf>(out + j) : load_part<vf>(out + j, n); }
};

template <Mode mode, class Side>
void add_reduction(const ccu_tile& t, const float* dot, const Chooser& chooser, Kind kind, const Side& side, int64_t i,
                   int64_t begin, int64_t end, float* g) {
  for (int64_t j = begin; j < end; j += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, end - j));
    const vi chosen = chooser.template operator()<mode>(i, j, n);
    const vf d = n == kLanes ? load<vf>(dot + j) : load_part<vf>(dot + j, n);
    const vf s = d * t.scale + t.bias;
    vf value = side.grads(j, n);
    if (kind == kLse) {
      value *= exp(s - side.outs(j, n));
    } else if (kind == kSoftplus) {
      // Through exp(-|s|), which cannot overflow.
      const vf e = exp(s < splat(0.0f) ? s : -s);
      value *= (s < splat(0.0f) ? e : splat(1.0f)) / (e + 1.0f);
    }
    // g is padded to whole vectors.
    float* slot = g + (j - begin);
    store(slot, load<vf>(slot) + (chosen ? value : splat(0.0f)));
  }
}

template <class Side>
void add_reduction(const ccu_tile& t, const float* dot, const Chooser& chooser, Kind kind, const Side& side, int64_t i,
                   int64_t begin, int64_t end, float* g) {
  switch (mode_of(t, chooser.relations)) {
    case Mode::kAll:
      return add_reduction<Mode::kAll>(t, dot, chooser, kind, side, i, begin, end, g);
    case Mode::kDiagonal: {
      const int64_t own = t.row0 + i;
      if (!chooser.only_diagonal()) return add_reduction<Mode::kDiagonal>(t, dot, chooser, kind, side, i, begin, end, g);
      // SELF alone on the diagonal: one pair a row.
      if (!t.diagonal || !(chooser.relations & kSelf) || own < begin || own >= end) return;
      const int64_t first = own - (own - begin) % kLanes;
      return add_reduction<Mode::kDiagonal>(t, dot, chooser, kind, side, i, first, std::min<int64_t>(first + kLanes, end),
                                            g + (first - begin));
    }
    case Mode::kGeneral:
      return add_reduction<Mode::kGeneral>(t, dot, chooser, kind, side, i, begin, end, g);
  }
}

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

int similarity_backward(const ccu_similarity_backward_args& a) {
  const ccu_tile& t = a.tile;
  if (a.grad_dtype != CCU_F32 && a.grad_dtype != CCU_BF16) return CCU_UNSUPPORTED;
  const int64_t blocks = (t.rows + kRowBlock - 1) / kRowBlock;

  parallel_for(t.banks * blocks, t.threads, [&](int64_t task) {
    const int64_t bank = task / blocks, first = task % blocks * kRowBlock;
    const int64_t last = std::min(first + kRowBlock, t.rows);
    alignas(64) float g[kStripe + kLanes];
    double scale_sum[kRowBlock] = {}, bias_sum[kRowBlock] = {};
    for (int64_t begin = 0; begin < t.cols; begin += kStripe) {
      const int64_t end = std::min(begin + kStripe, t.cols);
      for (int64_t i = first; i < last; ++i) {
        const int64_t row = bank * t.rows + i;
        const float* dot = t.dot + row * t.cols;
        std::fill(g, g + (end - begin) + kLanes, 0.0f);
        for (int r = 0; r < t.n_row; ++r) {
          const int64_t at = r * a.row_reduction_stride + bank * a.row_bank_stride + i;
          add_reduction(t, dot, Chooser(t, bank, relations_of(t.row_codes[r])), kind_of(t.row_codes[r]),
                        PerRow{a.row_grad[at], a.row_out[at]}, i, begin, end, g);
        }
        for (int c = 0; c < t.n_col; ++c) {
          const int64_t at = c * a.col_reduction_stride + bank * t.cols;
          add_reduction(t, dot, Chooser(t, bank, relations_of(t.col_codes[c])), kind_of(t.col_codes[c]),
                        PerColumn{a.col_grad + at, a.col_out + at}, i, begin, end, g);
        }
        vf scale_part = splat(0.0f), bias_part = splat(0.0f);
        for (int64_t j = begin; j < end; j += kLanes) {
          const int n = static_cast<int>(std::min<int64_t>(kLanes, end - j));
          const vf d = n == kLanes ? load<vf>(dot + j) : load_part<vf>(dot + j, n);
          const vf value = load<vf>(g + (j - begin));
          scale_part += value * d;
          bias_part += value;
          store(g + (j - begin), value * t.scale);
        }
        scale_sum[i - first] += sum(scale_part);
        bias_sum[i - first] += sum(bias_part);
        // Last, because grad may be dot itself.
        if (a.grad_dtype == CCU_F32) {
          std::copy(g, g + (end - begin), static_cast<float*>(a.grad) + row * t.cols + begin);
        } else {
          uint16_t* out = static_cast<uint16_t*>(a.grad) + row * t.cols + begin;
          for (int64_t j = 0; j < end - begin; ++j) out[j] = to_bf16(g[j]);
        }
      }
    }
    for (int64_t i = first; i < last; ++i) {
      a.scale_sums[bank * t.rows + i] = scale_sum[i - first];
      a.bias_sums[bank * t.rows + i] = bias_sum[i - first];
    }
  });
  return CCU_OK;
}

}  // namespace CCU_ISA
}  // namespace ccu
