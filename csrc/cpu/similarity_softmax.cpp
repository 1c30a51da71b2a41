// A block of keys of a running softmax: rows of exponentials for the GEMM that computes their weighted mean key.
//
// For every row i and every group g of relations, over the columns j of all blocks so far,
//
//     shift_gi = max_j [chosen_gij] S_ij      sum_gi = sum_j E_gij      mean_gi = sum_j E_gij key_j
//     E_gij    = [chosen_gij] exp(S_ij - shift_gi)
//
// A block raises the shifts, rescales the previous sums, and adds its own. For group 0 the caller's GEMM updates the
// mean, mean_0 += E_0 keys, with the E_0 that is written here. The other groups have few pairs (those with the same
// label or the same id), whose keys are added up here.
//
// Work: 4 bytes read and 4 written per pair, in the L2 cache, and one exponential; 2 dim FLOP for a pair of another
// group. A task is a row.
#include <algorithm>
#include <cmath>

#include "../ccu_fast.h"
#include "parallel.h"
#include "relations.h"
#include "simd.h"

namespace ccu {
namespace CCU_ISA {
namespace {

// Columns whose exponentials are gathered before their keys are added, and floats of a key added at a time.
constexpr int64_t kStripe = 1024;
constexpr int64_t kPart = 4 * kLanes;

struct Row {
  const float* dot;
  float scale, bias;
  int64_t i, cols;
  Chooser chooser;

  template <class Lanes>
  vf scores(int64_t j, Lanes lanes) const {
    return load<vf>(dot + j, lanes) * scale + bias;
  }

  template <Mode mode>
  float highest(float before) const {
    vf top = splat(before);
    for_vectors(0, cols, [&](int64_t j, auto lanes) {
      top = max(chooser.choose<mode>(i, j, lanes) ? scores(j, lanes) : splat(-kInf), top);
    });
    return max(top);
  }

  // Writes the exponentials, zero for pairs that were not chosen, and returns their sum.
  template <Mode mode>
  double exponentials(float shift, float* e) const {
    vf total = splat(0.0f);
    for_vectors(0, cols, [&](int64_t j, auto lanes) {
      // S is not bounded for pairs that were not chosen: their exponential may be inf.
      const vf value = chooser.choose<mode>(i, j, lanes) ? exp(scores(j, lanes) - shift) : splat(0.0f);
      store(e + j, value, lanes);
      total += value;
    });
    return sum(total);
  }

  // Adds the chosen keys, each times its exponential, and returns the sum of the exponentials.
  template <Mode mode>
  double add_keys(float shift, const float* keys, int64_t dim, float* mean) const {
    double total = 0;
    int32_t where[kStripe];
    float weight[kStripe];
    for (int64_t begin = 0; begin < cols; begin += kStripe) {
      int64_t found = 0;
      for_vectors(begin, std::min(begin + kStripe, cols), [&](int64_t j, auto lanes) {
        const vi chosen = chooser.choose<mode>(i, j, lanes);
        if (!any(chosen)) return;
        const vf value = exp(scores(j, lanes) - shift);
        for (int lane = 0; lane < lanes.n; ++lane) {
          where[found] = static_cast<int32_t>(j + lane);
          weight[found] = value[lane];
          found += chosen[lane] != 0;
        }
      });
      for (int64_t f = 0; f < found; ++f) total += weight[f];
      int64_t d = 0;
      for (; d + kPart <= dim; d += kPart) {
        vf part[4];
        for (int v = 0; v < 4; ++v) part[v] = load<vf>(mean + d + v * kLanes);
        for (int64_t f = 0; f < found; ++f) {
          const float* key = keys + where[f] * dim + d;
          for (int v = 0; v < 4; ++v) part[v] += load<vf>(key + v * kLanes) * weight[f];
        }
        for (int v = 0; v < 4; ++v) store(mean + d + v * kLanes, part[v]);
      }
      for_vectors(d, dim, [&](int64_t at, auto lanes) {
        vf part = load<vf>(mean + at, lanes);
        for (int64_t f = 0; f < found; ++f) part += load<vf>(keys + where[f] * dim + at, lanes) * weight[f];
        store(mean + at, part, lanes);
      });
    }
    return total;
  }
};

template <Mode mode>
void add_block(const ccu_similarity_softmax_args& a, const Row& row, int64_t g) {
  const int64_t at = g * a.group_stride + row.i;
  float* mean = a.mean + at * a.dim;
  const float before = a.shift[at], shift = row.highest<mode>(before);
  if (shift != before) {
    const float decay = std::exp(before - shift);
    a.shift[at] = shift;
    a.sum[at] *= decay;
    for_vectors(0, a.dim, [&](int64_t d, auto lanes) { store(mean + d, load<vf>(mean + d, lanes) * decay, lanes); });
  }
  // With nothing chosen so far any shift will do. (A NaN may be lost in the maximum, but not in the exponentials.)
  const float finite = shift == -kInf ? 0.0f : shift;
  a.sum[at] += g == 0 ? row.exponentials<mode>(finite, a.e + row.i * a.tile.cols)
                      : row.add_keys<mode>(finite, a.keys, a.dim, mean);
}

}  // namespace

int similarity_softmax(const ccu_similarity_softmax_args& a) {
  const ccu_tile& t = a.tile;
  if (t.banks != 1 || t.n_col != 0) return CCU_UNSUPPORTED;
  parallel_for(t.rows, t.threads, [&](int64_t i) {
    const float* dot = static_cast<const float*>(t.dot) + i * t.cols;
    if (t.dot_dtype == CCU_BF16) {
      // E_0 overwrites it, a vector at a time, behind the reads.
      float* widened = a.e + i * t.cols;
      widen(t, i, i, 0, t.cols, widened);
      dot = widened;
    }
    // Group 0 last: it overwrites dot.
    for (int64_t g = t.n_row - 1; g >= 0; --g) {
      if (t.row_codes[g] == 0) continue;
      const Row row{dot, t.scale, t.bias, i, t.cols, Chooser(t, 0, relations_of(t.row_codes[g]))};
      pick(mode_of(t, row.chooser.relations, i, i + 1, 0, t.cols), add_block<Mode::kAll>, add_block<Mode::kDiagonal>,
           add_block<Mode::kGeneral>)(a, row, g);
    }
  });
  return CCU_OK;
}

}  // namespace CCU_ISA
}  // namespace ccu
