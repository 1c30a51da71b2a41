// The part of CUDA that csrc/cuda uses, for a C++ compiler: kernels run on a CPU, see fibers.cpp and README.md.
#pragma once
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
// Shared by one block, since blocks run one after another; in a separate section, which can be filled with garbage. Not
// under the address sanitizer, which must see each variable by itself.
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static
#else
#define __shared__ static __attribute__((section("emulated_shared")))
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
using std::isfinite;
using std::isinf;
using std::isnan;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
extern "C" {
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetDevice(int*);
cudaError_t cudaHostGetDevicePointer(void**, void*, unsigned);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int);
}

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulation {

struct Place {
  const char* file;
  int line;
};
#define EMULATION_HERE \
  ::emulation::Place { __FILE__, __LINE__ }

void block_barrier(Place);
void warp_barrier(unsigned mask, Place);
// The values of the 32 lanes of this warp; those of lanes outside the mask are undefined.
const uint64_t* exchange(unsigned mask, uint64_t mine, Place);
[[noreturn]] void trap();
int lane();

struct Launch {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
  Launch(dim3 grid_, dim3 block_, size_t shared_ = 0, cudaStream_t stream_ = nullptr)
      : grid(grid_), block(block_), shared(shared_), stream(stream_) {}
};
void run(const Launch&, size_t parameter_bytes, void (*thread)(void*), void* context);

// kernel<<<launch>>>(arguments): the arguments are copied once and shared by every thread.
template <class... P, class... A>
void launch(const Launch& how, void (*kernel)(P...), A&&... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> parameters;
  } call{kernel, {P(arguments)...}};
  const auto thread = [](void* context) {
    auto* c = static_cast<Call*>(context);
    std::apply(c->kernel, c->parameters);
  };
  run(how, (sizeof(P) + ... + 0), thread, &call);
}

template <class T>
T shuffle(unsigned mask, T value, int from, Place place) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "at most 8 bytes travel");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t* all = exchange(mask, bits, place);
  if (from >= 0 && from < 32) std::memcpy(&value, all + from, sizeof value);
  return value;
}

inline unsigned ballot(unsigned mask, bool flag, Place place) {
  const uint64_t* all = exchange(mask, flag, place);
  unsigned set = 0;
  for (int l = 0; l < 32; ++l) set |= (mask >> l & 1) ? static_cast<unsigned>(all[l]) << l : 0u;
  return set;
}

template <class T, class Join>
T reduce(unsigned mask, T value, Join join, Place place) {
  const uint64_t* all = exchange(mask, static_cast<uint64_t>(value), place);
  bool first = true;
  T result{};
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) {
      result = first ? static_cast<T>(all[l]) : join(result, static_cast<T>(all[l]));
      first = false;
    }
  return result;
}

}  // namespace emulation

#define __trap() ::emulation::trap()
#define __syncthreads() ::emulation::block_barrier(EMULATION_HERE)
#define __syncwarp() ::emulation::warp_barrier(0xffffffffu, EMULATION_HERE)
#define __shfl_sync(mask, v, from) ::emulation::shuffle(mask, v, from, EMULATION_HERE)
#define __shfl_xor_sync(mask, v, by) ::emulation::shuffle(mask, v, ::emulation::lane() ^ (by), EMULATION_HERE)
#define __shfl_down_sync(mask, v, by) ::emulation::shuffle(mask, v, ::emulation::lane() + (by), EMULATION_HERE)
#define __shfl_up_sync(mask, v, by) ::emulation::shuffle(mask, v, ::emulation::lane() - (by), EMULATION_HERE)
#define __ballot_sync(mask, p) ::emulation::ballot(mask, p, EMULATION_HERE)
#define __any_sync(mask, p) (__ballot_sync(mask, p) != 0)
#define __all_sync(mask, p) (__ballot_sync(mask, p) == (mask))
#define __reduce_add_sync(mask, v) ::emulation::reduce(mask, v, [](auto a, auto b) { return a + b; }, EMULATION_HERE)
#define __reduce_min_sync(mask, v) \
  ::emulation::reduce(mask, v, [](auto a, auto b) { return a < b ? a : b; }, EMULATION_HERE)
#define __reduce_max_sync(mask, v) \
  ::emulation::reduce(mask, v, [](auto a, auto b) { return a < b ? b : a; }, EMULATION_HERE)

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T atomicAdd(T* p, T v) {
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
template <class T>
T atomicOr(T* p, T v) {
  return __atomic_fetch_or(p, v, __ATOMIC_RELAXED);
}
template <class T>
T atomicCAS(T* p, T expected, T v) {
  __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
template <class T>
T atomicMax(T* p, T v) {
  T seen = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (seen < v && !__atomic_compare_exchange_n(p, &seen, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}
