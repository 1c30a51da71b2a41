// The end of topk_flips: float64 scores of the few tokens that the scan of a row leaves, or of all, and the answer.
#ifndef CCU_FAST_CPU_TOPK_RESCORE_H_
#define CCU_FAST_CPU_TOPK_RESCORE_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../ccu_fast.h"
#include "topk_dot.h"

namespace ccu {
namespace CCU_ISA {

struct Scored {
  double score, dot;
  int32_t token;
  friend bool operator<(const Scored& a, const Scored& b) {
    return a.score < b.score || (a.score == b.score && a.token < b.token);
  }
};

class Rescorer {
 public:
  explicit Rescorer(const ccu_topk_flips_args& a) : a_(a), dot_(a) {}

  bool may_use(int64_t i, int64_t token) const {
    if (a_.allowed != nullptr && !a_.allowed[i * a_.allowed_stride + token]) return false;
    return !a_.exclude_current || id_of(token) != a_.current[i];
  }

  Scored operator()(int64_t i, int32_t token) const {
    const double dot = dot_(id_of(token), a_.grad + i * a_.dim);
    const double penalty = a_.penalty != nullptr ? a_.penalty[i * a_.penalty_stride + token] : 0.0;
    return {(a_.maximize ? -dot : dot) + penalty, dot, token};
  }

  // The k best of all tokens that row i may use, and perhaps some more.
  void all(int64_t i, std::vector<Scored>* best) const {
    const size_t k = a_.k, limit = 2 * k + 32;
    best->clear();
    best->reserve(std::min<size_t>(limit, a_.tokens));
    double cutoff = std::numeric_limits<double>::infinity();
    bool full = false;
    for (int64_t token = 0; token < a_.tokens; ++token) {
      if (!may_use(i, token)) continue;
      const Scored scored = (*this)(i, static_cast<int32_t>(token));
      if (full && !(scored.score < cutoff)) continue;
      best->push_back(scored);
      if (best->size() == limit) {
        std::nth_element(best->begin(), best->begin() + (k - 1), best->end());
        cutoff = (*best)[k - 1].score;
        best->resize(k);
        full = true;
      }
    }
  }

  // The answer of row i.
  void write(int64_t i, std::vector<Scored>* best) const {
    const int64_t n = std::min<int64_t>(a_.k, best->size());
    std::partial_sort(best->begin(), best->begin() + n, best->end());
    const double current = a_.current != nullptr && n > 0 ? dot_(a_.current[i], a_.grad + i * a_.dim) : 0.0;
    a_.count[i] = n;
    for (int64_t c = 0; c < a_.k; ++c) {
      const int64_t out = i * a_.k + c;
      if (c < n) {
        const Scored& s = (*best)[c];
        a_.ids[out] = id_of(s.token);
        a_.delta[out] = static_cast<float>(s.dot - current);
        a_.score[out] = s.score - (a_.maximize ? -current : current);
      } else {
        a_.ids[out] = -1;
        a_.delta[out] = std::numeric_limits<float>::quiet_NaN();
        a_.score[out] = std::numeric_limits<double>::infinity();
      }
    }
  }

 private:
  int64_t id_of(int64_t token) const { return a_.token_ids != nullptr ? a_.token_ids[token] : token; }

  const ccu_topk_flips_args& a_;
  const Dot dot_;
};

}  // namespace CCU_ISA
}  // namespace ccu

#endif  // CCU_FAST_CPU_TOPK_RESCORE_H_
