// noise_add: out[b] = clamp(images[b] + noise[index[b]], lower, upper).
//
// Memory bound: one read of the images and of their rows of noise, one write. A task is a block of one image, so that
// the noise is looked up once per block, and a few large images still occupy all threads.
#include <algorithm>

#include "../ccu_fast.h"
#include "../common/noise.h"
#include "parallel.h"

namespace ccu {
namespace CCU_ISA {
namespace {

constexpr int64_t kBlock = 1 << 15;

template <class T, class N>
int add(const ccu_noise_add_args& a) {
  const int64_t size = a.channels * a.inner, blocks = (size + kBlock - 1) / kBlock;
  parallel_for(
      a.items * blocks, threads_for(a.threads, 1.0 * a.items * size * (2 * sizeof(T) + sizeof(N))), [&](int64_t task) {
        const int64_t item = task / blocks, begin = task % blocks * kBlock, end = std::min(begin + kBlock, size);
        const T* image = static_cast<const T*>(a.images) + item * size;
        const N* noise = static_cast<const N*>(a.noise) + (a.index != nullptr ? a.index[item] : item) * size;
        T* out = static_cast<T*>(a.out) + item * size;
        for (int64_t from = begin; from < end;) {
          const int64_t channel = from / a.inner;
          const int64_t to = a.limits != nullptr ? std::min(end, (channel + 1) * a.inner) : end;
          const float low = a.limits != nullptr ? a.limits[channel] : a.lower;
          const float high = a.limits != nullptr ? a.limits[a.channels + channel] : a.upper;
      // out may be images itself, but must not overlap it in any other way.
#pragma GCC ivdep
          for (int64_t i = from; i < to; ++i) out[i] = noisy(image[i], noise[i], low, high);
          from = to;
        }
      });
  return CCU_OK;
}

template <class T>
int with_noise(const ccu_noise_add_args& a) {
  switch (a.noise_dtype) {
    case CCU_I8:
      return add<T, int8_t>(a);
    case CCU_F16:
      return add<T, f16>(a);
    case CCU_F32:
      return add<T, float>(a);
    default:
      return CCU_BAD_ARGUMENT;
  }
}

}  // namespace

int noise_add(const ccu_noise_add_args& a) {
  if (a.items < 0 || a.channels < 1 || a.inner < 1) return CCU_BAD_ARGUMENT;
  switch (a.image_dtype) {
    case CCU_U8:
      return with_noise<uint8_t>(a);
    case CCU_F32:
      return with_noise<float>(a);
    case CCU_F16:
      return with_noise<f16>(a);
    case CCU_BF16:
      return with_noise<bf16>(a);
    default:
      return CCU_BAD_ARGUMENT;
  }
}

}  // namespace CCU_ISA
}  // namespace ccu
