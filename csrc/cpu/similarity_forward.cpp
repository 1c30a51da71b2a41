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
// may have underflowed is recomputed with its own maximum, so no range of S is lost. Away from the diagonal of a
// problem with one lse a side, the c of the block above mostly serves, and the block is read once. Neither the tasks
// nor the order of additions depend on the number of threads.
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

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
  const float* raw;  // the products without their factors, of (first, begin); NULL: they are not fp32
  int64_t raw_stride;
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

  // Points to the chunk itself, or to a copy in `widened`: in fp32 when it is bf16, times its factors when it has any.
  // Then does the same for the guide.
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
    const bool as_it_is = raw != nullptr && t.row_factors == nullptr;
    dot = as_it_is ? raw : widened;
    stride = as_it_is ? raw_stride : kStripe;
    for (int64_t i = 0; !as_it_is && i < last - first; ++i) {
      const int64_t row = bank * t.rows + first + i;
      if (raw != nullptr)
        multiply(t, row, begin, end, raw + i * raw_stride, widened + i * kStripe);
      else
        widen(t, row, first + i, begin, end, widened + i * kStripe);
    }
  }

  template <Mode mode>
  float highest(const Chooser& wanted) const {
    vf top = splat(-kInf);
    for (int64_t i = first; i < last; ++i)
      for_vectors(begin, end, [&](int64_t j, auto lanes) {
        top = max(choose<mode>(wanted, i, j, lanes) ? scores(i, j, lanes) : splat(-kInf), top);
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
    highest = max(block.choose<mode>(chooser, i, j, lanes) ? block.scores(i, j, lanes) : splat(-kInf), highest);
  });
  const float peak = max(highest);
  const float shift = peak == -kInf ? 0.0f : peak;
  return {peak, add_up([&](int64_t j, auto lanes) { return exp(block.scores(i, j, lanes) - shift); })};
}

// Adds total * exp(shift) to the running sums of some columns.
template <class Lanes>
void add_to_columns(float* running_shift, double* running_sum, vf shift, vf total, Lanes lanes) {
  // A running sum may be far below its shift, and a total far above its own: what is left of them when the shift moves
  // by more than this has to be exact all the same.
  constexpr float kFar = 80;
  const vf before = load<vf>(running_shift, lanes), now = max(shift, before);
  const vi far = ((now - shift > kFar) & (total != 0.0f)) | ((now - before > kFar) & (before > -kInf));
  if (any(far)) {
    for (int lane = 0; lane < lanes.n; ++lane) {
      const double top = now[lane];
      const double decay = before[lane] == -kInf ? 0 : std::exp(before[lane] - top);
      const double share = shift[lane] == -kInf ? 0 : std::exp(shift[lane] - top);
      running_sum[lane] = running_sum[lane] * decay + total[lane] * share;
    }
  } else {
    const vf decay = before == splat(-kInf) ? splat(0.0f) : exp(before - now);
    const vf share = shift == splat(-kInf) ? splat(0.0f) : exp(shift - now);
    for (int lane = 0; lane < lanes.n; ++lane)
      running_sum[lane] = running_sum[lane] * decay[lane] + total[lane] * share[lane];
  }
  store(running_shift, now, lanes);
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
    vf shift = splat(block.shift), total = splat(0.0f);
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
      shift = seen ? shift : splat(-kInf);
    }
    if (!trusted) {
      vf peak = splat(-kInf);
      for (int64_t i = block.first; i < block.last; ++i)
        peak = max(block.choose<mode>(chooser, i, j, lanes) ? block.scores(i, j, lanes) : splat(-kInf), peak);
      const vf finite = peak == splat(-kInf) ? splat(0.0f) : peak;
      total = add_up([&](int64_t i) { return exp(block.scores(i, j, lanes) - finite); });
      shift = peak;
    }
    add_to_columns(running_shift + j, column_sum, shift, total, lanes);
  });
}

// Terms exceed the shift by no more than this in exponents: their sums are far from infinity.
constexpr float kHeadroom = 40.0f;

