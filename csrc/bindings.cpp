// The only file that knows Python: raw addresses in, the GIL released around the work, a status out as an exception.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "ccu_fast.h"
#include "common/select.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Runs an operation without the GIL and turns its status into an exception.
template <class Args>
void call(const char* name, int (*op)(const Args*), const Args& args) {
  int status;
  {
    py::gil_scoped_release release;
    status = op(&args);
  }
  switch (status) {
    case CCU_OK:
      return;
    case CCU_OUT_OF_MEMORY:
      throw std::bad_alloc();
    case CCU_BAD_ARGUMENT:
      throw std::invalid_argument(std::string(name) + ": bad argument");
    case CCU_UNSUPPORTED:
      throw std::runtime_error(std::string(name) + ": not supported by this build");
    default:
      throw std::runtime_error(std::string(name) + ": failed with status " + std::to_string(status));
  }
}

// On tensors of a CPU or of a GPU. Args are deduced from cpu_op alone: without CUDA the other one is nullptr.
template <class Args>
void call_on(bool cuda, const char* name, int (*cpu_op)(const Args*),
             [[maybe_unused]] std::common_type_t<int (*)(const Args*)> cuda_op, const Args& args) {
#if !CCU_HAVE_CUDA
  if (cuda) throw std::runtime_error(std::string(name) + ": this build has no CUDA");
#endif
  call(name, cuda ? cuda_op : cpu_op, args);
}

#if CCU_HAVE_CUDA
#define CCU_CUDA(op) op
#else
#define CCU_CUDA(op) nullptr
#endif

void copy_codes(const std::vector<int32_t>& from, int32_t* to, int32_t* count) {
  if (from.size() > CCU_MAX_REDUCTIONS)
    throw std::invalid_argument("expected at most " + std::to_string(CCU_MAX_REDUCTIONS) + " reductions a side, got " +
                                std::to_string(from.size()));
  std::copy(from.begin(), from.end(), to);
  *count = static_cast<int32_t>(from.size());
}

