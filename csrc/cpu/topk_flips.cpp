// topk_flips: the k tokens of lowest score per row, exactly, without a rows x tokens matrix.
//
//   score[i, v] = sign * (embedding[id(v)] . grad[i]) + penalty[i, v],   sign = -1 for maximize
//   order: (score in float64, v)
//
// Work: 2 * rows * tokens * dim FLOP; the table is read once (tokens * dim * 2 bytes) while rows * dim * 4 bytes of
// gradients fit in the cache. Few rows are bound by that read, many by the FMA units.
//
// The table is int16 steps of a power of two of each token, which halves the read and costs, for a rounding of 2^-16 of
// the token's largest element, a few more tokens to rescore. It is packed in panels of 16 tokens, [panel][dim][16], so
// that a lane is a token: the micro-kernel keeps row x token accumulators in registers, needs no horizontal sums, and
// each finished tile is compared with its rows' cutoffs while it is still in registers. What passes goes to a short
// list per row. Many rows use a panel many times: it is then brought to fp32 once, in the second-level cache.
//
// Why the answer is exact: with gradients scaled to largest element 1, |coarse score - score| <= err for any order of
// summation. If T is the k-th smallest coarse score so far, no token above T + 2 err (plus the rounding of T) can be
// among the final k, since T only falls. So a list holds every token that could matter; at the end they are rescored
// in float64 from the embedding itself. Masses of near-ties overflow a list: that row is redone in float64. Thus
// neither the split over threads nor the instruction set can change an id.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "../ccu_fast.h"
#include "parallel.h"
#include "simd.h"
#include "topk_list.h"
#include "topk_panel.h"
#include "topk_rescore.h"
#include "topk_row.h"

namespace ccu {
namespace CCU_ISA {
namespace {

constexpr int kGroup = 12;
constexpr int64_t kGroupBytes = 384 << 10;  // of the table in fp32, to stay in the second-level cache
constexpr int64_t kTilesToShare = 16;       // a thread with fewer of its own had better bring less of the table to fp32
constexpr int64_t kListBytes = 32 << 20;    // of all lists together

class Search {
 public:
  explicit Search(const ccu_topk_flips_args& a)
      : a_(a),
        rescore_(a),
        rule_(a),
        rounding_(largest_rounding(a)),
        panels_((a.tokens + kPanel - 1) / kPanel),
        threads_(threads_for(a.threads, 2.0 * a.tokens * a.dim, 1.0 * a.rows * a.tokens * a.dim)) {
    const int64_t tiles = (a.rows + kRows - 1) / kRows;
    // Threads share the rows when there are enough of them; few rows are scanned by all, each over its own tokens.
    const int64_t row_slices = std::max<int64_t>(1, std::min<int64_t>(threads_, tiles / kTilesToShare));
    token_slices_ = std::max<int64_t>(1, std::min<int64_t>((threads_ + row_slices - 1) / row_slices, panels_));
    const int64_t fit = kGroupBytes / (a.dim * kPanel * 4) / kGroup * kGroup;
    group_ = fit > 0 ? fit : panels_of(kRows);
    const int64_t bytes_a_row = token_slices_ * (rule_.capacity() * sizeof(Item) + sizeof(List)) + a.dim * 4;
    const int64_t rows_that_fit = kListBytes / bytes_a_row / kRows * kRows;
    block_ = std::min<int64_t>(std::max<int64_t>(rows_that_fit, int64_t{kRows} * threads_ * 4), tiles * kRows);
  }

  // The memory of one block of rows, all of it before any thread starts.
  void allocate() {
    rows_.resize(block_);
    cutoffs_.resize(block_ * token_slices_);
    lists_.resize(block_ * token_slices_);
    items_.reset(new Item[block_ * token_slices_ * rule_.capacity()]);
    grad_.reset(new float[block_ * a_.dim]);
    if (token_slices_ > 1) merged_.resize(block_);
    const int64_t tiles = block_ / kRows;
    if (tiles > 1) wide_.reset(new float[row_slices(tiles) * token_slices_ * group_ * a_.dim * kPanel]);
  }

