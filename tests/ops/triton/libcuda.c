// A CUDA driver without a GPU: it checks what a launch and a tensor descriptor are made with, says it, and does nothing.
#include <stdint.h>
#include <stdio.h>

// The first members of CUlaunchConfig.
struct Launch {
  unsigned grid[3], block[3], shared;
};

int cuLaunchKernelEx(const struct Launch *launch, void *function, void **parameters, void **extra) {
  const unsigned threads = launch->block[0] * launch->block[1] * launch->block[2];
  const int fits = launch->grid[0] >= 1 && launch->grid[0] <= 0x7fffffffu && launch->grid[1] == 1 &&
                   launch->grid[2] == 1 && threads >= 32 && threads <= 1024 && launch->shared <= 227 * 1024;
  printf("launch %s\n", fits ? "ok" : "refused");
  fflush(stdout);
  return fits ? 0 : 1;
}

// The rules of the CUDA driver's manual, for descriptors without interleaving.
int cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *address, const uint64_t *size,
                           const uint64_t *stride, const uint32_t *box, const uint32_t *step, int interleave,
                           int swizzle, int promotion, int fill) {
  const int bytes = type == 6 || type == 9 ? 2 : 4;
  const char *wrong = NULL;
  if (address == NULL || (uintptr_t)address % 16 != 0) wrong = "address";
  if (rank != 2 || interleave != 0) wrong = "form";
  for (uint32_t i = 0; i < rank; ++i)
    if (size[i] < 1 || size[i] > (uint64_t)1 << 32 || box[i] < 1 || box[i] > 256 || step[i] != 1) wrong = "size or box";
  for (uint32_t i = 0; i + 1 < rank; ++i)
    if (stride[i] % 16 != 0 || stride[i] >= (uint64_t)1 << 40 || stride[i] < size[0] * bytes) wrong = "stride";
  if (box[0] * bytes % 16 != 0 || (swizzle != 0 && box[0] * bytes > 16u << swizzle)) wrong = "width of the box";
  printf("descriptor %s\n", wrong == NULL ? "ok" : wrong);
  fflush(stdout);
  return wrong == NULL ? 0 : 1;
}

int cuGetErrorString(int error, const char **text) {
  *text = "refused by tests/ops/triton/libcuda.c";
  return 0;
}
int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) {
  *(uint64_t *)data = pointer;
  return 0;
}
int cuCtxGetCurrent(void **context) {
  static int any;
  *context = &any;
  return 0;
}

#define NOTHING(name) \
  int name(void) { return 0; }
NOTHING(cuInit)
NOTHING(cuCtxGetDevice)
NOTHING(cuCtxGetLimit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuDeviceGet)
NOTHING(cuDeviceGetAttribute)
NOTHING(cuDevicePrimaryCtxRetain)
NOTHING(cuDriverGetVersion)
NOTHING(cuFuncGetAttribute)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuKernelGetFunction)
NOTHING(cuLibraryGetKernel)
NOTHING(cuLibraryLoadData)
NOTHING(cuLibraryUnload)
NOTHING(cuModuleGetFunction)
NOTHING(cuModuleLoadData)
NOTHING(cuModuleUnload)
NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuStreamGetCtx)
NOTHING(cuTensorMapEncodeIm2col)
