// The gradient of all reductions with respect to a chunk of S, written as the left operand of two GEMMs.
//
//     G_ij = sum over row reductions r that chose (i, j):   lse: g_ri exp(S_ij - out_ri)   sum: g_ri
//                                                           softplus: g_ri / (1 + exp(-S_ij))
//                                                           expected: g_ri exp(teacher_scale * guide_ij - norm_i)
//          + the same over column reductions with g_cj, out_cj
//     grad = scale * G                        so that dX = grad Y and dY = grad^T X
//     scale_sums_i = sum_j G_ij dot_ij        bias_sums_i = sum_j G_ij        col_sums_j = sum_i G_ij dot_ij
//
// With factors (of prefixes that are made unit vectors) grad takes them too, and is added to that of longer prefixes.
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

// What is summed up of a row.
struct RowSums {
  vf scale = splat(0.0f), bias = splat(0.0f);
};

// A row of the usual problem without its pair (i, i), from dot to grad in one pass.
template <bool with_columns, bool with_factors, bool add_to, bool with_col_sums>
void differentiate(const ccu_tile& t, const float* dot, int64_t count, float c, float row_weight,
                   const float* col_weights, float row_factor, const float* col_factors, float* out, float* of_columns,
                   RowSums& sums) {
  for_vectors(0, count, [&](int64_t j, auto lanes) {
    const vf factor = with_factors ? splat(row_factor) * load<vf>(col_factors + j, lanes) : splat(1.0f);
    vf product = load<vf>(dot + j, lanes);
    if (with_factors) product *= factor;
    vf weight = splat(row_weight);
    if (with_columns) weight += load<vf>(col_weights + j, lanes);
    const vf score = product * t.scale + t.bias;
    const vf e = exp_of_normal(score - c);
    // Where nothing was chosen S is not bounded, and 0 * inf must not make a NaN.
    const vf g = in_use(lanes) ? (weight == 0.0f ? weight : weight * e) : splat(0.0f);
    const vf for_scale = g * product;
    sums.bias += g;
    sums.scale += for_scale;
    if (with_col_sums) store(of_columns + j, load<vf>(of_columns + j, lanes) + for_scale, lanes);
    vf value = g * t.scale;
    if (with_factors) value *= factor;
    if (add_to) value += load<vf>(out + j, lanes);
    store(out + j, value, lanes);
  });
}

using Differentiate = decltype(&differentiate<true, true, true, true>);

template <bool with_columns>
Differentiate differentiate_with(bool factors, bool add_to, bool col_sums) {
  if (!factors)
    return add_to ? differentiate<with_columns, false, true, false> : differentiate<with_columns, false, false, false>;
  if (col_sums)
    return add_to ? differentiate<with_columns, true, true, true> : differentiate<with_columns, true, false, true>;
  return add_to ? differentiate<with_columns, true, true, false> : differentiate<with_columns, true, false, false>;
}

