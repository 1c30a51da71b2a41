// The gradient of all reductions with respect to a chunk of S, written as the left operand of two GEMMs.
//
//     G_ij = sum over row reductions r that chose (i, j):   lse: g_ri exp(S_ij - out_ri)   sum: g_ri
//                                                           softplus: g_ri / (1 + exp(-S_ij))
//                                                           expected: g_ri exp(teacher_scale * guide_ij - norm_i)
//          + the same over column reductions with g_cj, out_cj
//     grad = scale * G                        so that dX = grad Y and dY = grad^T X
//     scale_sums_i = sum_j G_ij dot_ij        bias_sums_i = sum_j G_ij
//
// Work: 4 bytes read and 4 (bf16: 2) written per pair, and one exponential for all lse together: with
// w_ri = g_ri exp(c - out_ri), the same for columns, and one constant c, their part of G is exp(S_ij - c) (sum of the
// w that chose the pair). That is exact in fp32 as long as the outs lie within 2 * kSpread of each other; otherwise
// each lse takes its own exponential. All terms of a pair are added in fp32 before anything is rounded, because on a
// positive pair they nearly cancel.
//
// A task is a block of rows of one bank, processed in stripes of columns whose accumulator stays in the L1 cache.
#include <algorithm>
#include <memory>
#include <new>

#include "../ccu_fast.h"
#include "../common/half.h"
#include "parallel.h"
#include "relations.h"
#include "simd.h"

namespace ccu {
namespace CCU_ISA {
namespace {

constexpr int64_t kStripe = 1024;
constexpr int64_t kRowBlock = 8;

// S <= out for a chosen pair, so exp(S - c) <= e^40; and where it underflows, S < c - 87 <= out - 47: nothing is lost.
constexpr float kSpread = 40.0f;

// The values of a reduction for a vector of columns: its factor (incoming gradient, times exp(c - out) when the
// exponential is shared) and its forward result.
struct PerRow {
  float grad, out;
  template <class Lanes>
  vf factors(int64_t, Lanes) const {
    return splat(grad);
  }
  template <class Lanes>
  vf outs(int64_t, Lanes) const {
    return splat(out);
  }
};

struct PerColumn {
  const float *grad, *out;
  template <class Lanes>
  vf factors(int64_t j, Lanes lanes) const {
    return load<vf>(grad + j, lanes);
  }
  template <class Lanes>
  vf outs(int64_t j, Lanes lanes) const {
    return load<vf>(out + j, lanes);
  }
};

// What the factor is multiplied by.
enum class Term { kNothing, kOwnExp, kSigmoid, kOtherSigmoid, kTeacher };  // the fourth is 1 - sigmoid

// A stripe of one row: its part of S, and the accumulator for G, padded to whole vectors.
struct Stripe {
  const float* dot;    // of column begin
  const float* alike;  // what limits look at: dot or the guide
  float scale, bias;
  int64_t i, begin, end;
  float* g;
  float teacher_scale;

  template <class Lanes>
  vf scores(int64_t j, Lanes lanes) const {
    return load<vf>(dot + (j - begin), lanes) * scale + bias;
  }

  template <class Lanes>
  vf teacher(int64_t j, Lanes lanes) const {
    return load<vf>(alike + (j - begin), lanes) * teacher_scale;
  }
};

template <Term term, Mode mode, class Side>
void add(const Stripe& stripe, const Chooser& chooser, const Side& side) {
  int64_t begin = stripe.begin, end = stripe.end;
  if (mode == Mode::kDiagonal && chooser.only_diagonal()) {
    begin = std::max(begin, chooser.row0 + stripe.i);
    end = std::min(end, chooser.row0 + stripe.i + 1);
  }
  for_vectors(begin, end, [&](int64_t j, auto lanes) {
    const vi chosen = chooser.choose<mode>(stripe.i, j, lanes, [&]() __attribute__((always_inline)) {
      return load<vf>(stripe.alike + (j - stripe.begin), lanes);
    });
    // Few pairs have the same label or id; the others need no exponential.
    if (base_of(mode) == Mode::kGeneral && term != Term::kNothing && !any(chosen)) return;
    vf value = side.factors(j, lanes);
    if (term == Term::kOwnExp) {
      value *= exp(stripe.scores(j, lanes) - side.outs(j, lanes));
    } else if (term == Term::kSigmoid || term == Term::kOtherSigmoid) {
      const vf s = term == Term::kSigmoid ? stripe.scores(j, lanes) : -stripe.scores(j, lanes);
      const vf e = exp(s < 0.0f ? s : -s);  // through exp(-|s|), which cannot overflow
      value *= (s < 0.0f ? e : splat(1.0f)) / (e + 1.0f);
    } else if (term == Term::kTeacher) {
      value *= exp(stripe.teacher(j, lanes) - side.outs(j, lanes));
    }
    float* slot = stripe.g + (j - stripe.begin);
    store(slot, load<vf>(slot) + (chosen ? value : splat(0.0f)));
  });
}

template <Term term, class Side>
void add(const Stripe& stripe, const Chooser& chooser, Mode mode, const Side& side) {
  pick(mode, add<term, Mode::kAll, Side>, add<term, Mode::kDiagonal, Side>, add<term, Mode::kGeneral, Side>,
       add<term, Mode::kAllLimited, Side>, add<term, Mode::kDiagonalLimited, Side>,
       add<term, Mode::kGeneralLimited, Side>)(stripe, chooser, side);
}

// The constant c, and the columns' factors times exp(c - out); `shared` is false where that would not be exact.
struct SharedExponential {
  bool shared = false;
  float c = 0;
  std::unique_ptr<float[]> col_factors;  // [n_col, banks, cols]

