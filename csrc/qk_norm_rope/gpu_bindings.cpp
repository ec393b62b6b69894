#include "../gpu_bindings.h"

#include "python.h"

namespace ard {

void bind_qk_norm_rope(pybind11::module_& m) {
  m.def("qk_norm_rope_forward", [](const pybind11::tuple& rule, const Object& weight, const Object& bias,
                                   const Object& tables, const HeadsView& x, const HeadsView& y, uintptr_t mean,
                                   uintptr_t rstd, int blocks, uintptr_t stream) {
    norm_rope_forward_gpu(forward_of(rule, weight, bias, tables, x, y, mean, rstd), blocks, pointer<void>(stream));
  });
  m.def("qk_norm_rope_backward", [](const pybind11::tuple& rule, const Object& weight, const Object& tables,
                                    const HeadsView& grad_y, const HeadsView& x, uintptr_t mean, uintptr_t rstd,
                                    const HeadsView& dx, const Object& dweight, const Object& dbias,
                                    uintptr_t workspace, int blocks, uintptr_t stream) {
    norm_rope_backward_gpu(backward_of(rule, weight, tables, grad_y, x, mean, rstd, dx, dweight, dbias, workspace),
                           blocks, pointer<void>(stream));
  });
  m.def(
      "qk_norm_rope_geometry",
      [](int heads, int head_dim) {
        const BlockGeometry g = norm_rope_geometry(heads, head_dim);
        return pybind11::make_tuple(g.units, g.rows_per_warp, g.heads_each, g.warps);
      },
      "(units of a row, rows of a warp, heads of a thread, warps of a block)");
}

}  // namespace ard
