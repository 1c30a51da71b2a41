// small_info_nce for Python. The arguments are positional: at eight items their names would be a tenth of a call.
#include "bindings.h"

namespace ccu {

void bind_small_info_nce(py::module_& m) {
  m.def(
      "small_info_nce",
      [](Address x, Address y, int64_t items, int64_t dim, int dtype, int rounded, float scale, double weight,
         bool symmetric, Address dot, Address loss, Address scale_grad, int threads) {
        ccu_small_info_nce_args a{};
        a.x = pointer<void>(x);
        a.y = pointer<void>(y);
        a.dim = dim;
        a.dtype = dtype;
        a.rounded = rounded;
        a.items = items;
        a.scale = scale;
        a.weight = weight;
        a.symmetric = symmetric;
        a.dot = pointer<float>(dot);
        a.loss = pointer<float>(loss);
        a.scale_grad = pointer<float>(scale_grad);
        a.threads = threads;
        call("info_nce", ccu_small_info_nce, a);
      },
      "Writes the loss of a small batch and, where scale_grad is not 0, that gradient and the products' to dot. Takes "
      "the products from there where x is 0.",
      py::arg("x"), py::arg("y"), py::arg("items"), py::arg("dim"), py::arg("dtype"), py::arg("rounded"),
      py::arg("scale"), py::arg("weight"), py::arg("symmetric"), py::arg("dot"), py::arg("loss"), py::arg("scale_grad"),
      py::arg("threads"), py::pos_only());

  m.def(
      "small_info_nce_backward",
      [](Address grad, Address x, Address y, int64_t items, int64_t dim, int dtype, int rounded, float factor,
         Address dx, Address dy, Address scale_grad, Address dscale, int threads) {
        ccu_small_info_nce_backward_args a{};
        a.grad = pointer<float>(grad);
        a.x = pointer<void>(x);
        a.y = pointer<void>(y);
        a.items = items;
        a.dim = dim;
        a.dtype = dtype;
        a.rounded = rounded;
        a.factor = factor;
        a.dx = pointer<void>(dx);
        a.dy = pointer<void>(dy);
        a.scale_grad = pointer<float>(scale_grad);
        a.dscale = pointer<float>(dscale);
        a.threads = threads;
        call("info_nce", ccu_small_info_nce_backward, a);
      },
      "Writes the gradients of x, y and scale, where their addresses are not 0, from what the forward pass left.",
      py::arg("grad"), py::arg("x"), py::arg("y"), py::arg("items"), py::arg("dim"), py::arg("dtype"),
      py::arg("rounded"), py::arg("factor"), py::arg("dx"), py::arg("dy"), py::arg("scale_grad"), py::arg("dscale"),
      py::arg("threads"), py::pos_only());
}

}  // namespace ccu
