// Kernels with one bug each, which the emulation must detect. The first argument selects the kernel.
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>

namespace {

// A barrier that half of a block does not reach.
__global__ void divergent_barrier(float*) {
  if (threadIdx.x < 32) __syncthreads();
}

// Two barriers in one branch each.
__global__ void different_barriers(float*) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

// A collective whose mask names lanes that have exited.
__global__ void missing_lane(float* out) {
  if (threadIdx.x % 32 >= 16) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

// A read of what another thread may not have written yet.
__global__ void race(float* out) {
  __shared__ float shared[64];
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = shared[63 - threadIdx.x];
}

__global__ void out_of_bounds(float* out) { out[threadIdx.x + 1] = 1.0f; }

// Sixteen bytes at an address that is only aligned to a float.
__global__ void misaligned(float* out) {
  if (threadIdx.x == 0) reinterpret_cast<float4*>(out + 1)->x = 1.0f;
}

__global__ void traps(float*) {
  if (threadIdx.x == 7) __trap();
}

__global__ void nothing(float*) {}

}  // namespace

int main(int, char** arguments) {
  float* out = static_cast<float*>(std::aligned_alloc(64, 64 * sizeof(float)));
  const char* which = arguments[1];
  unsigned threads = 64;
  if (!std::strcmp(which, "divergent_barrier")) divergent_barrier<<<1, threads>>>(out);
  if (!std::strcmp(which, "different_barriers")) different_barriers<<<1, threads>>>(out);
  if (!std::strcmp(which, "missing_lane")) missing_lane<<<1, threads>>>(out);
  if (!std::strcmp(which, "race")) race<<<1, threads>>>(out);
  if (!std::strcmp(which, "out_of_bounds")) out_of_bounds<<<1, threads>>>(out);
  if (!std::strcmp(which, "misaligned")) misaligned<<<1, threads>>>(out);
  if (!std::strcmp(which, "traps")) traps<<<1, threads>>>(out);
  if (!std::strcmp(which, "too_many_threads")) nothing<<<1, 2048>>>(out);
  if (!std::strcmp(which, "too_large_grid")) nothing<<<dim3(1, 70000), threads>>>(out);
  if (!std::strcmp(which, "nothing")) nothing<<<2, threads>>>(out);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) std::printf("%s\n", cudaGetErrorString(error));
  return error == cudaSuccess ? 0 : 3;
}
