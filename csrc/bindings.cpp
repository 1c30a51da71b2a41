// The only file that knows Python: raw addresses in, the GIL released around the work, a status out as an exception.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "ccu_fast.h"

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

void copy_codes(const std::vector<int32_t>& from, int32_t* to, int32_t* count) {
  if (from.size() > CCU_MAX_REDUCTIONS)
    throw std::invalid_argument("expected at most " + std::to_string(CCU_MAX_REDUCTIONS) + " reductions a side, got " +
                                std::to_string(from.size()));
  std::copy(from.begin(), from.end(), to);
  *count = static_cast<int32_t>(from.size());
}


}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of ccu_fast. Use ccu_fast.backends.native, which checks its arguments.";
  m.attr("MAX_REDUCTIONS") = static_cast<int>(CCU_MAX_REDUCTIONS);
  m.attr("F32") = static_cast<int>(CCU_F32);
  m.attr("F16") = static_cast<int>(CCU_F16);
  m.attr("BF16") = static_cast<int>(CCU_BF16);
  m.def("cpu_isa", [] { return std::string(ccu_cpu_isa()); });

  py::class_<ccu_tile>(m, "Tile").def(
      py::init([](Address dot, int64_t banks, int64_t rows, int64_t cols, int64_t row0, float scale, float bias,
                  std::pair<Address, int64_t> row_labels, std::pair<Address, int64_t> col_labels,
                  std::pair<Address, int64_t> row_ids, std::pair<Address, int64_t> col_ids, bool diagonal,
                  const std::vector<int32_t>& row_codes, const std::vector<int32_t>& col_codes, int threads) {
        ccu_tile t{};
        t.dot = pointer<float>(dot);
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

  m.def("similarity_forward", [](const ccu_tile& tile, Address row_out, int64_t row_reduction_stride,
                                 int64_t row_bank_stride, Address col_max, Address col_sum,
                                 int64_t col_reduction_stride) {
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
}
