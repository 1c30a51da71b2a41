// InfoNCE of one small paired batch, and its gradients. In plain torch, with S = scale * dot and dot = x @ y.T:
//
//     off = ~torch.eye(items, dtype=torch.bool)
//     z = (torch.where(off, S, -inf).logsumexp(1) - S.diagonal())          and the same of dim 0 if symmetric
//     loss = weight * F.softplus(z).sum()
//     dot <- scale * G, G = d loss / d S,  scale_grad = (G * dot).sum()    if wanted
//     dx = factor * (scale * G) @ y,  dy = factor * (scale * G).T @ x      the backward pass
//
// Work: 2 * items^2 * dim FLOPs forward, unless the caller brings dot, and twice that backward; between them one
// exponential a pair and four passes over dot, items^2 * 4 bytes, which stay in the caches. One call each way, because
// at a hundred items the calls of a tensor library for what lies between the products would take as long as they do.
//
// With M the largest S off the diagonal, E = exp(S - M) is computed once and serves rows, columns and gradient:
//
//     r = E.sum(1), c = E.sum(0);  G = E * (w sigmoid(z_row) / r + w sigmoid(z_col) / c)    off the diagonal
//
// That loses nothing as long as no row's or column's largest is further than kSpread below M; otherwise, and for inf
// and NaN, the kernels of similarity_forward.cpp and similarity_backward.cpp do the same at twice the cost.
//
// A task of the forward pass is a block of rows, whose part of every column's sum is merged in the order of the blocks;
// of the backward pass a block of rows and columns of dx or dy. Neither depends on the number of threads.
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "../ccu_fast.h"
#include "parallel.h"
#include "relations.h"
#include "simd.h"
#include "small_products.h"

namespace ccu {
namespace CCU_ISA {

int similarity_forward(const ccu_similarity_forward_args& a);
int similarity_backward(const ccu_similarity_backward_args& a);

namespace {

// E >= exp(-kSpread) for the largest of a sum, so terms of 2^-24 of it are normal numbers in fp32.
constexpr float kSpread = 60.0f;
// Of a product, what threads_for would count: these run at more than twice the rate that it assumes, and a team that is
// started for 30 us of work waits longer than that for its last thread when the cores have other work.
constexpr double kProductFmas = 0.4;
// An exponential and what else happens to a pair, in multiply-adds.
constexpr double kPairFmas = 24;

struct Margin {
  double softplus, sigmoid;
  explicit Margin(double z) {
    const double e = std::exp(z > 0 ? -z : z);  // at most 1; NaN for NaN
    softplus = (z > 0 ? z : 0.0) + std::log1p(e);
    sigmoid = (z > 0 ? 1.0 : e) / (1 + e);
  }
};

// For every range of S: lse of rows and columns by themselves, then G from a second exponential.
int at_any_range(const ccu_small_info_nce_args& a) {
  const int64_t n = a.items;
  ccu_tile t{};
  t.dot = a.dot;
  t.dot_dtype = CCU_F32;
  t.banks = 1;
  t.rows = t.cols = n;
  t.scale = a.scale;
  t.diagonal = 1;
  t.n_row = 2;
  t.row_codes[0] = t.col_codes[0] = kLse * 8 + kOther;
  t.row_codes[1] = kSum * 8 + kSelf;
  t.n_col = a.symmetric ? 1 : 0;
  t.threads = threads_for(a.threads, 0, kPairFmas * n * n);
  const std::unique_ptr<float[]> floats(new (std::nothrow) float[7 * n]);
  const std::unique_ptr<double[]> doubles(new (std::nothrow) double[3 * n]);
  if (!floats || !doubles) return CCU_OUT_OF_MEMORY;
  // Results, and the loss's gradient with respect to them: lse of rows, own, lse of columns.
  float *const lse = floats.get(), *const own = lse + n, *const col_lse = own + n;
  float *const row_grad = col_lse + n, *const own_grad = row_grad + n, *const col_grad = own_grad + n;
  float* const col_max = col_grad + n;
  double* const col_sum = doubles.get();
  std::fill(col_max, col_max + n, -kInf);
  std::fill(col_sum, col_sum + n, 0.0);
  int status = similarity_forward({t, lse, n, n, col_max, col_sum, n});
  if (status != CCU_OK) return status;

  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Margin row(static_cast<double>(lse[i]) - own[i]);
    total += row.softplus;
    row_grad[i] = static_cast<float>(a.weight * row.sigmoid);
    own_grad[i] = -row_grad[i];
    if (t.n_col == 0) continue;
    const double of_column = col_max[i] + std::log(col_sum[i]);
    const Margin column(of_column - own[i]);
    total += column.softplus;
    col_lse[i] = static_cast<float>(of_column);
    col_grad[i] = static_cast<float>(a.weight * column.sigmoid);
    own_grad[i] = static_cast<float>(-a.weight * (row.sigmoid + column.sigmoid));
  }
  *a.loss = static_cast<float>(a.weight * total);
  if (a.scale_grad == nullptr) return CCU_OK;

