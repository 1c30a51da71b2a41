// The three matrix products of a small batch, where a library's take longer to start than to compute.
//
//     S = x y^T                [rows, items], sums over dim      multiply_rows
//     dx = G y, dy = G^T x     [items, dim], sums over items     Product
//
// Work: 2 * items * items * dim FLOPs each, from 2 * items * dim elements that are read in the dtype they have, rounded
// where that is wanted, and widened to fp32 on the way. All sums are in fp32, each of an element's in one fixed order,
// so nothing depends on how the work is shared.
#ifndef CCU_FAST_CPU_SMALL_PRODUCTS_H_
#define CCU_FAST_CPU_SMALL_PRODUCTS_H_

#include <algorithm>

#include "../ccu_fast.h"
#include "simd.h"

namespace ccu {
namespace CCU_ISA {

constexpr int64_t kPanel = 2 * kLanes;

// As from_float<bf16> of common/half.h, a vector at a time: the bits of bf16 are the upper halves of the result.
inline vf round_bf16(vf v) {
  typedef uint32_t word __attribute__((vector_size(kLanes * 4)));
  const word u = (word)v, nan = u | 0x400000u, rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return (vf)((v == v ? rounded : nan) & 0xffff0000u);
}

// The lower halves.
inline void store_halves(uint16_t* p, vi v) {
  typedef uint16_t half __attribute__((vector_size(kLanes * 2)));
  const half bits = __builtin_convertvector(v, half);
  std::memcpy(p, &bits, sizeof bits);
}

// As to_float(f16) and from_float<f16> there, whose comments say why; a vector at a time, its bits in the lower halves.
inline vf widen_f16(vi bits) {
  const vi magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  const vi finite = (vi)((vf)magnitude * 0x1p112f);
  return (vf)((magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite) | sign);
}

inline vi narrow_f16(vf v) {
  const vi u = (vi)v, magnitude = u & 0x7fffffff, sign = (u >> 16) & 0x8000;
  const vi denormal = (vi)((vf)magnitude + 0.5f) - 0x3f000000;
  const vi normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const vi large = magnitude > 0x7f800000 ? splat(0x7e00) : splat(0x7c00);
  const vi finite = magnitude < 0x38800000 ? denormal : normal;
  return (magnitude >= 0x47800000 ? large : finite) | sign;
}

template <class Lanes>
inline vf load_f16(const uint16_t* p, Lanes lanes) {
  typedef uint16_t half __attribute__((vector_size(kLanes * 2)));
  half bits = {};
  std::memcpy(&bits, p, lanes.n * sizeof(uint16_t));
  return widen_f16(__builtin_convertvector(bits, vi));
}

// x or y: rows of `dim` elements, whose values are first rounded to another dtype if that is not fp32.
struct Features {
  const void* data;
  int64_t dim;
  int32_t dtype, rounded;

  bool plain() const { return dtype == CCU_F32 && rounded == CCU_F32; }
  const float* row(int64_t i) const { return static_cast<const float*>(data) + i * dim; }

  // Elements [begin, begin + count) of row i as fp32.
  void widen(int64_t i, int64_t begin, int64_t count, float* out) const {
    with_values([&](const auto* in, const auto& value) {
      in += i * dim + begin;
      for_vectors(0, count, [&](int64_t k, auto lanes) { store(out + k, value(in + k, lanes), lanes); });
    });
  }

  // Elements [begin, begin + count) of the first rows as fp32, and zeros up to kPanel of them.
  void gather(int64_t rows, int64_t begin, int64_t count, float* out) const {
    with_values([&](const auto* in, const auto& value) {
      in += begin;
      for (int64_t i = 0; i < rows; ++i, in += dim, out += kPanel)
        for (int64_t k = 0; k < kPanel; k += kLanes) {
          const int64_t left = count - k;
          store(out + k, left >= kLanes ? value(in + k, Full{}) : value(in + k, Part{std::max<int>(left, 0)}));
        }
    });
  }

