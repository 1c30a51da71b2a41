// reduce_similarity, candidate_losses and l2_normalize for Python.
#include <algorithm>
#include <optional>
#include <tuple>

#include "bindings.h"

namespace ccu {
namespace {

// What determines the relation of a pair: labels and ids, each an address and a stride from bank to bank.
struct Relations {
  Strided row_labels, col_labels, row_ids, col_ids;
  bool diagonal;
};

// Limits of rows and columns, each an address and a stride from bank to bank, and the guide's products by address and
// dtype; or the same of a teacher.
struct Limits {
  Strided rows, cols;
  std::pair<Address, int32_t> guide;
  bool teaches;
  float teacher_scale;
  Address guide_self_dot;
};

struct Reductions {
  int32_t row_codes[CCU_MAX_REDUCTIONS], col_codes[CCU_MAX_REDUCTIONS];
  int32_t n_row, n_col;
};

void copy_codes(const std::vector<int32_t>& from, int32_t* to, int32_t* count) {
  if (from.size() > CCU_MAX_REDUCTIONS)
    throw std::invalid_argument("expected at most " + std::to_string(CCU_MAX_REDUCTIONS) + " reductions a side, got " +
                                std::to_string(from.size()));
  std::copy(from.begin(), from.end(), to);
  *count = static_cast<int32_t>(from.size());
}

void bind_tile(py::module_& m) {
  m.attr("MAX_REDUCTIONS") = static_cast<int>(CCU_MAX_REDUCTIONS);
  py::class_<Relations>(m, "Relations", "The labels and ids that decide which pairs are SELF, SAME or OTHER.")
      .def(py::init([](Strided row_labels, Strided col_labels, Strided row_ids, Strided col_ids, bool diagonal) {
             return Relations{row_labels, col_labels, row_ids, col_ids, diagonal};
           }),
           "Takes an address and a stride from bank to bank for each of the four, (0, 0) for none.",
           py::arg("row_labels"), py::arg("col_labels"), py::arg("row_ids"), py::arg("col_ids"), py::arg("diagonal"));

  py::class_<Limits>(m, "Limits", "How similar an OTHER pair may be to take part in a reduction.")
      .def(py::init([](Strided rows, Strided cols, std::pair<Address, int32_t> guide,
                       std::optional<std::pair<float, Address>> teacher) {
             const auto [scale, self_dot] = teacher.value_or(std::pair<float, Address>{0.0f, 0});
             return Limits{rows, cols, guide, teacher.has_value(), scale, self_dot};
           }),
           "Takes an address and a stride from bank to bank for each side, (0, 0) for none, and the address and dtype "
           "of the products to compare, (0, 0) for those of the tile itself. Where these are a teacher's: its scale "
           "and the address of its fp32 products of the diagonal pairs or 0; the sides are its log-sum-exps.",
           py::arg("rows"), py::arg("cols"), py::arg("guide"), py::arg("teacher") = py::none());

  py::class_<Reductions>(m, "Reductions", "The codes of the reductions over rows and over columns.")
      .def(py::init([](const std::vector<int32_t>& rows, const std::vector<int32_t>& cols) {
             Reductions r{};
             copy_codes(rows, r.row_codes, &r.n_row);
             copy_codes(cols, r.col_codes, &r.n_col);
             return r;
           }),
           "Takes at most MAX_REDUCTIONS codes a side.", py::arg("rows"), py::arg("cols"));

  // Relations and reductions are separate objects so that a small problem, which is bound by call overhead, builds them
  // only once.
  py::class_<ccu_tile>(m, "Tile", "A part of the similarities, and what its rows and columns are.")
      .def(py::init([](std::pair<Address, int32_t> dot, Address self_dot, std::tuple<int64_t, int64_t, int64_t> shape,
                       int64_t row0, float scale, float bias, const Relations& relations, const Reductions& reductions,
                       int threads, const Limits* limits, std::pair<Address, Address> factors) {
             ccu_tile t{};
             t.dot = pointer<void>(dot.first);
             t.dot_dtype = dot.second;
             t.self_dot = pointer<float>(self_dot);
             std::tie(t.banks, t.rows, t.cols) = shape;
             t.row0 = row0;
             t.scale = scale;
             t.bias = bias;
             t.row_labels = pointer<int32_t>(relations.row_labels.first);
             t.col_labels = pointer<int32_t>(relations.col_labels.first);
             t.row_ids = pointer<int32_t>(relations.row_ids.first);
             t.col_ids = pointer<int32_t>(relations.col_ids.first);
             t.row_label_stride = relations.row_labels.second;
             t.col_label_stride = relations.col_labels.second;
             t.row_id_stride = relations.row_ids.second;
             t.col_id_stride = relations.col_ids.second;
             t.diagonal = relations.diagonal;
             t.n_row = reductions.n_row;
             t.n_col = reductions.n_col;
             std::copy(std::begin(reductions.row_codes), std::end(reductions.row_codes), t.row_codes);
             std::copy(std::begin(reductions.col_codes), std::end(reductions.col_codes), t.col_codes);
             t.threads = threads;
             if (limits != nullptr) {
               t.row_limits = pointer<float>(limits->rows.first);
               t.row_limit_stride = limits->rows.second;
               t.col_limits = pointer<float>(limits->cols.first);
               t.col_limit_stride = limits->cols.second;
               t.guide = pointer<void>(limits->guide.first);
               t.guide_dtype = limits->guide.second;
               t.teaches = limits->teaches;
               t.teacher_scale = limits->teacher_scale;
               t.guide_self_dot = pointer<float>(limits->guide_self_dot);
             }
             t.row_factors = pointer<float>(factors.first);
             t.col_factors = pointer<float>(factors.second);
             return t;
           }),
           "Takes the products by address and dtype, and their shape as (banks, rows, cols). Factors are those of rows "
           "and of columns.",
           py::kw_only(), py::arg("dot"), py::arg("self_dot"), py::arg("shape"), py::arg("row0"), py::arg("scale"),
           py::arg("bias"), py::arg("relations"), py::arg("reductions"), py::arg("threads"),
           py::arg("limits") = py::none(), py::arg("factors") = std::pair<Address, Address>(0, 0));
}

using Rows = std::tuple<Address, int64_t, int64_t>;
using Cols = std::tuple<Address, Address, int64_t>;

ccu_similarity_forward_args forward_args(const ccu_tile& tile, const Rows& rows, const Cols& cols) {
  ccu_similarity_forward_args a{};
  a.tile = tile;
  a.row_out = pointer<float>(std::get<0>(rows));
  a.row_reduction_stride = std::get<1>(rows);
  a.row_bank_stride = std::get<2>(rows);
  a.col_max = pointer<float>(std::get<0>(cols));
  a.col_sum = pointer<double>(std::get<1>(cols));
  a.col_reduction_stride = std::get<2>(cols);
  return a;
}

void bind_reduce_similarity(py::module_& m) {
  m.def(
      "similarity_forward",
      [](const ccu_tile& tile, const Rows& rows, const Cols& cols) {
        call("similarity_forward", ccu_similarity_forward, forward_args(tile, rows, cols));
      },
      "Writes rows = (results, stride of reductions, stride of banks) and updates cols = (maxima, sums, stride of "
      "reductions).",
      py::arg("tile"), py::arg("rows"), py::arg("cols"));

  m.def(
      "similarity_forward_prefixes",
      [](const std::vector<std::tuple<ccu_tile, Rows, Cols>>& prefixes) {
        std::vector<ccu_similarity_forward_args> all;
        for (const auto& [tile, rows, cols] : prefixes) all.push_back(forward_args(tile, rows, cols));
        for (size_t k = 1; k < all.size(); ++k) all[k - 1].longer = &all[k];
        if (!all.empty()) call("similarity_forward", ccu_similarity_forward, all[0]);
      },
      "The same of (tile, rows, cols) of each prefix, after adding its products to those of the shorter ones, in "
      "place.",
      py::arg("prefixes"));

  m.def(
      "similarity_backward",
      [](const ccu_tile& tile, std::tuple<Address, Address, int64_t, int64_t> rows,
         std::tuple<Address, Address, int64_t> cols, std::pair<Address, int32_t> grad, std::pair<Address, Address> sums,
         bool add, Address col_sums) {
        ccu_similarity_backward_args a{};
        a.tile = tile;
        a.row_grad = pointer<float>(std::get<0>(rows));
        a.row_out = pointer<float>(std::get<1>(rows));
        a.row_reduction_stride = std::get<2>(rows);
        a.row_bank_stride = std::get<3>(rows);
        a.col_grad = pointer<float>(std::get<0>(cols));
        a.col_out = pointer<float>(std::get<1>(cols));
        a.col_reduction_stride = std::get<2>(cols);
        a.grad = pointer<void>(grad.first);
        a.grad_dtype = grad.second;
        a.scale_sums = pointer<double>(sums.first);
        a.bias_sums = pointer<double>(sums.second);
        a.add = add;
        a.col_sums = pointer<double>(col_sums);
        call("similarity_backward", ccu_similarity_backward, a);
      },
      "Writes grad = (address, dtype) and sums = (for scale, for bias) from rows = (gradients, results, stride of "
      "reductions, stride of banks) and cols = (gradients, results, stride of reductions). With add it adds to "
      "grad; to col_sums it always does.",
      py::arg("tile"), py::arg("rows"), py::arg("cols"), py::arg("grad"), py::arg("sums"), py::kw_only(),
      py::arg("add") = false, py::arg("col_sums") = 0);

  m.def(
      "similarity_softmax",
      [](const ccu_tile& tile, Address e, Address keys, int64_t dim, Address shift, Address sum, Address mean,
         int64_t group_stride) {
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
      },
      "Adds one block of keys to the running softmax of each group of relations.", py::kw_only(), py::arg("tile"),
      py::arg("e"), py::arg("keys"), py::arg("dim"), py::arg("shift"), py::arg("sum"), py::arg("mean"),
      py::arg("group_stride"));
}

void bind_candidates(py::module_& m) {
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
      "Computes what all candidates of a batch share, on a CPU.", py::kw_only(), py::arg("s"), py::arg("batch"),
      py::arg("rest"), py::arg("fixed"), py::arg("threads"));

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
      "Computes the losses of the candidates of some texts, on a CPU.", py::kw_only(), py::arg("similarity"),
      py::arg("rest"), py::arg("fixed"), py::arg("batch"), py::arg("candidates"), py::arg("first"), py::arg("rows"),
      py::arg("out"), py::arg("threads"));

