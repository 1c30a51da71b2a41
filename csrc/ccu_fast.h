// The C ABI of ccu_fast: every operation is one function that takes one struct.
//
// Pointers refer to contiguous memory unless a stride says otherwise, sizes and strides are in elements, and no
// allocation outlives the call. Python validates, allocates and owns the memory; these functions only compute.
#ifndef CCU_FAST_H_
#define CCU_FAST_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// After a status other than CCU_OK the outputs are undefined; inputs, and buffers updated in place, are untouched.
enum ccu_status {
  CCU_OK = 0,
  CCU_BAD_ARGUMENT = 1,
  CCU_UNSUPPORTED = 2,
  CCU_OUT_OF_MEMORY = 3,
  CCU_CUDA_ERROR = 1000,  // plus the number of the CUDA error, if that is known
};

// Describes a status of CCU_CUDA_ERROR or above; CUDA builds only.
const char* ccu_cuda_error_text(int status);

enum ccu_dtype { CCU_F32 = 0, CCU_F16 = 1, CCU_BF16 = 2, CCU_U8 = 3, CCU_I8 = 4, CCU_F64 = 5 };

// The instruction set the CPU kernels run with: "avx512", "avx2", "neon" or "base".
const char* ccu_cpu_isa(void);

// ---------------------------------------------------------------------------------------------------------------------
// reduce_similarity on tiles of S = scale * dot + bias, where a library GEMM has computed dot = x y^T.
//
// A reduction is encoded as kind * 8 + relations: kind 0 = lse, 1 = sum, 2 = softplus, 3 = logsigmoid, 4 = count,
// 5 = mass, 6 = expected; relations is a set of SELF = 1, SAME = 2, OTHER = 4. Without labels no pair is SAME; without
// ids, `diagonal` says whether (i, i) is SELF. An OTHER pair whose similarity is above the limit of its row has no part
// in the reductions of rows, and likewise for columns. With a teacher, a guide whose products make the probabilities of
// mass and expected, there are no limits.

enum { CCU_MAX_REDUCTIONS = 8 };

// A chunk of rows of one or several banks, with the labels and ids of its rows and columns.
typedef struct {
  const void* dot;        // [banks, rows, cols] in dot_dtype; the rows start at row0
  int32_t dot_dtype;      // CCU_F32 or CCU_BF16
  const float* self_dot;  // [banks, rows]: fp32 dot of the diagonal pairs, replaces the rounded ones; or NULL
  int64_t banks, rows, cols;
  int64_t row0;  // index of the first row, for the diagonal
  float scale, bias;
  const int32_t* row_labels;  // [banks or 1, rows] of this chunk, or NULL; negative = ignored
  const int32_t* col_labels;  // [banks or 1, cols], or NULL
  const int32_t* row_ids;     // [banks or 1, rows] of this chunk, or NULL
  const int32_t* col_ids;     // [banks or 1, cols], or NULL
  int64_t row_label_stride, col_label_stride, row_id_stride, col_id_stride;  // from bank to bank, 0 if shared
  int32_t diagonal;
  int32_t n_row, n_col;  // numbers of reductions
  int32_t row_codes[CCU_MAX_REDUCTIONS];
  int32_t col_codes[CCU_MAX_REDUCTIONS];
  int32_t threads;
  const float* row_limits;  // [banks or 1, rows] of this chunk, or NULL; of a teacher the lse of its rows
  const float* col_limits;  // [banks or 1, cols], or NULL; of a teacher the lse of its columns
  int64_t row_limit_stride, col_limit_stride;
  const void* guide;  // [banks, rows, cols] in guide_dtype: the similarities that limits look at; NULL: those are dot
  int32_t guide_dtype;
  int32_t teaches;              // whether the guide is a teacher
  float teacher_scale;          // of the teacher's products
  const float* guide_self_dot;  // what self_dot is to dot; or NULL
  // [banks, rows] of this chunk and [banks, cols], both or neither: what is said of dot_ij concerns dot_ij times
  // row_factors_i times col_factors_j, such as inverse norms. Only with CCU_F32.
  const float* row_factors;
  const float* col_factors;
} ccu_tile;