 private:
  // Calls use(elements, what a vector of them is in fp32).
  template <class Use>
  void with_values(const Use& use) const {
    if (dtype == CCU_BF16)
      return use(static_cast<const uint16_t*>(data), [](auto* in, auto lanes) { return load_bf16(in, lanes); });
    if (dtype == CCU_F16)
      return use(static_cast<const uint16_t*>(data), [](auto* in, auto lanes) { return load_f16(in, lanes); });
    const float* const in = static_cast<const float*>(data);
    if (rounded == CCU_BF16) return use(in, [](auto* in, auto lanes) { return round_bf16(load<vf>(in, lanes)); });
    if (rounded == CCU_F16)
      return use(in, [](auto* in, auto lanes) { return widen_f16(narrow_f16(load<vf>(in, lanes))); });
    use(in, [](auto* in, auto lanes) { return load<vf>(in, lanes); });
  }
};

// --- S ---------------------------------------------------------------------------------------------------------------

// Of so many rows of x the sums are in registers, against so many of y: with those of a step's operands they fill 16
// registers, or 32.
constexpr int kDotRows = kLanes == 16 ? 6 : 3;
constexpr int kDotCols = 4;
// Elements of a row at a time: kDotCols rows of y are 8 KiB, and stay in the L1 cache.
constexpr int64_t kDotDepth = 512;

// The sum of each of four vectors.
inline void four_sums(const vf* v, float* out) {
#if defined(__AVX2__)
  // Neighbours are added first, of four vectors at once: what a library spends on this is a tenth of a short product.
  __m256 w[4];
  for (int i = 0; i < 4; ++i) {
    __m256 half[kLanes / 8];
    std::memcpy(half, v + i, sizeof half);
    w[i] = kLanes == 8 ? half[0] : half[0] + half[kLanes / 8 - 1];
  }
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(w[0], w[1]), _mm256_hadd_ps(w[2], w[3]));
  _mm_storeu_ps(out, _mm256_castps256_ps128(all) + _mm256_extractf128_ps(all, 1));
#else
  for (int i = 0; i < 4; ++i) out[i] = sum(v[i]);
#endif
}

template <int rows>
inline void dots(const float* const* x, const float* const* y, int64_t depth, float* out) {
  vf total[rows * kDotCols] = {};
  for_vectors(0, depth, [&](int64_t d, auto lanes) {
    vf right[kDotCols];
    for (int j = 0; j < kDotCols; ++j) right[j] = load<vf>(y[j] + d, lanes);
    for (int i = 0; i < rows; ++i) {
      const vf left = load<vf>(x[i] + d, lanes);
      for (int j = 0; j < kDotCols; ++j) total[i * kDotCols + j] += left * right[j];
    }
  });
  for (int i = 0; i < rows; ++i) four_sums(total + i * kDotCols, out + i * kDotCols);
}

template <int most>
inline void dots(int rows, const float* const* x, const float* const* y, int64_t depth, float* out) {
  if constexpr (most > 1)
    if (rows < most) return dots<most - 1>(rows, x, y, depth, out);
  dots<most>(x, y, depth, out);
}

// How many of `left` rows to take so that the rest divides evenly: 8 in threes are 3, 3 and 2.
inline int64_t next_rows(int64_t left, int64_t most) {
  const int64_t steps = (left + most - 1) / most;
  return (left + steps - 1) / steps;
}

// out[i, j] = x_i y_j for rows i of [first, last), at most kRowsAtOnce, and all columns.
constexpr int64_t kRowsAtOnce = 12;

inline void multiply_rows(const Features& x, const Features& y, int64_t first, int64_t last, int64_t cols, float* out) {
  alignas(64) float of_x[kRowsAtOnce * kDotDepth];
  alignas(64) float of_y[kDotCols * kDotDepth];
  const float *left[kRowsAtOnce], *right[kDotCols];
  for (int64_t begin = 0; begin < x.dim; begin += kDotDepth) {
    const int64_t depth = std::min(kDotDepth, x.dim - begin);
    for (int64_t i = first; i < last; ++i) {
      float* const own = of_x + (i - first) * kDotDepth;
      left[i - first] = x.plain() ? x.row(i) + begin : own;
      if (!x.plain()) x.widen(i, begin, depth, own);
    }
    for (int64_t j = 0; j < cols; j += kDotCols) {
      const int64_t some = std::min<int64_t>(kDotCols, cols - j);
      for (int64_t k = 0; k < kDotCols; ++k) {
        const int64_t other = j + std::min(k, some - 1);  // past the end the last one once more
        float* const own = of_y + k * kDotDepth;
        right[k] = y.plain() ? y.row(other) + begin : own;
        if (!y.plain()) y.widen(other, begin, depth, own);
      }
      for (int64_t i = first, rows; i < last; i += rows) {
        rows = next_rows(last - i, kDotRows);
        float found[kDotRows * kDotCols];
        dots<kDotRows>(static_cast<int>(rows), left + (i - first), right, depth, found);
        for (int64_t r = 0; r < rows; ++r) {
          float* const to = out + (i + r) * cols + j;
          const float* const from = found + r * kDotCols;
          if (begin == 0 && some == kDotCols) {
            std::memcpy(to, from, kDotCols * sizeof(float));
          } else {
            for (int64_t k = 0; k < some; ++k) to[k] = begin == 0 ? from[k] : to[k] + from[k];
          }
        }
      }
    }
  }
}

// --- dx and dy -------------------------------------------------------------------------------------------------------

// The sums of so many rows, times two vectors, are in registers.
constexpr int kTileRows = kLanes == 16 ? 12 : 6;
// A task's rows and columns. Its rows of G are read once for every panel; a panel, at most 64 KiB, is made once a task
// and read once for every kTileRows of them.
constexpr int64_t kTaskRows = 128, kTaskCols = 128;

// out[r, :] = sum_k a[r, k] * panel[k, :] with `a` the rows from one on of G, or of G^T, which is [count, count].
template <bool transposed, int rows>
inline void tile(const float* a, const float* panel, int64_t count, float* out) {
  vf total[rows][2] = {};
  const float* left[rows];
  for (int r = 0; r < rows; ++r) left[r] = a + r * count;
  for (int64_t k = 0; k < count; ++k, panel += kPanel) {
    const vf first = load<vf>(panel), second = load<vf>(panel + kLanes);
    for (int r = 0; r < rows; ++r) {
      const float value = transposed ? a[r] : left[r][k];  // broadcast as it is loaded
      total[r][0] += value * first;
      total[r][1] += value * second;
    }
    if (transposed) a += count;
  }
  for (int r = 0; r < rows; ++r)
    for (int half = 0; half < 2; ++half) store(out + r * kPanel + half * kLanes, total[r][half]);
}

template <bool transposed, int most>
inline void tile(int rows, const float* a, const float* panel, int64_t count, float* out) {
  if constexpr (most > 1)
    if (rows < most) return tile<transposed, most - 1>(rows, a, panel, count, out);
  tile<transposed, most>(a, panel, count, out);
}

// out = factor * (G or G^T) * features, in the dtype of the features.
struct Product {
  const float* g;  // [items, items]
  bool transposed;
  Features features;
  int64_t items;
  float factor;
  void* out;  // [items, dim], or NULL: not wanted

