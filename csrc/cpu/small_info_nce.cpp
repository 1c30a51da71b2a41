// InfoNCE of one small paired batch, and its gradient with respect to dot = x y^T:
//
//     z_i = log(sum_{j != i} exp(S_ij)) - S_ii                  the same of columns
//     loss = weight * sum_i log(1 + exp(z_i))
//     dot <- scale * d loss / d S                               if scale_grad is wanted, d loss / d scale
//
// Work: that of similarity_forward.cpp and similarity_backward.cpp, which it calls. In one call, because at a hundred
// items the calls of a tensor library for what lies between them would take as long as they do.
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "../ccu_fast.h"
#include "simd.h"

namespace ccu {
namespace CCU_ISA {

int similarity_forward(const ccu_similarity_forward_args& a);
int similarity_backward(const ccu_similarity_backward_args& a);

namespace {

struct Margin {
  double softplus, sigmoid;
  explicit Margin(double z) : softplus(z > 50 ? z : std::log1p(std::exp(z))), sigmoid(1 / (1 + std::exp(-z))) {}
};

}  // namespace

int small_info_nce(const ccu_small_info_nce_args& a) {
  const ccu_tile& t = a.tile;
  const int64_t n = t.rows;
  if (t.banks != 1 || t.cols != n || t.n_row != 2 || t.n_col > 1) return CCU_UNSUPPORTED;
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
      {t, row_grad, lse, n, n, col_grad, col_lse, n, const_cast<void*>(t.dot), CCU_F32, by_row, by_row + n});
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += by_row[i];
  *a.scale_grad = static_cast<float>(sum);
  return status;
}

}  // namespace CCU_ISA
}  // namespace ccu