// Row results of the chunk, and running column results.
typedef struct ccu_similarity_forward_args {
  ccu_tile tile;
  float* row_out;  // reduction r, bank b, row i at r * row_reduction_stride + b * row_bank_stride + i
  int64_t row_reduction_stride, row_bank_stride;
  float* col_max;                // [n_col, banks, cols], -inf before the first chunk (lse only)
  double* col_sum;               // [n_col, banks, cols], 0 before the first chunk
  int64_t col_reduction_stride;  // from reduction to reduction in both
  // Of more dimensions of the same items, or NULL: its products become those of this tile plus its own. Only with
  // CCU_F32 and in the same shape.
  const struct ccu_similarity_forward_args* longer;
} ccu_similarity_forward_args;

int ccu_similarity_forward(const ccu_similarity_forward_args* args);

// G of the chunk, scaled for the two GEMMs dX = G Y and dY = G^T X.
typedef struct {
  ccu_tile tile;
  const float* row_grad;  // strides of row_out
  const float* row_out;
  int64_t row_reduction_stride, row_bank_stride;
  const float* col_grad;  // [n_col, banks, cols], strides of col_out
  const float* col_out;
  int64_t col_reduction_stride;
  void* grad;          // [banks, rows, cols]: scale * G (times the factors, if there are any) in grad_dtype; may be
                       // `dot` itself if the dtypes are the same
  int32_t grad_dtype;  // CCU_F32 or CCU_BF16
  double* scale_sums;  // [banks * rows]: sum_j G_ij dot_ij
  double* bias_sums;   // [banks * rows]: sum_j G_ij
  int32_t add;         // 1: is added to what grad holds, which is not dot
  double* col_sums;    // [banks * cols]: sum_i G_ij dot_ij is added; NULL where it is not wanted
} ccu_similarity_backward_args;

int ccu_similarity_backward(const ccu_similarity_backward_args* args);

// A running softmax over blocks of keys, see csrc/cpu/similarity_softmax.cpp.
typedef struct {
  ccu_tile tile;      // the columns of one block; row_codes are lse of disjoint sets, the groups; 0 for an empty group
  float* e;           // [rows, cols]: exponentials of group 0; may be `dot` itself if that is fp32
  const float* keys;  // [cols, dim], for the groups after the first
  int64_t dim;
  float* shift;  // group g, row i at g * group_stride + i; -inf before the first block
  double* sum;   // the same; 0 before the first block
  float* mean;   // the same, times dim; 0 before the first block
  int64_t group_stride;
} ccu_similarity_softmax_args;

int ccu_similarity_softmax(const ccu_similarity_softmax_args* args);

// InfoNCE of one small paired batch, and its gradients; see csrc/cpu/small_info_nce.cpp.
typedef struct {
  const void* x;  // [items, dim]; NULL: `dot` holds x y^T, and the next four say nothing
  const void* y;  // [items, dim]
  int64_t dim;
  int32_t dtype;    // of x and y
  int32_t rounded;  // to which their values are rounded before they are multiplied; CCU_F32 for not at all
  int64_t items;
  float scale;
  double weight;  // of a row's, and of a column's loss
  int32_t symmetric;
  float* dot;         // [items, items]
  float* loss;        // one number
  float* scale_grad;  // one number, and `dot` is overwritten with scale * G; or NULL, and only the loss is computed
  int32_t threads;
} ccu_small_info_nce_args;

int ccu_small_info_nce(const ccu_small_info_nce_args* args);

typedef struct {
  const float* grad;  // [items, items]: scale * G
  const void *x, *y;  // [items, dim]
  int64_t items, dim;
  int32_t dtype;            // of x, y, dx and dy
  int32_t rounded;          // as above
  float factor;             // of all gradients
  void *dx, *dy;            // [items, dim]; NULL where one is not wanted
  const float* scale_grad;  // one number
  float* dscale;            // factor times that; or NULL
  int32_t threads;
} ccu_small_info_nce_backward_args;

