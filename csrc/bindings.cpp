// The one pybind11 module, ard_kernels._C. Python owns all memory and passes pointers, strides and sizes; shapes and
// dtypes were checked by the rooms' spec.py before a pointer gets here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "block_causal_attention/cpu_bindings.h"
#include "common/isa.h"
#include "common/python.h"
#include "gelu/kernels.h"
#include "gpu_bindings.h"
#include "history_attention/cpu.h"
#include "qk_norm_rope/python.h"
#include "segment_adaln/params.h"

namespace py = pybind11;

namespace ard {
namespace {

void segment_adaln_forward(const Segments& segments, const View& x, const View& branch, const View& gate,
                           const View& shift, const View& scale, const View& weight, const View& bias, const View& h,
                           const View& y, uintptr_t mean, uintptr_t rstd, float eps) {
  CpuForwardParams p;
  p.x = x, p.branch = branch, p.gate = gate, p.shift = shift, p.scale = scale, p.weight = weight, p.bias = bias;
  p.h = h, p.y = y, p.mean = pointer<float>(mean), p.rstd = pointer<float>(rstd), p.eps = eps;
  py::gil_scoped_release release;
  forward_cpu(p, segments);
}

// `workspace` is called with the number of floats that are needed, and gives their address.
void segment_adaln_backward(const Segments& segments, const View& grad_h, const View& grad_y, const View& h,
                            const View& branch, const View& gate, const View& scale, const View& weight,
                            const View& bias, uintptr_t mean, uintptr_t rstd, const View& dx, const View& dbranch,
                            const View& dgate, const View& dshift, const View& dscale, const View& dweight,
                            const View& dbias, const py::function& workspace) {
  CpuBackwardParams p;
  p.grad_h = grad_h, p.grad_y = grad_y, p.h = h, p.branch = branch, p.gate = gate, p.scale = scale;
  p.weight = weight, p.bias = bias, p.mean = pointer<float>(mean), p.rstd = pointer<float>(rstd);
  p.dx = dx, p.dbranch = dbranch, p.dgate = dgate, p.dshift = dshift, p.dscale = dscale;
  p.dweight = dweight, p.dbias = dbias;
  p.workspace = pointer<float>(workspace(workspace_floats(segments, p)).cast<uintptr_t>());
  py::gil_scoped_release release;
  backward_cpu(p, segments);
}

}  // namespace
}  // namespace ard

PYBIND11_MODULE(_C, m) {
  using namespace ard;
  py::class_<Segments>(m, "Segments")
      .def(
          py::init([](int64_t batch, int64_t tokens, int64_t channels, int64_t length, std::vector<int64_t> offsets,
                      int threads) { return Segments{batch, tokens, channels, length, std::move(offsets), threads}; }));
  m.def("segment_adaln_forward", &segment_adaln_forward);
  m.def("segment_adaln_backward", &segment_adaln_backward);
  m.def("history_attention",
        [](const AttentionTiles& tiles, const py::tuple& shape, int dtype, float scale, int threads, const HeadsView& q,
           const HeadsView& k, const HeadsView& v, const HeadsView& cache_k, const HeadsView& cache_v,
           const HeadsView& out, int64_t start) {
          const AttentionCall p = attention_call(shape, dtype, scale, threads, q, cache_k, cache_v, out, 0);
          py::gil_scoped_release release;
          history_attention_cpu(p, tiles, k, v, start);
        });
  m.def("gelu_forward", [](uintptr_t x, uintptr_t y, int64_t n, int dtype, int threads) {
    py::gil_scoped_release release;
    gelu_forward_cpu(pointer<void>(x), pointer<void>(y), n, static_cast<DType>(dtype), threads);
  });
  m.def("gelu_backward", [](uintptr_t grad, uintptr_t x, uintptr_t dx, int64_t n, int dtype, int threads) {
    py::gil_scoped_release release;
    gelu_backward_cpu(pointer<void>(grad), pointer<void>(x), pointer<void>(dx), n, static_cast<DType>(dtype), threads);
  });
  bind_attention_cpu(m);
  bind_qk_norm_rope_cpu(m);
  m.def("cpu_isa", &isa);
  m.def("cpu_isas", &supported_isas);
  m.def("use_cpu_isa", &use_isa);
#ifdef ARD_CUDA
  bind_gpu(m.def_submodule("gpu"));
#endif
}
