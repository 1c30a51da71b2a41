// topk_flips: the k tokens of lowest score per row, exactly, without a rows x tokens matrix.
//
//   score[i, v] = sign * (embedding[id(v)] . grad[i]) + penalty[i, v],   sign = -1 for maximize
//   order: (score in float64, v)
//
// Work: 2 * rows * tokens * dim FLOP; the table is read once (tokens * dim * 4 bytes) while rows * dim * 4 bytes of
// gradients fit in the cache. Few rows are bound by that read, many by the FMA units.
//
// The table is packed in panels of 16 tokens, [panel][dim][16], so that a lane is a token: the micro-kernel keeps
// row x token accumulators in registers, needs no horizontal sums, and each finished tile is compared with its rows'
// cutoffs while it is still in registers. What passes goes to a short list per row.
//
// Why the answer is exact: with gradients scaled to largest element 1, |fp32 score - score| <= err for any order of
// summation. If T is the k-th smallest fp32 score so far, no token above T + 2 err (plus the rounding of T) can be
// among the final k, since T only falls. So a list holds every token that could matter; at the end they are rescored
// in float64 from the embedding itself. Masses of near-ties overflow a list: that row is redone in float64. Thus
// neither the split over threads nor the instruction set can change an id.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../ccu_fast.h"
#include "../common/select.h"
#include "parallel.h"
#include "simd.h"
#include "topk_dot.h"
#include "topk_panel.h"

namespace ccu {
namespace CCU_ISA {
namespace {

constexpr int kGroup = 12;
constexpr int64_t kGroupBytes = 384 << 10;  // of the table, to stay in the second-level cache
constexpr int64_t kListBytes = 32 << 20;    // of all lists together
constexpr double kLargest = 1e37;           // beyond it an fp32 score might overflow

struct Item {
  float key;
  int32_t token;
  friend bool operator<(const Item& a, const Item& b) { return a.key < b.key || (a.key == b.key && a.token < b.token); }
};

enum class Path : uint8_t { kScan, kExact, kInvalid };

// What the scan knows about a row.
struct Row {
  float penalty_scale;  // the power of two that brought the gradient's largest element into [1, 2)
  double err;           // bound of |fp32 score - score|, both scaled
  bool strict;          // keep exactly k by (fp32 score, token)
  Path path;
};

struct List {
  Item* items;
  int32_t size, limit;
  bool overflow;
};

class Search {
 public:
  explicit Search(const ccu_topk_flips_args& a) : a_(a), dot_(a), panels_((a.tokens + kPanel - 1) / kPanel) {
    capacity_ = static_cast<int32_t>(std::min<int64_t>(2 * a.k + 512, std::max<int64_t>(a.tokens, 1) + 1));
    first_limit_ = static_cast<int32_t>(std::min<int64_t>(2 * a.k + 32, capacity_));
    const int threads = std::max<int>(a.threads, 1);
    const int64_t tiles = (a.rows + kRows - 1) / kRows;
    // Threads share the rows when there are enough of them; few rows are scanned by all, each over its own tokens.
    const int64_t row_slices = std::max<int64_t>(1, std::min<int64_t>(threads, tiles / 4));
    token_slices_ = std::max<int64_t>(1, std::min<int64_t>((threads + row_slices - 1) / row_slices, panels_));
    const int64_t bytes_a_row = token_slices_ * (capacity_ * sizeof(Item) + sizeof(List)) + a.dim * sizeof(float);
    const int64_t fit = kListBytes / bytes_a_row / kRows * kRows;
    block_ = std::min<int64_t>(std::max<int64_t>(fit, int64_t{kRows} * threads * 4), tiles * kRows);
  }

  // The memory of one block of rows, all of it before any thread starts.
  void allocate() {
    rows_.resize(block_);
    cutoffs_.resize(block_ * token_slices_);
    lists_.resize(block_ * token_slices_);
    items_.reset(new Item[block_ * token_slices_ * capacity_]);
    grad_.reset(new float[block_ * a_.dim]);
    if (token_slices_ > 1) merged_.resize(block_);
  }

  bool run() {
    for (int64_t first = 0; first < a_.rows; first += block_) {
      first_ = first;
      count_ = std::min(block_, a_.rows - first);
      scan();
      parallel_for(count_, a_.threads, [&](int64_t r) {
        try {
          finish(r);
        } catch (const std::bad_alloc&) {
          failed_ = true;
        }
      });
      if (failed_) return false;
    }
    return true;
  }