int ccu_small_info_nce_backward(const ccu_small_info_nce_backward_args* args);

// ---------------------------------------------------------------------------------------------------------------------
// topk_flips: for each row the k tokens of lowest score = sign * dot(embedding[id], grad) + penalty in float64, ties to
// the lowest token; sign = -1 for maximize. Tokens are numbered 0 to tokens - 1 in the packed table.

// A packed token consists of integers within +-2^CCU_TOKEN_BITS.
enum { CCU_TOKEN_PANEL = 16, CCU_TOKEN_BITS = 13 };

typedef struct {
  const float* grad;  // [rows, dim]
  int64_t rows, dim;
  const int16_t* packed;  // [ceil(tokens / 16), ceil(dim / 2), 16, 2] in steps of each token, zeros after the last
  const float* steps;     // [ceil(tokens / 16), 16] powers of two; an element is off by at most half its token's step
  int64_t tokens;
  const int64_t* token_ids;  // [tokens], ascending: the embedding row of each packed token; NULL: the same number
  double max_norm;           // of the packed tokens
  const void* embedding;     // element d of row id at id * embedding_stride + d * embedding_step
  int64_t embedding_stride, embedding_step;
  int32_t embedding_dtype;
  int32_t maximize;
  const int64_t* current;  // [rows] token ids, or NULL
  int32_t exclude_current;
  const uint8_t* allowed;  // row i at i * allowed_stride, by packed token; or NULL
  int64_t allowed_stride;
  const float* penalty;  // row i at i * penalty_stride, by packed token; finite; or NULL
  int64_t penalty_stride;
  int64_t k;
  int32_t threads;
  int64_t* ids;    // [rows, k]; -1 after the last
  float* delta;    // [rows, k]: dot(embedding[id] - embedding[current], grad); NaN after the last
  double* score;   // [rows, k]: score - sign * dot(embedding[current], grad); +inf after the last
  int64_t* count;  // [rows]
  uint8_t* valid;  // [rows]: 0 for a gradient with NaN or inf
} ccu_topk_flips_args;

int ccu_topk_flips(const ccu_topk_flips_args* args);

// On a GPU in three steps: ccu_cuda_topk_describe prepares the gradients; ccu_cuda_topk_scores (few rows) or a library
// GEMM computes coarse scores from an fp16 table; the selection rescores candidates from the embedding.
enum { CCU_CUDA_MOST_FLIPS = 1024, CCU_CUDA_FEW_ROWS = 6, CCU_CUDA_TOPK_GROUPS = 4096, CCU_CUDA_GROUP_STEP = 4 };
// How a row is selected: from its coarse scores and their error bound; from float64 scores of all tokens, because there
// is no bound; not at all; by the penalty alone, because the gradient is zero.
enum ccu_topk_path { CCU_TOPK_SCAN = 0, CCU_TOPK_EXACT = 1, CCU_TOPK_INVALID = 2, CCU_TOPK_ZERO = 3 };

typedef struct {
  const float* grad;  // [rows, dim]
  int64_t rows, dim;
  int64_t padded;        // dimension of the table
  const double* coarse;  // [3]: 1 / scale of the table, largest error and norm of a row of it
  int32_t maximize;
  int32_t certify;  // 0: treat coarse scores as exact
  int32_t half;     // 1: operand is fp16, for a library GEMM; 0: fp32, for ccu_cuda_topk_scores
  void* operand;    // [rows, padded]
  float* about;     // [rows, 4]: see ccu_cuda_topk_args
  void* stream;
} ccu_topk_describe_args;

int ccu_cuda_topk_describe(const ccu_topk_describe_args* args);

