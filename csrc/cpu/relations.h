// Which columns of a row belong to a reduction: the relation of every pair, a vector of columns at a time.
#ifndef CCU_FAST_CPU_RELATIONS_H_
#define CCU_FAST_CPU_RELATIONS_H_

#include "../ccu_fast.h"
#include "simd.h"

namespace ccu {
namespace CCU_ISA {

enum : int32_t { kSelf = 1, kSame = 2, kOther = 4 };
enum Kind : int32_t { kLse = 0, kSum = 1, kSoftplus = 2, kLogSigmoid = 3, kCount = 4, kMass = 5, kExpected = 6 };

// How much of the relation must be checked. Most problems need nothing or only the diagonal. The last three are the
// same with a limit on OTHER pairs.
enum class Mode { kAll, kDiagonal, kGeneral, kAllLimited, kDiagonalLimited, kGeneralLimited };

constexpr bool is_limited(Mode mode) { return mode >= Mode::kAllLimited; }
// The mode without the limit.
constexpr Mode base_of(Mode mode) {
  return mode == Mode::kAllLimited        ? Mode::kAll
         : mode == Mode::kDiagonalLimited ? Mode::kDiagonal
         : mode == Mode::kGeneralLimited  ? Mode::kGeneral
                                          : mode;
}

inline Kind kind_of(int32_t code) { return static_cast<Kind>(code / 8); }
inline bool is_lse(int32_t code) { return kind_of(code) == kLse; }
inline int32_t relations_of(int32_t code) { return code % 8; }

inline Mode mode_of(const ccu_tile& t, int32_t relations) {
  if (t.row_labels != nullptr || t.row_ids != nullptr) return Mode::kGeneral;
  const bool self = relations & kSelf, other = relations & kOther;
  if (!t.diagonal) return other ? Mode::kAll : Mode::kDiagonal;
  return self == other && other ? Mode::kAll : Mode::kDiagonal;
}

// The usual problem: one lse of rows and at most one of columns over all OTHER pairs, beside reductions of pairs (i,
// i).
struct Usual {
  int row = -1, col = -1;  // which reductions they are; col is -1 if there is none
  bool holds = false;

