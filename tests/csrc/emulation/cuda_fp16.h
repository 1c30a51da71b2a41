// The part of cuda_fp16.h that the kernels use, on the project's own conversions.
#pragma once
#include "common/half.h"
#include "cuda_runtime.h"

using __half = ccu::f16;
struct alignas(4) __half2 {
  __half x, y;
};
inline float2 __half22float2(__half2 v) { return {ccu::to_float(v.x), ccu::to_float(v.y)}; }
