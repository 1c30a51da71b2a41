// l2_normalize: rows of unit length, and its gradient.
//
//   forward     out = x * inverse,  inverse = 1 / max(|x|, eps)                              |.| over a row
//   backward    dx = (g - (u . g) u) * inverse,  u = x * inverse;  dx = g / eps where |x| < eps
//
// Memory bound: x is read and out written once (backward: two reads, one write); the second pass over a row finds it in
// the cache. All arithmetic is in fp32, rounded once. A task is a block of whole rows, so the result does not depend on
// the number of threads.
#include <algorithm>
#include <cmath>

#include "../ccu_fast.h"
#include "../common/half.h"
#include "parallel.h"

namespace ccu {
namespace CCU_ISA {
namespace {

constexpr int64_t kBlock = 1 << 14;
// Number of independent sums, so that their additions overlap.
constexpr int kSums = 32;

// sum_i term(i), always in the same order.
template <class Term>
float total(int64_t n, const Term& term) {
  float sum[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int s = 0; s < kSums; ++s) sum[s] += term(i + s);
  for (int s = 0; i < n; ++i, ++s) sum[s] += term(i);
  for (int width = kSums / 2; width > 0; width /= 2)
    for (int s = 0; s < width; ++s) sum[s] += sum[s + width];
  return sum[0];
}

template <class X, class Out>
void forward_row(const X* __restrict x, Out* __restrict out, float* inverse, int64_t n, float eps) {
  const float norm = std::sqrt(total(n, [&](int64_t i) {
    const float v = to_float(x[i]);
    return v * v;
  }));
  const float factor = 1.0f / (norm < eps ? eps : norm);  // NaN stays NaN
  *inverse = factor;
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<Out>(to_float(x[i]) * factor);
}

template <class X, class G>
void backward_row(const X* __restrict x, const G* __restrict grad, X* __restrict out, float inverse, int64_t n,
                  float eps) {
  const float along = total(n, [&](int64_t i) { return to_float(x[i]) * to_float(grad[i]); }) * inverse;
  const float toward = inverse < 1.0f / eps ? along * inverse : 0.0f;
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<X>((to_float(grad[i]) - toward * to_float(x[i])) * inverse);
}

template <class Row>
int each_row(const ccu_l2_normalize_args& a, const Row& row) {
  const int64_t block = std::max<int64_t>(1, kBlock / std::max<int64_t>(a.dim, 1));
  parallel_for((a.rows + block - 1) / block, threads_for(a.threads, 12.0 * a.rows * a.dim), [&](int64_t task) {
    const int64_t last = std::min(a.rows, (task + 1) * block);
    for (int64_t i = task * block; i < last; ++i) row(i, i * a.dim);
  });
  return CCU_OK;
}

// Calls body with a value of the type that dtype names.
template <class Body>
int with_type(int32_t dtype, const Body& body) {
  switch (dtype) {
    case CCU_F32:
      return body(float{});
    case CCU_F16:
      return body(f16{});
    case CCU_BF16:
      return body(bf16{});
    default:
      return CCU_BAD_ARGUMENT;
  }
}

bool bad(const ccu_l2_normalize_args& a) { return a.rows < 0 || a.dim < 0 || a.inverse == nullptr || !(a.eps > 0.0f); }

}  // namespace

int l2_normalize(const ccu_l2_normalize_args& a) {
  if (bad(a)) return CCU_BAD_ARGUMENT;
  return with_type(a.dtype, [&](auto x_type) {
    return with_type(a.other_dtype, [&](auto out_type) {
      const auto* x = static_cast<const decltype(x_type)*>(a.x);
      auto* out = static_cast<decltype(out_type)*>(a.out);
      return each_row(a, [&](int64_t i, int64_t at) { forward_row(x + at, out + at, a.inverse + i, a.dim, a.eps); });
    });
  });
}

int l2_normalize_backward(const ccu_l2_normalize_args& a) {
  if (bad(a)) return CCU_BAD_ARGUMENT;
  return with_type(a.dtype, [&](auto x_type) {
    return with_type(a.other_dtype, [&](auto grad_type) {
      const auto* x = static_cast<const decltype(x_type)*>(a.x);
      const auto* grad = static_cast<const decltype(grad_type)*>(a.grad);
      auto* out = static_cast<decltype(x_type)*>(a.out);
      return each_row(
          a, [&](int64_t i, int64_t at) { backward_row(x + at, grad + at, out + at, a.inverse[i], a.dim, a.eps); });
    });
  });
}

}  // namespace CCU_ISA
}  // namespace ccu
