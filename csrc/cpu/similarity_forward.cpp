// Row and column reductions of a chunk of S = scale * dot + bias, from one read of the chunk.
//
//     lse        out_i = log(sum_j [chosen_ij] exp(S_ij))
//     sum        out_i = sum_j [chosen_ij] S_ij
//     softplus   out_i = sum_j [chosen_ij] log(1 + exp(S_ij))        and the same along columns
//     logsigmoid out_i = -sum_j [chosen_ij] log(1 + exp(-S_ij))
//     count      out_i = sum_j [chosen_ij]
//     mass       out_i = sum_j [chosen_ij] Q_ij                          Q_ij = exp(teacher_scale * guide_ij - norm_i)
//     expected   out_i = sum_j [chosen_ij] Q_ij S_ij
//
// Work: 4 bytes read per pair, and one exponential for all lse together; with a teacher 4 bytes more, and an
// exponential for each mass and expected. The GEMM of the chunk costs 2 D FLOP per pair, so this is a few percent of
// it.
//
// A task is a stripe of columns of one bank: it owns the running (shift, sum) of its columns, and leaves a partial
// (shift, sum) per row, merged afterwards in stripe order. A block of a few rows of the stripe stays in the L1 cache:
// its maximum c is the shift of E = exp(S - c), computed once, and every lse is a sum over E. A sum so small that terms
// may have underflowed is recomputed with its own maximum, so no range of S is lost.
// Neither the tasks nor the order of additions depend on the number of threads.
#include <algorithm>
#include <memory>
#include <new>

#include "../ccu_fast.h"
#include "parallel.h"
#include "relations.h"
#include "simd.h"

namespace ccu {
namespace CCU_ISA {
namespace {

constexpr int64_t kStripe = 256;
constexpr int64_t kRowBlock = 16;

// Terms of at least 2^-24 of such a sum are normal numbers in fp32.
constexpr float kTrusted = 1e-26f;

// sum * exp(shift), or just sum when the reduction is not an lse.
struct Partial {
  float shift, sum;
};

// One bank's S, and the block of it that is being reduced: rows [first, last), columns [begin, end).
struct Block {
  const float* dot;  // of (first, begin)
  int64_t stride;    // from row to row
  float scale, bias;
  int64_t first, last, begin, end;
  float shift;         // the block's maximum
  bool exponentials;   // e holds exp(S - shift)
  float* e;            // [kRowBlock][kStripe]
  const float* alike;  // what limits look at, of (first, begin): dot or the guide
  int64_t alike_stride;
  float teacher_scale;
  const float *row_norms, *col_norms;  // of the teacher's logits, which are alike times teacher_scale

  template <class Lanes>
  vf scores(int64_t i, int64_t j, Lanes lanes) const {
    return load<vf>(dot + (i - first) * stride + (j - begin), lanes) * scale + bias;
  }

  // The teacher's probabilities, given the log-sum-exp of its logits.
  template <class Lanes, class Norm>
  vf probabilities(int64_t i, int64_t j, Lanes lanes, Norm norm) const {
    return exp(load<vf>(alike + (i - first) * alike_stride + (j - begin), lanes) * teacher_scale - norm);
  }

  template <Mode mode, class Lanes>
  __attribute__((always_inline)) vi choose(const Chooser& chooser, int64_t i, int64_t j, Lanes lanes) const {
    return chooser.choose<mode>(i, j, lanes, [&]() __attribute__((always_inline)) {
      return load<vf>(alike + (i - first) * alike_stride + (j - begin), lanes);
    });
  }

  // Points to the chunk itself, or to its fp32 form in `widened` when it is bf16; then does the same for the guide.
  void fetch(const ccu_tile& t, int64_t bank, float* widened, float* widened_guide) {
    fetch_dot(t, bank, widened);
    alike = dot;
    alike_stride = stride;
    if (t.guide == nullptr) return;
    const int64_t at = (bank * t.rows + first) * t.cols + begin;
    alike_stride = t.guide_dtype == CCU_F32 ? t.cols : kStripe;
    alike = t.guide_dtype == CCU_F32 ? static_cast<const float*>(t.guide) + at : widened_guide;
    if (t.guide_dtype == CCU_F32) return;
    for (int64_t i = 0; i < last - first; ++i)
      widen_guide(t, bank * t.rows + first + i, first + i, begin, end, widened_guide + i * kStripe);
  }

