// Selects the k lowest of many scores, for CPU and GPU: the order, the bound, and the sorting networks.
#ifndef CCU_FAST_COMMON_SELECT_H_
#define CCU_FAST_COMMON_SELECT_H_

#include <math.h>

#include "half.h"

namespace ccu {

// Rounding unit of fp32.
constexpr double kUnit = 1.0 / (1 << 24);

// Maps floats to unsigned integers of the same order; -0 equals +0, and no number maps to kNever.
constexpr uint32_t kNever = 0xffffffffu;
CCU_HD uint32_t ordered(float x) {
  const uint32_t u = bits_of(x + 0.0f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
CCU_HD float unordered(uint32_t key) { return float_of(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// If every score is off by at most err, a token whose score is above this cannot be among the k best by true score.
// `kth` is an upper bound of the k-th lowest score; the margin is twice err, plus the rounding of this sum itself.
CCU_HD float cutoff_above(float kth, double err) {
  const double cutoff = kth + 2.02 * err + 4.0 * kUnit * fabs(static_cast<double>(kth));
  return nextafterf(static_cast<float>(cutoff), INFINITY);
}

// (score, lowest token): the order of the result.
CCU_HD bool before(double score_a, int32_t token_a, double score_b, int32_t token_b) {
  return score_a < score_b || (score_a == score_b && token_a < token_b);
}

// The k-th lowest of a set of keys, bit by bit from the top: count(v) says how many keys are at most v. Gives kNever if
// there are fewer than `k` keys.
template <class Count>
CCU_HD uint32_t kth_key(int64_t k, const Count& count) {
  uint32_t high = 0;  // the answer is in [high, high + 2^(bit + 1) - 1]
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t half = 1u << bit;
    if (count(high + (half - 1)) < k) high += half;
  }
  return high;
}

// One comparator of a bitonic sort of a power of two of items: number `c` of the stage (size, stride) compares
// positions i and j = i + stride and puts the lower first where `up`.
struct Comparator {
  int i, j;
  bool up;
};
CCU_HD Comparator comparator(int c, int size, int stride) {
  const int i = 2 * stride * (c / stride) + c % stride;
  return {i, i + stride, (i & size) == 0};
}

}  // namespace ccu

#endif  // CCU_FAST_COMMON_SELECT_H_