  m.attr("CUDA_ALONE") = static_cast<int>(CCU_CUDA_ALONE);
#if CCU_HAVE_CUDA
  py::class_<ccu_cuda_candidate_args>(m, "CudaCandidates", "The arguments of both kernels of candidate_losses.")
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
           "Takes 0 for each address that a kernel does not use.", py::kw_only(), py::arg("s"), py::arg("similarity"),
           py::arg("scale"), py::arg("factor"), py::arg("batch"), py::arg("candidates"), py::arg("first"),
           py::arg("rows"), py::arg("rest"), py::arg("columns"), py::arg("out"), py::arg("stream"));
  m.def(
      "cuda_candidate_rest",
      [](const ccu_cuda_candidate_args& problem) { call("candidate_losses", ccu_cuda_candidate_rest, problem); },
      "Computes what all candidates of a large batch share, on a GPU.", py::arg("problem"));
  m.def(
      "cuda_candidate_losses",
      [](const ccu_cuda_candidate_args& problem) { call("candidate_losses", ccu_cuda_candidate_losses, problem); },
      "Computes the losses of the candidates of some texts, on a GPU.", py::arg("problem"));
#endif
}

void bind_normalize(py::module_& m) {
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
      "Writes rows of unit length or, given a gradient, the gradient of x.", py::kw_only(), py::arg("x"),
      py::arg("dtype"), py::arg("rows"), py::arg("dim"), py::arg("eps"), py::arg("grad"), py::arg("out"),
      py::arg("other_dtype"), py::arg("inverse"), py::arg("threads"));
}

}  // namespace

void bind_similarity(py::module_& m) {
  bind_tile(m);
  bind_reduce_similarity(m);
  bind_candidates(m);
  bind_normalize(m);
}

}  // namespace ccu
