// What topk_flips on a GPU must know about its gradients before it scans the table; csrc/common/topk_row.h has the
// formulas. Torch would need some 40 launches of a microsecond or two for this.
//
// Work: each block reads one row of the gradient twice, the second time from the cache, and writes it once.
#include "../common/topk_row.h"
#include "launch.cuh"

namespace ccu {
namespace {

__global__ void __launch_bounds__(kThreads) describe(ccu_topk_describe_args a) {
  const int64_t row = blockIdx.x;
  const float* grad = a.grad + row * a.dim;
  float largest = 0.0f;
  for (int64_t d = threadIdx.x; d < a.dim && largest <= FLT_MAX; d += kThreads) largest = larger(largest, grad[d]);
  TopkRow about(over_block<kThreads>(largest, [](float x, float y) { return fmaxf(x, y); }));
  for (int64_t d = threadIdx.x; d < a.padded; d += kThreads)
    about.put(d < a.dim ? grad[d] : 0.0f, a, row * a.padded + d);
  about.norm = over_block<kThreads>(about.norm, Add());
  about.off = over_block<kThreads>(about.off, Add());
  if (threadIdx.x == 0) about.tell(a, a.about + 4 * row);
}

}  // namespace
}  // namespace ccu

extern "C" int ccu_cuda_topk_describe(const ccu_topk_describe_args* args) {
  if (args == nullptr || args->rows < 0 || args->rows > INT32_MAX || args->dim < 1 || args->padded < args->dim)
    return CCU_BAD_ARGUMENT;
  if (args->rows == 0) return CCU_OK;
  const unsigned blocks = static_cast<unsigned>(args->rows);
  ccu::describe<<<blocks, ccu::kThreads, 0, static_cast<cudaStream_t>(args->stream)>>>(*args);
  return ccu::launched();
}