 private:
  // ---- before: scale the gradients, bound the error, pack them as [tile][dim][rows of the tile]

  void prepare(int64_t tile) {
    const int64_t r0 = tile * kRows;
    const int n = static_cast<int>(std::min<int64_t>(kRows, count_ - r0));
    float* packed = grad_.get() + r0 * a_.dim;
    for (int r = 0; r < n; ++r) {
      const float* g = a_.grad + (first_ + r0 + r) * a_.dim;
      Row& row = rows_[r0 + r];
      row = describe(first_ + r0 + r, g);
      const bool scan = row.path == Path::kScan;
      for (int64_t s = 0; s < token_slices_; ++s) {
        const int64_t at = (r0 + r) * token_slices_ + s;
        cutoffs_[at] = scan ? kInf : -kInf;
        lists_[at] = {items_.get() + at * capacity_, 0, first_limit_, false};
      }
      const float factor = scan ? (a_.maximize ? -row.penalty_scale : row.penalty_scale) : 0.0f;
      for (int64_t d = 0; d < a_.dim; ++d) packed[d * n + r] = scan ? g[d] * factor : 0.0f;
    }
  }

  Row describe(int64_t i, const float* g) const {
    Row row{1.0f, 0.0, a_.certify == 0, Path::kScan};
    float largest = 0.0f;
    bool finite = true;
    for (int64_t d = 0; d < a_.dim; ++d) {
      const float m = std::fabs(g[d]);
      finite &= m < kInf;
      largest = m > largest ? m : largest;
    }
    if (!finite) {
      row.path = Path::kInvalid;
      return row;
    }
    double scale = 1.0;
    if (largest > 0.0f) {
      // The scale must be a normal fp32 number; gradients beyond go the float64 way.
      const int exponent = std::ilogb(largest);
      if (exponent < -120 || exponent > 120) {
        row.path = Path::kExact;
        return row;
      }
      scale = std::ldexp(1.0, -exponent);
      double squares = 0.0;
      for (int64_t d = 0; d < a_.dim; ++d) squares += static_cast<double>(g[d]) * g[d];
      const double reach = std::sqrt(squares) * scale * a_.max_norm;
      row.err = 1.01 * (a_.dim + 2) * kUnit * reach + a_.dim * 0x1p-124;  // and underflow
      if (!(reach < kLargest)) row.path = Path::kExact;
    } else {
      row.strict = true;  // every product is an exact zero: nothing to certify
    }
    row.penalty_scale = static_cast<float>(scale);
    if (a_.penalty != nullptr) {
      const float* p = a_.penalty + i * a_.penalty_stride;
      float most = 0.0f;
      for (int64_t v = 0; v < a_.tokens; ++v) most = std::max(most, std::fabs(p[v]));
      if (!(most * scale < kLargest)) row.path = Path::kExact;
      row.err += scale * 0x1p-125;
    }
    return row;
  }

  // ---- the scan

  void scan() {
    const int64_t tiles = (count_ + kRows - 1) / kRows;
    parallel_for(tiles, a_.threads, [&](int64_t tile) { prepare(tile); });
    int64_t slices = 1;
    if (token_slices_ == 1) {
      // Whole gradients of a slice stay in the second-level cache beside the group of panels.
      const int64_t longest = std::max<int64_t>(1, (1 << 20) / (a_.dim * 4 * kRows));
      const int64_t threads = std::max<int>(a_.threads, 1);
      slices = std::min(tiles, threads * ((tiles + threads * longest - 1) / (threads * longest)));
    }
    parallel_for(slices * token_slices_, a_.threads, [&](int64_t task) {
      const int64_t rows = task / token_slices_, tokens = task % token_slices_;
      scan_slice(tiles * rows / slices, tiles * (rows + 1) / slices, panels_ * tokens / token_slices_,
                 panels_ * (tokens + 1) / token_slices_, tokens);
    });
  }

