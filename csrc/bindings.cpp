// The one pybind11 module, ard_kernels._C. Python owns all memory and passes pointers, strides and sizes; shapes and
// dtypes were checked by the rooms' spec.py before a pointer gets here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "history_cache/params.h"
#include "segment_adaln/params.h"
#include "segment_adaln/row_kernels.h"

namespace py = pybind11;

namespace ard {
namespace {

using OptionalView = std::optional<View>;

View or_absent(const OptionalView& view) { return view.value_or(View{}); }

float* floats(uintptr_t pointer) { return reinterpret_cast<float*>(pointer); }

void segment_adaln_forward(const Segments& segments, const View& x, const OptionalView& branch,
                           const OptionalView& gate, const OptionalView& shift, const OptionalView& scale,
                           const OptionalView& h, const OptionalView& y, uintptr_t mean, uintptr_t rstd, float eps) {
  ForwardParams p;
  p.x = x;
  p.branch = or_absent(branch);
  p.gate = or_absent(gate);
  p.shift = or_absent(shift);
  p.scale = or_absent(scale);
  p.h = or_absent(h);
  p.y = or_absent(y);
  p.mean = floats(mean);
  p.rstd = floats(rstd);
  p.eps = eps;
  py::gil_scoped_release release;
  forward_cpu(p, segments);
}

void segment_adaln_backward(const Segments& segments, const OptionalView& grad_h, const OptionalView& grad_y,
                            const OptionalView& h, const OptionalView& branch, const OptionalView& gate,
                            const OptionalView& scale, const OptionalView& dx, const OptionalView& dbranch,
                            const OptionalView& dgate, const OptionalView& dshift, const OptionalView& dscale,
                            uintptr_t mean, uintptr_t rstd, uintptr_t workspace) {
  BackwardParams p;
  p.grad_h = or_absent(grad_h);
  p.grad_y = or_absent(grad_y);
  p.h = or_absent(h);
  p.branch = or_absent(branch);
  p.gate = or_absent(gate);
  p.scale = or_absent(scale);
  p.dx = or_absent(dx);
  p.dbranch = or_absent(dbranch);
  p.dgate = or_absent(dgate);
  p.dshift = or_absent(dshift);
  p.dscale = or_absent(dscale);
  p.mean = floats(mean);
  p.rstd = floats(rstd);
  p.workspace = floats(workspace);
  py::gil_scoped_release release;
  backward_cpu(p, segments);
}

}  // namespace
}  // namespace ard

PYBIND11_MODULE(_C, m) {
  using namespace ard;
  py::class_<View>(m, "View").def(py::init([](uintptr_t data, int64_t stride_batch, int64_t stride_row, int dtype) {
    return View{reinterpret_cast<void*>(data), stride_batch, stride_row, static_cast<DType>(dtype)};
  }));
  py::class_<Segments>(m, "Segments")
      .def(
          py::init([](int64_t batch, int64_t tokens, int64_t channels, int64_t length, std::vector<int64_t> offsets,
                      int threads) { return Segments{batch, tokens, channels, length, std::move(offsets), threads}; }));
  py::class_<HeadsView>(m, "HeadsView")
      .def(py::init([](uintptr_t data, int64_t stride_batch, int64_t stride_head, int64_t stride_token) {
        return HeadsView{reinterpret_cast<void*>(data), stride_batch, stride_head, stride_token};
      }));
  m.def("segment_adaln_forward", &segment_adaln_forward);
  m.def("segment_adaln_backward", &segment_adaln_backward);
  m.def("segment_adaln_workspace", [](const Segments& segments, bool gated, bool normed) {
    return workspace_floats(segments, (gated ? 1 : 0) + (normed ? 2 : 0));
  });
  m.def(
      "history_cache_append",
      [](const HeadsView& k, const HeadsView& v, const HeadsView& cache_k, const HeadsView& cache_v, int64_t batch,
         int64_t heads, int64_t tokens, int64_t row_bytes, int64_t element_bytes, int threads) {
        append_cpu({k, v, cache_k, cache_v, batch, heads, tokens, row_bytes, element_bytes, threads});
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("cpu_isa", [] { return row_kernels().isa; });
  m.def("cpu_isas", [] {
    std::vector<std::string> names;
    for (const RowKernels* kernels : supported_row_kernels()) names.push_back(kernels->isa);
    return names;
  });
  m.def("use_cpu_isa", &use_row_kernels);
}