// E of `count` rows from `dot` on, summed up by row and by column; returns how far the highest score is above the
// shift.
template <int count, bool with_factors, bool with_columns>
float add_exponentials(const ccu_tile& t, const float* dot, int64_t stride, const float* row_factors,
                       const float* col_factors, int64_t width, float shift, float* row_sums, float* col_sums) {
  vf total[count], top[count];
  for (int i = 0; i < count; ++i) total[i] = splat(0.0f), top[i] = splat(-kInf);
  for_vectors(0, width, [&](int64_t j, auto lanes) {
    const vf by_column = with_factors ? load<vf>(col_factors + j, lanes) : splat(1.0f);
    vf column = splat(0.0f);
    for (int i = 0; i < count; ++i) {
      vf product = load<vf>(dot + i * stride + j, lanes);
      if (with_factors) product *= splat(row_factors[i]) * by_column;
      // S is rounded as everywhere: a row of one large S has that very number for its lse, and 1 for its exponential.
      const vf s = product * t.scale + t.bias;
      const vf above = s - shift;
      const vf e = in_use(lanes) ? exp_of_normal(above) : splat(0.0f);
      top[i] = max(in_use(lanes) ? above : splat(-kInf), top[i]);
      total[i] += e;
      column += e;
    }
    if (with_columns) store(col_sums + j, load<vf>(col_sums + j) + column);
  });
  float highest = -kInf;
  for (int i = 0; i < count; ++i) {
    row_sums[i] = sum(total[i]);
    highest = std::max(highest, max(top[i]));
  }
  return highest;
}

// The sums of a block.
struct Sums {
  alignas(64) float rows[kRowBlock];
  alignas(64) float cols[kStripe + kLanes];
  float highest;  // score, above the shift

  template <bool with_factors, bool with_columns>
  void add(const ccu_tile& t, const Block& block, const float* row_factors, const float* col_factors, float shift) {
    const int64_t count = block.last - block.first, width = block.end - block.begin;
    highest = -kInf;
    int64_t i = 0;
    const auto next = [&](auto add_some, int64_t some) {
      const float* of_rows = with_factors ? row_factors + i : nullptr;
      const float top =
          add_some(t, block.dot + i * block.stride, block.stride, of_rows, col_factors, width, shift, rows + i, cols);
      highest = std::max(highest, top);
      i += some;
    };
    while (i + 4 <= count) next(add_exponentials<4, with_factors, with_columns>, 4);
    while (i < count) next(add_exponentials<1, with_factors, with_columns>, 1);
  }
};

// Reduces a block in one pass with the shift of the block above; false where that shift does not fit, and nothing is
// written. After true `shift` is that of the next block.
bool reduce_at_once(const ccu_similarity_forward_args& a, const Usual& usual, Block& block, int64_t bank, float& shift,
                    float* widened, Partial* partials, int64_t per_reduction) {
  const ccu_tile& t = a.tile;
  Sums sums;
  const bool factors = t.row_factors != nullptr, columns = usual.col >= 0;
  if (columns) std::fill(sums.cols, sums.cols + kStripe + kLanes, 0.0f);
  if (factors) {
    const float* of_rows = t.row_factors + bank * t.rows + block.first;
    const float* of_cols = t.col_factors + bank * t.cols + block.begin;
    block.dot = block.raw;
    block.stride = block.raw_stride;
    if (columns)
      sums.add<true, true>(t, block, of_rows, of_cols, shift);
    else
      sums.add<true, false>(t, block, of_rows, of_cols, shift);
  } else {
    block.fetch_dot(t, bank, widened);
    if (columns)
      sums.add<false, true>(t, block, nullptr, nullptr, shift);
    else
      sums.add<false, false>(t, block, nullptr, nullptr, shift);
  }
  const float used = shift;
  if (!(sums.highest <= kHeadroom)) return false;
  for (int64_t i = 0; i < block.last - block.first; ++i)
    if (sums.rows[i] < kTrusted) return false;
  if (columns)
    for (int64_t j = 0; j < block.end - block.begin; ++j)
      if (sums.cols[j] < kTrusted) return false;
  if (sums.highest < -kHeadroom / 2 && std::isfinite(sums.highest)) shift = used + sums.highest;
  for (int r = 0; r < t.n_row; ++r)
    for (int64_t i = block.first; i < block.last; ++i)
      partials[r * per_reduction + i] = r == usual.row           ? Partial{used, sums.rows[i - block.first]}
                                        : is_lse(t.row_codes[r]) ? Partial{-kInf, 0}
                                                                 : Partial{0, 0};
  if (!columns) return true;
  const int64_t offset = usual.col * a.col_reduction_stride + bank * t.cols;
  for_vectors(block.begin, block.end, [&](int64_t j, auto lanes) {
    const vf total = load<vf>(sums.cols + (j - block.begin));
    add_to_columns(a.col_max + offset + j, a.col_sum + offset + j, splat(used), total, lanes);
  });
  return true;
}