  void fetch_dot(const ccu_tile& t, int64_t bank, float* widened) {
    const int64_t row = bank * t.rows + first;
    if (t.dot_dtype == CCU_F32) {
      dot = static_cast<const float*>(t.dot) + row * t.cols + begin;
      stride = t.cols;
      return;
    }
    for (int64_t i = first; i < last; ++i) widen(t, row + (i - first), i, begin, end, widened + (i - first) * kStripe);
    dot = widened;
    stride = kStripe;
  }

  template <Mode mode>
  float highest(const Chooser& wanted) const {
    vf top = splat(-kInf);
    for (int64_t i = first; i < last; ++i)
      for_vectors(begin, end, [&](int64_t j, auto lanes) {
        top = max(top, choose<mode>(wanted, i, j, lanes) ? scores(i, j, lanes) : splat(-kInf));
      });
    return max(top);
  }

  template <class Lanes>
  vf shared_exp(int64_t i, int64_t j, Lanes lanes) const {
    return load<vf>(e + (i - first) * kStripe + (j - begin), lanes);
  }

  float highest(const Chooser& wanted, Mode mode) const {
    if (is_limited(mode))
      return mode == Mode::kAllLimited        ? highest<Mode::kAllLimited>(wanted)
             : mode == Mode::kDiagonalLimited ? highest<Mode::kDiagonalLimited>(wanted)
                                              : highest<Mode::kGeneralLimited>(wanted);
    return mode == Mode::kDiagonal ? highest<Mode::kDiagonal>(wanted) : highest<Mode::kAll>(wanted);
  }