  double* const by_row = doubles.get() + n;
  status = similarity_backward(
      {t, row_grad, lse, n, n, col_grad, col_lse, n, a.dot, CCU_F32, by_row, by_row + n, 0, nullptr});
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += by_row[i];
  *a.scale_grad = static_cast<float>(sum);
  return status;
}

// The passes over dot of a problem whose range allows one exponential.
struct Batch {
  const ccu_small_info_nce_args& a;
  int64_t n, blocks;
  // Of rows; and of columns, a row of n for every block.
  float *top, *own, *sum, *moment;        // moment = (E * dot).sum
  float *col_top, *col_sum, *col_moment;  // col_sum replaces col_top

  static int64_t blocks_of(int64_t items) { return (items + kRowsAtOnce - 1) / kRowsAtOnce; }
  static int64_t floats(int64_t items) { return 4 * items + 2 * blocks_of(items) * items; }

  Batch(const ccu_small_info_nce_args& args, float* room)
      : a(args),
        n(args.items),
        blocks(blocks_of(args.items)),
        top(room),
        own(room + n),
        sum(room + 2 * n),
        moment(room + 3 * n),
        col_top(room + 4 * n),
        col_sum(col_top),
        col_moment(col_top + blocks * n) {}

  template <class Rows>
  void for_blocks(double fmas, const Rows& rows) const {
    parallel_for(blocks, threads_for(a.threads, 0, fmas),
                 [&](int64_t block) { rows(block, block * kRowsAtOnce, std::min(n, (block + 1) * kRowsAtOnce)); });
  }

  // Calls step(j, lanes, which of them are not i).
  template <class Step>
  void for_others(int64_t i, const Step& step) const {
    const int64_t own_vector = i / kLanes * kLanes;
    for_vectors(0, n, [&](int64_t j, auto lanes) {
      if (j == own_vector) {
        step(j, lanes, iota() != splat(static_cast<int32_t>(i - j)));
      } else {
        step(j, lanes, splat(-1));
      }
    });
  }

  // dot, if it is not there yet, and the largest S of rows and of columns.
  void find_ranges() const {
    const Features x{a.x, a.dim, a.dtype, a.rounded}, y{a.y, a.dim, a.dtype, a.rounded};
    const double fmas = a.x == nullptr ? 4.0 : 4.0 + kProductFmas * a.dim;
    for_blocks(fmas * n * n, [&](int64_t block, int64_t first, int64_t last) {
      if (a.x != nullptr) multiply_rows(x, y, first, last, n, a.dot);
      float* const of_cols = col_top + block * n;
      std::fill(of_cols, of_cols + n, -kInf);
      for (int64_t i = first; i < last; ++i) {
        vf highest = splat(-kInf);
        for_others(i, [&](int64_t j, auto lanes, vi others) {
          const vi used = others & in_use(lanes);
          const vf s = used ? load<vf>(a.dot + i * n + j, lanes) * a.scale : splat(-kInf);
          highest = max(highest, s);
          if (a.symmetric) store(of_cols + j, max(load<vf>(of_cols + j, lanes), s), lanes);
        });
        top[i] = max(highest);
        own[i] = a.dot[i * n + i];
      }
    });
  }

  // The largest S of all; false if it cannot be everyone's shift.
  bool shift_of_all(float* shift) const {
    float lowest = top[0], highest = top[0];
    const auto note = [&](float value) {
      lowest = value < lowest ? value : lowest;
      highest = value > highest ? value : highest;
    };
    for (int64_t i = 0; i < n; ++i) note(top[i]);
    for (int64_t j = 0; a.symmetric && j < n; ++j) {
      float of_column = -kInf;
      for (int64_t block = 0; block < blocks; ++block) of_column = std::max(of_column, col_top[block * n + j]);
      note(of_column);
    }
    *shift = highest;
    return std::isfinite(highest) && lowest >= highest - kSpread;  // no row or column without another: -inf
  }

