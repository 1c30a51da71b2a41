// The coarse scores of a few gradient rows against a table in fp16, and the lowest key of every group of tokens:
//
//     scores[r, t] = sum_d table[t, d] * operand[r, d]         fp32 products and sums
//     lowest[r, g] = min of the keys of the usable tokens in group g; a key has the order of
//                    factor[r] * scores[r, t] + penalty_scale[r] * penalty[r, t]
//
// The time is that of one read of the table, 2 * tokens * dim bytes. A warp takes a group, 4 tokens at a time, and a
// lane takes 8 dimensions of each at a time, 16 bytes, so that every warp has 2 KB in flight. The 4 x 8 sums are then
// added over the lanes by halving: 31 shuffles leave sum number l in lane l, where separate reductions would take 160.
// A library GEMM serves calls with more rows than registers can hold sums for.
#include <cuda_fp16.h>

#include "topk.cuh"

namespace ccu {
namespace {

constexpr int kTokens = CCU_CUDA_GROUP_STEP;
constexpr int kRows = 8;  // the layout of the sums; using all eight would spill registers
constexpr int kDims = 8;
static_assert(CCU_CUDA_FEW_ROWS == 6 && CCU_CUDA_FEW_ROWS <= kRows);
static_assert(kTokens * kRows == 32);  // a sum for each lane

// Adds 2 * Width numbers over groups of 2 * Width lanes and gives sum number l to lane l of each group. A template, so
// that v stays in registers.
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
__global__ void __launch_bounds__(kThreads) few_rows(ccu_cuda_topk_args a) {
  const __half* __restrict__ table = static_cast<const __half*>(a.table);
  const float* __restrict__ operand = a.operand;
  float* __restrict__ scores = a.scores;
  const int lane = threadIdx.x % 32, row = lane % kRows;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int64_t tokens = a.tokens, groups = (tokens + a.group - 1) / a.group;
  if (group >= groups) return;
  const int64_t begin = group * a.group, end = begin + a.group < tokens ? begin + a.group : tokens;
  uint32_t lowest = kNever;
  for (int64_t first = begin; first < end; first += kTokens) {
    float sums[kTokens * kRows] = {};
    for (int64_t d = lane * kDims; d < a.padded; d += 32 * kDims) {
      float e[kTokens][kDims];
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        // Past the end, the last token is read again and its sum is not written.
        const int64_t token = first + t < tokens ? first + t : tokens - 1;
        const uint4 bits = __ldg(reinterpret_cast<const uint4*>(table + token * a.padded + d));
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
        const float4* g = reinterpret_cast<const float4*>(operand + r * a.padded + d);
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
    if (row < R && token < end) {
      scores[row * tokens + token] = sum;
      const uint32_t key = Keys(a, a.first + row).of(token, sum);
      lowest = key < lowest ? key : lowest;
    }
  }
  // The lowest of a row's four lanes.
#pragma unroll
  for (int other = kRows; other < 32; other *= 2) {
    const uint32_t key = __shfl_xor_sync(0xffffffffu, lowest, other);
    lowest = key < lowest ? key : lowest;
  }
  if (lane < R) a.lowest[lane * groups + group] = lowest;
}

template <int R>
void launch(const ccu_cuda_topk_args& a, unsigned blocks) {
  few_rows<R><<<blocks, kThreads, 0, static_cast<cudaStream_t>(a.stream)>>>(a);
}

}  // namespace
}  // namespace ccu

extern "C" int ccu_cuda_topk_scores(const ccu_cuda_topk_args* args) {
  if (args == nullptr || args->rows < 0 || args->rows > CCU_CUDA_FEW_ROWS || args->tokens < 1 ||
      args->tokens > INT32_MAX - 64 || args->padded < 1 || args->padded % ccu::kDims != 0 || args->lowest == nullptr ||
      args->group < 1 || args->group % ccu::kTokens != 0)
    return CCU_BAD_ARGUMENT;
  if (args->rows == 0) return CCU_OK;
  const int64_t groups = (args->tokens + args->group - 1) / args->group, warps = ccu::kThreads / 32;
  using Launch = void (*)(const ccu_cuda_topk_args&, unsigned);
  constexpr Launch kLaunch[] = {ccu::launch<1>, ccu::launch<2>, ccu::launch<3>,
                                ccu::launch<4>, ccu::launch<5>, ccu::launch<6>};
  kLaunch[args->rows - 1](*args, static_cast<unsigned>((groups + warps - 1) / warps));
  return ccu::launched();
}