typedef struct {
  // Inputs of the scores of at most CCU_CUDA_FEW_ROWS rows; both pointers are 16-byte aligned.
  const void* table;     // fp16 [tokens, padded]
  const float* operand;  // [rows, padded]
  int64_t padded;        // a multiple of 8
  float* scores;         // [rows, tokens] of rows first, first + 1, ..
  int64_t first, rows, tokens;
  // [rows, ceil(tokens / group)]: the lowest key of each group of tokens; at most CCU_CUDA_TOPK_GROUPS groups, and
  // `group` is a multiple of CCU_CUDA_GROUP_STEP. NULL where a GEMM computed the scores.
  uint32_t* lowest;
  int64_t group;
  // [all rows, 4]: score in the row's units = [0] * coarse score + [1] * penalty, off by at most [2]; [3] is the path
  const float* about;
  const float* grad;  // this and the following as in ccu_topk_flips_args, for all rows
  int64_t dim;
  const int64_t* token_ids;
  const void* embedding;
  int64_t embedding_stride, embedding_step, vocabulary;
  int32_t embedding_dtype;
  int32_t maximize;
  const int64_t* current;
  int32_t exclude_current;
  const uint8_t* allowed;
  int64_t allowed_stride;
  const float* penalty;
  int64_t penalty_stride;
  int64_t k;  // at most CCU_CUDA_MOST_FLIPS
  int64_t* ids;
  float* delta;
  double* score;
  int64_t* count;
  uint8_t* valid;
  uint8_t* redo;  // [all rows]: set for rows with too many candidates for one pass
  void* stream;
} ccu_cuda_topk_args;

// Computes scores and lowest from the table and the operand.
int ccu_cuda_topk_scores(const ccu_cuda_topk_args* args);
// Finds the best tokens from scores, and from lowest if it is given.
int ccu_cuda_topk_select(const ccu_cuda_topk_args* args);

// ---------------------------------------------------------------------------------------------------------------------
// pgd_step, in place on delta.

enum ccu_pgd_norm { CCU_LINF = 0, CCU_L2 = 1 };
enum { CCU_PGD_SLICES = 32 };  // slices of a sample whose partial sums a GPU stores for l2

typedef struct {
  void* delta;        // [samples, channels, inner]
  const void* grad;   // the same shape
  const void* image;  // the same shape
  void* out;          // the same shape: delta + image in the dtype of delta, or NULL
  int32_t dtype;      // of delta, image and out
  int32_t grad_dtype;
  int64_t samples, channels, inner;
  float step, eps, lower, upper;
  const float* channel;  // [4, channels]: per-channel values that replace the four (l2: lower and upper), or NULL
  int32_t norm;
  // 1: look for NaN (l2: also inf) first and write nothing if there is one; 0: such elements take no step. A GPU also
  // checks the channels.
  int32_t check;
  int32_t threads;
  int32_t* found;  // set to 1 if the check found something, else 0 (CPU only)
  double* parts;   // CUDA, l2 only: [2, samples, CCU_PGD_SLICES]
  // CUDA with check only: 0 until something is found, then the index of an element of grad plus one, or minus one minus
  // a channel; no step is made while it is not 0. `told` is a copy in pinned memory that the host can read.
  unsigned long long* refused;
  unsigned long long* told;
  void* stream;  // CUDA only
} ccu_pgd_step_args;

int ccu_pgd_step(const ccu_pgd_step_args* args);
// Ignores `threads` and `found`.
int ccu_cuda_pgd_step(const ccu_pgd_step_args* args);

// ---------------------------------------------------------------------------------------------------------------------
// The noise store. int8 noise counts steps of 1/255; uint8 images are pixels, whose level 255 is 1.

// out[b] = clamp(images[b] + noise[index[b]], lower, upper), out may be images.
typedef struct {
  const void* images;    // [items, channels, inner]
  int32_t image_dtype;   // CCU_U8, F32, F16, BF16
  const void* noise;     // [rows, channels, inner]
  int32_t noise_dtype;   // CCU_I8, F16, F32
  const int64_t* index;  // [items], in range; NULL: the same number
  int64_t items, channels, inner, rows;
  float lower, upper;   // in the units of images: levels for uint8
  const float* limits;  // [2, channels]: lower and upper per channel, which replace those; or NULL
  void* out;
  int32_t threads;
  void* stream;  // CUDA only
} ccu_noise_add_args;

int ccu_noise_add(const ccu_noise_add_args* args);
int ccu_cuda_noise_add(const ccu_noise_add_args* args);