  int64_t row_tasks() const { return (items + kTaskRows - 1) / kTaskRows; }
  int64_t tasks() const { return out == nullptr ? 0 : row_tasks() * ((features.dim + kTaskCols - 1) / kTaskCols); }

  // `panel` has room for items * kPanel numbers.
  void run(int64_t task, float* panel) const {
    const int64_t row_task = task % row_tasks(), left = task / row_tasks() * kTaskCols;
    const int64_t first = row_task * items / row_tasks(), last = (row_task + 1) * items / row_tasks();
    const int64_t right = std::min(left + kTaskCols, features.dim);
    for (int64_t begin = left; begin < right; begin += kPanel) {
      const int64_t width = std::min(kPanel, right - begin);
      features.gather(items, begin, width, panel);
      for (int64_t i = first, rows; i < last; i += rows) {
        rows = next_rows(last - i, kTileRows);
        alignas(64) float found[kTileRows * kPanel];
        if (transposed) {
          tile<true, kTileRows>(static_cast<int>(rows), g + i, panel, items, found);
        } else {
          tile<false, kTileRows>(static_cast<int>(rows), g + i * items, panel, items, found);
        }
        for (int64_t r = 0; r < rows; ++r) write(found + r * kPanel, width, (i + r) * features.dim + begin);
      }
    }
  }

 private:
  void write(const float* found, int64_t width, int64_t at) const {
    for_vectors(0, width, [&](int64_t c, auto lanes) {
      const vf value = load<vf>(found + c) * factor;
      if (features.dtype == CCU_F32) return store(static_cast<float*>(out) + at + c, value, lanes);
      uint16_t bits[kLanes];
      if (features.dtype == CCU_BF16) {
        store_halves(bits, (vi)round_bf16(value) >> 16);
      } else {
        store_halves(bits, narrow_f16(value));
      }
      std::memcpy(static_cast<uint16_t*>(out) + at + c, bits, lanes.n * sizeof(uint16_t));
    });
  }
};

}  // namespace CCU_ISA
}  // namespace ccu

#endif  // CCU_FAST_CPU_SMALL_PRODUCTS_H_
