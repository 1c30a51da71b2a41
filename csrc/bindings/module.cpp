// The Python module, compiled as one file: for each file pybind11's templates would take longer than all the rest.
#include "../cpu/parallel.h"
#include "bindings.h"
#include "noise.cpp"
#include "similarity.cpp"
#include "small_info_nce.cpp"
#include "tokens.cpp"

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of ccu_fast; call them through ccu_fast.ops, which checks the arguments.";
  m.attr("F32") = static_cast<int>(CCU_F32);
  m.attr("F16") = static_cast<int>(CCU_F16);
  m.attr("BF16") = static_cast<int>(CCU_BF16);
  m.attr("U8") = static_cast<int>(CCU_U8);
  m.attr("I8") = static_cast<int>(CCU_I8);
  m.attr("F64") = static_cast<int>(CCU_F64);
  m.def(
      "largest_team", [] { return ccu::largest_team().exchange(1); },
      "Returns the largest number of threads that an operation has used since the last call.");
#if CCU_HAVE_CUDA
  m.attr("CUDA") = true;
#else
  m.attr("CUDA") = false;
#endif
  m.def("cpu_isa", [] { return std::string(ccu_cpu_isa()); }, "Names the instruction set that the CPU kernels use.");
  ccu::bind_similarity(m);
  ccu::bind_small_info_nce(m);
  ccu::bind_tokens(m);
  ccu::bind_noise(m);
}
