// The noise store on a GPU:
//
//     noise_add       out[b] = clamp(images[b] + noise[index[b]], lower, upper)
//     noise_update    noise[i] = clamp(noise[i] + sum of the deltas whose index is i, in order, -eps, eps)
//     noise_check     found = max over the values that a store cannot hold of (count - place)
//
// Memory bound: adding int8 noise to fp32 images moves 9 bytes per element. A thread takes 16 bytes of images, or of
// the wider of noise and deltas (of 16-byte rows), so 4 to 16 elements, in a grid-stride loop over items and packs; the
// index is read through the cache. A row out of range stops the kernel, as in torch's indexing: the host never waits
// for the index.
#include "../common/noise.h"
#include "launch.cuh"

namespace ccu {
namespace {

__device__ __forceinline__ int64_t in_range(int64_t row, int64_t rows) {
  if (row < 0 || row >= rows) out_of_range("index", row, rows);
  return row;
}

template <class T, class N, int W, bool kLimits>
__global__ void __launch_bounds__(kThreads) add_packs(ccu_noise_add_args a, int64_t packs) {
  const Pack<T, W>* images = static_cast<const Pack<T, W>*>(a.images);
  const Pack<N, W>* noise = static_cast<const Pack<N, W>*>(a.noise);
  Pack<T, W>* out = static_cast<Pack<T, W>*>(a.out);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads, all = a.items * packs;
  float low = a.lower, high = a.upper;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < all; at += stride) {
    const int64_t item = at / packs, p = at - item * packs;
    const int64_t row = a.index != nullptr ? in_range(__ldg(a.index + item), a.rows) : item;
    if (kLimits) {
      const int64_t channel = p * W / a.inner;
      low = __ldg(a.limits + channel);
      high = __ldg(a.limits + a.channels + channel);
    }
    Pack<T, W> x = images[at];
    const Pack<N, W> n = noise[row * packs + p];
#pragma unroll
    for (int i = 0; i < W; ++i) x.item[i] = noisy(x.item[i], n.item[i], low, high);
    out[at] = x;
  }
}

template <class N, class D, int W>
__global__ void __launch_bounds__(kThreads) update_packs(ccu_noise_update_args a, int64_t packs) {
  Pack<N, W>* noise = static_cast<Pack<N, W>*>(a.noise);
  const Pack<D, W>* delta = static_cast<const Pack<D, W>*>(a.delta);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads, all = a.count * packs;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < all; at += stride) {
    const int64_t first = at / packs, p = at - first * packs;
    const int64_t row = in_range(__ldg(a.rows + first), a.total);
    if (first > 0 && __ldg(a.rows + first - 1) == row) continue;  // the first of its row adds for all
    Pack<N, W> n = noise[row * packs + p];
    typename Sum<N>::type sum[W];
#pragma unroll
    for (int i = 0; i < W; ++i) sum[i] = Sum<N>::start(n.item[i]);
    for (int64_t q = first; q < a.count && __ldg(a.rows + q) == row; ++q) {
      const Pack<D, W> d = delta[__ldg(a.order + q) * packs + p];
#pragma unroll
      for (int i = 0; i < W; ++i) sum[i] += Sum<N>::of(d.item[i]);
    }
#pragma unroll
    for (int i = 0; i < W; ++i) n.item[i] = Sum<N>::end(sum[i], a.eps);
    noise[row * packs + p] = n;
  }
}

// Converts to the dtype of the computation.
__device__ __forceinline__ double wide(double x) { return x; }
template <class V>
__device__ __forceinline__ float wide(V x) {
  return to_float(x);
}

template <class V>
__device__ __forceinline__ bool cannot_hold(V value, const ccu_cuda_noise_check_args& a) {
  const auto x = wide(value);
  if (!a.whole) return !isfinite(x);
  const auto steps = rint(x * kSteps);
  // NaN fails the comparison.
  return !(fabs(x * kSteps - steps) <= a.slack) || steps < -128 || steps > 127;
}

template <class V, int W>
__global__ void __launch_bounds__(kThreads) check_values(ccu_cuda_noise_check_args a, int64_t packs) {
  const Pack<V, W>* values = static_cast<const Pack<V, W>*>(a.values);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t p = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; p < packs; p += stride) {
    const Pack<V, W> pack = values[p];
#pragma unroll
    for (int i = 0; i < W; ++i)
      if (cannot_hold(pack.item[i], a)) atomicMax(a.found, static_cast<unsigned long long>(a.count - (p * W + i)));
  }
}

template <class T, class N, int W>
int launch_add(const ccu_noise_add_args& a) {
  const int64_t packs = a.channels * a.inner / W;
  const unsigned blocks = blocks_for(a.items * packs);
  if (blocks == 0) return no_device();
  const cudaStream_t stream = static_cast<cudaStream_t>(a.stream);
  if (a.limits != nullptr)
    add_packs<T, N, W, true><<<blocks, kThreads, 0, stream>>>(a, packs);
  else
    add_packs<T, N, W, false><<<blocks, kThreads, 0, stream>>>(a, packs);
  return launched();
}

