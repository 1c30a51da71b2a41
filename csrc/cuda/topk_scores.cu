// The coarse scores of few gradient rows against a table in fp16:
//
//     scores[r, t] = sum_d table[t, d] * grad[r, d]            fp32 products and sums
//
// Bound by the one read of the table, 2 * tokens * dim bytes, up to 6 rows a launch. A warp takes 4 tokens; a lane 8
// dimensions of each at a time, 16 bytes, so that 2 KB are on their way for every warp. The 4 x 8 sums are then added
// over the lanes by halving: 31 shuffles leave sum number l in lane l, where reducing each by itself would take 160.
// More rows than a few of these launches serve go to a library GEMM.
#include <cuda_fp16.h>

#include "launch.cuh"

namespace ccu {
namespace {

constexpr int kTokens = 4;
constexpr int kRows = 8;      // that the sums are laid out for
constexpr int kMostRows = 6;  // of a launch: 8 would spill registers
constexpr int kDims = 8;

// Number l of 2 * Width sums over groups of 2 * Width lanes to lane l of each; templates, so that v stays in registers.
template <int Width>
__device__ __forceinline__ float scatter_sums(const float (&v)[2 * Width], int lane) {
  const bool upper = lane & Width;
  float half[Width];
#pragma unroll
  for (int i = 0; i < Width; ++i) {
    const float send = upper ? v[i] : v[i + Width], keep = upper ? v[i + Width] : v[i];
    half[i] = keep + __shfl_xor_sync(0xffffffffu, send, Width);
  }
  if constexpr (Width == 1)
    return half[0];
  else
    return scatter_sums<Width / 2>(half, lane);
}

template <int R>
__global__ void __launch_bounds__(kThreads) few_rows(const __half* __restrict__ table, const float* __restrict__ grad,
                                                     float* __restrict__ scores, int64_t tokens, int64_t dim) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32) * kTokens;
       first < tokens; first += warps * kTokens) {
    float sums[kTokens * kRows] = {};
    for (int64_t d = lane * kDims; d < dim; d += 32 * kDims) {
      float e[kTokens][kDims];
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        // Behind the last token the last one is read again, and not written.
        const int64_t token = first + t < tokens ? first + t : tokens - 1;
        const uint4 bits = __ldg(reinterpret_cast<const uint4*>(table + token * dim + d));
        const __half2* pairs = reinterpret_cast<const __half2*>(&bits);
#pragma unroll
        for (int p = 0; p < kDims / 2; ++p) {
          const float2 pair = __half22float2(pairs[p]);
          e[t][2 * p] = pair.x;
          e[t][2 * p + 1] = pair.y;
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float4* g = reinterpret_cast<const float4*>(grad + r * dim + d);
        const float4 low = __ldg(g), high = __ldg(g + 1);
        const float values[kDims] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int t = 0; t < kTokens; ++t)
#pragma unroll
          for (int i = 0; i < kDims; ++i) sums[t * kRows + r] = fmaf(e[t][i], values[i], sums[t * kRows + r]);
      }
    }
    const float sum = scatter_sums<16>(sums, lane);
    const int64_t token = first + lane / kRows;
    if (lane % kRows < R && token < tokens) scores[(lane % kRows) * tokens + token] = sum;
  }
}

template <int R>
void launch(const ccu_cuda_topk_scores_args& a, int64_t row, unsigned blocks) {
  few_rows<R><<<blocks, kThreads, 0, static_cast<cudaStream_t>(a.stream)>>>(
      static_cast<const __half*>(a.table), a.grad + row * a.dim, a.scores + row * a.tokens, a.tokens, a.dim);
}

}  // namespace
}  // namespace ccu

extern "C" int ccu_cuda_topk_scores(const ccu_cuda_topk_scores_args* args) {
  if (args == nullptr || args->rows < 0 || args->tokens < 1 || args->dim < 1 || args->dim % ccu::kDims != 0)
    return CCU_BAD_ARGUMENT;
  const unsigned blocks = ccu::blocks_for((args->tokens + ccu::kTokens - 1) / ccu::kTokens * 32);
  if (blocks == 0) return ccu::no_device();
  using Launch = void (*)(const ccu_cuda_topk_scores_args&, int64_t, unsigned);
  constexpr Launch kLaunch[ccu::kMostRows] = {ccu::launch<1>, ccu::launch<2>, ccu::launch<3>,
                                              ccu::launch<4>, ccu::launch<5>, ccu::launch<6>};
  for (int64_t row = 0; row < args->rows; row += ccu::kMostRows) {
    const int64_t left = args->rows - row;
    kLaunch[(left < ccu::kMostRows ? left : ccu::kMostRows) - 1](*args, row, blocks);
  }
  return ccu::launched();
}
