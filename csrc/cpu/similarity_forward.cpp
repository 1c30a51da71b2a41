// Row and column reductions of a chunk of S = scale * dot + bias, from one read of the chunk.
//
//     lse       out_i = log(sum_j [chosen_ij] exp(S_ij))          softplus   out_i = sum_j [chosen_ij] log(1 + exp(S_ij))
//     sum       out_i = sum_j [chosen_ij] S_ij                    and the same along columns
//
// Work: one exponential per pair and lse or softplus; 4 bytes read per pair. The GEMM that made the chunk costs 2 D
// FLOP per pair, so this is a few percent of it.
//
// A task is a stripe of columns of one bank: it owns those columns' running (max, sum), and leaves a partial (max,
// sum) per row that is merged afterwards in stripe order. Every lse has its own running maximum, so no range of S can
// underflow. Blocks of rows are small enough that the second look at a block finds it in the L1 cache. Neither the
// tasks nor the order of additions depend on the number of threads.
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

struct Partial {
  float max, sum;
};

// One chunk's view of S.
struct Scores {
  const float* dot;
  int64_t cols;
  float scale, bias;

  vf operator()(int64_t i, int64_t j, int n) const {
    const float* p = dot + i * cols + j;
    return (n == kLanes ? load<vf>(p) : load_part<vf>(p, n)) * scale + bias;
  }
};

// Calls step(j, lanes) over [begin, end) in vectors.
template <class Step>
inline void over_columns(int64_t begin, int64_t end, const Step& step) {
  int64_t j = begin;
  for (; j + kLanes <= end; j += kLanes) step(j, kLanes);
  if (j < end) step(j, static_cast<int>(end - j));
}

template <Mode mode>
Partial reduce_row(const Scores& scores, const Chooser& chooser, Kind kind, int64_t i, int64_t begin, int64_t end) {
  if (mode == Mode::kDiagonal && chooser.only_diagonal()) {
    begin = std::max(begin, chooser.row0 + i);
    end = std::min(end, chooser.row0 + i + 1);
  }
  if (kind != kLse) {
    vf total = splat(0.0f);
    over_columns(begin, end, [&](int64_t j, int n) {
      const vf s = scores(i, j, n);
      const vi chosen = chooser.template operator()<mode>(i, j, n);
      total += chosen ? (kind == kSum ? s : softplus(s)) : splat(0.0f);
    });
    return {0.0f, sum(total)};
  }
  vf highest = splat(-kInf);
  over_columns(begin, end, [&](int64_t j, int n) {
    const vf s = scores(i, j, n);
    highest = max(highest, chooser.template operator()<mode>(i, j, n) ? s : splat(-kInf));
  });
  const float peak = max(highest);
  const float shift = peak == -kInf ? 0.0f : peak;
  vf total = splat(0.0f);
  over_columns(begin, end, [&](int64_t j, int n) {
    const vf e = exp(scores(i, j, n) - shift);
    total += chooser.template operator()<mode>(i, j, n) ? e : splat(0.0f);
  });
  return {peak, sum(total)};
}

template <Mode mode>
void reduce_columns(const Scores& scores, const Chooser& chooser, Kind kind, int64_t first, int64_t last, int64_t begin,
                    int64_t end, float* running_max, double* running_sum) {
  if (mode == Mode::kDiagonal && chooser.only_diagonal()) {
    begin = std::max(begin, chooser.row0 + first);
    end = std::min(end, chooser.row0 + last);
  }
  over_columns(begin, end, [&](int64_t j, int n) {
    float* const column_max = running_max + j;
    double* const column_sum = running_sum + j;
    vf total = splat(0.0f);
    if (kind != kLse) {
      for (int64_t i = first; i < last; ++i) {
        const vf s = scores(i, j, n);
        const vi chosen = chooser.template operator()<mode>(i, j, n);
        total += chosen ? (kind == kSum ? s : softplus(s)) : splat(0.0f);
      }
      for (int lane = 0; lane < n; ++lane) column_sum[lane] += total[lane];
      return;
    }
    const vf before = n == kLanes ? load<vf>(column_max) : load_part<vf>(column_max, n);
    vf peak = before;
    for (int64_t i = first; i < last; ++i) {
      const vf s = scores(i, j, n);
      peak = max(peak, chooser.template operator()<mode>(i, j, n) ? s : splat(-kInf));
    }
    const vf shift = peak == splat(-kInf) ? splat(0.0f) : peak;
    for (int64_t i = first; i < last; ++i) {
      const vf e = exp(scores(i, j, n) - shift);
      total += chooser.template operator()<mode>(i, j, n) ? e : splat(0.0f);
    }
    const vf decay = exp(before - shift);
    for (int lane = 0; lane < n; ++lane) column_sum[lane] = column_sum[lane] * decay[lane] + total[lane];
    if (n == kLanes)
      store(column_max, peak);
    else
      store_part(column_max, peak, n);
  });
}

}  // namespace

