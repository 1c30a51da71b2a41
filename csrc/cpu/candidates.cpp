// candidate_losses without its two GEMMs.
//
//   candidate_rest:    from s = scale image text^T [B images, B texts]
//       rest[b, i] = log sum_{j != b} exp(s[i, j])
//       fixed[b]   = sum_{j != b} (log sum_i exp(s[i, j]) - 2 s[j, j])
//   candidate_losses:  from n = scale text_candidates image^T [rows, K, B], where row r is text first + r
//       out[r, k] = (fixed[b] + sum_i log(exp(rest[b, i]) + exp(n[i])) + log sum_i exp(n[i]) - 2 n[b]) / 2 B
//
// A row's sum without one term is the sum minus that term. If the term is more than half of the sum, which at most one
// is, the others are added up anew, so that nothing cancels. Each element takes two exponentials and one logarithm and
// is read once, from the cache where the GEMM left it.
#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "../ccu_fast.h"
#include "parallel.h"
#include "simd.h"

namespace ccu {
namespace CCU_ISA {
namespace {

struct Lse {
  float peak;
  double sum;
  double value() const { return peak + std::log(sum); }
};

// Sums the lanes of at most a few hundred vectors in fp32, then in fp64.
template <class Value>
double add_up(int64_t n, const Value& value) {
  constexpr int64_t kBlock = 256;
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    vf acc = {};
    for_vectors(begin, std::min(begin + kBlock, n), [&](int64_t j, auto lanes) {
      const vf x = value(j, lanes);
      acc += in_use(lanes) ? x : vf{};
    });
    total += sum(acc);
  }
  return total;
}

float peak_of(const float* x, int64_t n) {
  vf peak = splat(-kInf);
  for_vectors(0, n, [&](int64_t j, auto lanes) {
    const vf v = load<vf>(x + j, lanes);
    peak = max(peak, in_use(lanes) ? v : splat(-kInf));
  });
  return max(peak);
}

// log sum exp of x; one exponential per element.
Lse lse(const float* x, int64_t n) {
  const float peak = peak_of(x, n);
  return {peak, add_up(n, [&](int64_t j, auto lanes) { return exp(load<vf>(x + j, lanes) - peak); })};
}

// log sum_{j != skip} exp(x_j), summed directly.
double lse_without(const float* x, int64_t n, int64_t skip) {
  float peak = -kInf;
  for (int64_t j = 0; j < n; ++j)
    if (j != skip) peak = std::max(peak, x[j]);
  if (!(peak > -kInf)) return peak;
  double total = 0.0;
  for (int64_t j = 0; j < n; ++j)
    if (j != skip) total += std::exp(static_cast<double>(x[j]) - peak);
  return peak + std::log(total);
}

}  // namespace

int candidate_rest(const ccu_candidate_rest_args& a) {
  if (a.batch < 1) return CCU_BAD_ARGUMENT;
  const int64_t n = a.batch;
  try {
    std::vector<double> columns(n);
    const int threads = threads_for(a.threads, 0.0, 64.0 * n * n);  // a float64 exponential takes as long as 64 of them
    parallel_for(n, threads, [&](int64_t i) {
      const float* s = a.s + i * n;
      float peak = peak_of(s, n);
      double total = 0.0;
      for (int64_t j = 0; j < n; ++j) total += std::exp(static_cast<double>(s[j]) - peak);
      for (int64_t b = 0; b < n; ++b) {
        const double term = std::exp(static_cast<double>(s[b]) - peak);
        const double rest = term > 0.5 * total ? lse_without(s, n, b) : peak + std::log(total - term);
        a.rest[b * n + i] = static_cast<float>(rest);
      }
    });
    parallel_for(n, threads, [&](int64_t j) {
      double total = 0.0;
      float peak = -kInf;
      for (int64_t i = 0; i < n; ++i) peak = std::max(peak, a.s[i * n + j]);
      for (int64_t i = 0; i < n; ++i) total += std::exp(static_cast<double>(a.s[i * n + j]) - peak);
      columns[j] = peak + std::log(total) - 2.0 * a.s[j * n + j];
    });
    double all = 0.0;
    for (const double column : columns) all += column;
    for (int64_t b = 0; b < n; ++b) a.fixed[b] = all - columns[b];
    return CCU_OK;
  } catch (const std::bad_alloc&) {
    return CCU_OUT_OF_MEMORY;
  }
}

int candidate_losses(const ccu_candidate_losses_args& a) {
  if (a.batch < 1 || a.rows < 0 || a.candidates < 0) return CCU_BAD_ARGUMENT;
  const int64_t n = a.batch;
  const int threads = threads_for(a.threads, 0.0, 32.0 * a.rows * a.candidates * n);  // two fp32 exponentials
  parallel_for(a.rows * a.candidates, threads, [&](int64_t task) {
    const int64_t b = a.first + task / a.candidates;
    const float* x = a.similarity + task * n;
    const float* rest = a.rest + b * n;
    const double images = add_up(n, [&](int64_t i, auto lanes) {
      const vf r = load<vf>(rest + i, lanes), v = load<vf>(x + i, lanes);
      // Without any other text the rest is -inf and the new term stands alone.
      return r > -kInf ? r + softplus(v - r) : v;
    });
    a.out[b * a.candidates + task % a.candidates] =
        static_cast<float>((a.fixed[b] + images + lse(x, n).value() - 2.0 * x[b]) / (2.0 * n));
  });
  return CCU_OK;
}

}  // namespace CCU_ISA
}  // namespace ccu