  void scan_slice(int64_t tile0, int64_t tile1, int64_t panel0, int64_t panel1, int64_t slice) {
    int64_t group = panel1 - panel0;
    if (tile1 - tile0 > 1) {
      const int64_t fit = kGroupBytes / (a_.dim * kPanel * 4) / kGroup * kGroup;
      group = fit > 0 ? fit : panels_of(kRows);
    }
    for (int64_t p = panel0; p < panel1; p += group) {
      const int64_t end = std::min(p + group, panel1);
      for (int64_t tile = tile0; tile < tile1; ++tile) {
        const int64_t r0 = tile * kRows;
        scan_tile(static_cast<int>(std::min<int64_t>(kRows, count_ - r0)), r0, p, end, slice);
      }
    }
  }

  void scan_tile(int rows, int64_t r0, int64_t panel0, int64_t panel1, int64_t slice) {
    switch (rows) {
      case 1:
        return sweep<1>(r0, panel0, panel1, slice);
      case 2:
        return sweep<2>(r0, panel0, panel1, slice);
      case 3:
        return sweep<3>(r0, panel0, panel1, slice);
#if defined(__AVX2__) || defined(__aarch64__)
      case 4:
        return sweep<4>(r0, panel0, panel1, slice);
      case 5:
        return sweep<5>(r0, panel0, panel1, slice);
      case 6:
        return sweep<6>(r0, panel0, panel1, slice);
#endif
#if defined(__AVX512F__)
      case 7:
        return sweep<7>(r0, panel0, panel1, slice);
      case 8:
        return sweep<8>(r0, panel0, panel1, slice);
#endif
    }
  }

  template <int R>
  void sweep(int64_t r0, int64_t panel0, int64_t panel1, int64_t slice) {
    constexpr int P = panels_of(R);
    int64_t p = panel0;
    for (; p + P <= panel1; p += P) micro<R, P>(r0, p, slice);
    for (; p < panel1; ++p) micro<R, 1>(r0, p, slice);
  }

  template <int R, int P>
  void micro(int64_t r0, int64_t panel, int64_t slice) {
    vf acc[R][P * kVectors];
    panel_scores<R, P>(grad_.get() + r0 * a_.dim, a_.packed + panel * a_.dim * kPanel, a_.dim, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int64_t at = (r0 + r) * token_slices_ + slice;
      if (a_.penalty != nullptr) {
        const float* penalty = a_.penalty + (first_ + r0 + r) * a_.penalty_stride;
        const float scale = rows_[r0 + r].penalty_scale;
        for (int v = 0; v < P * kVectors; ++v) {
          const int64_t token = panel * kPanel + v * kLanes;
          const int64_t left = a_.tokens - token;
          if (left <= 0) break;
          acc[r][v] += scale * (left >= kLanes ? load<vf>(penalty + token)
                                               : load<vf>(penalty + token, Part{static_cast<int>(left)}));
        }
      }
      const vf cutoff = splat(cutoffs_[at]);
#pragma GCC unroll 24
      for (int v = 0; v < P * kVectors; ++v) {
        const vi passed = acc[r][v] <= cutoff;
        if (__builtin_expect(any(passed), 0)) push(r0 + r, at, panel * kPanel + v * kLanes, acc[r][v]);
      }
    }
  }

  __attribute__((noinline)) void push(int64_t r, int64_t at, int64_t token0, vf keys) {
    List& list = lists_[at];
    const int64_t n = std::min<int64_t>(kLanes, a_.tokens - token0);
    for (int64_t l = 0; l < n; ++l) {
      if (!(keys[l] <= cutoffs_[at]) || !may_use(first_ + r, token0 + l)) continue;
      list.items[list.size++] = {keys[l], static_cast<int32_t>(token0 + l)};
      if (list.size == list.limit) tighten(rows_[r], list, cutoffs_[at]);
    }
  }

  int64_t id_of(int64_t token) const { return a_.token_ids != nullptr ? a_.token_ids[token] : token; }

  bool may_use(int64_t i, int64_t token) const {
    if (a_.allowed != nullptr && !a_.allowed[i * a_.allowed_stride + token]) return false;
    return !a_.exclude_current || id_of(token) != a_.current[i];
  }

  // Drops what can no longer be among the first k, and lowers the cutoff.
  void tighten(const Row& row, List& list, float& cutoff) const {
    if (list.size > a_.k) {
      list.size = shorten(row, list.items, list.size, cutoff);
      // A list that could hold every token cannot overflow.
      if (capacity_ <= a_.tokens && list.size > capacity_ - 64) {
        list.overflow = true;
        cutoff = -kInf;
      }
    }
    list.limit = std::min(capacity_, std::max(first_limit_, 2 * list.size));
  }

