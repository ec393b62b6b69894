#include "../gpu_bindings.h"

#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "../common/python.h"
#include "params.h"

namespace ard {
namespace {

// (kind, weight pointer, its dtype code, bias pointer, its dtype code, eps); a null pointer is an absent parameter.
using NormTuple = std::tuple<int, uintptr_t, int, uintptr_t, int, float>;

HeadNormParams head_norm(const std::optional<NormTuple>& from) {
  if (!from) return {};
  const auto& [kind, weight, weight_dtype, bias, bias_dtype, eps] = *from;
  const auto is_float = [](int dtype) { return static_cast<DType>(dtype) == DType::kFloat32; };
  return {static_cast<NormKind>(kind), pointer<const void>(weight), pointer<const void>(bias),
          is_float(weight_dtype),      is_float(bias_dtype),        eps};
}

void history_append(const HeadsView& q, const HeadsView& normed_q, const HeadsView& k, const HeadsView& v,
                    const HeadsView& cache_k, const HeadsView& cache_v, const std::optional<NormTuple>& q_norm,
                    const std::optional<NormTuple>& k_norm, int batch, int heads, int tokens, int head_dim, int dtype,
                    uintptr_t stream) {
  AppendGpuParams p;
  p.q = q;
  p.normed_q = normed_q;
  p.k = k;
  p.v = v;
  p.cache_k = cache_k;
  p.cache_v = cache_v;
  p.norm[0] = head_norm(q_norm);
  p.norm[1] = head_norm(k_norm);
  p.batch = batch;
  p.heads = heads;
  p.tokens = tokens;
  p.head_dim = head_dim;
  append_gpu(p, static_cast<DType>(dtype), pointer<void>(stream));
}

void history_add_splits(uintptr_t workspace, const HeadsView& out, int batch, int heads, int tokens, int head_dim,
                        int splits, int dtype, uintptr_t stream) {
  const SplitsParams p{out, pointer<const float>(workspace), batch, heads, tokens, head_dim, splits};
  add_splits_gpu(p, static_cast<DType>(dtype), pointer<void>(stream));
}

}  // namespace

void bind_history_attention(pybind11::module_& m) {
  m.def("history_append", &history_append);
  m.def("history_add_splits", &history_add_splits);
}

}  // namespace ard
