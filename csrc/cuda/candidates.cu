// candidate_losses on a GPU, after its two GEMMs; csrc/cpu/candidates.cpp explains the formulas.
//
//     s = scale * image @ text.T;  n = scale * image @ text_candidates[b].T
//     rest[b, i]  = s[i, all but b].logsumexp()                           of one text and image
//     columns[j]  = s[:, j].logsumexp() - 2 s[j, j]                       of one text
//     sum[b, k]   = columns[all but b].sum() + logaddexp(rest[b], n[:, k]).sum() + n[:, k].logsumexp() - 2 n[b, k]
//     out[b, k]   = sum[b, k] / (2 B)
//
// A block takes a text and its K candidates, and each of its warps one candidate at a time. Up to a batch of
// CCU_CUDA_ALONE the block computes rest and columns itself. That costs 2 B^2 exponentials in each of B blocks but
// saves a launch: 4 million exponentials at B = 128 take the device less than a microsecond, and nothing has to be
// subtracted from a sum. For larger batches `rest_and_columns` computes both once, with B^2 exponentials each.
// Differences and exponentials are fp32, sums are fp64 in a fixed order, so the bits are the same every time.
#include <cmath>

#include "launch.cuh"

namespace ccu {
namespace {

constexpr int kWarps = kThreads / 32;

struct Largest {
  template <class T>
  __device__ T operator()(T x, T y) const {
    return x > y ? x : y;
  }
};

struct Lse {
  float peak;
  double sum;
  __device__ double value() const { return peak > -INFINITY ? peak + log(sum) : -INFINITY; }
};

// The parts of a log-sum-exp over value(j) for all j != skip (-1 skips none); a thread takes every `step`-th j from
// `first` on.
template <class Value>
__device__ __forceinline__ float peak_of(int64_t n, int64_t skip, int first, int step, const Value& value) {
  float peak = -INFINITY;
  for (int64_t j = first; j < n; j += step)
    if (j != skip) peak = fmaxf(peak, value(j));
  return peak;
}
template <class Value>
__device__ __forceinline__ double sum_of(int64_t n, int64_t skip, int first, int step, float peak, const Value& value) {
  double sum = 0.0;
  for (int64_t j = first; j < n; j += step)
    if (j != skip) sum += expf(value(j) - peak);
  return sum;
}
template <class Value>
__device__ __forceinline__ Lse warp_lse(int64_t n, int64_t skip, const Value& value) {
  const int lane = threadIdx.x % 32;
  const float peak = over_warp(peak_of(n, skip, lane, 32, value), Largest());
  return {peak, over_warp(sum_of(n, skip, lane, 32, peak, value), Add())};
}
template <class Value>
__device__ __forceinline__ Lse block_lse(int64_t n, int64_t skip, const Value& value) {
  const int thread = threadIdx.x;
  const float peak = over_block<kThreads>(peak_of(n, skip, thread, kThreads, value), Largest());
  return {peak, over_block<kThreads>(sum_of(n, skip, thread, kThreads, peak, value), Add())};
}

__device__ __forceinline__ float scale_of(const ccu_cuda_candidate_args& a) {
  return a.factor != nullptr ? a.scale * __ldg(a.factor) : a.scale;
}

// One block for each image, which computes the rest of every text from its row of s, and one for each text, which
// reduces its column of s.
__global__ void __launch_bounds__(kThreads) rest_and_columns(ccu_cuda_candidate_args a) {
  const int64_t n = a.batch;
  const float scale = scale_of(a);
  if (blockIdx.x >= n) {
    const int64_t j = blockIdx.x - n;
    const Lse column = block_lse(n, -1, [&](int64_t i) { return scale * a.s[i * n + j]; });
    if (threadIdx.x == 0) a.columns[j] = column.value() - 2.0 * (scale * a.s[j * n + j]);
    return;
  }
  const int64_t i = blockIdx.x;
  const auto row = [&](int64_t j) { return scale * a.s[i * n + j]; };
  const Lse all = block_lse(n, -1, row);
  // A term that is more than half of the sum is not subtracted from it; instead the others are added up separately.
  __shared__ int64_t dominant;
  if (threadIdx.x == 0) dominant = -1;
  __syncthreads();
  for (int64_t b = threadIdx.x; b < n; b += kThreads) {
    const double term = expf(row(b) - all.peak);
    if (term > 0.5 * all.sum)
      dominant = b;  // at most one term is
    else
      a.rest[b * n + i] = static_cast<float>(all.peak + log(all.sum - term));
  }
  __syncthreads();
  const int64_t b = dominant;
  if (b < 0) return;
  const Lse others = block_lse(n, b, row);
  if (threadIdx.x == 0) a.rest[b * n + i] = static_cast<float>(others.value());
}

template <bool kAlone>
__global__ void __launch_bounds__(kThreads) losses(ccu_cuda_candidate_args a) {
  __shared__ float own[kAlone ? CCU_CUDA_ALONE : 1];
  const int64_t n = a.batch, b = a.first + blockIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float scale = scale_of(a);
  const float* rest = own;
  double fixed = 0.0;
  if constexpr (kAlone) {
    for (int64_t i = warp; i < n; i += kWarps) {
      const Lse row = warp_lse(n, b, [&](int64_t j) { return scale * a.s[i * n + j]; });
      if (lane == 0) own[i] = static_cast<float>(row.value());
    }
    // Each thread takes a column, so that neighbouring threads read neighbouring elements.
    for (int64_t j = threadIdx.x; j < n; j += kThreads) {
      if (j == b) continue;
      const auto column = [&](int64_t i) { return scale * a.s[i * n + j]; };
      const float peak = peak_of(n, -1, 0, 1, column);
      fixed += Lse{peak, sum_of(n, -1, 0, 1, peak, column)}.value() - 2.0 * column(j);
    }
  } else {
    rest = a.rest + b * n;
    for (int64_t j = threadIdx.x; j < n; j += kThreads) fixed += j == b ? 0.0 : a.columns[j];
  }
  fixed = over_block<kThreads>(fixed, Add());  // also waits until all of `own` is written
  for (int64_t k = warp; k < a.candidates; k += kWarps) {
    const float* x = a.similarity + (blockIdx.x * a.candidates + k) * n;
    const auto value = [&](int64_t i) { return scale * x[i]; };
    double images = 0.0;
    for (int64_t i = lane; i < n; i += 32) {
      const float high = fmaxf(rest[i], value(i)), low = fminf(rest[i], value(i));
      images += static_cast<double>(high) + log1pf(expf(low - high));
    }
    images = over_warp(images, Add());
    const Lse text = warp_lse(n, -1, value);
    if (lane == 0)
      a.out[b * a.candidates + k] = static_cast<float>((fixed + images + text.value() - 2.0 * value(b)) / (2.0 * n));
  }
}

}  // namespace
}  // namespace ccu