  explicit SharedExponential(const ccu_similarity_backward_args& a) {
    const ccu_tile& t = a.tile;
    float lowest = kInf, highest = -kInf;
    const auto widen = [&](float out) {
      // An empty set (-inf) chose no pair.
      if (out == -kInf) return;
      lowest = out < lowest ? out : lowest;
      highest = out <= highest ? highest : out;
    };
    for (int r = 0; r < t.n_row; ++r)
      for (int64_t b = 0; kind_of(t.row_codes[r]) == kLse && b < t.banks; ++b)
        for (int64_t i = 0; i < t.rows; ++i) widen(a.row_out[r * a.row_reduction_stride + b * a.row_bank_stride + i]);
    for (int c_ = 0; c_ < t.n_col; ++c_)
      for (int64_t j = 0; kind_of(t.col_codes[c_]) == kLse && j < t.banks * t.cols; ++j)
        widen(a.col_out[c_ * a.col_reduction_stride + j]);
    // Without any lse there is nothing to share; with an inf or NaN among the outs sharing is not safe.
    if (!(lowest <= highest && highest - lowest <= 2 * kSpread)) return;
    c = lowest + (highest - lowest) / 2;
    const int64_t columns = t.banks * t.cols;
    col_factors.reset(new (std::nothrow) float[t.n_col * columns]);
    if (!col_factors) return;
    shared = true;
    for (int r = 0; r < t.n_col; ++r) {
      const float* grad = a.col_grad + r * a.col_reduction_stride;
      const float* out = a.col_out + r * a.col_reduction_stride;
      float* factors = col_factors.get() + r * columns;
      for_vectors(0, columns, [&](int64_t j, auto lanes) {
        store(factors + j, load<vf>(grad + j, lanes) * factor(load<vf>(out + j, lanes)), lanes);
      });
    }
  }

