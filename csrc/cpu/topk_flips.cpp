// topk_flips: the k tokens of lowest score per row, exactly, without a rows x tokens matrix.
//
//   score[i, v] = sign * (embedding[id(v)] . grad[i]) + penalty[i, v],   sign = -1 for maximize
//   order: (score in float64, v)
//
// Work: 2 * rows * tokens * dim FLOP; the table is read once (tokens * dim * 2 bytes) while rows * dim * 2 bytes of
// gradients fit in the cache. Few rows are bound by that read, many rows by the multiply units.
//
// The scan uses integers: tokens of 13 bits and gradients of about 11, in int16, each in steps of a power of two. That
// halves the read and doubles the products per instruction, but leaves a few more tokens to rescore. Tokens are packed
// in panels of 16, [panel][dim / 2][16][2], so that a lane is a token: the micro-kernel keeps row x token accumulators
// in registers, needs no horizontal sums, and compares each finished tile with its rows' cutoffs while it is still in
// registers. Tokens that pass go to a short list per row.
//
// Why the answer is exact: the rounding errors of the gradient and of the tokens are measured, so that
// |coarse score - score| <= err for any order of summation. If T is the k-th smallest coarse score so far, no token
// above T + 2 err (plus the rounding of T) can be among the final k, since T only falls. So a list holds every token
// that could matter; at the end they are rescored in float64 from the embedding itself. If too many near-ties overflow
// a list, its row is redone in float64. Thus neither the split over threads nor the instruction set can change an id.
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
constexpr int64_t kGroupBytes = 384 << 10;  // of the table, to stay in the second-level cache
constexpr int64_t kTilesToShare = 16;       // with fewer tiles per thread, split the table instead of the rows
constexpr int64_t kListBytes = 32 << 20;    // of all lists together

class Search {
 public:
  explicit Search(const ccu_topk_flips_args& a)
      : a_(a),
        rescore_(a),
        rule_(a),
        rounding_(largest_rounding(a)),
        pairs_((a.dim + 1) / 2),
        panels_((a.tokens + kPanel - 1) / kPanel),
        threads_(threads_for(a.threads, 2.0 * a.tokens * a.dim, 0.5 * a.rows * a.tokens * a.dim)) {
    const int64_t tiles = (a.rows + kRows - 1) / kRows;
    // Threads share the rows when there are enough of them; few rows are scanned by all, each over its own tokens.
    const int64_t row_slices = std::max<int64_t>(1, std::min<int64_t>(threads_, tiles / kTilesToShare));
    token_slices_ = std::max<int64_t>(1, std::min<int64_t>((threads_ + row_slices - 1) / row_slices, panels_));
    const int64_t fit = kGroupBytes / (pairs_ * kPanel * 4) / kGroup * kGroup;
    group_ = fit > 0 ? fit : panels_of(kRows);
    const int64_t bytes_a_row = token_slices_ * (rule_.capacity() * sizeof(Item) + sizeof(List)) + pairs_ * 4;
    const int64_t rows_that_fit = kListBytes / bytes_a_row / kRows * kRows;
    block_ = std::min<int64_t>(std::max<int64_t>(rows_that_fit, int64_t{kRows} * threads_ * 4), tiles * kRows);
  }

