// pgd_step_ and the noise store for Python.
#include "bindings.h"

namespace ccu {

void bind_noise(py::module_& m) {
  m.attr("PGD_SLICES") = static_cast<int>(CCU_PGD_SLICES);
  m.def(
      "pgd_step",
      [](Address delta, Address grad, Address image, Address out, int dtype, int grad_dtype, int64_t samples,
         int64_t channels, int64_t inner, float step, float eps, float lower, float upper, Address channel, bool l2,
         bool check, Address parts, Address refused, Address told, int threads, bool cuda, Address stream) {
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
        a.refused = pointer<unsigned long long>(refused);
        a.told = pointer<unsigned long long>(told);
        a.norm = l2 ? CCU_L2 : CCU_LINF;
        a.check = check;
        a.threads = threads;
        a.found = &found;
        a.stream = pointer<void>(stream);
        call_on(cuda, "pgd_step", ccu_pgd_step, CCU_CUDA(ccu_cuda_pgd_step), a);
        return found != 0;
      },
      "Makes one step in place and, on a CPU, returns whether a check failed and nothing was written.", py::kw_only(),
      py::arg("delta"), py::arg("grad"), py::arg("image"), py::arg("out"), py::arg("dtype"), py::arg("grad_dtype"),
      py::arg("samples"), py::arg("channels"), py::arg("inner"), py::arg("step"), py::arg("eps"), py::arg("lower"),
      py::arg("upper"), py::arg("channel"), py::arg("l2"), py::arg("check"), py::arg("parts"), py::arg("refused"),
      py::arg("told"), py::arg("threads"), py::arg("cuda"), py::arg("stream"));

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
      "Adds a row of the noise to each image and clamps the sum.", py::kw_only(), py::arg("images"),
      py::arg("image_dtype"), py::arg("noise"), py::arg("noise_dtype"), py::arg("index"), py::arg("items"),
      py::arg("channels"), py::arg("inner"), py::arg("rows"), py::arg("lower"), py::arg("upper"), py::arg("limits"),
      py::arg("out"), py::arg("threads"), py::arg("cuda"), py::arg("stream"));

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
      "Adds each delta to its row of the noise and clamps the row.", py::kw_only(), py::arg("noise"),
      py::arg("noise_dtype"), py::arg("rows"), py::arg("order"), py::arg("count"), py::arg("total"), py::arg("size"),
      py::arg("delta"), py::arg("delta_dtype"), py::arg("eps"), py::arg("threads"), py::arg("cuda"), py::arg("stream"));

#if CCU_HAVE_CUDA
  m.def(
      "cuda_noise_check",
      [](Address values, int dtype, bool whole, float slack, int64_t count, Address found, Address stream) {
        ccu_cuda_noise_check_args a{};
        a.values = pointer<void>(values);
        a.dtype = dtype;
        a.whole = whole;
        a.slack = slack;
        a.count = count;
        a.found = pointer<unsigned long long>(found);
        a.stream = pointer<void>(stream);
        call("noise_check", ccu_cuda_noise_check, a);
      },
      "Finds the first value that a noise store cannot hold.", py::kw_only(), py::arg("values"), py::arg("dtype"),
      py::arg("whole"), py::arg("slack"), py::arg("count"), py::arg("found"), py::arg("stream"));
#endif
}

}  // namespace ccu