template <class T, class N>
int add(const ccu_noise_add_args& a) {
  constexpr int kWide = 16 / sizeof(T);
  const int64_t run = a.limits != nullptr ? a.inner : a.channels * a.inner;
  using Wide = Pack<T, kWide>;
  const bool wide = run % kWide == 0 && aligned_for<Wide>(a.images) && aligned_for<Wide>(a.out) &&
                    aligned_for<Pack<N, kWide>>(a.noise);
  return wide ? launch_add<T, N, kWide>(a) : launch_add<T, N, 1>(a);
}

template <class T>
int add_any(const ccu_noise_add_args& a) {
  switch (a.noise_dtype) {
    case CCU_I8:
      return add<T, int8_t>(a);
    case CCU_F16:
      return add<T, f16>(a);
    case CCU_F32:
      return add<T, float>(a);
    default:
      return CCU_BAD_ARGUMENT;
  }
}

template <class N, class D, int W>
int launch_update(const ccu_noise_update_args& a) {
  const int64_t packs = a.size / W;
  const unsigned blocks = blocks_for(a.count * packs);
  if (blocks == 0) return no_device();
  update_packs<N, D, W><<<blocks, kThreads, 0, static_cast<cudaStream_t>(a.stream)>>>(a, packs);
  return launched();
}

template <class N, class D, int W>
bool packs_of(const ccu_noise_update_args& a) {
  return a.size % W == 0 && aligned_for<Pack<N, W>>(a.noise) && aligned_for<Pack<D, W>>(a.delta);
}

template <class N, class D>
int update(const ccu_noise_update_args& a) {
  constexpr int kWide = 16 / (sizeof(N) > sizeof(D) ? sizeof(N) : sizeof(D)), kNarrow = 4;
  if (packs_of<N, D, kWide>(a)) return launch_update<N, D, kWide>(a);
  return packs_of<N, D, kNarrow>(a) ? launch_update<N, D, kNarrow>(a) : launch_update<N, D, 1>(a);
}

template <class N>
int update_any(const ccu_noise_update_args& a) {
  switch (a.delta_dtype) {
    case CCU_I8:
      return update<N, int8_t>(a);
    case CCU_F16:
      return update<N, f16>(a);
    case CCU_F32:
      return update<N, float>(a);
    default:
      return CCU_BAD_ARGUMENT;
  }
}

template <class V, int W>
int launch_check(const ccu_cuda_noise_check_args& a) {
  const int64_t packs = a.count / W;
  const unsigned blocks = blocks_for(packs);
  if (blocks == 0) return no_device();
  check_values<V, W><<<blocks, kThreads, 0, static_cast<cudaStream_t>(a.stream)>>>(a, packs);
  return launched();
}

template <class V>
int check(const ccu_cuda_noise_check_args& a) {
  constexpr int kWide = 16 / sizeof(V);
  const bool wide = a.count % kWide == 0 && aligned_for<Pack<V, kWide>>(a.values);
  return wide ? launch_check<V, kWide>(a) : launch_check<V, 1>(a);
}

}  // namespace
}  // namespace ccu

extern "C" int ccu_cuda_noise_check(const ccu_cuda_noise_check_args* args) {
  if (args == nullptr || args->count < 0 || args->found == nullptr) return CCU_BAD_ARGUMENT;
  if (args->count == 0) return CCU_OK;
  switch (args->dtype) {
    case CCU_F32:
      return ccu::check<float>(*args);
    case CCU_F16:
      return ccu::check<ccu::f16>(*args);
    case CCU_F64:
      return ccu::check<double>(*args);
    default:
      return CCU_BAD_ARGUMENT;
  }
}

extern "C" int ccu_cuda_noise_add(const ccu_noise_add_args* args) {
  if (args == nullptr || args->items < 0 || args->channels < 1 || args->inner < 1) return CCU_BAD_ARGUMENT;
  if (args->items == 0) return CCU_OK;
  switch (args->image_dtype) {
    case CCU_U8:
      return ccu::add_any<uint8_t>(*args);
    case CCU_F32:
      return ccu::add_any<float>(*args);
    case CCU_F16:
      return ccu::add_any<ccu::f16>(*args);
    case CCU_BF16:
      return ccu::add_any<ccu::bf16>(*args);
    default:
      return CCU_BAD_ARGUMENT;
  }
}

extern "C" int ccu_cuda_noise_update(const ccu_noise_update_args* args) {
  if (args == nullptr || args->count < 0 || args->size < 1) return CCU_BAD_ARGUMENT;
  if (args->count == 0) return CCU_OK;
  switch (args->noise_dtype) {
    case CCU_I8:
      return ccu::update_any<int8_t>(*args);
    case CCU_F16:
      return ccu::update_any<ccu::f16>(*args);
    case CCU_F32:
      return ccu::update_any<float>(*args);
    default:
      return CCU_BAD_ARGUMENT;
  }
}
