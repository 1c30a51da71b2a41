// pgd_step on a GPU, L-infinity:
//
//     delta = clamp(clamp(delta - step * sign(grad), -eps, eps) + image, lower, upper) - image
//
// Bytes bound: three reads and one write of the tensor, 3 FLOP-like operations for every 4 bytes. So the grid is
// only as large as it takes to keep the memory busy, and each thread moves 16 bytes of delta at a time; grid-stride, so
// that one launch serves any size. Parameters per channel are read through the cache, or once when there is one
// channel.
#include <cuda_runtime.h>

#include "../ccu_fast.h"
#include "../common/half.h"
#include "../common/pgd.h"

namespace ccu {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 8;

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T item[N];
};

struct Parameters {
  const float *step, *eps, *lower, *upper;
};

struct Values {
  float step, eps, lower, upper;
};

__device__ __forceinline__ Values read(const Parameters& p, int64_t channel) {
  return {__ldg(p.step + channel), __ldg(p.eps + channel), __ldg(p.lower + channel), __ldg(p.upper + channel)};
}

template <class T, class G>
__device__ __forceinline__ void update(T* delta, const G& grad, const T& image, const Values& v) {
  *delta = from_float<T>(pgd_linf(to_float(*delta), to_float(grad), to_float(image), v.step, v.eps, v.lower, v.upper));
}

// N elements a time; `inner` is a multiple of N, so that a pack lies within one channel.
template <class T, class G, int N, bool kOneChannel>
__global__ void __launch_bounds__(kThreads)
    linf_packs(Pack<T, N>* __restrict__ delta, const Pack<G, N>* __restrict__ grad,
               const Pack<T, N>* __restrict__ image, int64_t packs, int64_t packs_per_channel, int64_t channels,
               Parameters p) {
  Values v = read(p, 0);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < packs; i += stride) {
    if (!kOneChannel) v = read(p, i / packs_per_channel % channels);
    Pack<T, N> d = delta[i];
    const Pack<G, N> g = grad[i];
    const Pack<T, N> x = image[i];
#pragma unroll
    for (int n = 0; n < N; ++n) update(&d.item[n], g.item[n], x.item[n], v);
    delta[i] = d;
  }
}

bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

template <class T, class G, int N, bool kOneChannel>
int launch(const ccu_pgd_step_args& a, int64_t elements, int64_t inner) {
  int device = 0, processors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return CCU_CUDA_ERROR;
  const int64_t packs = elements / N;
  const int64_t wanted = (packs + kThreads - 1) / kThreads,
                most = static_cast<int64_t>(processors) * kBlocksPerProcessor;
  linf_packs<T, G, N, kOneChannel>
      <<<static_cast<unsigned>(wanted < most ? wanted : most), kThreads, 0, static_cast<cudaStream_t>(a.stream)>>>(
          static_cast<Pack<T, N>*>(a.delta), static_cast<const Pack<G, N>*>(a.grad),
          static_cast<const Pack<T, N>*>(a.image), packs, inner / N, a.channels,
          Parameters{a.step, a.eps, a.lower, a.upper});
  return cudaGetLastError() == cudaSuccess ? CCU_OK : CCU_CUDA_ERROR;
}

template <class T, class G>
int with_types(const ccu_pgd_step_args& a) {
  constexpr int kWide = 16 / sizeof(T);
  const int64_t elements = a.samples * a.channels * a.inner;
  const bool one = a.channels == 1;
  const int64_t inner = one ? elements : a.inner;
  const bool wide = inner % kWide == 0 && aligned(a.delta, kWide * sizeof(T)) && aligned(a.image, kWide * sizeof(T)) &&
                    aligned(a.grad, kWide * sizeof(G));
  if (wide) return one ? launch<T, G, kWide, true>(a, elements, inner) : launch<T, G, kWide, false>(a, elements, inner);
  return one ? launch<T, G, 1, true>(a, elements, inner) : launch<T, G, 1, false>(a, elements, inner);
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
  if (args->norm != CCU_LINF) return CCU_UNSUPPORTED;
  if (args->samples == 0 || args->inner == 0) return CCU_OK;
  switch (args->dtype) {
    case CCU_F32:
      return ccu::with_grad<float>(*args);
    case CCU_F16:
      return ccu::with_grad<ccu::f16>(*args);
    case CCU_BF16:
      return ccu::with_grad<ccu::bf16>(*args);
    default:
      return CCU_BAD_ARGUMENT;
  }
}