  explicit Usual(const ccu_tile& t) {
    if (t.row_limits != nullptr || t.col_limits != nullptr || t.row_labels != nullptr || t.row_ids != nullptr) return;
    const auto find = [](const int32_t* codes, int n, int* at) {
      for (int r = 0; r < n; ++r) {
        if (!(relations_of(codes[r]) & kOther)) continue;
        if (!is_lse(codes[r]) || *at >= 0) return false;
        *at = r;
      }
      return true;
    };
    holds = find(t.row_codes, t.n_row, &row) && find(t.col_codes, t.n_col, &col) && row >= 0;
  }
};

// The mode of a block of rows [first, last) and columns [begin, end): away from the diagonal there is nothing to check.
inline Mode mode_of(const ccu_tile& t, int32_t relations, int64_t first, int64_t last, int64_t begin, int64_t end) {
  const Mode mode = mode_of(t, relations);
  if (mode != Mode::kDiagonal || !(relations & kOther)) return mode;
  return t.row0 + first < end && begin < t.row0 + last ? mode : Mode::kAll;
}

// The mode of a block for a chooser that may have limits. On the diagonal SELF has to be told from OTHER.
template <class Chooser>
Mode mode_of(const ccu_tile& t, const Chooser& chooser, int64_t first, int64_t last, int64_t begin, int64_t end) {
  if (!chooser.limited()) return mode_of(t, chooser.relations, first, last, begin, end);
  if (t.row_labels != nullptr || t.row_ids != nullptr) return Mode::kGeneralLimited;
  const bool crosses = t.row0 + first < end && begin < t.row0 + last;
  return t.diagonal && crosses ? Mode::kDiagonalLimited : Mode::kAllLimited;
}

// bf16 as fp32.
inline void widen(const uint16_t* in, int64_t count, float* out) {
  for_vectors(0, count, [&](int64_t j, auto lanes) { store(out + j, load_bf16(in + j, lanes), lanes); });
}

// A bf16 row of `dot` (`row` counted over all banks, row `i` of its bank) as fp32, columns [begin, end), with the
// unrounded value of the diagonal pair.
inline void widen(const ccu_tile& t, const void* dot, const float* self_dot, int64_t row, int64_t i, int64_t begin,
                  int64_t end, float* out) {
  widen(static_cast<const uint16_t*>(dot) + row * t.cols + begin, end - begin, out);
  const int64_t own = t.row0 + i;
  if (self_dot != nullptr && own >= begin && own < end) out[own - begin] = self_dot[row];
}

inline void widen(const ccu_tile& t, int64_t row, int64_t i, int64_t begin, int64_t end, float* out) {
  widen(t, t.dot, t.self_dot, row, i, begin, end, out);
}

inline void widen_guide(const ccu_tile& t, int64_t row, int64_t i, int64_t begin, int64_t end, float* out) {
  widen(t, t.guide, t.guide_self_dot, row, i, begin, end, out);
}

// Whether there are limits; those of a teacher are none.
inline bool is_limited(const ccu_tile& t) {
  return t.teaches == 0 && (t.row_limits != nullptr || t.col_limits != nullptr);
}

// The log-sum-exps of the teacher's rows and columns in one bank; NULL where no reduction of that side needs them.
inline const float* row_norms(const ccu_tile& t, int64_t bank) {
  return t.row_limits == nullptr ? nullptr : t.row_limits + bank * t.row_limit_stride;
}
inline const float* col_norms(const ccu_tile& t, int64_t bank) {
  return t.col_limits == nullptr ? nullptr : t.col_limits + bank * t.col_limit_stride;
}

// `in`, of columns [begin, end) of a row, times their factors and the row's; `row` is counted over all banks.
inline void multiply(const ccu_tile& t, int64_t row, int64_t begin, int64_t end, const float* in, float* out) {
  const vf own = splat(t.row_factors[row]);
  const float* factors = t.col_factors + row / t.rows * t.cols;
  for_vectors(begin, end, [&](int64_t j, auto lanes) {
    store(out + (j - begin), load<vf>(in + (j - begin), lanes) * (own * load<vf>(factors + j, lanes)), lanes);
  });
}

// Stands for similarities that no mode without a limit asks for.
struct NoSimilarity {
  __attribute__((always_inline)) vf operator()() const { return splat(0.0f); }
};

// The pairs of one bank that a reduction chooses.
struct Chooser {
  const int32_t *row_labels, *col_labels, *row_ids, *col_ids;
  const float *row_limits = nullptr, *col_limits = nullptr;  // one of them, where the reduction has limits
  int64_t row0;
  bool diagonal;
  int32_t relations;

  Chooser(const ccu_tile& t, int64_t bank, int32_t relations_)
      : row_labels(t.row_labels ? t.row_labels + bank * t.row_label_stride : nullptr),
        col_labels(t.col_labels ? t.col_labels + bank * t.col_label_stride : nullptr),
        row_ids(t.row_ids ? t.row_ids + bank * t.row_id_stride : nullptr),
        col_ids(t.col_ids ? t.col_ids + bank * t.col_id_stride : nullptr),
        row0(t.row0),
        diagonal(t.diagonal),
        relations(relations_) {}

  // What a reduction of rows chooses.
  static Chooser of_rows(const ccu_tile& t, int64_t bank, int32_t relations) {
    Chooser made(t, bank, relations);
    if (is_limited(t) && relations & kOther) made.row_limits = row_norms(t, bank);
    return made;
  }

  static Chooser of_columns(const ccu_tile& t, int64_t bank, int32_t relations) {
    Chooser made(t, bank, relations);
    if (is_limited(t) && relations & kOther) made.col_limits = col_norms(t, bank);
    return made;
  }

  bool limited() const { return row_limits != nullptr || col_limits != nullptr; }

  // At most the pair (i, i) is chosen; only meaningful in Mode::kDiagonal.
  bool only_diagonal() const { return !(relations & kOther); }

