#include "../gpu_bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "../common/python.h"
#include "head_dims.h"
#include "params.h"
#ifdef ARD_CUDA_SM90
#include "sm90_entry.h"
#endif

namespace py = pybind11;

namespace ard {
namespace {

// (items, masked, bounds, row_segments pointers, tiles, heads per group)
using Tables = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int32_t, int32_t>;
// (B, H, H_kv, T_q, T_k)
using Sizes = std::tuple<int32_t, int32_t, int32_t, int32_t, int32_t>;

TileTables tables_of(const Tables& tables) {
  const auto& [items, masked, bounds, row_segments, tiles, group] = tables;
  return {pointer<const TileItem>(items),
          pointer<const MaskedTile>(masked),
          pointer<const int32_t>(bounds),
          pointer<const int32_t>(row_segments),
          tiles,
          group};
}

AttentionSizes sizes_of(const Sizes& sizes) {
  const auto& [batch, heads, kv_heads, tokens, key_tokens] = sizes;
  return {batch, heads, kv_heads, tokens, key_tokens};
}

// |scale| * log2(e), never 0: a masked score of -inf must stay -inf.
float base2_scale(float scale) { return std::max(std::fabs(scale) * 1.4426950408889634f, FLT_MIN); }

AttentionParams params_of(const HeadsView& q, const HeadsView& k, const HeadsView& v, const HeadsView& out,
                          const Tables& tables, const Sizes& sizes, float scale) {
  AttentionParams p;
  static_cast<AttentionSizes&>(p) = sizes_of(sizes);
  p.q = q, p.k = k, p.v = v, p.out = out;
  p.tiles = tables_of(tables);
  p.scale = base2_scale(scale);
  p.flip = scale < 0 ? 0x80008000u : 0;
  return p;
}

// (multiprocessors if the Hopper kernel serves the call on compute capability `chip`, else 0; rows and columns of a
// tile)
std::tuple<int, int, int> attention_forward_kernel(const HeadsView& q, const HeadsView& k, const HeadsView& v,
                                                   const HeadsView& out, const Sizes& sizes, float scale, int dtype,
                                                   int head_dim, int chip, int multiprocessors) {
#ifdef ARD_CUDA_SM90
  const AttentionParams p = params_of(q, k, v, out, {}, sizes, scale);
  if (chip == 90 && is_compiled(head_dim) && sm90_serves(p, static_cast<DType>(dtype))) {
    return {multiprocessors, sm90::kBlockM, sm90::kBlockN};
  }
#endif
  return {0, kForwardBlockM, forward_block_n(head_dim)};
}

// hopper_blocks: the first of forward_kernel's results.
void attention_forward(const HeadsView& q, const HeadsView& k, const HeadsView& v, const HeadsView& out, uintptr_t lse,
                       const Tables& tables, const Sizes& sizes, float scale, int dtype, int head_dim,
                       int hopper_blocks, uintptr_t stream) {
  AttentionParams p = params_of(q, k, v, out, tables, sizes, scale);
  p.lse = pointer<float>(lse);
  with_head_dim(head_dim, [&](auto dim) {
#ifdef ARD_CUDA_SM90
    if (hopper_blocks) {
      return attention_forward_sm90<dim>(p, static_cast<DType>(dtype), hopper_blocks, pointer<void>(stream));
    }
#endif
    attention_forward_sm80<dim>(p, static_cast<DType>(dtype), pointer<void>(stream));
  });
}

void attention_history(const HeadsView& q, const HeadsView& k, const HeadsView& v, const HeadsView& out,
                       uintptr_t workspace, const Tables& tables, const Sizes& sizes, int32_t splits,
                       int32_t tiles_per_split, float scale, int dtype, int head_dim, uintptr_t stream) {
  AttentionParams p = params_of(q, k, v, out, tables, sizes, scale);
  p.workspace = pointer<float>(workspace);
  p.splits = splits, p.tiles_per_split = tiles_per_split;
  with_head_dim(head_dim,
                [&](auto dim) { attention_history_sm80<dim>(p, static_cast<DType>(dtype), pointer<void>(stream)); });
}

void attention_backward(const HeadsView& grad_out, const HeadsView& q, const HeadsView& k, const HeadsView& v,
                        const HeadsView& out, const HeadsView& dq, const HeadsView& dk, const HeadsView& dv,
                        uintptr_t lse, uintptr_t grad_lse, uintptr_t statistics, const Tables& by_query,
                        const Tables& by_key, const Sizes& sizes, float scale, int dtype, int head_dim,
                        uintptr_t stream) {
  AttentionBackwardParams p;
  static_cast<AttentionSizes&>(p) = sizes_of(sizes);
  p.grad_out = grad_out, p.q = q, p.k = k, p.v = v, p.out = out, p.dq = dq, p.dk = dk, p.dv = dv;
  p.lse = pointer<float>(lse), p.grad_lse = pointer<float>(grad_lse), p.statistics = pointer<float>(statistics);
  p.by_query = tables_of(by_query), p.by_key = tables_of(by_key);
  p.scale = scale;
  p.scale2 = scale < 0 ? -base2_scale(scale) : base2_scale(scale);
  with_head_dim(head_dim,
                [&](auto dim) { attention_backward_sm80<dim>(p, static_cast<DType>(dtype), pointer<void>(stream)); });
}

}  // namespace

void bind_block_causal_attention(py::module_& m) {
  // A dict, not a function: it is asked while torch.compile traces a caller.
  py::dict shared_bytes;
  for_each_head_dim([&](auto dim) { shared_bytes[py::int_(dim())] = attention_shared_bytes_sm80<dim>(); });
  m.attr("attention_shared_bytes") = shared_bytes;
  m.def("attention_forward_kernel", &attention_forward_kernel);
  m.def("attention_history_block", [](int head_dim) { return std::pair(kHistoryBlockM, forward_block_n(head_dim)); });
  m.def("attention_forward", &attention_forward);
  m.def("attention_history", &attention_history);
  m.def("attention_backward_block", [] { return std::pair(kBackwardBlockM, kBackwardBlockN); });
  m.def("attention_backward", &attention_backward);
}

}  // namespace ard