// A row of a problem whose reductions are of rows alone, from dot to grad in one pass: G is exp(S - c) times a weight
// of the pair's relation, plus another.
void differentiate_by_classes(const ccu_similarity_backward_args& a, const SharedExponential& exponential, int64_t bank,
                              int64_t i, const float* dot, int64_t begin, int64_t end, float* out, RowSums& sums) {
  const ccu_tile& t = a.tile;
  const Classes classes(t, bank, i);
  float weight[Classes::kHowMany] = {}, constant[Classes::kHowMany] = {};
  for (int r = 0; r < t.n_row && !classes.ignored(); ++r) {
    const int64_t at = r * a.row_reduction_stride + bank * a.row_bank_stride + i;
    const bool lse = is_lse(t.row_codes[r]);
    const float share = lse ? a.row_grad[at] * exponential.factor(splat(a.row_out[at]))[0] : a.row_grad[at];
    for (int which = 0; which < Classes::kHowMany; ++which)
      if (Classes::has(relations_of(t.row_codes[r]), which)) (lse ? weight : constant)[which] += share;
  }
  const vf by_other = splat(weight[Classes::kOtherPairs]), of_other = splat(constant[Classes::kOtherPairs]);
  for_vectors(begin, end, [&](int64_t j, auto lanes) {
    const vf product = load<vf>(dot + (j - begin), lanes);
    const vf score = product * t.scale + t.bias;
    const vf e = exp_of_normal(score - exponential.c);
    vi masks[Classes::kHowMany];
    vf g = splat(0.0f);
    // Where nothing was chosen S is not bounded, and 0 * inf must not make a NaN.
    if (classes.all_other(j, lanes, masks)) {
      g = (by_other == 0.0f ? by_other : by_other * e) + of_other;
    } else {
      for (int which = 0; which < Classes::kHowMany; ++which) {
        const vf own = weight[which] == 0.0f ? splat(0.0f) : e * weight[which];
        g = masks[which] ? own + constant[which] : g;
      }
    }
    sums.scale += g * product;
    sums.bias += g;
    store(out + (j - begin), g * t.scale, lanes);
  });
}

}  // namespace