  // The memory of one block of rows, all allocated before any thread starts.
  void allocate() {
    rows_.resize(block_);
    cutoffs_.resize(block_ * token_slices_);
    lists_.resize(block_ * token_slices_);
    items_.reset(new Item[block_ * token_slices_ * rule_.capacity()]);
    grad_.reset(new int32_t[block_ * pairs_]);
    if (token_slices_ > 1) merged_.resize(block_);
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
  // ---- before: the gradients as integers, [tile][pairs][rows of the tile]

  void prepare(int64_t tile) {
    const int64_t r0 = tile * kRows;
    const int n = static_cast<int>(std::min<int64_t>(kRows, count_ - r0));
    int32_t* packed = grad_.get() + r0 * pairs_;
    std::fill(packed, packed + n * pairs_, 0);
    for (int r = 0; r < n; ++r) {
      Row& row = rows_[r0 + r];
      row = describe(a_, rounding_, first_ + r0 + r, reinterpret_cast<int16_t*>(packed + r), n);
      for (int64_t s = 0; s < token_slices_; ++s) {
        const int64_t at = (r0 + r) * token_slices_ + s;
        cutoffs_[at] = row.path == Path::kScan ? kInf : -kInf;
        lists_[at] = rule_.empty(items_.get() + at * rule_.capacity());
      }
    }
  }

  // ---- the scan

  // The integer gradients of a slice stay in the second-level cache beside the group of panels.
  int64_t row_slices(int64_t tiles) const {
    if (token_slices_ > 1) return 1;
    const int64_t longest = std::max<int64_t>(1, (1 << 20) / (pairs_ * 4 * kRows));
    return std::min(tiles, threads_ * ((tiles + threads_ * longest - 1) / (threads_ * longest)));
  }

  void scan() {
    const int64_t tiles = (count_ + kRows - 1) / kRows, slices = row_slices(tiles);
    parallel_for(tiles, threads_for(threads_, 6.0 * count_ * a_.dim), [&](int64_t tile) { prepare(tile); });
    parallel_for(slices * token_slices_, threads_, [&](int64_t task) {
      const int64_t rows = task / token_slices_, tokens = task % token_slices_;
      const int64_t tile0 = tiles * rows / slices, tile1 = tiles * (rows + 1) / slices;
      const int64_t panel0 = panels_ * tokens / token_slices_, panel1 = panels_ * (tokens + 1) / token_slices_;
      for (int64_t p = panel0; p < panel1; p += group_)
        for (int64_t tile = tile0; tile < tile1; ++tile) {
          if (has_vnni()) {
            scan_tile<Pairs::kVnni>(tile, p, std::min(p + group_, panel1), tokens);
          } else {
            scan_tile<Pairs::kPlain>(tile, p, std::min(p + group_, panel1), tokens);
          }
        }
    });
  }

  // A tile of rows against panels [panel0, panel1).
  template <Pairs kPairs>
  void scan_tile(int64_t tile, int64_t panel0, int64_t panel1, int64_t slice) {
    const int64_t r0 = tile * kRows;
    switch (std::min<int64_t>(kRows, count_ - r0)) {
      case 1:
        return sweep<kPairs, 1>(r0, panel0, panel1, slice);
      case 2:
        return sweep<kPairs, 2>(r0, panel0, panel1, slice);
      case 3:
        return sweep<kPairs, 3>(r0, panel0, panel1, slice);
#if defined(__AVX2__) || defined(__aarch64__)
      case 4:
        return sweep<kPairs, 4>(r0, panel0, panel1, slice);
      case 5:
        return sweep<kPairs, 5>(r0, panel0, panel1, slice);
      case 6:
        return sweep<kPairs, 6>(r0, panel0, panel1, slice);
#endif
#if defined(__AVX512F__)
      case 7:
        return sweep<kPairs, 7>(r0, panel0, panel1, slice);
      case 8:
        return sweep<kPairs, 8>(r0, panel0, panel1, slice);
#endif
    }
  }

  template <Pairs kPairs, int R>
  void sweep(int64_t r0, int64_t panel0, int64_t panel1, int64_t slice) {
    constexpr int P = panels_of(R);
    int64_t p = panel0;
    for (; p + P <= panel1; p += P) micro<kPairs, R, P>(r0, p, slice);
    for (; p < panel1; ++p) micro<kPairs, R, 1>(r0, p, slice);
  }

  template <Pairs kPairs, int R, int P>
  void micro(int64_t r0, int64_t panel, int64_t slice) {
    vf acc[R][P * kVectors];
    panel_scores<kPairs, R, P>(grad_.get() + r0 * pairs_, a_.packed + panel * pairs_ * kPanel * 2, pairs_, acc);
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
        const float scale = rows_[r0 + r].scale;
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

  // ---- after: float64 scores of the candidates

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
  const int64_t pairs_, panels_;
  const int threads_;
  int64_t token_slices_, group_, block_;
  int64_t first_ = 0, count_ = 0;
  std::atomic<bool> failed_{false};
  std::vector<Row> rows_;
  std::vector<float> cutoffs_;
  std::vector<List> lists_;
  std::unique_ptr<Item[]> items_;
  std::unique_ptr<int32_t[]> grad_;
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