  // Lanes of 0 or -1 for row i of the chunk and the columns from j on. `similar` gives those pairs' similarities to the
  // modes with a limit. A comparison with NaN leaves nothing out.
  // Always inline: the compiler would else call it for each vector where several kinds of a reduction share it.
  template <Mode with_limit, class Lanes, class Similar = NoSimilarity>
  __attribute__((always_inline)) vi choose(int64_t i, int64_t j, Lanes lanes, const Similar& similar = {}) const {
    constexpr Mode mode = base_of(with_limit);
    const vi yes = splat(-1), no = splat(0);
    vi chosen = yes;
    if (is_limited(with_limit)) {
      const vf limit = row_limits != nullptr ? splat(row_limits[i]) : load<vf>(col_limits + j, lanes);
      chosen = similar() > limit ? no : yes;
    } else if (mode != Mode::kAll) {
      chosen = relations & kOther ? yes : no;
    }
    if (mode == Mode::kGeneral && row_labels != nullptr) {
      const vi label = load<vi>(col_labels + j, lanes);
      chosen = label == splat(row_labels[i]) ? (relations & kSame ? yes : no) : chosen;
    }
    if (mode == Mode::kGeneral && row_ids != nullptr) {
      chosen = load<vi>(col_ids + j, lanes) == splat(row_ids[i]) ? (relations & kSelf ? yes : no) : chosen;
    } else if (mode != Mode::kAll && diagonal) {
      const int64_t own = row0 + i - j;
      const int32_t where = own < 0 || own >= kLanes ? -1 : static_cast<int32_t>(own);
      chosen = iota() == splat(where) ? (relations & kSelf ? yes : no) : chosen;
    }
    if (mode == Mode::kGeneral && row_labels != nullptr) {
      chosen = load<vi>(col_labels + j, lanes) < splat(0) ? no : chosen;
      if (row_labels[i] < 0) chosen = no;
    }
    return chosen & in_use(lanes);
  }
};

// The pairs of one row by relation, a vector of columns at a time, for problems of which only rows are reduced.
struct Classes {
  enum { kOtherPairs, kSamePairs, kSelfPairs, kHowMany };

  const int32_t *col_labels = nullptr, *col_ids = nullptr;
  int32_t label = 0, id = 0;
  int64_t own = -1;  // the column that is the same item by place

  Classes(const ccu_tile& t, int64_t bank, int64_t i) {
    if (t.row_labels != nullptr) {
      label = t.row_labels[bank * t.row_label_stride + i];
      col_labels = t.col_labels + bank * t.col_label_stride;
    }
    if (t.row_ids != nullptr) {
      id = t.row_ids[bank * t.row_id_stride + i];
      col_ids = t.col_ids + bank * t.col_id_stride;
    } else if (t.diagonal) {
      own = t.row0 + i;
    }
  }

  // Whether these can tell the pairs of a problem: it has labels or ids, and each reduction is an lse or a sum of rows.
  static bool suffice(const ccu_tile& t) {
    if (t.row_labels == nullptr && t.row_ids == nullptr) return false;
    if (t.n_col != 0 || t.row_limits != nullptr) return false;
    bool some_lse = false;
    for (int r = 0; r < t.n_row; ++r) {
      if (kind_of(t.row_codes[r]) != kLse && kind_of(t.row_codes[r]) != kSum) return false;
      some_lse |= is_lse(t.row_codes[r]);
    }
    return some_lse;
  }

  static bool has(int32_t relations, int which) {
    return relations & (which == kOtherPairs ? kOther : which == kSamePairs ? kSame : kSelf);
  }

  bool ignored() const { return col_labels != nullptr && label < 0; }

  // True where all columns are OTHER; else the masks say what each is, none of them for an ignored one.
  template <class Lanes>
  __attribute__((always_inline)) bool all_other(int64_t j, Lanes lanes, vi masks[kHowMany]) const {
    vi self = splat(0), same = splat(0), left_out = splat(0);
    if (col_labels != nullptr) {
      const vi labels = load<vi>(col_labels + j, lanes);
      same = labels == splat(label);
      left_out = labels < splat(0);
    }
    if (col_ids != nullptr)
      self = load<vi>(col_ids + j, lanes) == splat(id);
    else if (own >= j && own < j + lanes.n)
      self = iota() == splat(static_cast<int32_t>(own - j));
    if (lanes.n == kLanes && !any(self | same | left_out)) return true;
    const vi there = in_use(lanes) & ~left_out;
    masks[kSelfPairs] = self & there;
    masks[kSamePairs] = same & ~self & there;
    masks[kOtherPairs] = ~same & ~self & there;
    return false;
  }
};

// Picks the instance of a template over modes that a problem needs.
template <class F>
F pick(Mode mode, F all, F diagonal, F general) {
  return mode == Mode::kAll ? all : mode == Mode::kDiagonal ? diagonal : general;
}

template <class F>
F pick(Mode mode, F all, F diagonal, F general, F all_limited, F diagonal_limited, F general_limited) {
  return is_limited(mode) ? pick(base_of(mode), all_limited, diagonal_limited, general_limited)
                          : pick(mode, all, diagonal, general);
}

}  // namespace CCU_ISA
}  // namespace ccu

#endif  // CCU_FAST_CPU_RELATIONS_H_
