#include "python.h"

namespace ard {

namespace py = pybind11;

void bind_qk_norm_rope_cpu(py::module_& m) {
  m.def("qk_norm_rope_forward",
        [](const py::tuple& rule, const Object& weight, const Object& bias, const Object& tables, const HeadsView& x,
           const HeadsView& y, uintptr_t mean, uintptr_t rstd, int threads) {
          const NormRopeForward p = forward_of(rule, weight, bias, tables, x, y, mean, rstd);
          py::gil_scoped_release release;
          norm_rope_forward_cpu(p, threads);
        });
  m.def("qk_norm_rope_backward", [](const py::tuple& rule, const Object& weight, const Object& tables,
                                    const HeadsView& grad_y, const HeadsView& x, uintptr_t mean, uintptr_t rstd,
                                    const HeadsView& dx, const Object& dweight, const Object& dbias,
                                    uintptr_t workspace, int threads) {
    const NormRopeBackward p = backward_of(rule, weight, tables, grad_y, x, mean, rstd, dx, dweight, dbias, workspace);
    py::gil_scoped_release release;
    norm_rope_backward_cpu(p, threads);
  });
  m.def("qk_norm_rope_chunks", &norm_rope_chunks_cpu, "chunks of so many tokens, each with its sums in the workspace");
}

}  // namespace ard