  // `top` is the highest of the pairs of any lse: a positive pair that none wants must not set the shift, which it may
  // raise so far that of the others nothing is left. No more may one that is beyond a limit.
  void compute_exponentials(float top) {
    shift = top;
    exponentials = std::isfinite(shift);
    if (!exponentials) return;
    for (int64_t i = first; i < last; ++i)
      for_vectors(begin, end, [&](int64_t j, auto lanes) {
        store(e + (i - first) * kStripe + (j - begin), exp(scores(i, j, lanes) - shift), lanes);
      });
  }
};

template <Mode mode>
Partial reduce_row(const Block& block, const Chooser& chooser, Kind kind, int64_t i) {
  int64_t begin = block.begin, end = block.end;
  if (mode == Mode::kDiagonal && chooser.only_diagonal()) {
    begin = std::max(begin, chooser.row0 + i);
    end = std::min(end, chooser.row0 + i + 1);
  }
  const auto add_up = [&](const auto& term) {
    vf total = splat(0.0f);
    for_vectors(begin, end, [&](int64_t j, auto lanes) {
      total += block.choose<mode>(chooser, i, j, lanes) ? term(j, lanes) : splat(0.0f);
    });
    return sum(total);
  };
  if (kind == kCount) return {0, add_up([&](int64_t, auto) { return splat(1.0f); })};
  if (kind == kSum) return {0, add_up([&](int64_t j, auto lanes) { return block.scores(i, j, lanes); })};
  if (kind == kSoftplus) return {0, add_up([&](int64_t j, auto lanes) { return softplus(block.scores(i, j, lanes)); })};
  if (kind == kLogSigmoid)
    return {0, add_up([&](int64_t j, auto lanes) { return -softplus(-block.scores(i, j, lanes)); })};
  if (kind == kMass)
    return {0, add_up([&](int64_t j, auto lanes) { return block.probabilities(i, j, lanes, block.row_norms[i]); })};
  if (kind == kExpected)
    return {0, add_up([&](int64_t j, auto lanes) {
              return block.probabilities(i, j, lanes, block.row_norms[i]) * block.scores(i, j, lanes);
            })};
  if (block.exponentials) {
    vf total = splat(0.0f);
    vi seen = splat(0);
    for_vectors(begin, end, [&](int64_t j, auto lanes) {
      const vi chosen = block.choose<mode>(chooser, i, j, lanes);
      seen |= chosen;
      total += chosen ? block.shared_exp(i, j, lanes) : splat(0.0f);
    });
    if (!any(seen)) return {-kInf, 0};
    const float shared = sum(total);
    if (!(shared < kTrusted)) return {block.shift, shared};
  }
  vf highest = splat(-kInf);
  for_vectors(begin, end, [&](int64_t j, auto lanes) {
    highest = max(highest, block.choose<mode>(chooser, i, j, lanes) ? block.scores(i, j, lanes) : splat(-kInf));
  });
  const float peak = max(highest);
  const float shift = peak == -kInf ? 0.0f : peak;
  return {peak, add_up([&](int64_t j, auto lanes) { return exp(block.scores(i, j, lanes) - shift); })};
}

template <Mode mode>
void reduce_columns(const Block& block, const Chooser& chooser, Kind kind, float* running_shift, double* running_sum) {
  int64_t begin = block.begin, end = block.end;
  if (mode == Mode::kDiagonal && chooser.only_diagonal()) {
    begin = std::max(begin, chooser.row0 + block.first);
    end = std::min(end, chooser.row0 + block.last);
  }
  for_vectors(begin, end, [&](int64_t j, auto lanes) {
    const auto add_up = [&](const auto& term) {
      vf total = splat(0.0f);
      for (int64_t i = block.first; i < block.last; ++i)
        total += block.choose<mode>(chooser, i, j, lanes) ? term(i) : splat(0.0f);
      return total;
    };
    double* const column_sum = running_sum + j;
    if (kind == kMass || kind == kExpected) {
      const vf norm = load<vf>(block.col_norms + j, lanes);
      const vf total =
          kind == kMass
              ? add_up([&](int64_t i) { return block.probabilities(i, j, lanes, norm); })
              : add_up([&](int64_t i) { return block.probabilities(i, j, lanes, norm) * block.scores(i, j, lanes); });
      for (int lane = 0; lane < lanes.n; ++lane) column_sum[lane] += total[lane];
      return;
    }
    if (kind != kLse) {
      const vf total = kind == kCount      ? add_up([](int64_t) { return splat(1.0f); })
                       : kind == kSum      ? add_up([&](int64_t i) { return block.scores(i, j, lanes); })
                       : kind == kSoftplus ? add_up([&](int64_t i) { return softplus(block.scores(i, j, lanes)); })
                                           : add_up([&](int64_t i) { return -softplus(-block.scores(i, j, lanes)); });
      for (int lane = 0; lane < lanes.n; ++lane) column_sum[lane] += total[lane];
      return;
    }
    const vf before = load<vf>(running_shift + j, lanes);
    vf shift = max(before, splat(block.shift));
    vf total = splat(0.0f);
    bool trusted = block.exponentials;
    if (trusted) {
      vi seen = splat(0);
      for (int64_t i = block.first; i < block.last; ++i) {
        const vi chosen = block.choose<mode>(chooser, i, j, lanes);
        seen |= chosen;
        total += chosen ? block.shared_exp(i, j, lanes) : splat(0.0f);
      }
      if (!any(seen)) return;
      trusted = !any((total < splat(kTrusted)) & seen);
      // A column of which nothing is in the block keeps its shift.
      shift = seen ? shift : before;
      total = seen ? total * exp(block.shift - shift) : splat(0.0f);
    }
    if (!trusted) {
      vf peak = before;
      for (int64_t i = block.first; i < block.last; ++i)
        peak = max(peak, block.choose<mode>(chooser, i, j, lanes) ? block.scores(i, j, lanes) : splat(-kInf));
      const vf finite = peak == splat(-kInf) ? splat(0.0f) : peak;
      total = add_up([&](int64_t i) { return exp(block.scores(i, j, lanes) - finite); });
      shift = peak;
    }
    const vf decay = shift == splat(-kInf) ? splat(0.0f) : exp(before - shift);
    for (int lane = 0; lane < lanes.n; ++lane) column_sum[lane] = column_sum[lane] * decay[lane] + total[lane];
    store(running_shift + j, shift, lanes);
  });
}

}  // namespace

int similarity_forward(const ccu_similarity_forward_args& a) {
  const ccu_tile& t = a.tile;
  const int64_t stripes = (t.cols + kStripe - 1) / kStripe;
  const int64_t per_reduction = t.banks * stripes * t.rows;
  const std::unique_ptr<Partial[]> partials(new (std::nothrow) Partial[t.n_row * per_reduction]);
  if (!partials) return CCU_OUT_OF_MEMORY;

  int32_t row_lse = 0, col_lse = 0;  // the relations of any lse of rows, and of columns
  for (int r = 0; r < t.n_row; ++r) row_lse |= is_lse(t.row_codes[r]) ? relations_of(t.row_codes[r]) : 0;
  for (int c = 0; c < t.n_col; ++c) col_lse |= is_lse(t.col_codes[c]) ? relations_of(t.col_codes[c]) : 0;
  const bool limited = is_limited(t);
  parallel_for(t.banks * stripes, t.threads, [&](int64_t task) {
    const int64_t bank = task / stripes, stripe = task % stripes;
    alignas(64) float e[kRowBlock * kStripe];
    alignas(64) float widened[kRowBlock * kStripe];
    alignas(64) float widened_guide[kRowBlock * kStripe];
    const int64_t begin = stripe * kStripe, end = std::min(begin + kStripe, t.cols);
    Block block{nullptr,
                0,
                t.scale,
                t.bias,
                0,
                0,
                begin,
                end,
                0,
                false,
                e,
                nullptr,
                0,
                t.teacher_scale,
                row_norms(t, bank),
                col_norms(t, bank)};
    for (block.first = 0; block.first < t.rows; block.first = block.last) {
      block.last = std::min(block.first + kRowBlock, t.rows);
      block.fetch(t, bank, widened, widened_guide);
      const auto mode_in = [&](const Chooser& chooser) {
        return mode_of(t, chooser, block.first, block.last, begin, end);
      };
      if ((row_lse | col_lse) != 0) {
        float top = -kInf;
        const auto raise = [&](const Chooser& wanted) { top = std::max(top, block.highest(wanted, mode_in(wanted))); };
        if (limited && row_lse != 0) raise(Chooser::of_rows(t, bank, row_lse));
        if (limited && col_lse != 0) raise(Chooser::of_columns(t, bank, col_lse));
        if (!limited) raise(Chooser(t, bank, row_lse | col_lse));
        block.compute_exponentials(top);
      }
      for (int r = 0; r < t.n_row; ++r) {
        const Chooser chooser = Chooser::of_rows(t, bank, relations_of(t.row_codes[r]));
        const auto reduce =
            pick(mode_in(chooser), reduce_row<Mode::kAll>, reduce_row<Mode::kDiagonal>, reduce_row<Mode::kGeneral>,
                 reduce_row<Mode::kAllLimited>, reduce_row<Mode::kDiagonalLimited>, reduce_row<Mode::kGeneralLimited>);
        Partial* out = partials.get() + r * per_reduction + (bank * stripes + stripe) * t.rows;
        for (int64_t i = block.first; i < block.last; ++i) out[i] = reduce(block, chooser, kind_of(t.row_codes[r]), i);
      }
      for (int c = 0; c < t.n_col; ++c) {
        const Chooser chooser = Chooser::of_columns(t, bank, relations_of(t.col_codes[c]));
        const auto reduce = pick(mode_in(chooser), reduce_columns<Mode::kAll>, reduce_columns<Mode::kDiagonal>,
                                 reduce_columns<Mode::kGeneral>, reduce_columns<Mode::kAllLimited>,
                                 reduce_columns<Mode::kDiagonalLimited>, reduce_columns<Mode::kGeneralLimited>);
        const int64_t offset = c * a.col_reduction_stride + bank * t.cols;
        reduce(block, chooser, kind_of(t.col_codes[c]), a.col_max + offset, a.col_sum + offset);
      }
    }
  });

  parallel_for(t.n_row * t.banks, t.threads, [&](int64_t task) {
    const int64_t r = task / t.banks, bank = task % t.banks;
    const bool lse = is_lse(t.row_codes[r]);
    const Partial* in = partials.get() + r * per_reduction + bank * stripes * t.rows;
    float* out = a.row_out + r * a.row_reduction_stride + bank * a.row_bank_stride;
    for (int64_t i = 0; i < t.rows; ++i) {
      float peak = lse ? -kInf : 0.0f;
      for (int64_t k = 0; lse && k < stripes; ++k) peak = std::max(peak, in[k * t.rows + i].shift);
      double total = 0;
      for (int64_t k = 0; k < stripes; ++k) {
        const Partial& part = in[k * t.rows + i];
        // A stripe with nothing chosen has shift -inf and sum 0; -inf - -inf must not make it NaN.
        if (part.sum == 0.0f) continue;
        total += lse ? part.sum * std::exp(static_cast<double>(part.shift) - peak) : part.sum;
      }
      out[i] = static_cast<float>(lse ? peak + std::log(total) : total);
    }
  });
  return CCU_OK;
}

}  // namespace CCU_ISA
}  // namespace ccu
