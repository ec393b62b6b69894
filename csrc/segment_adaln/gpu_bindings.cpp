#include "../gpu_bindings.h"

#include "../common/python.h"
#include "params.h"

namespace ard {

namespace {

// (address of chunks, of spans, samples, chunks, segments, whether rows are per token)
GpuChunks chunks_of(const pybind11::tuple& work) {
  GpuChunks chunks;
  chunks.chunks = pointer<const int32_t>(work[0].cast<uintptr_t>());
  chunks.spans = pointer<const int32_t>(work[1].cast<uintptr_t>());
  chunks.batch = work[2].cast<int>();
  chunks.chunk_count = work[3].cast<int>();
  chunks.segments = work[4].cast<int>();
  chunks.rows_per_token = work[5].cast<bool>();
  return chunks;
}

void adaln_forward(View x, View branch, View gate, View shift, View scale, View weight, View bias, View h, View y,
                   uintptr_t mean, uintptr_t rstd, float eps, int64_t tokens, int64_t channels,
                   const pybind11::tuple& work, int shared_limit, uintptr_t stream) {
  GpuForwardParams p;
  p.x = x, p.branch = branch, p.gate = gate, p.shift = shift, p.scale = scale, p.weight = weight, p.bias = bias;
  p.h = h, p.y = y, p.mean = pointer<float>(mean), p.rstd = pointer<float>(rstd), p.eps = eps;
  p.tokens = tokens, p.channels = channels, p.work = chunks_of(work);
  forward_gpu(p, shared_limit, pointer<void>(stream));
}

void adaln_backward(View grad_h, View grad_y, View h, View branch, View gate, View scale, View weight, View bias,
                    uintptr_t mean, uintptr_t rstd, View dx, View dbranch, View dgate, View dshift, View dscale,
                    View dweight, View dbias, uintptr_t workspace, int sums, int64_t tokens, int64_t channels,
                    const pybind11::tuple& work, int shared_limit, uintptr_t stream) {
  GpuBackwardParams p;
  p.grad_h = grad_h, p.grad_y = grad_y, p.h = h, p.branch = branch, p.gate = gate, p.scale = scale;
  p.weight = weight, p.bias = bias, p.mean = pointer<const float>(mean), p.rstd = pointer<const float>(rstd);
  p.dx = dx, p.dbranch = dbranch, p.dgate = dgate, p.dshift = dshift, p.dscale = dscale;
  p.dweight = dweight, p.dbias = dbias, p.workspace = pointer<float>(workspace), p.sums = sums;
  p.tokens = tokens, p.channels = channels, p.work = chunks_of(work);
  backward_gpu(p, shared_limit, pointer<void>(stream));
}

pybind11::tuple adaln_geometry(int channels, bool is_backward) {
  const RowGeometry g = is_backward ? backward_geometry(channels) : forward_geometry(channels);
  return pybind11::make_tuple(g.elements, g.threads, g.rows);
}

}  // namespace

void bind_segment_adaln(pybind11::module_& m) {
  m.def("adaln_forward", &adaln_forward);
  m.def("adaln_backward", &adaln_backward);
  m.def("adaln_geometry", &adaln_geometry, "(elements per thread, threads per row, rows per block) for a width");
}

}  // namespace ard
