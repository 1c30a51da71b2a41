// reduce_similarity, candidate_losses and l2_normalize for Python.
#include <algorithm>

#include "bindings.h"

namespace ccu {
namespace {

void copy_codes(const std::vector<int32_t>& from, int32_t* to, int32_t* count) {
  if (from.size() > CCU_MAX_REDUCTIONS)
    throw std::invalid_argument("expected at most " + std::to_string(CCU_MAX_REDUCTIONS) + " reductions a side, got " +
                                std::to_string(from.size()));
  std::copy(from.begin(), from.end(), to);
  *count = static_cast<int32_t>(from.size());
}

}  // namespace

void bind_similarity(py::module_& m) {
  m.attr("MAX_REDUCTIONS") = static_cast<int>(CCU_MAX_REDUCTIONS);
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
      "candidate_rest",
      [](Address s, int64_t batch, Address rest, Address fixed, int threads) {
        ccu_candidate_rest_args a{};
        a.s = pointer<float>(s);
        a.batch = batch;
        a.rest = pointer<float>(rest);
        a.fixed = pointer<double>(fixed);
        a.threads = threads;
        call("candidate_rest", ccu_candidate_rest, a);
      },
      py::kw_only(), py::arg("s"), py::arg("batch"), py::arg("rest"), py::arg("fixed"), py::arg("threads"));

  m.def(
      "candidate_losses",
      [](Address similarity, Address rest, Address fixed, int64_t batch, int64_t candidates, int64_t first,
         int64_t rows, Address out, int threads) {
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
        call("candidate_losses", ccu_candidate_losses, a);
      },
      py::kw_only(), py::arg("similarity"), py::arg("rest"), py::arg("fixed"), py::arg("batch"), py::arg("candidates"),
      py::arg("first"), py::arg("rows"), py::arg("out"), py::arg("threads"));

  m.attr("CUDA_ALONE") = static_cast<int>(CCU_CUDA_ALONE);
#if CCU_HAVE_CUDA
  py::class_<ccu_cuda_candidate_args>(m, "CudaCandidates")
      .def(py::init([](Address s, Address similarity, float scale, Address factor, int64_t batch, int64_t candidates,
                       int64_t first, int64_t rows, Address rest, Address columns, Address out, Address stream) {
             ccu_cuda_candidate_args a{};
             a.s = pointer<float>(s);
             a.similarity = pointer<float>(similarity);
             a.scale = scale;
             a.factor = pointer<float>(factor);
             a.batch = batch;
             a.candidates = candidates;
             a.first = first;
             a.rows = rows;
             a.rest = pointer<float>(rest);
             a.columns = pointer<double>(columns);
             a.out = pointer<float>(out);
             a.stream = pointer<void>(stream);
             return a;
           }),
           py::kw_only(), py::arg("s"), py::arg("similarity"), py::arg("scale"), py::arg("factor"), py::arg("batch"),
           py::arg("candidates"), py::arg("first"), py::arg("rows"), py::arg("rest"), py::arg("columns"),
           py::arg("out"), py::arg("stream"));
  m.def("cuda_candidate_rest",
        [](const ccu_cuda_candidate_args& a) { call("candidate_losses", ccu_cuda_candidate_rest, a); });
  m.def("cuda_candidate_losses",
        [](const ccu_cuda_candidate_args& a) { call("candidate_losses", ccu_cuda_candidate_losses, a); });
#endif

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
}

}  // namespace ccu