int similarity_forward(const ccu_similarity_forward_args& a) {
  const ccu_tile& t = a.tile;
  const int64_t stripes = (t.cols + kStripe - 1) / kStripe;
  const int64_t per_reduction = t.banks * stripes * t.rows;
  const std::unique_ptr<Partial[]> partials(new (std::nothrow) Partial[t.n_row * per_reduction]);
  if (!partials) return CCU_OUT_OF_MEMORY;

  parallel_for(t.banks * stripes, t.threads, [&](int64_t task) {
    const int64_t bank = task / stripes, stripe = task % stripes;
    const int64_t begin = stripe * kStripe, end = std::min(begin + kStripe, t.cols);
    const Scores scores{t.dot + bank * t.rows * t.cols, t.cols, t.scale, t.bias};
    for (int64_t first = 0; first < t.rows; first += kRowBlock) {
      const int64_t last = std::min(first + kRowBlock, t.rows);
      for (int r = 0; r < t.n_row; ++r) {
        const Chooser chooser(t, bank, relations_of(t.row_codes[r]));
        const Mode mode = mode_of(t, chooser.relations);
        const auto reduce = mode == Mode::kAll        ? reduce_row<Mode::kAll>
                            : mode == Mode::kDiagonal ? reduce_row<Mode::kDiagonal>
                                                      : reduce_row<Mode::kGeneral>;
        Partial* out = partials.get() + r * per_reduction + (bank * stripes + stripe) * t.rows;
        for (int64_t i = first; i < last; ++i)
          out[i] = reduce(scores, chooser, kind_of(t.row_codes[r]), i, begin, end);
      }
      for (int c = 0; c < t.n_col; ++c) {
        const Chooser chooser(t, bank, relations_of(t.col_codes[c]));
        const Mode mode = mode_of(t, chooser.relations);
        const auto reduce = mode == Mode::kAll        ? reduce_columns<Mode::kAll>
                            : mode == Mode::kDiagonal ? reduce_columns<Mode::kDiagonal>
                                                      : reduce_columns<Mode::kGeneral>;
        const int64_t offset = c * a.col_reduction_stride + bank * t.cols;
        reduce(scores, chooser, kind_of(t.col_codes[c]), first, last, begin, end, a.col_max + offset,
               a.col_sum + offset);
      }
    }
  });

  parallel_for(t.n_row * t.banks, t.threads, [&](int64_t task) {
    const int64_t r = task / t.banks, bank = task % t.banks;
    const bool lse = kind_of(t.row_codes[r]) == kLse;
    const Partial* in = partials.get() + r * per_reduction + bank * stripes * t.rows;
    float* out = a.row_out + r * a.row_reduction_stride + bank * a.row_bank_stride;
    for (int64_t i = 0; i < t.rows; ++i) {
      float peak = lse ? -kInf : 0.0f;
      for (int64_t k = 0; lse && k < stripes; ++k) peak = std::max(peak, in[k * t.rows + i].max);
      double total = 0;
      for (int64_t k = 0; k < stripes; ++k) {
        const Partial& part = in[k * t.rows + i];
        // A stripe with nothing chosen has max -inf and sum 0; -inf - -inf must not make it NaN.
        if (part.sum == 0.0f) continue;
        total += lse ? part.sum * std::exp(static_cast<double>(part.max) - peak) : part.sum;
      }
      out[i] = static_cast<float>(lse ? peak + std::log(total) : total);
    }
  });
  return CCU_OK;
}

}  // namespace CCU_ISA
}  // namespace ccu
