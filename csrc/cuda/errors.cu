// The text of a CUDA status, for the exception that it becomes.
#include <cuda_runtime.h>

#include "../ccu_fast.h"

extern "C" const char* ccu_cuda_error_text(int status) {
  if (status == CCU_CUDA_ERROR) return "the device does not answer";
  return cudaGetErrorString(static_cast<cudaError_t>(status - CCU_CUDA_ERROR));
}