// Reduces a row of a block in one pass with the shift of the block above, one sum for each relation; a sum that this
// shift does not fit is made as in any other block. Sets `top` to the highest score.
void reduce_row_by_classes(const ccu_tile& t, const Block& block, int64_t bank, int64_t i, float shift, float* top,
                           Partial* partials, int64_t per_reduction) {
  const Classes classes(t, bank, i);
  const float* dot = block.dot + (i - block.first) * block.stride;
  vf e_sums[Classes::kHowMany], s_sums[Classes::kHowMany], highest = splat(-kInf);
  vi seen[Classes::kHowMany];
  for (int which = 0; which < Classes::kHowMany; ++which)
    e_sums[which] = s_sums[which] = splat(0.0f), seen[which] = splat(0);
  if (!classes.ignored()) {
    vf e_other = splat(0.0f), s_other = splat(0.0f);
    bool plain = false;
    for_vectors(block.begin, block.end, [&](int64_t j, auto lanes) {
      const vf s = load<vf>(dot + (j - block.begin), lanes) * t.scale + t.bias;
      const vf e = exp_of_normal(s - shift);
      vi masks[Classes::kHowMany];
      if (classes.all_other(j, lanes, masks)) {
        plain = true;
        highest = max(s, highest);
        e_other += e;
        s_other += s;
        return;
      }
      for (int which = 0; which < Classes::kHowMany; ++which) {
        highest = max(masks[which] ? s : splat(-kInf), highest);
        e_sums[which] += masks[which] ? e : splat(0.0f);
        s_sums[which] += masks[which] ? s : splat(0.0f);
        seen[which] |= masks[which];
      }
    });
    e_sums[Classes::kOtherPairs] += e_other;
    s_sums[Classes::kOtherPairs] += s_other;
    if (plain) seen[Classes::kOtherPairs] = splat(-1);
  }
  const float peak = max(highest);
  *top = std::max(*top, peak);
  for (int r = 0; r < t.n_row; ++r) {
    const int32_t relations = relations_of(t.row_codes[r]);
    const bool lse = is_lse(t.row_codes[r]);
    bool some = false;
    float total = 0;
    for (int which = 0; which < Classes::kHowMany; ++which) {
      if (!Classes::has(relations, which)) continue;
      some |= any(seen[which]);
      total += sum(lse ? e_sums[which] : s_sums[which]);
    }
    Partial& out = partials[r * per_reduction + i];
    if (!lse)
      out = {0, total};
    else if (!some)
      out = {-kInf, 0};
    else if (peak - shift <= kHeadroom && !(total < kTrusted))
      out = {shift, total};
    else
      out = reduce_row<Mode::kGeneral>(block, Chooser::of_rows(t, bank, relations), kLse, i);
  }
}

// The reductions of one tile, block by block, and what they leave of each row of a stripe.
struct Reducer {
  const ccu_similarity_forward_args& a;
  const ccu_tile& t;
  const Usual usual;
  const bool limited, by_classes;
  int32_t row_lse = 0, col_lse = 0;  // the relations of any lse of rows, and of columns
  int64_t per_reduction;
  std::unique_ptr<Partial[]> partials;  // [n_row, banks, stripes, rows]

  Reducer(const ccu_similarity_forward_args& args, int64_t stripes)
      : a(args), t(args.tile), usual(t), limited(is_limited(t)), by_classes(Classes::suffice(t)) {
    for (int r = 0; r < t.n_row; ++r) row_lse |= is_lse(t.row_codes[r]) ? relations_of(t.row_codes[r]) : 0;
    for (int c = 0; c < t.n_col; ++c) col_lse |= is_lse(t.col_codes[c]) ? relations_of(t.col_codes[c]) : 0;
    per_reduction = t.banks * stripes * t.rows;
    partials.reset(new Partial[t.n_row * per_reduction]);
  }

