// pgd_step on a GPU:
//
//   linf:  delta = clamp(clamp(delta - step * sign(grad), -eps, eps) + image, lower, upper) - image
//   l2:    delta = delta - step * grad / |grad|;  delta *= min(1, eps / |delta|);
//          delta = clamp(delta + image, lower, upper) - image                        |.| over a sample
//   and, on request, out = delta + image, from the sum before the image is subtracted
//
// Memory bandwidth is the limit: three reads and one write of the tensor (two with out), and about 3 operations for
// every 4 bytes. So the grid is only as large as it takes to keep the memory busy, and each thread moves 16 bytes of
// delta at a time, in a grid-stride loop, so that one launch serves any size. Numbers travel as kernel arguments:
// nothing is copied, and a CUDA graph can hold the step. l2 reads grad once more for its norm, and both tensors once
// more for the norm of the moved noise. It adds fp64 sums of fixed slices of a sample in a fixed order.
//
// With a check, linf reads grad once more, in a separate launch before anything is written, and l2 checks grad where it
// reads it for the norm. The kernel tells the host what is wrong, without making it wait, and makes no step.
#include <math.h>

#include "../common/pgd.h"
#include "launch.cuh"

namespace ccu {
namespace {

template <class T, class G, int N>
struct Tensors {
  Pack<T, N>* delta;
  const Pack<G, N>* grad;
  const Pack<T, N>* image;
  Pack<T, N>* out;

  explicit Tensors(const ccu_pgd_step_args& a)
      : delta(static_cast<Pack<T, N>*>(a.delta)),
        grad(static_cast<const Pack<G, N>*>(a.grad)),
        image(static_cast<const Pack<T, N>*>(a.image)),
        out(static_cast<Pack<T, N>*>(a.out)) {}

  // Writes both results of a pack from its moved noise.
  __device__ __forceinline__ void finish(int64_t i, const float (&moved)[N], const PgdParameters& p) const {
    const Pack<T, N> x = image[i];
    Pack<T, N> d, y;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float sum = pgd_image(moved[n], to_float(x.item[n]), p);
      d.item[n] = from_float<T>(sum - to_float(x.item[n]));
      y.item[n] = from_float<T>(sum);
    }
    delta[i] = d;
    if (out != nullptr) out[i] = y;
  }
};

// Records what is wrong. Neither this step nor later ones on the stream are made until the host has looked at it.
__device__ __noinline__ void refuse(unsigned long long* refused, unsigned long long* told, int64_t what) {
  const auto said = static_cast<unsigned long long>(what);
  if (atomicCAS(refused, 0ull, said) != 0ull) return;
  *const_cast<volatile unsigned long long*>(told) = said;
  __threadfence_system();
}

// The same in all threads, because the previous launch has decided it.
__device__ __forceinline__ bool is_refused(const ccu_pgd_step_args& a) { return a.check && *a.refused != 0ull; }

// Checks the parameters of all channels, in the first block.
__device__ __forceinline__ void check_channels(const ccu_pgd_step_args& a) {
  if (a.channel == nullptr || blockIdx.x != 0) return;
  for (int64_t c = threadIdx.x; c < a.channels; c += kThreads) {
    const PgdParameters p = pgd_parameters(a, c);
    const bool finite = isfinite(p.step) && isfinite(p.eps) && isfinite(p.lower) && isfinite(p.upper);
    if (!finite || p.step < 0.0f || p.eps < 0.0f || p.lower > p.upper) refuse(a.refused, a.told, -c - 1);
  }
}

template <class G, int N>
__global__ void __launch_bounds__(kThreads) check_packs(ccu_pgd_step_args a, const Pack<G, N>* grad, int64_t packs) {
  check_channels(a);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < packs; i += stride) {
    const Pack<G, N> g = grad[i];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float x = to_float(g.item[n]);
      if (isnan(x)) refuse(a.refused, a.told, i * N + n + 1);
    }
  }
}

// Moves N elements at a time. The size of a channel is a multiple of N, so that a pack lies within one channel.
template <class T, class G, int N>
__global__ void __launch_bounds__(kThreads)
    linf_packs(ccu_pgd_step_args a, Tensors<T, G, N> t, int64_t packs, int64_t packs_per_channel) {
  if (is_refused(a)) return;
  PgdParameters p = pgd_parameters(a, 0);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < packs; i += stride) {
    if (a.channel != nullptr) p = pgd_parameters(a, i / packs_per_channel % a.channels);
    const Pack<T, N> d = t.delta[i];
    const Pack<G, N> g = t.grad[i];
    float moved[N];
#pragma unroll
    for (int n = 0; n < N; ++n) moved[n] = pgd_linf(to_float(d.item[n]), to_float(g.item[n]), p);
    t.finish(i, moved, p);
  }
}

