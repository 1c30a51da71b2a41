// topk_flips for Python.
#include <algorithm>
#include <cmath>

#include "../common/select.h"
#include "../common/topk_row.h"
#include "bindings.h"

namespace ccu {
namespace {

int describe(const ccu_topk_describe_args* a) {
  for (int64_t r = 0; r < a->rows; ++r) {
    const float* grad = a->grad + r * a->dim;
    float largest = 0.0f;
    for (int64_t d = 0; d < a->dim && largest <= FLT_MAX; ++d) largest = larger(largest, grad[d]);
    TopkRow row(largest);
    for (int64_t d = 0; d < a->padded; ++d) row.put(d < a->dim ? grad[d] : 0.0f, *a, r * a->padded + d);
    row.tell(*a, a->about + 4 * r);
  }
  return CCU_OK;
}

std::vector<int64_t> select(const float* scores, int64_t n, int64_t k, double err, int64_t groups) {
  std::vector<uint32_t> lowest(groups, kNever);
  for (int64_t t = 0; t < n; ++t) lowest[t % groups] = std::min(lowest[t % groups], ordered(scores[t]));
  const uint32_t kth = kth_key(k, [&](uint32_t bound) {
    return std::count_if(lowest.begin(), lowest.end(), [=](uint32_t key) { return key <= bound; });
  });
  const uint32_t cutoff = kth == kNever ? kNever - 1 : ordered(cutoff_above(unordered(kth), err));
  std::vector<int64_t> found;
  for (int64_t t = 0; t < n; ++t)
    if (ordered(scores[t]) <= cutoff) found.push_back(t);
  int64_t size = 2;
  while (size < static_cast<int64_t>(found.size())) size *= 2;
  found.resize(size, INT32_MAX);
  const auto score = [&](int64_t t) { return t == INT32_MAX ? INFINITY : static_cast<double>(scores[t]); };
  for (int64_t span = 2; span <= size; span *= 2)
    for (int64_t stride = span / 2; stride > 0; stride /= 2)
      for (int64_t c = 0; c < size / 2; ++c) {
        const Comparator p = comparator(static_cast<int>(c), static_cast<int>(span), static_cast<int>(stride));
        const int64_t x = found[p.i], y = found[p.j];
        if (before(score(y), static_cast<int32_t>(y), score(x), static_cast<int32_t>(x)) == p.up)
          std::swap(found[p.i], found[p.j]);
      }
  while (!found.empty() && found.back() == INT32_MAX) found.pop_back();
  return found;
}

}  // namespace

void bind_tokens(py::module_& m) {
  m.attr("TOKEN_PANEL") = static_cast<int>(CCU_TOKEN_PANEL);
  m.attr("TOKEN_BITS") = static_cast<int>(CCU_TOKEN_BITS);
  m.def(
      "topk_flips",
      [](Address grad, int64_t rows, int64_t dim, Address packed, Address steps, int64_t tokens, Address token_ids,
         double max_norm, Address embedding, std::pair<int64_t, int64_t> embedding_strides, int embedding_dtype,
         bool maximize, Address current, bool exclude_current, Strided allowed, Strided penalty, int64_t k, int threads,
         Address ids, Address delta, Address score, Address count, Address valid) {
        ccu_topk_flips_args a{};
        a.grad = pointer<float>(grad);
        a.rows = rows;
        a.dim = dim;
        a.packed = pointer<int16_t>(packed);
        a.steps = pointer<float>(steps);
        a.tokens = tokens;
        a.token_ids = pointer<int64_t>(token_ids);
        a.max_norm = max_norm;
        a.embedding = pointer<void>(embedding);
        a.embedding_stride = embedding_strides.first;
        a.embedding_step = embedding_strides.second;
        a.embedding_dtype = embedding_dtype;
        a.maximize = maximize;
        a.current = pointer<int64_t>(current);
        a.exclude_current = exclude_current;
        a.allowed = pointer<uint8_t>(allowed.first);
        a.allowed_stride = allowed.second;
        a.penalty = pointer<float>(penalty.first);
        a.penalty_stride = penalty.second;
        a.k = k;
        a.threads = threads;
        a.ids = pointer<int64_t>(ids);
        a.delta = pointer<float>(delta);
        a.score = pointer<double>(score);
        a.count = pointer<int64_t>(count);
        a.valid = pointer<uint8_t>(valid);
        call("topk_flips", ccu_topk_flips, a);
      },
      "Finds the k best tokens of each gradient row, on a CPU.", py::kw_only(), py::arg("grad"), py::arg("rows"),
      py::arg("dim"), py::arg("packed"), py::arg("steps"), py::arg("tokens"), py::arg("token_ids"), py::arg("max_norm"),
      py::arg("embedding"), py::arg("embedding_strides"), py::arg("embedding_dtype"), py::arg("maximize"),
      py::arg("current"), py::arg("exclude_current"), py::arg("allowed"), py::arg("penalty"), py::arg("k"),
      py::arg("threads"), py::arg("ids"), py::arg("delta"), py::arg("score"), py::arg("count"), py::arg("valid"));

  // ---- topk_flips on a GPU

  m.attr("TOPK_SCAN") = static_cast<int>(CCU_TOPK_SCAN);
  m.attr("TOPK_EXACT") = static_cast<int>(CCU_TOPK_EXACT);
  m.attr("TOPK_INVALID") = static_cast<int>(CCU_TOPK_INVALID);
  m.attr("TOPK_ZERO") = static_cast<int>(CCU_TOPK_ZERO);
  m.attr("CUDA_MOST_FLIPS") = static_cast<int>(CCU_CUDA_MOST_FLIPS);
  m.attr("CUDA_FEW_ROWS") = static_cast<int>(CCU_CUDA_FEW_ROWS);
  m.attr("CUDA_TOPK_GROUPS") = static_cast<int>(CCU_CUDA_TOPK_GROUPS);
  m.attr("CUDA_GROUP_STEP") = static_cast<int>(CCU_CUDA_GROUP_STEP);
  // Also runs on a CPU, row by row with the same arithmetic as the GPU, for tests and reports on machines without one.
  m.def(
      "topk_describe",
      [](Address grad, int64_t rows, int64_t dim, int64_t padded, Address coarse, bool maximize, bool certify,
         bool half, Address operand, Address about, bool cuda, Address stream) {
        ccu_topk_describe_args a{};
        a.grad = pointer<float>(grad);
        a.rows = rows;
        a.dim = dim;
        a.padded = padded;
        a.coarse = pointer<double>(coarse);
        a.maximize = maximize;
        a.certify = certify;
        a.half = half;
        a.operand = pointer<void>(operand);
        a.about = pointer<float>(about);
        a.stream = pointer<void>(stream);
        call_on(cuda, "topk_flips", describe, CCU_CUDA(ccu_cuda_topk_describe), a);
      },
      "Prepares gradient rows for the coarse scan of a GPU.", py::kw_only(), py::arg("grad"), py::arg("rows"),
      py::arg("dim"), py::arg("padded"), py::arg("coarse"), py::arg("maximize"), py::arg("certify"), py::arg("half"),
      py::arg("operand"), py::arg("about"), py::arg("cuda"), py::arg("stream"));

#if CCU_HAVE_CUDA
  // Without a table, the caller has already computed the scores.
  m.def(
      "cuda_topk",
      [](Address table, Address operand, int64_t padded, Address lowest, int64_t group, Address scores, int64_t first,
         int64_t rows, int64_t tokens, Address about, Address grad, int64_t dim, Address token_ids, Address embedding,
         std::pair<int64_t, int64_t> embedding_strides, int64_t vocabulary, int embedding_dtype, bool maximize,
         Address current, bool exclude_current, Strided allowed, Strided penalty, int64_t k, Address ids, Address delta,
         Address score, Address count, Address valid, Address redo, Address stream) {
        ccu_cuda_topk_args a{};
        a.table = pointer<void>(table);
        a.operand = pointer<float>(operand);
        a.padded = padded;
        a.lowest = pointer<uint32_t>(lowest);
        a.group = group;
        a.scores = pointer<float>(scores);
        a.first = first;
        a.rows = rows;
        a.tokens = tokens;
        a.about = pointer<float>(about);
        a.grad = pointer<float>(grad);
        a.dim = dim;
        a.token_ids = pointer<int64_t>(token_ids);
        a.embedding = pointer<void>(embedding);
        a.embedding_stride = embedding_strides.first;
        a.embedding_step = embedding_strides.second;
        a.vocabulary = vocabulary;
        a.embedding_dtype = embedding_dtype;
        a.maximize = maximize;
        a.current = pointer<int64_t>(current);
        a.exclude_current = exclude_current;
        a.allowed = pointer<uint8_t>(allowed.first);
        a.allowed_stride = allowed.second;
        a.penalty = pointer<float>(penalty.first);
        a.penalty_stride = penalty.second;
        a.k = k;
        a.ids = pointer<int64_t>(ids);
        a.delta = pointer<float>(delta);
        a.score = pointer<double>(score);
        a.count = pointer<int64_t>(count);
        a.valid = pointer<uint8_t>(valid);
        a.redo = pointer<uint8_t>(redo);
        a.stream = pointer<void>(stream);
        if (a.table != nullptr) call("topk_flips", ccu_cuda_topk_scores, a);
        call("topk_flips", ccu_cuda_topk_select, a);
      },
      "Finds the k best tokens of each gradient row, on a GPU.", py::kw_only(), py::arg("table"), py::arg("operand"),
      py::arg("padded"), py::arg("lowest"), py::arg("group"), py::arg("scores"), py::arg("first"), py::arg("rows"),
      py::arg("tokens"), py::arg("about"), py::arg("grad"), py::arg("dim"), py::arg("token_ids"), py::arg("embedding"),
      py::arg("embedding_strides"), py::arg("vocabulary"), py::arg("embedding_dtype"), py::arg("maximize"),
      py::arg("current"), py::arg("exclude_current"), py::arg("allowed"), py::arg("penalty"), py::arg("k"),
      py::arg("ids"), py::arg("delta"), py::arg("score"), py::arg("count"), py::arg("valid"), py::arg("redo"),
      py::arg("stream"));
#endif

  // For tests on machines without a GPU.
  m.def(
      "select_candidates",
      [](const std::vector<float>& scores, int64_t k, double err, int64_t groups) {
        return select(scores.data(), static_cast<int64_t>(scores.size()), k, err, groups);
      },
      "Returns the sorted candidates that csrc/cuda/topk_select.cu selects from a row of scores.", py::arg("scores"),
      py::arg("k"), py::arg("err"), py::arg("groups"));
}

}  // namespace ccu
