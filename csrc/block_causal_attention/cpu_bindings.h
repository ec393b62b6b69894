#pragma once

#include <pybind11/pybind11.h>

#include "cpu_params.h"

namespace ard {

// shape: (batch, heads, kv_heads, rows, keys, head_dim).
AttentionCall attention_call(const pybind11::tuple& shape, int dtype, float scale, int threads, const HeadsView& q,
                             const HeadsView& k, const HeadsView& v, const HeadsView& out, uintptr_t lse);
void bind_attention_cpu(pybind11::module_& m);

}  // namespace ard
