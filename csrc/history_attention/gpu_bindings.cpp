#include "../gpu_bindings.h"

#include "../common/python.h"
#include "params.h"

namespace ard {
namespace {

void history_append(const HeadsView& k, const HeadsView& v, const HeadsView& cache_k, const HeadsView& cache_v,
                    int batch, int heads, int tokens, int head_dim, int dtype, uintptr_t stream) {
  const AppendParams p{k, v, cache_k, cache_v, batch, heads, tokens, head_dim};
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
