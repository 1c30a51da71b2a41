// candidate_losses on a GPU, besides its two GEMMs; the formulas stand in csrc/cpu/candidates.cpp.
//
//     rest       one block an image (its row) and one a text (its column): O(B^2) exponentials
//     losses     one block a candidate: reads its B similarities, once, from the level-2 cache
//
// B = 128, K = 17: 280 thousand elements, 1 MB; the time is that of two launches, the rest is in the GEMM. Sums are
// fp64 in a fixed order (a thread's own, then a tree): the same bits every time. Their number is small enough for that.
#include <cmath>

#include "launch.cuh"

namespace ccu {
namespace {

constexpr int kBlock = 128;

__device__ __forceinline__ double larger(double a, double b) { return a > b ? a : b; }
__device__ __forceinline__ double added(double a, double b) { return a + b; }

// Over the block, the same in every thread.
template <class Join>
__device__ double reduce(double value, Join join) {
  __shared__ double parts[kBlock];
  parts[threadIdx.x] = value;
  __syncthreads();
  for (int half = kBlock / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) parts[threadIdx.x] = join(parts[threadIdx.x], parts[threadIdx.x + half]);
    __syncthreads();
  }
  const double all = parts[0];
  __syncthreads();
  return all;
}

struct Lse {
  double peak, sum;
};

// log sum exp of x[j * step] without j = skip (-1: of all).
__device__ Lse lse(const float* x, int64_t n, int64_t step, int64_t skip) {
  double peak = -INFINITY, sum = 0.0;
  for (int64_t j = threadIdx.x; j < n; j += kBlock)
    if (j != skip) peak = larger(peak, x[j * step]);
  peak = reduce(peak, larger);
  for (int64_t j = threadIdx.x; j < n; j += kBlock)
    if (j != skip) sum += exp(static_cast<double>(x[j * step]) - peak);
  return {peak, reduce(sum, added)};
}

__global__ void __launch_bounds__(kBlock) rest_of_rows(ccu_candidate_rest_args a) {
  const int64_t i = blockIdx.x, n = a.batch;
  const float* s = a.s + i * n;
  const Lse all = lse(s, n, 1, -1);
  __shared__ int64_t dominant;
  if (threadIdx.x == 0) dominant = -1;
  __syncthreads();
  for (int64_t b = threadIdx.x; b < n; b += kBlock) {
    const double term = exp(static_cast<double>(s[b]) - all.peak);
    if (term > 0.5 * all.sum)
      dominant = b;  // one at most
    else
      a.rest[b * n + i] = static_cast<float>(all.peak + log(all.sum - term));
  }
  __syncthreads();
  const int64_t b = dominant;
  if (b < 0) return;
  const Lse others = lse(s, n, 1, b);
  if (threadIdx.x == 0) a.rest[b * n + i] = n > 1 ? static_cast<float>(others.peak + log(others.sum)) : -INFINITY;
}

__global__ void __launch_bounds__(kBlock) columns(ccu_candidate_rest_args a) {
  const int64_t j = blockIdx.x, n = a.batch;
  const Lse column = lse(a.s + j, n, n, -1);
  if (threadIdx.x == 0) a.fixed[j] = column.peak + log(column.sum) - 2.0 * a.s[j * n + j];
}

// fixed[b] = sum of all columns less that of b; one block, so that no other one still reads what is written.
__global__ void __launch_bounds__(kBlock) others(double* fixed, int64_t n) {
  double sum = 0.0;
  for (int64_t b = threadIdx.x; b < n; b += kBlock) sum += fixed[b];
  const double all = reduce(sum, added);
  for (int64_t b = threadIdx.x; b < n; b += kBlock) fixed[b] = all - fixed[b];
}

__global__ void __launch_bounds__(kBlock) losses(ccu_candidate_losses_args a) {
  const int64_t task = blockIdx.x, n = a.batch, b = a.first + task / a.candidates;
  const float* x = a.similarity + task * n;
  const float* rest = a.rest + b * n;
  double images = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += kBlock) {
    const float high = fmaxf(rest[i], x[i]), low = fminf(rest[i], x[i]);
    images += static_cast<double>(high) + log1pf(expf(low - high));
  }
  images = reduce(images, added);
  const Lse own = lse(x, n, 1, -1);
  if (threadIdx.x == 0)
    a.out[b * a.candidates + task % a.candidates] =
        static_cast<float>((a.fixed[b] + images + own.peak + log(own.sum) - 2.0 * x[b]) / (2.0 * n));
}

}  // namespace
}  // namespace ccu

extern "C" int ccu_cuda_candidate_rest(const ccu_candidate_rest_args* args) {
  if (args == nullptr || args->batch < 1) return CCU_BAD_ARGUMENT;
  const unsigned blocks = static_cast<unsigned>(args->batch);
  const cudaStream_t stream = static_cast<cudaStream_t>(args->stream);
  ccu::rest_of_rows<<<blocks, ccu::kBlock, 0, stream>>>(*args);
  ccu::columns<<<blocks, ccu::kBlock, 0, stream>>>(*args);
  ccu::others<<<1, ccu::kBlock, 0, stream>>>(args->fixed, args->batch);
  return ccu::launched();
}

extern "C" int ccu_cuda_candidate_losses(const ccu_candidate_losses_args* args) {
  if (args == nullptr || args->batch < 1 || args->rows < 0 || args->candidates < 0) return CCU_BAD_ARGUMENT;
  const int64_t blocks = args->rows * args->candidates;
  if (blocks > INT32_MAX) return CCU_BAD_ARGUMENT;
  if (blocks == 0) return CCU_OK;
  ccu::losses<<<static_cast<unsigned>(blocks), ccu::kBlock, 0, static_cast<cudaStream_t>(args->stream)>>>(*args);
  return ccu::launched();
}