  // E, in the place of dot, and its sums. A NaN that the ranges have passed over is in every sum it belongs to.
  void exponentials(float shift) const {
    const bool keep = a.scale_grad != nullptr;
    for_blocks(kPairFmas * n * n, [&](int64_t block, int64_t first, int64_t last) {
      float *const sums = col_sum + block * n, *const moments = col_moment + block * n;
      if (a.symmetric) std::fill(sums, sums + n, 0.0f), std::fill(moments, moments + n, 0.0f);
      for (int64_t i = first; i < last; ++i) {
        vf total = splat(0.0f), moved = splat(0.0f);
        float* const row = a.dot + i * n;
        for_others(i, [&](int64_t j, auto lanes, vi others) {
          const vf dot = load<vf>(row + j, lanes);
          const vf e = others & in_use(lanes) ? exp(dot * a.scale - shift) : splat(0.0f);
          const vf product = others & in_use(lanes) ? e * dot : splat(0.0f);
          total += e;
          moved += product;
          if (keep) store(row + j, e, lanes);
          if (!a.symmetric) return;
          store(sums + j, load<vf>(sums + j, lanes) + e, lanes);
          store(moments + j, load<vf>(moments + j, lanes) + product, lanes);
        });
        sum[i] = ccu::CCU_ISA::sum(total);
        moment[i] = ccu::CCU_ISA::sum(moved);
      }
    });
  }

  // Loss, d loss / d scale, and what E of each row and column is multiplied by to become scale * G, in place of its
  // sum.
  void margins(float shift) const {
    double total = 0, by_scale = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double positive = static_cast<double>(a.scale) * own[i];
      const Margin row(shift + std::log(static_cast<double>(sum[i])) - positive);
      double pull = row.sigmoid, per_exp = row.sigmoid / sum[i];
      total += row.softplus;
      by_scale += per_exp * moment[i];
      sum[i] = static_cast<float>(a.scale * a.weight * per_exp);
      if (a.symmetric) {
        double of_column = 0, moved = 0;
        for (int64_t block = 0; block < blocks; ++block) {
          of_column += col_sum[block * n + i];
          moved += col_moment[block * n + i];
        }
        const Margin column(shift + std::log(of_column) - positive);
        per_exp = column.sigmoid / of_column;
        total += column.softplus;
        by_scale += per_exp * moved;
        pull += column.sigmoid;
        col_sum[i] = static_cast<float>(a.scale * a.weight * per_exp);
      }
      by_scale -= pull * own[i];
      own[i] = static_cast<float>(-a.scale * a.weight * pull);
    }
    *a.loss = static_cast<float>(a.weight * total);
    if (a.scale_grad != nullptr) *a.scale_grad = static_cast<float>(a.weight * by_scale);
  }

  void gradient() const {
    for_blocks(4.0 * n * n, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        float* const row = a.dot + i * n;
        for_vectors(0, n, [&](int64_t j, auto lanes) {
          vf factors = splat(sum[i]);
          if (a.symmetric) factors += load<vf>(col_sum + j, lanes);
          store(row + j, load<vf>(row + j, lanes) * factors, lanes);
        });
        row[i] = own[i];
      }
    });
  }
};

}  // namespace

int small_info_nce(const ccu_small_info_nce_args& a) {
  const std::unique_ptr<float[]> room(new (std::nothrow) float[Batch::floats(a.items)]);
  if (!room) return CCU_OUT_OF_MEMORY;
  const Batch batch(a, room.get());
  batch.find_ranges();
  float shift;
  if (!batch.shift_of_all(&shift)) return at_any_range(a);
  batch.exponentials(shift);
  batch.margins(shift);
  if (a.scale_grad != nullptr) batch.gradient();
  return CCU_OK;
}

int small_info_nce_backward(const ccu_small_info_nce_backward_args& a) {
  if (a.dscale != nullptr) *a.dscale = a.factor * *a.scale_grad;
  const Product of_x{a.grad, false, {a.y, a.dim, a.dtype, a.rounded}, a.items, a.factor, a.dx};
  const Product of_y{a.grad, true, {a.x, a.dim, a.dtype, a.rounded}, a.items, a.factor, a.dy};
  const int64_t tasks = of_x.tasks() + of_y.tasks();
  const int products = (a.dx != nullptr) + (a.dy != nullptr);
  const double fmas = kProductFmas * products * a.items * a.items * a.dim;
  const int threads = static_cast<int>(std::min<int64_t>(threads_for(a.threads, 0, fmas), std::max<int64_t>(tasks, 1)));
  const int64_t size = a.items * kPanel;
  const std::unique_ptr<float[]> panels(new (std::nothrow) float[threads * size]);
  if (!panels) return CCU_OUT_OF_MEMORY;
  // As many takers as threads, each with a panel; a task is whoever's comes first.
  std::atomic<int64_t> next{0};
  parallel_for(threads, threads, [&](int64_t taker) {
    float* const panel = panels.get() + taker * size;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      if (task < of_x.tasks()) {
        of_x.run(task, panel);
      } else {
        of_y.run(task - of_x.tasks(), panel);
      }
    }
  });
  return CCU_OK;
}

}  // namespace CCU_ISA
}  // namespace ccu