  // `shift` is that of the block above, or inf; it becomes this block's. `of_stripe` are the stripe's partials.
  void reduce(Block& block, int64_t bank, float& shift, float* widened, float* widened_guide,
              Partial* of_stripe) const {
    const bool crosses = t.row0 + block.first < block.end && block.begin < t.row0 + block.last;  // the diagonal
    if (usual.holds && shift < kInf && !(t.diagonal && crosses) &&
        reduce_at_once(a, usual, block, bank, shift, widened, of_stripe, per_reduction))
      return;
    block.fetch(t, bank, widened, widened_guide);
    if (by_classes && shift < kInf) {
      float top = -kInf;
      block.exponentials = false;
      for (int64_t i = block.first; i < block.last; ++i)
        reduce_row_by_classes(t, block, bank, i, shift, &top, of_stripe, per_reduction);
      const bool fits = top - shift <= kHeadroom && top - shift >= -kHeadroom / 2;
      if (!fits) shift = std::isfinite(top) ? top : kInf;
      return;
    }
    const auto mode_in = [&](const Chooser& chooser) {
      return mode_of(t, chooser, block.first, block.last, block.begin, block.end);
    };
    if ((row_lse | col_lse) != 0) {
      float top = -kInf;
      const auto raise = [&](const Chooser& wanted) { top = std::max(top, block.highest(wanted, mode_in(wanted))); };
      if (limited && row_lse != 0) raise(Chooser::of_rows(t, bank, row_lse));
      if (limited && col_lse != 0) raise(Chooser::of_columns(t, bank, col_lse));
      if (!limited) raise(Chooser(t, bank, row_lse | col_lse));
      block.compute_exponentials(top);
      shift = block.exponentials ? block.shift : kInf;
    }
    for (int r = 0; r < t.n_row; ++r) {
      const Chooser chooser = Chooser::of_rows(t, bank, relations_of(t.row_codes[r]));
      const auto reduce =
          pick(mode_in(chooser), reduce_row<Mode::kAll>, reduce_row<Mode::kDiagonal>, reduce_row<Mode::kGeneral>,
               reduce_row<Mode::kAllLimited>, reduce_row<Mode::kDiagonalLimited>, reduce_row<Mode::kGeneralLimited>);
      Partial* out = of_stripe + r * per_reduction;
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

  // Row results of reduction r from the partials of all stripes.
  void merge(int64_t r, int64_t bank, int64_t stripes) const {
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
  }
};

// Rows that are fetched ahead: pieces of so few columns are too short for the processor to see that more will be read.
constexpr int64_t kAhead = 4;

// Adds the products of a block to the sum over fewer dimensions, which stays in the L1 cache, and replaces them by it.
void add_up(const ccu_tile& t, const Block& block, int64_t bank, bool first, float* total) {
  for (int64_t i = block.first; i < block.last; ++i) {
    float* dot = static_cast<float*>(const_cast<void*>(t.dot)) + (bank * t.rows + i) * t.cols;
    float* of_row = total + (i - block.first) * kStripe - block.begin;
    for_vectors(block.begin, block.end, [&](int64_t j, auto lanes) {
      __builtin_prefetch(dot + kAhead * t.cols + j);
      const vf sum = first ? load<vf>(dot + j, lanes) : load<vf>(of_row + j, lanes) + load<vf>(dot + j, lanes);
      store(of_row + j, sum, lanes);
      if (!first) store(dot + j, sum, lanes);
    });
  }
}

}  // namespace

int similarity_forward(const ccu_similarity_forward_args& a) try {
  const int64_t banks = a.tile.banks, rows = a.tile.rows, cols = a.tile.cols;
  const int64_t stripes = (cols + kStripe - 1) / kStripe;
  std::vector<Reducer> reducers;  // from the fewest dimensions to the most
  for (const ccu_similarity_forward_args* each = &a; each != nullptr; each = each->longer)
    reducers.emplace_back(*each, stripes);
  const int64_t sets = static_cast<int64_t>(reducers.size());
  std::vector<float> shifts(banks * stripes * sets, kInf);  // of the block above, if that has one
  parallel_for(banks * stripes, a.tile.threads, [&](int64_t task) {
    const int64_t bank = task / stripes, stripe = task % stripes;
    alignas(64) float e[kRowBlock * kStripe];
    alignas(64) float widened[kRowBlock * kStripe];
    alignas(64) float widened_guide[kRowBlock * kStripe];
    alignas(64) float total[kRowBlock * kStripe];
    for (int64_t first = 0; first < rows; first += kRowBlock)
      for (int64_t k = 0; k < sets; ++k) {
        const Reducer& reducer = reducers[k];
        const ccu_tile& t = reducer.t;
        Block block{};
        block.scale = t.scale, block.bias = t.bias;
        block.first = first, block.last = std::min(first + kRowBlock, rows);
        block.begin = stripe * kStripe, block.end = std::min(block.begin + kStripe, cols);
        block.e = e;
        block.teacher_scale = t.teacher_scale;
        block.row_norms = row_norms(t, bank), block.col_norms = col_norms(t, bank);
        if (t.dot_dtype == CCU_F32) {
          block.raw = static_cast<const float*>(t.dot) + (bank * rows + first) * cols + block.begin;
          block.raw_stride = cols;
        }
        if (sets > 1) {
          add_up(t, block, bank, k == 0, total);
          block.raw = total;
          block.raw_stride = kStripe;
        }
        reducer.reduce(block, bank, shifts[task * sets + k], widened, widened_guide,
                       reducer.partials.get() + (bank * stripes + stripe) * rows);
      }
  });
  for (const Reducer& reducer : reducers)
    parallel_for(reducer.t.n_row * banks, a.tile.threads,
                 [&](int64_t task) { reducer.merge(task / banks, task % banks, stripes); });
  return CCU_OK;
} catch (const std::bad_alloc&) {
  return CCU_OUT_OF_MEMORY;
}

}  // namespace CCU_ISA
}  // namespace ccu