extern "C" int ccu_cuda_candidate_rest(const ccu_cuda_candidate_args* args) {
  if (args == nullptr || args->batch < 1 || args->batch > INT32_MAX / 2) return CCU_BAD_ARGUMENT;
  const unsigned blocks = static_cast<unsigned>(2 * args->batch);
  ccu::rest_and_columns<<<blocks, ccu::kThreads, 0, static_cast<cudaStream_t>(args->stream)>>>(*args);
  return ccu::launched();
}

extern "C" int ccu_cuda_candidate_losses(const ccu_cuda_candidate_args* args) {
  if (args == nullptr || args->batch < 1 || args->rows < 0 || args->rows > INT32_MAX || args->candidates < 0)
    return CCU_BAD_ARGUMENT;
  if (args->rows == 0 || args->candidates == 0) return CCU_OK;
  if (args->rest == nullptr && args->batch > CCU_CUDA_ALONE) return CCU_BAD_ARGUMENT;
  const unsigned blocks = static_cast<unsigned>(args->rows);
  const cudaStream_t stream = static_cast<cudaStream_t>(args->stream);
  if (args->rest == nullptr)
    ccu::losses<true><<<blocks, ccu::kThreads, 0, stream>>>(*args);
  else
    ccu::losses<false><<<blocks, ccu::kThreads, 0, stream>>>(*args);
  return ccu::launched();
}