  vf factor(vf out) const { return out == splat(-kInf) ? splat(0.0f) : exp(c - out); }
};

// All reductions of one stripe of one row, into stripe.g.
void accumulate(const ccu_similarity_backward_args& a, const SharedExponential& exponential, int64_t bank,
                const Stripe& stripe) {
  const ccu_tile& t = a.tile;
  const int64_t i = stripe.i;
  std::fill(stripe.g, stripe.g + (stripe.end - stripe.begin) + kLanes, 0.0f);
  const auto mode_in = [&](const Chooser& chooser) { return mode_of(t, chooser, i, i + 1, stripe.begin, stripe.end); };
  const auto each = [&](const auto& of_row, const auto& of_column) {
    for (int r = 0; r < t.n_row; ++r) {
      const int64_t at = r * a.row_reduction_stride + bank * a.row_bank_stride + i;
      const Chooser chooser = Chooser::of_rows(t, bank, relations_of(t.row_codes[r]));
      of_row(kind_of(t.row_codes[r]), chooser, PerRow{a.row_grad[at], a.row_out[at]});
    }
    for (int r = 0; r < t.n_col; ++r) {
      const int64_t at = r * a.col_reduction_stride + bank * t.cols;
      const Chooser chooser = Chooser::of_columns(t, bank, relations_of(t.col_codes[r]));
      of_column(kind_of(t.col_codes[r]), chooser, PerColumn{a.col_grad + at, a.col_out + at}, r);
    }
  };
  if (exponential.shared) {
    each(
        [&](Kind kind, const Chooser& chooser, PerRow row) {
          if (kind != kLse) return;
          row.grad *= exponential.factor(splat(row.out))[0];
          add<Term::kNothing>(stripe, chooser, mode_in(chooser), row);
        },
        [&](Kind kind, const Chooser& chooser, PerColumn column, int r) {
          if (kind != kLse) return;
          column.grad = exponential.col_factors.get() + (r * t.banks + bank) * t.cols;
          add<Term::kNothing>(stripe, chooser, mode_in(chooser), column);
        });
    for_vectors(stripe.begin, stripe.end, [&](int64_t j, auto lanes) {
      float* slot = stripe.g + (j - stripe.begin);
      const vf weight = load<vf>(slot);
      // Where nothing was chosen S is not bounded, and 0 * inf must not make a NaN.
      store(slot, weight == 0.0f ? weight : weight * exp(stripe.scores(j, lanes) - exponential.c));
    });
  }
  // `norms` is the side with the teacher's log-sum-exps in place of the results.
  const auto rest = [&](Kind kind, const Chooser& chooser, const auto& side, const auto& norms) {
    const Mode mode = mode_in(chooser);
    if (kind == kSum) add<Term::kNothing>(stripe, chooser, mode, side);
    if (kind == kSoftplus) add<Term::kSigmoid>(stripe, chooser, mode, side);
    if (kind == kLogSigmoid) add<Term::kOtherSigmoid>(stripe, chooser, mode, side);
    if (kind == kLse && !exponential.shared) add<Term::kOwnExp>(stripe, chooser, mode, side);
    if (kind == kExpected) add<Term::kTeacher>(stripe, chooser, mode, norms);
  };
  const float *of_rows = row_norms(t, bank), *of_columns = col_norms(t, bank);
  each([&](Kind kind, const Chooser& chooser,
           const PerRow& row) { rest(kind, chooser, row, PerRow{row.grad, of_rows == nullptr ? 0.0f : of_rows[i]}); },
       [&](Kind kind, const Chooser& chooser, const PerColumn& column, int) {
         rest(kind, chooser, column, PerColumn{column.grad, of_columns});
       });
}

}  // namespace

int similarity_backward(const ccu_similarity_backward_args& a) {
  const ccu_tile& t = a.tile;
  if (a.grad_dtype != CCU_F32 && a.grad_dtype != CCU_BF16) return CCU_UNSUPPORTED;
  const int64_t blocks = (t.rows + kRowBlock - 1) / kRowBlock;
  const SharedExponential exponential(a);

  parallel_for(t.banks * blocks, t.threads, [&](int64_t task) {
    const int64_t bank = task / blocks, first = task % blocks * kRowBlock;
    const int64_t last = std::min(first + kRowBlock, t.rows);
    alignas(64) float g[kStripe + kLanes], widened[kStripe], widened_guide[kStripe];
    double scale_sum[kRowBlock] = {}, bias_sum[kRowBlock] = {};
    for (int64_t begin = 0; begin < t.cols; begin += kStripe) {
      const int64_t end = std::min(begin + kStripe, t.cols);
      for (int64_t i = first; i < last; ++i) {
        const int64_t row = bank * t.rows + i;
        const float* dot = widened;
        if (t.dot_dtype == CCU_F32)
          dot = static_cast<const float*>(t.dot) + row * t.cols + begin;
        else
          widen(t, row, i, begin, end, widened);
        const float* alike = dot;
        if (t.guide != nullptr && t.guide_dtype == CCU_F32) {
          alike = static_cast<const float*>(t.guide) + row * t.cols + begin;
        } else if (t.guide != nullptr) {
          widen_guide(t, row, i, begin, end, widened_guide);
          alike = widened_guide;
        }
        accumulate(a, exponential, bank, Stripe{dot, alike, t.scale, t.bias, i, begin, end, g, t.teacher_scale});
        vf scale_part = splat(0.0f), bias_part = splat(0.0f);
        for_vectors(begin, end, [&](int64_t j, auto lanes) {
          float* slot = g + (j - begin);
          const vf value = load<vf>(slot);
          scale_part += value * load<vf>(dot + (j - begin), lanes);
          bias_part += value;
          store(slot, value * t.scale);
        });
        scale_sum[i - first] += sum(scale_part);
        bias_sum[i - first] += sum(bias_part);
        // Last, because grad may be dot itself.
        const int64_t at = row * t.cols + begin;
        if (a.grad_dtype == CCU_F32) {
          std::copy(g, g + (end - begin), static_cast<float*>(a.grad) + at);
        } else {
          bf16* out = static_cast<bf16*>(a.grad) + at;
          for (int64_t j = 0; j < end - begin; ++j) out[j] = from_float<bf16>(g[j]);
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