// Writes the sum of a slice's squares to parts[block]; the blocks of a sample are neighbours.
__device__ __forceinline__ void store_sum(double sum, double* parts) {
  sum = over_block<kThreads>(sum, Add());
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

__device__ __forceinline__ double sum_of(const double* parts, int64_t sample) {
  double sum = 0.0;
  for (int i = 0; i < CCU_PGD_SLICES; ++i) sum += parts[sample * CCU_PGD_SLICES + i];
  return sum;
}

enum class Pass { kGrad, kMoved, kWrite };

template <class T, class G, int N, Pass pass>
__global__ void __launch_bounds__(kThreads)
    l2_packs(ccu_pgd_step_args a, Tensors<T, G, N> t, int64_t packs_per_sample, int64_t packs_per_channel) {
  if (pass != Pass::kGrad && is_refused(a)) return;
  const int64_t sample = blockIdx.x / CCU_PGD_SLICES, slice = blockIdx.x % CCU_PGD_SLICES;
  const int64_t begin = packs_per_sample * slice / CCU_PGD_SLICES,
                end = packs_per_sample * (slice + 1) / CCU_PGD_SLICES;
  double* grads = a.parts;
  double* norms = a.parts + a.samples * CCU_PGD_SLICES;
  PgdParameters p = pgd_parameters(a, 0);
  const float rate = pass == Pass::kGrad ? 0.0f : pgd_rate(sum_of(grads, sample), p.step);
  const float shrink = pass == Pass::kWrite ? pgd_shrink(sum_of(norms, sample), p.eps) : 1.0f;
  double sum = 0.0;
  if (pass == Pass::kGrad && a.check) check_channels(a);
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const int64_t at = sample * packs_per_sample + i;
    const Pack<G, N> g = t.grad[at];
    if constexpr (pass == Pass::kGrad) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float x = to_float(g.item[n]);
        if (a.check && !isfinite(x)) refuse(a.refused, a.told, at * N + n + 1);
        sum += static_cast<double>(finite_or_zero(x)) * finite_or_zero(x);
      }
    } else {
      const Pack<T, N> d = t.delta[at];
      float moved[N];
#pragma unroll
      for (int n = 0; n < N; ++n) moved[n] = pgd_l2(to_float(d.item[n]), to_float(g.item[n]), rate);
      if constexpr (pass == Pass::kMoved) {
#pragma unroll
        for (int n = 0; n < N; ++n) sum += static_cast<double>(moved[n]) * moved[n];
      } else {
#pragma unroll
        for (int n = 0; n < N; ++n) moved[n] *= shrink;
        if (a.channel != nullptr) p = pgd_parameters(a, i / packs_per_channel);
        t.finish(at, moved, p);
      }
    }
  }
  if (pass != Pass::kWrite) store_sum(sum, pass == Pass::kGrad ? grads : norms);
}

template <class T, class G, int N>
int launch(const ccu_pgd_step_args& a) {
  const Tensors<T, G, N> t(a);
  const int64_t per_sample = a.channels * a.inner / N, packs = a.samples * per_sample;
  const int64_t per_channel = a.inner / N > 0 ? a.inner / N : 1;
  const cudaStream_t stream = static_cast<cudaStream_t>(a.stream);
  if (a.norm == CCU_LINF) {
    const unsigned blocks = blocks_for(packs);
    if (blocks == 0) return no_device();
    if (a.check) check_packs<G, N><<<blocks, kThreads, 0, stream>>>(a, t.grad, packs);
    linf_packs<T, G, N><<<blocks, kThreads, 0, stream>>>(a, t, packs, per_channel);
    return launched();
  }
  if (a.samples > INT32_MAX / CCU_PGD_SLICES || a.parts == nullptr) return CCU_BAD_ARGUMENT;
  const unsigned blocks = static_cast<unsigned>(a.samples * CCU_PGD_SLICES);
  l2_packs<T, G, N, Pass::kGrad><<<blocks, kThreads, 0, stream>>>(a, t, per_sample, per_channel);
  l2_packs<T, G, N, Pass::kMoved><<<blocks, kThreads, 0, stream>>>(a, t, per_sample, per_channel);
  l2_packs<T, G, N, Pass::kWrite><<<blocks, kThreads, 0, stream>>>(a, t, per_sample, per_channel);
  return launched();
}

template <class T, class G>
int with_types(const ccu_pgd_step_args& a) {
  constexpr int kWide = 16 / sizeof(T);
  const int64_t run = a.channel != nullptr ? a.inner : a.channels * a.inner;
  using Wide = Pack<T, kWide>;
  const bool wide = run % kWide == 0 && aligned_for<Wide>(a.delta) && aligned_for<Wide>(a.image) &&
                    aligned_for<Wide>(a.out) && aligned_for<Pack<G, kWide>>(a.grad);
  return wide ? launch<T, G, kWide>(a) : launch<T, G, 1>(a);
}

template <class T>
int with_grad(const ccu_pgd_step_args& a) {
  switch (a.grad_dtype) {
    case CCU_F32:
      return with_types<T, float>(a);
    case CCU_F16:
      return with_types<T, f16>(a);
    case CCU_BF16:
      return with_types<T, bf16>(a);
    default:
      return CCU_BAD_ARGUMENT;
  }
}

}  // namespace
}  // namespace ccu

extern "C" int ccu_cuda_pgd_step(const ccu_pgd_step_args* args) {
  if (args == nullptr || args->samples < 0 || args->channels < 1 || args->inner < 0) return CCU_BAD_ARGUMENT;
  if (args->samples == 0 || args->inner == 0) return CCU_OK;
  ccu_pgd_step_args a = *args;
  if (a.check) {
    if (a.refused == nullptr || a.told == nullptr) return CCU_BAD_ARGUMENT;
    const cudaError_t error = cudaHostGetDevicePointer(reinterpret_cast<void**>(&a.told), args->told, 0);
    if (error != cudaSuccess) return CCU_CUDA_ERROR + static_cast<int>(error);
  }
  switch (a.dtype) {
    case CCU_F32:
      return ccu::with_grad<float>(a);
    case CCU_F16:
      return ccu::with_grad<ccu::f16>(a);
    case CCU_BF16:
      return ccu::with_grad<ccu::bf16>(a);
    default:
      return CCU_BAD_ARGUMENT;
  }
}
