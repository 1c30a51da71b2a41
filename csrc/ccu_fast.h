// The C ABI of ccu_fast: every operation is one function of one struct.
//
// Pointers are to contiguous memory unless a stride says otherwise, sizes and strides are in elements, and nothing is
// allocated here that outlives the call. Python validates, allocates and keeps alive; these functions only compute.
#ifndef CCU_FAST_H_
#define CCU_FAST_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// A status other than CCU_OK means that nothing was written.
enum ccu_status {
  CCU_OK = 0,
  CCU_BAD_ARGUMENT = 1,
  CCU_UNSUPPORTED = 2,
  CCU_OUT_OF_MEMORY = 3,
  CCU_CUDA_ERROR = 4,
};

enum ccu_dtype { CCU_F32 = 0, CCU_F16 = 1, CCU_BF16 = 2 };

// The instruction set the CPU kernels run with: "avx512", "avx2", "neon" or "base".
const char* ccu_cpu_isa(void);

// ---------------------------------------------------------------------------------------------------------------------
// reduce_similarity on tiles of S = scale * dot + bias, dot = x y^T being the work of a library GEMM.
//
// A reduction is kind * 8 + relations, kind 0 = lse, 1 = sum, 2 = softplus, relations a set of SELF = 1, SAME = 2,
// OTHER = 4. Without labels nothing is SAME; without ids, `diagonal` says whether (i, i) is SELF.

enum { CCU_MAX_REDUCTIONS = 8 };

// A chunk of rows of one or several banks, and what is to be known about its rows and columns.
typedef struct {
  const float* dot;         // [banks, rows, cols], rows are those from row0 on
  int64_t banks, rows, cols;
  int64_t row0;             // index of the first row, for the diagonal
  float scale, bias;
  const int32_t* row_labels;  // [banks or 1, rows] of this chunk, or NULL; negative = ignored
  const int32_t* col_labels;  // [banks or 1, cols], or NULL
  const int32_t* row_ids;     // [banks or 1, rows] of this chunk, or NULL
  const int32_t* col_ids;     // [banks or 1, cols], or NULL
  int64_t row_label_stride, col_label_stride, row_id_stride, col_id_stride;  // from bank to bank, 0 if shared
  int32_t diagonal;
  int32_t n_row, n_col;                        // how many reductions
  int32_t row_codes[CCU_MAX_REDUCTIONS];
  int32_t col_codes[CCU_MAX_REDUCTIONS];
  int32_t threads;
} ccu_tile;

// Row results of the chunk, and the running column results.
typedef struct {
  ccu_tile tile;
  float* row_out;           // reduction r, bank b, row i at r * row_reduction_stride + b * row_bank_stride + i
  int64_t row_reduction_stride, row_bank_stride;
  float* col_max;           // [n_col, banks, cols], -inf before the first chunk (lse only)
  double* col_sum;          // [n_col, banks, cols], 0 before the first chunk
  int64_t col_reduction_stride;  // from reduction to reduction in both
} ccu_similarity_forward_args;

int ccu_similarity_forward(const ccu_similarity_forward_args* args);

// G of the chunk, scaled and ready for the two GEMMs dX = G Y and dY = G^T X.
typedef struct {
  ccu_tile tile;
  const float* row_grad;    // strides of row_out
  const float* row_out;
  int64_t row_reduction_stride, row_bank_stride;
  const float* col_grad;    // [n_col, banks, cols], strides of col_out
  const float* col_out;
  int64_t col_reduction_stride;
  void* grad;               // [banks, rows, cols]: scale * G in grad_dtype; may be `dot` itself for fp32
  int32_t grad_dtype;       // CCU_F32 or CCU_BF16
  double* scale_sums;       // [banks * rows]: sum_j G_ij dot_ij
  double* bias_sums;        // [banks * rows]: sum_j G_ij
} ccu_similarity_backward_args;

int ccu_similarity_backward(const ccu_similarity_backward_args* args);

#ifdef __cplusplus
}
#endif

#endif  // CCU_FAST_H_