  int32_t shorten(const Row& row, Item* items, int32_t size, float& cutoff) const {
    std::nth_element(items, items + (a_.k - 1), items + size);
    const float kth = items[a_.k - 1].key;
    if (row.strict) {
      cutoff = std::nextafter(kth, -kInf);  // a later token of equal score has the higher id
      return static_cast<int32_t>(a_.k);
    }
    cutoff = cutoff_above(kth, row.err);
    const float highest = cutoff;
    return static_cast<int32_t>(
        std::partition(items + a_.k, items + size, [=](const Item& item) { return item.key <= highest; }) - items);
  }

  // ---- after: float64 scores of the few

  struct Scored {
    double score, dot;
    int32_t token;
    friend bool operator<(const Scored& a, const Scored& b) {
      return a.score < b.score || (a.score == b.score && a.token < b.token);
    }
  };

  Scored rescore(int64_t i, int32_t token) const {
    const double dot = dot_(id_of(token), a_.grad + i * a_.dim);
    const double penalty = a_.penalty != nullptr ? a_.penalty[i * a_.penalty_stride + token] : 0.0;
    return {(a_.maximize ? -dot : dot) + penalty, dot, token};
  }

  void finish(int64_t r) {
    const int64_t i = first_ + r;
    std::vector<Scored> best;
    Path path = rows_[r].path;
    if (path == Path::kScan && !collect(r, &best)) path = Path::kExact;
    if (path == Path::kExact) exact(i, &best);
    a_.valid[i] = path != Path::kInvalid;
    write(i, &best);
  }

  // The candidates of a row from all its lists; false if one overflowed.
  bool collect(int64_t r, std::vector<Scored>* best) {
    List* lists = &lists_[r * token_slices_];
    Item* items = lists[0].items;
    int32_t size = lists[0].size;
    for (int64_t s = 0; s < token_slices_; ++s)
      if (lists[s].overflow) return false;
    if (token_slices_ > 1) {
      auto& all = merged_[r];
      all.clear();
      for (int64_t s = 0; s < token_slices_; ++s) all.insert(all.end(), lists[s].items, lists[s].items + lists[s].size);
      items = all.data();
      size = static_cast<int32_t>(all.size());
    }
    float cutoff;
    if (size > a_.k) size = shorten(rows_[r], items, size, cutoff);
    best->reserve(size);
    for (int32_t c = 0; c < size; ++c) best->push_back(rescore(first_ + r, items[c].token));
    return true;
  }

  void exact(int64_t i, std::vector<Scored>* best) const {
    const size_t k = a_.k, limit = 2 * k + 32;
    best->clear();
    best->reserve(std::min<size_t>(limit, a_.tokens));
    double cutoff = std::numeric_limits<double>::infinity();
    bool full = false;
    for (int64_t token = 0; token < a_.tokens; ++token) {
      if (!may_use(i, token)) continue;
      const Scored scored = rescore(i, static_cast<int32_t>(token));
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

  const ccu_topk_flips_args& a_;
  const Dot dot_;
  const int64_t panels_;
  int32_t capacity_, first_limit_;
  int64_t token_slices_, block_;
  int64_t first_ = 0, count_ = 0;
  std::atomic<bool> failed_{false};
  std::vector<Row> rows_;
  std::vector<float> cutoffs_;
  std::vector<List> lists_;
  std::unique_ptr<Item[]> items_;
  std::unique_ptr<float[]> grad_;
  std::vector<std::vector<Item>> merged_;
};

}  // namespace

int topk_flips(const ccu_topk_flips_args& a) {
  if (a.rows < 0 || a.dim < 1 || a.tokens < 1 || a.tokens > INT32_MAX - kPanel || a.k < 1 || a.k > a.tokens)
    return CCU_BAD_ARGUMENT;
  if (a.rows == 0) return CCU_OK;
  try {
    Search search(a);
    search.allocate();
    return search.run() ? CCU_OK : CCU_OUT_OF_MEMORY;
  } catch (const std::bad_alloc&) {
    return CCU_OUT_OF_MEMORY;
  }
}

}  // namespace CCU_ISA
}  // namespace ccu