int similarity_backward(const ccu_similarity_backward_args& a) {
  const ccu_tile& t = a.tile;
  if (a.grad_dtype != CCU_F32 && (a.grad_dtype != CCU_BF16 || a.add)) return CCU_UNSUPPORTED;
  const int64_t blocks = (t.rows + kRowBlock - 1) / kRowBlock;
  const SharedExponential exponential(a);
  const Usual usual(t);
  const bool at_once = usual.holds && exponential.shared && t.dot_dtype == CCU_F32 && a.grad_dtype == CCU_F32;
  const bool by_classes = Classes::suffice(t) && exponential.shared && t.dot_dtype == CCU_F32 &&
                          a.grad_dtype == CCU_F32 && t.row_factors == nullptr && !a.add;
  const Differentiate differentiate_row =
      usual.col < 0 ? differentiate_with<false>(t.row_factors != nullptr, a.add, a.col_sums != nullptr)
                    : differentiate_with<true>(t.row_factors != nullptr, a.add, a.col_sums != nullptr);
  std::unique_ptr<float[]> col_parts;  // [banks * blocks, cols], added up in this order
  if (a.col_sums != nullptr) {
    col_parts.reset(new (std::nothrow) float[t.banks * blocks * t.cols]);
    if (!col_parts) return CCU_OUT_OF_MEMORY;
  }

  parallel_for(t.banks * blocks, t.threads, [&](int64_t task) {
    const int64_t bank = task / blocks, first = task % blocks * kRowBlock;
    const int64_t last = std::min(first + kRowBlock, t.rows);
    alignas(64) float g[kStripe + kLanes], widened[kStripe], widened_guide[kStripe], of_columns[kStripe + kLanes];
    double scale_sum[kRowBlock] = {}, bias_sum[kRowBlock] = {};
    for (int64_t begin = 0; begin < t.cols; begin += kStripe) {
      const int64_t end = std::min(begin + kStripe, t.cols);
      if (col_parts) std::fill(of_columns, of_columns + kStripe + kLanes, 0.0f);
      for (int64_t i = first; i < last; ++i) {
        const int64_t row = bank * t.rows + i;
        RowSums sums;
        const auto any_way = [&](int64_t from, int64_t to) {
          const float* dot = widened;
          if (t.dot_dtype == CCU_F32)
            dot = static_cast<const float*>(t.dot) + row * t.cols + from;
          else
            widen(t, row, i, from, to, widened);
          if (t.row_factors != nullptr) {
            multiply(t, row, from, to, dot, widened);
            dot = widened;
          }
          const float* alike = dot;
          if (t.guide != nullptr && t.guide_dtype == CCU_F32) {
            alike = static_cast<const float*>(t.guide) + row * t.cols + from;
          } else if (t.guide != nullptr) {
            widen_guide(t, row, i, from, to, widened_guide);
            alike = widened_guide;
          }
          accumulate(a, exponential, bank, Stripe{dot, alike, t.scale, t.bias, i, from, to, g, t.teacher_scale});
          for_vectors(from, to, [&](int64_t j, auto lanes) {
            float* slot = g + (j - from);
            const vf value = load<vf>(slot);
            const vf for_scale = value * load<vf>(dot + (j - from), lanes);
            sums.scale += for_scale;
            sums.bias += value;
            store(slot, value * t.scale);
            float* of_column = of_columns + (j - begin);
            if (col_parts) store(of_column, load<vf>(of_column, lanes) + for_scale, lanes);
          });
          if (t.row_factors != nullptr) multiply(t, row, from, to, g, g);
          // Last, because grad may be dot itself.
          const int64_t at = row * t.cols + from;
          if (a.grad_dtype == CCU_F32) {
            float* out = static_cast<float*>(a.grad) + at;
            if (a.add)
              for_vectors(0, to - from, [&](int64_t j, auto lanes) {
                store(out + j, load<vf>(out + j, lanes) + load<vf>(g + j), lanes);
              });
            else
              std::copy(g, g + (to - from), out);
          } else {
            bf16* out = static_cast<bf16*>(a.grad) + at;
            for (int64_t j = 0; j < to - from; ++j) out[j] = from_float<bf16>(g[j]);
          }
        };
        const auto in_one_pass = [&](int64_t from, int64_t to) {
          const int64_t of_row = usual.row * a.row_reduction_stride + bank * a.row_bank_stride + i;
          const float weight = a.row_grad[of_row] * exponential.factor(splat(a.row_out[of_row]))[0];
          const float* weights = nullptr;
          if (usual.col >= 0) weights = exponential.col_factors.get() + (usual.col * t.banks + bank) * t.cols + from;
          differentiate_row(t, static_cast<const float*>(t.dot) + row * t.cols + from, to - from, exponential.c, weight,
                            weights, t.row_factors ? t.row_factors[row] : 1.0f,
                            t.col_factors ? t.col_factors + bank * t.cols + from : nullptr,
                            static_cast<float*>(a.grad) + row * t.cols + from, of_columns + (from - begin), sums);
        };
        const int64_t own = t.diagonal ? t.row0 + i : -1;
        if (by_classes) {
          const int64_t at = row * t.cols + begin;
          differentiate_by_classes(a, exponential, bank, i, static_cast<const float*>(t.dot) + at, begin, end,
                                   static_cast<float*>(a.grad) + at, sums);
        } else if (!at_once) {
          any_way(begin, end);
        } else if (own < begin || own >= end) {
          in_one_pass(begin, end);
        } else {
          if (begin < own) in_one_pass(begin, own);
          any_way(own, own + 1);
          if (own + 1 < end) in_one_pass(own + 1, end);
        }
        scale_sum[i - first] += sum(sums.scale);
        bias_sum[i - first] += sum(sums.bias);
      }
      if (col_parts) std::copy(of_columns, of_columns + (end - begin), col_parts.get() + task * t.cols + begin);
    }
    for (int64_t i = first; i < last; ++i) {
      a.scale_sums[bank * t.rows + i] = scale_sum[i - first];
      a.bias_sums[bank * t.rows + i] = bias_sum[i - first];
    }
  });
  if (!col_parts) return CCU_OK;
  const int64_t stripes = (t.cols + kStripe - 1) / kStripe;
  parallel_for(t.banks * stripes, t.threads, [&](int64_t task) {
    const int64_t bank = task / stripes, begin = task % stripes * kStripe, end = std::min(begin + kStripe, t.cols);
    double* total = a.col_sums + bank * t.cols;
    for (int64_t block = bank * blocks; block < (bank + 1) * blocks; ++block)
      for (int64_t j = begin; j < end; ++j) total[j] += col_parts[block * t.cols + j];
  });
  return CCU_OK;
}

}  // namespace CCU_ISA
}  // namespace ccu
