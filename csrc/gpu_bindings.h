// What Python sees of the CUDA kernels: one function per room, defined in its gpu_bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace ard {

void bind_block_causal_attention(pybind11::module_& m);
void bind_history_attention(pybind11::module_& m);
void bind_qk_norm_rope(pybind11::module_& m);
void bind_segment_adaln(pybind11::module_& m);

inline void bind_gpu(pybind11::module_ m) {
  bind_block_causal_attention(m);
  bind_history_attention(m);
  bind_qk_norm_rope(m);
  bind_segment_adaln(m);
}

}  // namespace ard
