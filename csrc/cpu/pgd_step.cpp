// pgd_step: one projected gradient step on adversarial or error-minimising noise, in place.
//
//   linf:  delta = clamp(clamp(delta - step * sign(grad), -eps, eps) + image, lower, upper) - image
//   l2:    delta = delta - step * grad / |grad|;  delta *= min(1, eps / |delta|);
//          delta = clamp(delta + image, lower, upper) - image                        |.| over a sample
//   and, on request, out = delta + image, from the sum before the image is subtracted
//
// Memory bound: three reads and one write of the tensor (l2: the reductions read again), plus one read of grad when it
// is checked. A task is a fixed block of elements and partial sums are added in block order, so the result does not
// depend on the number of threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <vector>

#include "../ccu_fast.h"
#include "../common/half.h"
#include "../common/pgd.h"
#include "parallel.h"

namespace ccu {
namespace CCU_ISA {
namespace {

constexpr int64_t kBlock = 1 << 15;

template <class T, class G>
class Step {
 public:
  explicit Step(const ccu_pgd_step_args& a)
      : a_(a),
        delta_(static_cast<T*>(a.delta)),
        grad_(static_cast<const G*>(a.grad)),
        image_(static_cast<const T*>(a.image)),
        out_(static_cast<T*>(a.out)),
        sample_(a.channels * a.inner),
        blocks_((sample_ + kBlock - 1) / kBlock) {}

  void run() {
    *a_.found = 0;
    if (a_.norm == CCU_L2) return l2();
    if (a_.check && any_nan()) {
      *a_.found = 1;
      return;
    }
    each_block([&](int64_t sample, int64_t begin, int64_t end) {
      each_channel(begin, end, [&](int64_t c, int64_t from, int64_t to) {
        const PgdParameters p = pgd_parameters(a_, c);
        apply(sample * sample_ + from, to - from, p, [&](float delta, float grad) { return pgd_linf(delta, grad, p); });
      });
    });
  }

 private:
  // body(sample, begin, end): blocks of one sample's elements.
  template <class Body>
  void each_block(const Body& body) const {
    parallel_for(a_.samples * blocks_, threads_for(a_.threads, 12.0 * a_.samples * sample_), [&](int64_t task) {
      const int64_t begin = task % blocks_ * kBlock;
      body(task / blocks_, begin, std::min(begin + kBlock, sample_));
    });
  }

  // body(channel, from, to): the parts of a block that share parameters.
  template <class Body>
  void each_channel(int64_t begin, int64_t end, const Body& body) const {
    for (int64_t from = begin; from < end;) {
      const int64_t c = from / a_.inner, to = std::min(end, (c + 1) * a_.inner);
      body(c, from, to);
      from = to;
    }
  }

  bool any_nan() const {
    std::atomic<bool> found{false};
    each_block([&](int64_t sample, int64_t begin, int64_t end) {
      const G* g = grad_ + sample * sample_;
      int32_t nan = 0;
      for (int64_t i = begin; i < end; ++i) {
        const float x = to_float(g[i]);
        nan |= x != x;
      }
      if (nan) found.store(true, std::memory_order_relaxed);
    });
    return found;
  }

  // The final projection of n elements, and the image if requested.
  template <class Move>
  void apply(int64_t at, int64_t n, const PgdParameters& p, const Move& move) const {
    T* __restrict delta = delta_ + at;
    const G* __restrict grad = grad_ + at;
    const T* __restrict image = image_ + at;
    if (out_ == nullptr) {
      for (int64_t i = 0; i < n; ++i)
        delta[i] = from_float<T>(pgd_image(move(to_float(delta[i]), to_float(grad[i])), to_float(image[i]), p) -
                                 to_float(image[i]));
      return;
    }
    T* __restrict out = out_ + at;
    for (int64_t i = 0; i < n; ++i) {
      const float sum = pgd_image(move(to_float(delta[i]), to_float(grad[i])), to_float(image[i]), p);
      delta[i] = from_float<T>(sum - to_float(image[i]));
      out[i] = from_float<T>(sum);
    }
  }