  bool run() {
    for (int64_t first = 0; first < a_.rows; first += block_) {
      first_ = first;
      count_ = std::min(block_, a_.rows - first);
      scan();
      const int threads = threads_for(threads_, 0.0, 2.0 * count_ * a_.k * a_.dim);
      parallel_for(count_, threads, [&](int64_t r) {
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
      row = describe(a_, rounding_, first_ + r0 + r, g);
      const bool scan = row.path == Path::kScan;
      for (int64_t s = 0; s < token_slices_; ++s) {
        const int64_t at = (r0 + r) * token_slices_ + s;
        cutoffs_[at] = scan ? kInf : -kInf;
        lists_[at] = rule_.empty(items_.get() + at * rule_.capacity());
      }
      const float factor = scan ? (a_.maximize ? -row.penalty_scale : row.penalty_scale) : 0.0f;
      for (int64_t d = 0; d < a_.dim; ++d) packed[d * n + r] = scan ? g[d] * factor : 0.0f;
    }
  }

  // ---- the scan

  // Whole gradients of a slice stay in the second-level cache beside the group of panels.
  int64_t row_slices(int64_t tiles) const {
    if (token_slices_ > 1) return 1;
    const int64_t longest = std::max<int64_t>(1, (1 << 20) / (a_.dim * 4 * kRows));
    return std::min(tiles, threads_ * ((tiles + threads_ * longest - 1) / (threads_ * longest)));
  }

  void scan() {
    const int64_t tiles = (count_ + kRows - 1) / kRows, slices = row_slices(tiles);
    parallel_for(tiles, threads_for(threads_, 8.0 * count_ * a_.dim), [&](int64_t tile) { prepare(tile); });
    parallel_for(slices * token_slices_, threads_, [&](int64_t task) {
      const int64_t rows = task / token_slices_, tokens = task % token_slices_;
      scan_slice(tiles * rows / slices, tiles * (rows + 1) / slices, panels_ * tokens / token_slices_,
                 panels_ * (tokens + 1) / token_slices_, tokens, task);
    });
  }

  void scan_slice(int64_t tile0, int64_t tile1, int64_t panel0, int64_t panel1, int64_t slice, int64_t task) {
    const int64_t panel_size = a_.dim * kPanel;
    if (tile1 - tile0 == 1) return scan_tile(tile0, a_.packed + panel0 * panel_size, panel0, panel1, slice);
    float* wide = wide_.get() + task * group_ * panel_size;
    for (int64_t p = panel0; p < panel1; p += group_) {
      const int64_t end = std::min(p + group_, panel1);
      const int16_t* packed = a_.packed + p * panel_size;
      for (int64_t i = 0; i < (end - p) * panel_size; i += kLanes) store(wide + i, steps(packed + i));
      for (int64_t tile = tile0; tile < tile1; ++tile) scan_tile(tile, static_cast<const float*>(wide), p, end, slice);
    }
  }

  // A tile of rows against panels [panel0, panel1), which lie at e.
  template <class T>
  void scan_tile(int64_t tile, const T* e, int64_t panel0, int64_t panel1, int64_t slice) {
    const int64_t r0 = tile * kRows;
    switch (std::min<int64_t>(kRows, count_ - r0)) {
      case 1:
        return sweep<1>(r0, e, panel0, panel1, slice);
      case 2:
        return sweep<2>(r0, e, panel0, panel1, slice);
      case 3:
        return sweep<3>(r0, e, panel0, panel1, slice);
#if defined(__AVX2__) || defined(__aarch64__)
      case 4:
        return sweep<4>(r0, e, panel0, panel1, slice);
      case 5:
        return sweep<5>(r0, e, panel0, panel1, slice);
      case 6:
        return sweep<6>(r0, e, panel0, panel1, slice);
#endif
#if defined(__AVX512F__)
      case 7:
        return sweep<7>(r0, e, panel0, panel1, slice);
      case 8:
        return sweep<8>(r0, e, panel0, panel1, slice);
#endif
    }
  }

  template <int R, class T>
  void sweep(int64_t r0, const T* e, int64_t panel0, int64_t panel1, int64_t slice) {
    constexpr int P = panels_of(R);
    const int64_t size = a_.dim * kPanel;
    int64_t p = panel0;
    for (; p + P <= panel1; p += P) micro<R, P>(r0, e + (p - panel0) * size, p, slice);
    for (; p < panel1; ++p) micro<R, 1>(r0, e + (p - panel0) * size, p, slice);
  }

  template <int R, int P, class T>
  void micro(int64_t r0, const T* e, int64_t panel, int64_t slice) {
    vf acc[R][P * kVectors];
    panel_scores<R, P>(grad_.get() + r0 * a_.dim, e, a_.dim, acc);
    vf step[P * kVectors];
#pragma GCC unroll 24
    for (int v = 0; v < P * kVectors; ++v) step[v] = load<vf>(a_.steps + panel * kPanel + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int64_t at = (r0 + r) * token_slices_ + slice;
#pragma GCC unroll 24
      for (int v = 0; v < P * kVectors; ++v) acc[r][v] *= step[v];
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
    const int64_t n = std::min<int64_t>(kLanes, a_.tokens - token0);
    for (int64_t l = 0; l < n; ++l)
      if (keys[l] <= cutoffs_[at] && rescore_.may_use(first_ + r, token0 + l))
        rule_.add(rows_[r], {keys[l], static_cast<int32_t>(token0 + l)}, lists_[at], cutoffs_[at]);
  }

  // ---- after: float64 scores of the few

  void finish(int64_t r) {
    const int64_t i = first_ + r;
    std::vector<Scored> best;
    Path path = rows_[r].path;
    if (path == Path::kScan && !collect(r, &best)) path = Path::kExact;
    if (path == Path::kExact) rescore_.all(i, &best);
    a_.valid[i] = path != Path::kInvalid;
    rescore_.write(i, &best);
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
    if (size > a_.k) size = rule_.shorten(rows_[r], items, size, cutoff);
    best->reserve(size);
    for (int32_t c = 0; c < size; ++c) best->push_back(rescore_(first_ + r, items[c].token));
    return true;
  }

  const ccu_topk_flips_args& a_;
  const Rescorer rescore_;
  const ListRule rule_;
  const double rounding_;
  const int64_t panels_;
  const int threads_;
  int64_t token_slices_, group_, block_;
  int64_t first_ = 0, count_ = 0;
  std::atomic<bool> failed_{false};
  std::vector<Row> rows_;
  std::vector<float> cutoffs_;
  std::vector<List> lists_;
  std::unique_ptr<Item[]> items_;
  std::unique_ptr<float[]> grad_, wide_;
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
