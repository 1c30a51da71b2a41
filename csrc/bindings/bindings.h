// What the bindings share: they take raw addresses, release the GIL around the work, and turn a status into an
// exception.
#ifndef CCU_FAST_BINDINGS_BINDINGS_H_
#define CCU_FAST_BINDINGS_BINDINGS_H_

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../ccu_fast.h"

namespace py = pybind11;

namespace ccu {

using Address = uintptr_t;
using Strided = std::pair<Address, int64_t>;  // an address and a stride

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
  }
#if CCU_HAVE_CUDA
  if (status >= CCU_CUDA_ERROR)
    throw std::runtime_error(std::string(name) + ": CUDA error " + std::to_string(status - CCU_CUDA_ERROR) + ", " +
                             ccu_cuda_error_text(status));
#endif
  throw std::runtime_error(std::string(name) + ": failed with status " + std::to_string(status));
}

// Runs an operation on the CPU or on a GPU. Args is deduced from cpu_op alone, since cuda_op is nullptr in a build
// without CUDA.
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

void bind_similarity(py::module_& m);
void bind_small_info_nce(py::module_& m);
void bind_tokens(py::module_& m);
void bind_noise(py::module_& m);

}  // namespace ccu

#endif  // CCU_FAST_BINDINGS_BINDINGS_H_