  // Sums of squares per sample, of value(sample, i) with i counted over the whole tensor.
  template <class Value>
  std::vector<double> square_sums(const Value& value) const {
    std::vector<double> parts(a_.samples * blocks_), sums(a_.samples, 0.0);
    each_block([&](int64_t sample, int64_t begin, int64_t end) {
      // Independent sums, so that their additions overlap.
      constexpr int kSums = 16;
      double sum[kSums] = {};
      const int64_t from = sample * sample_ + begin, n = end - begin;
      int64_t i = 0;
      for (; i + kSums <= n; i += kSums)
        for (int s = 0; s < kSums; ++s) {
          const double x = value(sample, from + i + s);
          sum[s] += x * x;
        }
      for (; i < n; ++i) {
        const double x = value(sample, from + i);
        sum[0] += x * x;
      }
      double total = 0.0;
      for (const double part : sum) total += part;
      parts[sample * blocks_ + begin / kBlock] = total;
    });
    for (int64_t s = 0; s < a_.samples; ++s)
      for (int64_t b = 0; b < blocks_; ++b) sums[s] += parts[s * blocks_ + b];
    return sums;
  }

  void l2() const {
    const bool check = a_.check;
    std::vector<double> grads = square_sums([&](int64_t, int64_t i) {
      const float g = to_float(grad_[i]);
      return check ? g : finite_or_zero(g);
    });
    for (const double squares : grads)
      if (!std::isfinite(squares)) {
        *a_.found = 1;
        return;
      }
    std::vector<float> rate(a_.samples), shrink(a_.samples);
    for (int64_t s = 0; s < a_.samples; ++s) rate[s] = pgd_rate(grads[s], a_.step);
    const std::vector<double> norms =
        square_sums([&](int64_t s, int64_t i) { return pgd_l2(to_float(delta_[i]), to_float(grad_[i]), rate[s]); });
    for (int64_t s = 0; s < a_.samples; ++s) shrink[s] = pgd_shrink(norms[s], a_.eps);
    each_block([&](int64_t sample, int64_t begin, int64_t end) {
      each_channel(begin, end, [&](int64_t c, int64_t from, int64_t to) {
        const float by = rate[sample], factor = shrink[sample];
        apply(sample * sample_ + from, to - from, pgd_parameters(a_, c),
              [=](float delta, float grad) { return pgd_l2(delta, grad, by) * factor; });
      });
    });
  }

  const ccu_pgd_step_args& a_;
  T* const delta_;
  const G* const grad_;
  const T* const image_;
  T* const out_;
  const int64_t sample_, blocks_;
};

template <class T>
int with_grad(const ccu_pgd_step_args& a) {
  switch (a.grad_dtype) {
    case CCU_F32:
      return Step<T, float>(a).run(), CCU_OK;
    case CCU_F16:
      return Step<T, f16>(a).run(), CCU_OK;
    case CCU_BF16:
      return Step<T, bf16>(a).run(), CCU_OK;
    default:
      return CCU_BAD_ARGUMENT;
  }
}

}  // namespace

int pgd_step(const ccu_pgd_step_args& a) {
  if (a.samples < 0 || a.channels < 1 || a.inner < 0 || a.found == nullptr) return CCU_BAD_ARGUMENT;
  if (a.samples == 0 || a.inner == 0) return *a.found = 0, CCU_OK;
  try {
    switch (a.dtype) {
      case CCU_F32:
        return with_grad<float>(a);
      case CCU_F16:
        return with_grad<f16>(a);
      case CCU_BF16:
        return with_grad<bf16>(a);
      default:
        return CCU_BAD_ARGUMENT;
    }
  } catch (const std::bad_alloc&) {
    return CCU_OUT_OF_MEMORY;
  }
}

}  // namespace CCU_ISA
}  // namespace ccu
