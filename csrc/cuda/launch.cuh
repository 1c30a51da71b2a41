// Shared by the kernels: packs of elements that move as one access, a grid that fills the device, and reductions over a
// warp or a block.
#ifndef CCU_FAST_CUDA_LAUNCH_CUH_
#define CCU_FAST_CUDA_LAUNCH_CUH_

#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>

#include "../ccu_fast.h"

namespace ccu {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 8;

// N elements that move as one access, or as several of 16 bytes. A larger alignment would let nvcc emit accesses of 32
// bytes on GPUs that have them, but tensors are only aligned to 16.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T item[N];
};

template <class P>
bool aligned_for(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(P) == 0;
}

// The number of blocks for `tasks` grid-stride tasks of one thread each; 0 if the device does not answer.
inline unsigned blocks_for(int64_t tasks) {
  int device = 0, processors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 0;
  const int64_t wanted = (tasks + kThreads - 1) / kThreads, most = int64_t{processors} * kBlocksPerProcessor;
  return static_cast<unsigned>(wanted < most ? (wanted > 0 ? wanted : 1) : most);
}

// The status of the last launch, and the status to return when the device does not answer.
inline int launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? CCU_OK : CCU_CUDA_ERROR + static_cast<int>(error);
}
inline int no_device() {
  const int status = launched();
  return status == CCU_OK ? CCU_CUDA_ERROR : status;
}

// Joins two values into their sum, for over_warp and over_block.
struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T x, T y) const {
    return x + y;
  }
};

// Joins `value` over the lanes of a warp, in a fixed order; every lane gets the same result.
template <class T, class Join>
__device__ __forceinline__ T over_warp(T value, Join join) {
  for (int lane = 16; lane > 0; lane /= 2) value = join(value, __shfl_xor_sync(0xffffffffu, value, lane));
  return value;
}

// The same over the threads of a block of kBlock.
template <int kBlock, class T, class Join>
__device__ T over_block(T value, Join join) {
  constexpr int kParts = kBlock / 32;
  __shared__ T parts[kParts];
  value = over_warp(value, join);
  __syncthreads();  // every thread has read the parts of the previous call
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  T all = parts[0];
  for (int w = 1; w < kParts; ++w) all = join(all, parts[w]);
  return all;
}

// Ends the kernel over an error that the host did not check for. As in torch, the process can then no longer use the
// GPU.
[[noreturn]] __device__ __forceinline__ void end_kernel() {
  __trap();
  __builtin_unreachable();
}

[[noreturn, maybe_unused]] static __device__ __noinline__ void out_of_range(const char* name, int64_t value,
                                                                            int64_t end) {
  printf("ccu_fast: %s: expected 0 <= index < %lld, got %lld\n", name, static_cast<long long>(end),
         static_cast<long long>(value));
  end_kernel();
}

}  // namespace ccu

#endif  // CCU_FAST_CUDA_LAUNCH_CUH_
