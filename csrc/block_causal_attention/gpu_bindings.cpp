#include "../gpu_bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <stdexcept>

#include "../common/python.h"
#include "params.h"
#ifdef ARD_CUDA_SM90
#include "sm90_entry.h"
#endif

namespace py = pybind11;

namespace ard {
namespace {

// (items, masked, bounds pointers, tiles, heads per group)
using Tables = std::tuple<uintptr_t, uintptr_t, uintptr_t, int32_t, int32_t>;

TileTables tables_of(const Tables& tables) {
  return {reinterpret_cast<const TileItem*>(std::get<0>(tables)),
          reinterpret_cast<const MaskedTile*>(std::get<1>(tables)),
          reinterpret_cast<const RowBounds*>(std::get<2>(tables)), std::get<3>(tables), std::get<4>(tables)};
}

float* floats(uintptr_t pointer) { return reinterpret_cast<float*>(pointer); }
void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// |scale| * log2(e), never 0: a masked score of -inf must stay -inf.
float base2_scale(float scale) { return std::max(std::fabs(scale) * 1.4426950408889634f, FLT_MIN); }

AttentionParams params_of(const HeadsView& q, const HeadsView& k, const HeadsView& v, const HeadsView& out,
                          const Tables& tables, int32_t batch, int32_t heads, int32_t tokens, float scale) {
  AttentionParams p;
  p.q = q, p.k = k, p.v = v, p.out = out;
  p.tiles = tables_of(tables);
  p.batch = batch, p.heads = heads, p.tokens = tokens;
  p.scale = base2_scale(scale);
  p.flip = scale < 0 ? 0x80008000u : 0;
  return p;
}

// (multiprocessors if the Hopper kernel serves the call on compute capability `chip`, else 0; rows and columns of a
// tile)
std::tuple<int, int, int> forward_kernel(const HeadsView& q, const HeadsView& k, const HeadsView& v,
                                         const HeadsView& out, int32_t batch, int32_t heads, int32_t tokens,
                                         float scale, int dtype, int head_dim, int chip, int multiprocessors) {
#ifdef ARD_CUDA_SM90
  const AttentionParams p = params_of(q, k, v, out, {}, batch, heads, tokens, scale);
  if (chip == 90 && sm90_serves(p, static_cast<DType>(dtype), head_dim)) {
    return {multiprocessors, kSm90BlockM, kSm90BlockN};
  }
#endif
  return {0, kForwardBlockM, forward_block_n(head_dim)};
}

// hopper_blocks: the first of forward_kernel's results.
void forward(const HeadsView& q, const HeadsView& k, const HeadsView& v, const HeadsView& out, uintptr_t lse,
             const Tables& tables, int32_t batch, int32_t heads, int32_t tokens, float scale, int dtype, int head_dim,
             int hopper_blocks, uintptr_t stream) {
  AttentionParams p = params_of(q, k, v, out, tables, batch, heads, tokens, scale);
  p.lse = floats(lse);
#ifdef ARD_CUDA_SM90
  if (hopper_blocks)
    return attention_forward_sm90(p, static_cast<DType>(dtype), head_dim, hopper_blocks, pointer(stream));
#endif
  switch (head_dim) {
#define ARD_CASE(dim) \
  case dim:           \
    return attention_forward_sm80<dim>(p, static_cast<DType>(dtype), pointer(stream));
    ARD_FOR_EACH_HEAD_DIM(ARD_CASE)
#undef ARD_CASE
  }
  throw std::invalid_argument("attention_forward: head dim not compiled");
}

void history(const HeadsView& q, const HeadsView& k, const HeadsView& v, const HeadsView& out, uintptr_t workspace,
             const Tables& tables, int32_t batch, int32_t heads, int32_t tokens, int32_t splits,
             int32_t tiles_per_split, float scale, int dtype, int head_dim, uintptr_t stream) {
  AttentionParams p = params_of(q, k, v, out, tables, batch, heads, tokens, scale);
  p.workspace = floats(workspace);
  p.splits = splits, p.tiles_per_split = tiles_per_split;
  switch (head_dim) {
#define ARD_CASE(dim) \
  case dim:           \
    return attention_history_sm80<dim>(p, static_cast<DType>(dtype), pointer(stream));
    ARD_FOR_EACH_HEAD_DIM(ARD_CASE)
#undef ARD_CASE
  }
  throw std::invalid_argument("attention_history: head dim not compiled");
}

void backward(const HeadsView& grad_out, const HeadsView& q, const HeadsView& k, const HeadsView& v,
              const HeadsView& out, const HeadsView& dq, const HeadsView& dk, const HeadsView& dv, uintptr_t lse,
              uintptr_t delta, const Tables& by_query, const Tables& by_key, int32_t batch, int32_t heads,
              int32_t tokens, float scale, int dtype, int head_dim, uintptr_t stream) {
  AttentionBackwardParams p;
  p.grad_out = grad_out, p.q = q, p.k = k, p.v = v, p.out = out, p.dq = dq, p.dk = dk, p.dv = dv;
  p.lse = floats(lse), p.delta = floats(delta);
  p.by_query = tables_of(by_query), p.by_key = tables_of(by_key);
  p.batch = batch, p.heads = heads, p.tokens = tokens;
  p.scale = scale;
  p.scale2 = scale < 0 ? -base2_scale(scale) : base2_scale(scale);
  switch (head_dim) {
#define ARD_CASE(dim) \
  case dim:           \
    return attention_backward_sm80<dim>(p, static_cast<DType>(dtype), pointer(stream));
    ARD_FOR_EACH_HEAD_DIM(ARD_CASE)
#undef ARD_CASE
  }
  throw std::invalid_argument("attention_backward: head dim not compiled");
}

}  // namespace

void bind_block_causal_attention(py::module_& m) {
  // A dict, not a function: it is asked while torch.compile traces a caller.
  py::dict shared_bytes;
#define ARD_ENTRY(dim) shared_bytes[py::int_(dim)] = attention_shared_bytes_sm80<dim>();
  ARD_FOR_EACH_HEAD_DIM(ARD_ENTRY)
#undef ARD_ENTRY
  m.attr("attention_shared_bytes") = shared_bytes;
  m.def("attention_forward_kernel", &forward_kernel);
  m.def("attention_history_block", [](int head_dim) { return std::pair(kHistoryBlockM, forward_block_n(head_dim)); });
  m.def("attention_forward", &forward);
  m.def("attention_history", &history);
  m.def("attention_backward_block", [] { return std::pair(kBackwardBlockM, kBackwardBlockN); });
  m.def("attention_backward", &backward);
}

}  // namespace ard
