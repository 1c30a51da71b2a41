// What the bytes-bound kernels share: packs of elements that move as one access, and a grid that fills the device.
#ifndef CCU_FAST_CUDA_LAUNCH_CUH_
#define CCU_FAST_CUDA_LAUNCH_CUH_

#include <cuda_runtime.h>
#include <stdint.h>

#include "../ccu_fast.h"

namespace ccu {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 8;

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T item[N];
};

inline bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Blocks for `tasks` grid-stride tasks of one thread each; 0 if the device does not answer.
inline unsigned blocks_for(int64_t tasks) {
  int device = 0, processors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 0;
  const int64_t wanted = (tasks + kThreads - 1) / kThreads, most = int64_t{processors} * kBlocksPerProcessor;
  return static_cast<unsigned>(wanted < most ? (wanted > 0 ? wanted : 1) : most);
}

inline int launched() { return cudaGetLastError() == cudaSuccess ? CCU_OK : CCU_CUDA_ERROR; }

}  // namespace ccu

#endif  // CCU_FAST_CUDA_LAUNCH_CUH_