std::vector<int64_t> ccu_select_candidates(const float* scores, int64_t n, int64_t k, double err, int64_t groups) {
  std::vector<uint32_t> lowest(groups, ccu::kNever);
  for (int64_t t = 0; t < n; ++t) lowest[t % groups] = std::min(lowest[t % groups], ccu::ordered(scores[t]));
  const uint32_t kth = ccu::kth_key(k, [&](uint32_t bound) {
    return std::count_if(lowest.begin(), lowest.end(), [=](uint32_t key) { return key <= bound; });
  });
  const uint32_t cutoff =
      kth == ccu::kNever ? ccu::kNever - 1 : ccu::ordered(ccu::cutoff_above(ccu::unordered(kth), err));
  std::vector<int64_t> found;
  for (int64_t t = 0; t < n; ++t)
    if (ccu::ordered(scores[t]) <= cutoff) found.push_back(t);
  int64_t size = 2;
  while (size < static_cast<int64_t>(found.size())) size *= 2;
  found.resize(size, INT32_MAX);
  const auto score = [&](int64_t t) { return t == INT32_MAX ? INFINITY : static_cast<double>(scores[t]); };
  for (int64_t span = 2; span <= size; span *= 2)
    for (int64_t stride = span / 2; stride > 0; stride /= 2)
      for (int64_t c = 0; c < size / 2; ++c) {
        const ccu::Comparator p =
            ccu::comparator(static_cast<int>(c), static_cast<int>(span), static_cast<int>(stride));
        const int64_t x = found[p.i], y = found[p.j];
        if (ccu::before(score(y), static_cast<int32_t>(y), score(x), static_cast<int32_t>(x)) == p.up)
          std::swap(found[p.i], found[p.j]);
      }
  while (!found.empty() && found.back() == INT32_MAX) found.pop_back();
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of ccu_fast. Use ccu_fast.backends.native, which checks its arguments.";
  m.attr("MAX_REDUCTIONS") = static_cast<int>(CCU_MAX_REDUCTIONS);
  m.attr("F32") = static_cast<int>(CCU_F32);
  m.attr("F16") = static_cast<int>(CCU_F16);
  m.attr("BF16") = static_cast<int>(CCU_BF16);
  m.attr("U8") = static_cast<int>(CCU_U8);
  m.attr("I8") = static_cast<int>(CCU_I8);
  m.def("largest_team", [] { return ccu::largest_team().exchange(1); });
  m.attr("TOKEN_PANEL") = static_cast<int>(CCU_TOKEN_PANEL);
#if CCU_HAVE_CUDA
  m.attr("CUDA") = true;
#else
  m.attr("CUDA") = false;
#endif
  m.def("cpu_isa", [] { return std::string(ccu_cpu_isa()); });

  py::class_<ccu_tile>(m, "Tile").def(py::init(
      [](Address dot, int dot_dtype, Address self_dot, int64_t banks, int64_t rows, int64_t cols, int64_t row0,
         float scale, float bias, std::pair<Address, int64_t> row_labels, std::pair<Address, int64_t> col_labels,
         std::pair<Address, int64_t> row_ids, std::pair<Address, int64_t> col_ids, bool diagonal,
         const std::vector<int32_t>& row_codes, const std::vector<int32_t>& col_codes, int threads) {
        ccu_tile t{};
        t.dot = pointer<void>(dot);
        t.dot_dtype = dot_dtype;
        t.self_dot = pointer<float>(self_dot);
        t.banks = banks;
        t.rows = rows;
        t.cols = cols;
        t.row0 = row0;
        t.scale = scale;
        t.bias = bias;
        t.row_labels = pointer<int32_t>(row_labels.first);
        t.col_labels = pointer<int32_t>(col_labels.first);
        t.row_ids = pointer<int32_t>(row_ids.first);
        t.col_ids = pointer<int32_t>(col_ids.first);
        t.row_label_stride = row_labels.second;
        t.col_label_stride = col_labels.second;
        t.row_id_stride = row_ids.second;
        t.col_id_stride = col_ids.second;
        t.diagonal = diagonal;
        copy_codes(row_codes, t.row_codes, &t.n_row);
        copy_codes(col_codes, t.col_codes, &t.n_col);
        t.threads = threads;
        return t;
      }));

  m.def("similarity_forward",
        [](const ccu_tile& tile, Address row_out, int64_t row_reduction_stride, int64_t row_bank_stride,
           Address col_max, Address col_sum, int64_t col_reduction_stride) {
          ccu_similarity_forward_args a{};
          a.tile = tile;
          a.row_out = pointer<float>(row_out);
          a.row_reduction_stride = row_reduction_stride;
          a.row_bank_stride = row_bank_stride;
          a.col_max = pointer<float>(col_max);
          a.col_sum = pointer<double>(col_sum);
          a.col_reduction_stride = col_reduction_stride;
          call("similarity_forward", ccu_similarity_forward, a);
        });

  m.def("similarity_backward",
        [](const ccu_tile& tile, Address row_grad, Address row_out, int64_t row_reduction_stride,
           int64_t row_bank_stride, Address col_grad, Address col_out, int64_t col_reduction_stride, Address grad,
           int grad_dtype, Address scale_sums, Address bias_sums) {
          ccu_similarity_backward_args a{};
          a.tile = tile;
          a.row_grad = pointer<float>(row_grad);
          a.row_out = pointer<float>(row_out);
          a.row_reduction_stride = row_reduction_stride;
          a.row_bank_stride = row_bank_stride;
          a.col_grad = pointer<float>(col_grad);
          a.col_out = pointer<float>(col_out);
          a.col_reduction_stride = col_reduction_stride;
          a.grad = pointer<void>(grad);
          a.grad_dtype = grad_dtype;
          a.scale_sums = pointer<double>(scale_sums);
          a.bias_sums = pointer<double>(bias_sums);
          call("similarity_backward", ccu_similarity_backward, a);
        });

  m.def("similarity_softmax", [](const ccu_tile& tile, Address e, Address keys, int64_t dim, Address shift, Address sum,
                                 Address mean, int64_t group_stride) {
    ccu_similarity_softmax_args a{};
    a.tile = tile;
    a.e = pointer<float>(e);
    a.keys = pointer<float>(keys);
    a.dim = dim;
    a.shift = pointer<float>(shift);
    a.sum = pointer<double>(sum);
    a.mean = pointer<float>(mean);
    a.group_stride = group_stride;
    call("similarity_softmax", ccu_similarity_softmax, a);
  });

  m.def(
      "topk_flips",
      [](Address grad, int64_t rows, int64_t dim, Address packed, Address steps, int64_t tokens, Address token_ids,
         double max_norm, Address embedding, std::pair<int64_t, int64_t> embedding_strides, int embedding_dtype,
         bool maximize, Address current, bool exclude_current, bool certify, std::pair<Address, int64_t> allowed,
         std::pair<Address, int64_t> penalty, int64_t k, int threads, Address ids, Address delta, Address score,
         Address count, Address valid) {
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
        a.certify = certify;
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
      py::kw_only(), py::arg("grad"), py::arg("rows"), py::arg("dim"), py::arg("packed"), py::arg("steps"),
      py::arg("tokens"), py::arg("token_ids"), py::arg("max_norm"), py::arg("embedding"), py::arg("embedding_strides"),
      py::arg("embedding_dtype"), py::arg("maximize"), py::arg("current"), py::arg("exclude_current"),
      py::arg("certify"), py::arg("allowed"), py::arg("penalty"), py::arg("k"), py::arg("threads"), py::arg("ids"),
      py::arg("delta"), py::arg("score"), py::arg("count"), py::arg("valid"));

  // Forward without a gradient, backward with one.
  m.def(
      "l2_normalize",
      [](Address x, int dtype, int64_t rows, int64_t dim, float eps, Address grad, Address out, int other_dtype,
         Address inverse, int threads) {
        ccu_l2_normalize_args a{};
        a.x = pointer<void>(x);
        a.dtype = dtype;
        a.rows = rows;
        a.dim = dim;
        a.eps = eps;
        a.grad = pointer<void>(grad);
        a.out = pointer<void>(out);
        a.other_dtype = other_dtype;
        a.inverse = pointer<float>(inverse);
        a.threads = threads;
        call("l2_normalize", a.grad == nullptr ? ccu_l2_normalize : ccu_l2_normalize_backward, a);
      },
      py::kw_only(), py::arg("x"), py::arg("dtype"), py::arg("rows"), py::arg("dim"), py::arg("eps"), py::arg("grad"),
      py::arg("out"), py::arg("other_dtype"), py::arg("inverse"), py::arg("threads"));

  // On a CPU: whether the check found something, and therefore nothing was written.
  m.def(
      "pgd_step",
      [](Address delta, Address grad, Address image, Address out, int dtype, int grad_dtype, int64_t samples,
         int64_t channels, int64_t inner, float step, float eps, float lower, float upper, Address channel, bool l2,
         bool check, Address parts, int threads, bool cuda, Address stream) {
        int32_t found = 0;
        ccu_pgd_step_args a{};
        a.delta = pointer<void>(delta);
        a.grad = pointer<void>(grad);
        a.image = pointer<void>(image);
        a.dtype = dtype;
        a.grad_dtype = grad_dtype;
        a.samples = samples;
        a.channels = channels;
        a.inner = inner;
        a.out = pointer<void>(out);
        a.step = step;
        a.eps = eps;
        a.lower = lower;
        a.upper = upper;
        a.channel = pointer<float>(channel);
        a.parts = pointer<double>(parts);
        a.norm = l2 ? CCU_L2 : CCU_LINF;
        a.check = check;
        a.threads = threads;
        a.found = &found;
        a.stream = pointer<void>(stream);
        call_on(cuda, "pgd_step", ccu_pgd_step, CCU_CUDA(ccu_cuda_pgd_step), a);
        return found != 0;
      },
      py::kw_only(), py::arg("delta"), py::arg("grad"), py::arg("image"), py::arg("out"), py::arg("dtype"),
      py::arg("grad_dtype"), py::arg("samples"), py::arg("channels"), py::arg("inner"), py::arg("step"), py::arg("eps"),
      py::arg("lower"), py::arg("upper"), py::arg("channel"), py::arg("l2"), py::arg("check"), py::arg("parts"),
      py::arg("threads"), py::arg("cuda"), py::arg("stream"));

  // ---- topk_flips on a GPU

  m.attr("PGD_SLICES") = static_cast<int>(CCU_PGD_SLICES);
  m.attr("TOPK_SCAN") = static_cast<int>(CCU_TOPK_SCAN);
  m.attr("TOPK_EXACT") = static_cast<int>(CCU_TOPK_EXACT);
  m.attr("TOPK_INVALID") = static_cast<int>(CCU_TOPK_INVALID);
  m.attr("CUDA_MOST_FLIPS") = static_cast<int>(CCU_CUDA_MOST_FLIPS);
#if CCU_HAVE_CUDA
  m.def(
      "cuda_topk_scores",
      [](Address table, Address grad, Address scores, int64_t rows, int64_t tokens, int64_t dim, Address stream) {
        ccu_cuda_topk_scores_args a{};
        a.table = pointer<void>(table);
        a.grad = pointer<float>(grad);
        a.scores = pointer<float>(scores);
        a.rows = rows;
        a.tokens = tokens;
        a.dim = dim;
        a.stream = pointer<void>(stream);
        call("topk_flips", ccu_cuda_topk_scores, a);
      },
      py::kw_only(), py::arg("table"), py::arg("grad"), py::arg("scores"), py::arg("rows"), py::arg("tokens"),
      py::arg("dim"), py::arg("stream"));

  m.def(
      "cuda_topk_select",
      [](Address scores, int64_t first, int64_t rows, int64_t tokens, Address about, Address grad, int64_t dim,
         Address token_ids, Address embedding, std::pair<int64_t, int64_t> embedding_strides, int64_t vocabulary,
         int embedding_dtype, bool maximize, Address current, bool exclude_current, std::pair<Address, int64_t> allowed,
         std::pair<Address, int64_t> penalty, int64_t k, Address ids, Address delta, Address score, Address count,
         Address valid, Address redo, Address stream) {
        ccu_cuda_topk_args a{};
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
        call("topk_flips", ccu_cuda_topk_select, a);
      },
      py::kw_only(), py::arg("scores"), py::arg("first"), py::arg("rows"), py::arg("tokens"), py::arg("about"),
      py::arg("grad"), py::arg("dim"), py::arg("token_ids"), py::arg("embedding"), py::arg("embedding_strides"),
      py::arg("vocabulary"), py::arg("embedding_dtype"), py::arg("maximize"), py::arg("current"),
      py::arg("exclude_current"), py::arg("allowed"), py::arg("penalty"), py::arg("k"), py::arg("ids"),
      py::arg("delta"), py::arg("score"), py::arg("count"), py::arg("valid"), py::arg("redo"), py::arg("stream"));
#endif

  // The selection of csrc/cuda/topk_select.cu with its own arithmetic, one thread after the other: the candidates of a
  // row, sorted; for tests, which have no GPU.
  m.def("select_candidates", [](const std::vector<float>& scores, int64_t k, double err, int64_t groups) {
    return ccu_select_candidates(scores.data(), static_cast<int64_t>(scores.size()), k, err, groups);
  });

  m.def(
      "noise_add",
      [](Address images, int image_dtype, Address noise, int noise_dtype, Address index, int64_t items,
         int64_t channels, int64_t inner, int64_t rows, float lower, float upper, Address limits, Address out,
         int threads, bool cuda, Address stream) {
        ccu_noise_add_args a{};
        a.images = pointer<void>(images);
        a.image_dtype = image_dtype;
        a.noise = pointer<void>(noise);
        a.noise_dtype = noise_dtype;
        a.index = pointer<int64_t>(index);
        a.items = items;
        a.channels = channels;
        a.inner = inner;
        a.rows = rows;
        a.lower = lower;
        a.upper = upper;
        a.limits = pointer<float>(limits);
        a.out = pointer<void>(out);
        a.threads = threads;
        a.stream = pointer<void>(stream);
        call_on(cuda, "noise_add", ccu_noise_add, CCU_CUDA(ccu_cuda_noise_add), a);
      },
      py::kw_only(), py::arg("images"), py::arg("image_dtype"), py::arg("noise"), py::arg("noise_dtype"),
      py::arg("index"), py::arg("items"), py::arg("channels"), py::arg("inner"), py::arg("rows"), py::arg("lower"),
      py::arg("upper"), py::arg("limits"), py::arg("out"), py::arg("threads"), py::arg("cuda"), py::arg("stream"));

  m.def(
      "noise_update",
      [](Address noise, int noise_dtype, Address rows, Address order, int64_t count, int64_t total, int64_t size,
         Address delta, int delta_dtype, float eps, int threads, bool cuda, Address stream) {
        ccu_noise_update_args a{};
        a.noise = pointer<void>(noise);
        a.noise_dtype = noise_dtype;
        a.rows = pointer<int64_t>(rows);
        a.order = pointer<int64_t>(order);
        a.count = count;
        a.total = total;
        a.size = size;
        a.delta = pointer<void>(delta);
        a.delta_dtype = delta_dtype;
        a.eps = eps;
        a.threads = threads;
        a.stream = pointer<void>(stream);
        call_on(cuda, "noise_update", ccu_noise_update, CCU_CUDA(ccu_cuda_noise_update), a);
      },
      py::kw_only(), py::arg("noise"), py::arg("noise_dtype"), py::arg("rows"), py::arg("order"), py::arg("count"),
      py::arg("total"), py::arg("size"), py::arg("delta"), py::arg("delta_dtype"), py::arg("eps"), py::arg("threads"),
      py::arg("cuda"), py::arg("stream"));

  m.def(
      "candidate_rest",
      [](Address s, int64_t batch, Address rest, Address fixed, int threads, bool cuda, Address stream) {
        ccu_candidate_rest_args a{};
        a.s = pointer<float>(s);
        a.batch = batch;
        a.rest = pointer<float>(rest);
        a.fixed = pointer<double>(fixed);
        a.threads = threads;
        a.stream = pointer<void>(stream);
        call_on(cuda, "candidate_rest", ccu_candidate_rest, CCU_CUDA(ccu_cuda_candidate_rest), a);
      },
      py::kw_only(), py::arg("s"), py::arg("batch"), py::arg("rest"), py::arg("fixed"), py::arg("threads"),
      py::arg("cuda"), py::arg("stream"));

  m.def(
      "candidate_losses",
      [](Address similarity, Address rest, Address fixed, int64_t batch, int64_t candidates, int64_t first,
         int64_t rows, Address out, int threads, bool cuda, Address stream) {
        ccu_candidate_losses_args a{};
        a.similarity = pointer<float>(similarity);
        a.rest = pointer<float>(rest);
        a.fixed = pointer<double>(fixed);
        a.batch = batch;
        a.candidates = candidates;
        a.first = first;
        a.rows = rows;
        a.out = pointer<float>(out);
        a.threads = threads;
        a.stream = pointer<void>(stream);
        call_on(cuda, "candidate_losses", ccu_candidate_losses, CCU_CUDA(ccu_cuda_candidate_losses), a);
      },
      py::kw_only(), py::arg("similarity"), py::arg("rest"), py::arg("fixed"), py::arg("batch"), py::arg("candidates"),
      py::arg("first"), py::arg("rows"), py::arg("out"), py::arg("threads"), py::arg("cuda"), py::arg("stream"));
}
