// How attention on the CPU comes from Python: see ard_kernels/block_causal_attention/cpu.py.
#include "cpu_bindings.h"

#include <pybind11/stl.h>

#include "../common/python.h"

namespace ard {

namespace py = pybind11;

AttentionCall attention_call(const py::tuple& shape, int dtype, float scale, int threads, const HeadsView& q,
                             const HeadsView& k, const HeadsView& v, const HeadsView& out, uintptr_t lse) {
  AttentionCall p;
  int64_t* const sizes[] = {&p.batch, &p.heads, &p.kv_heads, &p.rows, &p.keys, &p.head_dim};
  for (size_t i = 0; i < 6; ++i) *sizes[i] = shape[i].cast<int64_t>();
  p.dtype = static_cast<DType>(dtype), p.scale = scale, p.threads = threads;
  p.q = q, p.k = k, p.v = v, p.out = out, p.lse = pointer<float>(lse);
  return p;
}

void bind_attention_cpu(py::module_& m) {
  py::class_<AttentionTiles>(m, "AttentionTiles")
      .def(py::init([](const std::vector<std::array<int32_t, 4>>& tiles,
                       const std::vector<std::array<int32_t, 3>>& pieces, std::vector<int32_t> unseen) {
        AttentionTiles made;
        for (const auto& t : tiles) made.tiles.push_back({t[0], t[1], t[2], t[3]});
        for (const auto& p : pieces) made.pieces.push_back({p[0], p[1], p[2]});
        made.unseen = std::move(unseen);
        return made;
      }));
  m.def("attention_forward",
        [](const AttentionTiles& tiles, const py::tuple& shape, int dtype, float scale, int threads, const HeadsView& q,
           const HeadsView& k, const HeadsView& v, const HeadsView& out, uintptr_t lse) {
          const AttentionCall p = attention_call(shape, dtype, scale, threads, q, k, v, out, lse);
          py::gil_scoped_release release;
          return attention_forward_cpu(p, tiles);
        });
  m.def("attention_backward",
        [](const AttentionTiles& tiles, const py::tuple& shape, int dtype, float scale, int threads, const HeadsView& q,
           const HeadsView& k, const HeadsView& v, const HeadsView& out, uintptr_t lse, const HeadsView& grad_out,
           uintptr_t grad_lse, const HeadsView& dq, const HeadsView& dk, const HeadsView& dv) {
          const AttentionCall p = attention_call(shape, dtype, scale, threads, q, k, v, out, lse);
          const AttentionGradients g{grad_out, dq, dk, dv, pointer<const float>(grad_lse)};
          py::gil_scoped_release release;
          return attention_backward_cpu(p, g, tiles);
        });
}

}  // namespace ard