// noise[i] = clamp(noise[i] + sum of the deltas whose index is i, in order, -eps, eps).
typedef struct {
  void* noise;           // [total, size]
  int32_t noise_dtype;   // CCU_I8, F16, F32
  const int64_t* rows;   // [count]: the indices, sorted; in range
  const int64_t* order;  // [count]: which delta belongs to each
  int64_t count, total, size;
  const void* delta;    // [count, size]
  int32_t delta_dtype;  // CCU_I8, F16, F32
  float eps;            // in the units of the noise: steps for int8
  int32_t threads;
  void* stream;  // CUDA only
} ccu_noise_update_args;

int ccu_noise_update(const ccu_noise_update_args* args);
int ccu_cuda_noise_update(const ccu_noise_update_args* args);

// Finds the first value that a store cannot hold. `found` is 0 before the call; it becomes count minus the index of the
// value, or stays 0 if there is none.
typedef struct {
  const void* values;  // [count]
  int32_t dtype;       // CCU_F32, F16, F64
  int32_t whole;       // 1: whole steps of 1/255 within -128 .. 127; 0: finite numbers
  float slack;         // in steps: how far a value may be from a whole step
  int64_t count;
  unsigned long long* found;
  void* stream;
} ccu_cuda_noise_check_args;

int ccu_cuda_noise_check(const ccu_cuda_noise_check_args* args);

// ---------------------------------------------------------------------------------------------------------------------
// candidate_losses without its GEMMs, see csrc/cpu/candidates.cpp. Addresses are on the device that computes.

typedef struct {
  const float* s;  // [batch images, batch texts]
  int64_t batch;
  float* rest;    // [batch texts, batch images]
  double* fixed;  // [batch]
  int32_t threads;
} ccu_candidate_rest_args;

int ccu_candidate_rest(const ccu_candidate_rest_args* args);

typedef struct {
  const float* similarity;  // [rows, candidates, batch]
  const float* rest;
  const double* fixed;
  int64_t batch, candidates, first, rows;
  float* out;  // [batch, candidates]
  int32_t threads;
} ccu_candidate_losses_args;

int ccu_candidate_losses(const ccu_candidate_losses_args* args);

// On a GPU: a small batch takes one launch, in which each block computes the shared sums by itself; a large batch needs
// ccu_cuda_candidate_rest first.
enum { CCU_CUDA_ALONE = 192 };

typedef struct {
  const float* s;           // [batch images, batch texts]: dot products
  const float* similarity;  // [rows, candidates, batch images]: dot products
  float scale;              // multiplies both
  const float* factor;      // [1]: also multiplies both; or NULL
  int64_t batch, candidates, first, rows;
  float* rest;      // [batch texts, batch images]; NULL up to CCU_CUDA_ALONE
  double* columns;  // [batch texts]; likewise NULL
  float* out;       // [batch, candidates]
  void* stream;
} ccu_cuda_candidate_args;

int ccu_cuda_candidate_rest(const ccu_cuda_candidate_args* args);
int ccu_cuda_candidate_losses(const ccu_cuda_candidate_args* args);

// ---------------------------------------------------------------------------------------------------------------------
// l2_normalize: rows of unit length, out = x * inverse, inverse = 1 / max(|x|, eps); backward: dx from dout.

typedef struct {
  const void* x;  // [rows, dim]
  int32_t dtype;  // of x and dx
  int64_t rows, dim;
  float eps;
  const void* grad;     // [rows, dim]: of the result; backward only
  void* out;            // [rows, dim]: the result; backward: dx
  int32_t other_dtype;  // of the result and its gradient
  float* inverse;       // [rows]: written by forward, read by backward
  int32_t threads;
} ccu_l2_normalize_args;
typedef ccu_l2_normalize_args ccu_l2_normalize_backward_args;

int ccu_l2_normalize(const ccu_l2_normalize_args* args);
int ccu_l2_normalize_backward(const ccu_l2_normalize_backward_args* args);

#ifdef __cplusplus
}
#endif

#endif  // CCU_FAST_H_
