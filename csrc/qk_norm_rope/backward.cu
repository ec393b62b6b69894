// qk_norm_rope of one section, backward; with dz = dy turned back, n = (x - mean) * rstd, g = dz * weight:
//   dx = rstd * (g - mean(g) - n * mean(g * n)), mean(g) of a LayerNorm alone     dweight = sum dz * n     dbias = sum
//   dz
//
// Memory bounds it: 3 tensors (dy, x, dx) must move. A block's sums for weight and bias stay in registers and are
// written once, as fp32; a second kernel adds the blocks' up in order: no atomics, so results are the same in every
// run. A second pass over a token is over registers. LayerNorm has kernels of its own, as its sums take 16 registers
// more.
#include "gpu_heads.h"

namespace ard {
namespace {

template <class T, int kHeads>
struct Token {
  Eight<T> dy[kHeads], x[kHeads];

  ARD_DEVICE void load(const NormRopeBackward& p, const Cursor& n, const Spot& at) {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const int head = at.head(i, static_cast<int>(p.heads));
      if (head < 0) continue;
      dy[i].load_once(unit_address<T>(p.grad_y, n, head, at.unit));
      if (p.norm != RowNorm::kNone) x[i].load_once(unit_address<T>(p.x, n, head, at.unit));
    }
  }
};

template <int kHeads>
using Sums = float[kHeads][8];

// The block's share of dweight or dbias to the workspace: over all heads a row of its own for each, else the sum over
// the heads of a thread, the rows of a warp and the warps, in that order.
template <int kHeads>
ARD_DEVICE void store_sums(const OnGpu<NormRopeBackward>& p, const Sums<kHeads>& sums, int which, const Spot& at) {
  const int width = static_cast<int>(p.parameter_width()), head_dim = static_cast<int>(p.head_dim);
  float* const to = p.workspace + (static_cast<int64_t>(block_index()) * p.sums() + which) * width;
  if (p.over_all) {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const int head = at.head(i, static_cast<int>(p.heads));
      if (head < 0) continue;
      Eight<float> row;
      row.narrow_from(sums[i]);
      row.store(to + head * head_dim + 8 * at.unit);
    }
    return;
  }
  float* const shared = reinterpret_cast<float*>(shared_memory());
  sync_block();  // what was here has been read
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    float sum = sums[0][e];
#pragma unroll
    for (int i = 1; i < kHeads; ++i) sum += sums[i][e];
    store_shared(shared + e * block_threads() + at.thread, sum);
  }
  sync_block();
  for (int c = at.thread; c < width; c += block_threads()) {
    float total = 0;
    for (int w = 0; w < at.warps; ++w) {
      for (int row = 0; row < at.rows; ++row) {
        const int thread = w * kLanesOfWarp + row * at.units + c / 8;
        total += load_shared(shared + c % 8 * block_threads() + thread);
      }
    }
    to[c] = total;
  }
}

template <class T, int kHeads, bool kLayer>
ARD_KERNEL(most_threads(kHeads), kHeads == 1 ? 2 : 1)
norm_rope_backward(const ARD_GRID_CONSTANT OnGpu<NormRopeBackward> p) {
  const Spot at(p.geometry);
  Cursor n(p, p.blocks);
  const float inverse = 1.f / static_cast<float>(p.over_all ? p.channels() : p.head_dim);
  Shared shared;
  Sums<kHeads> weight_sum = {}, bias_sum = {};
  Token<T, kHeads> next = {};
  // Ahead of a token's turn, but for the kernel that would spill.
  constexpr bool kAhead = !(sizeof(T) == 4 && kHeads == 2 && kLayer);
  if (kAhead && n.left > 0) next.load(p, n, at);
  while (n.left > 0) {
    if (!kAhead) next.load(p, n, at);
    float dz[kHeads][8], normed[kHeads][8], rstd[kHeads] = {}, mean_g[kHeads] = {}, mean_gn[kHeads] = {};
#pragma unroll
    for (int i = 0; i < kHeads; ++i) next.dy[i].widen_to(dz[i]), next.x[i].widen_to(normed[i]);
    const Cursor here = n;
    n.advance();
    if (kAhead && n.left > 0) next.load(p, n, at);
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const int head = at.head(i, static_cast<int>(p.heads));
      if (p.tables.pairs) turn(dz[i], p, p.table_vectors, here, head, at, -1);
      if (p.norm == RowNorm::kNone || head < 0) continue;
      const int64_t place = p.over_all ? here.index() : here.index() * p.heads + head;
      const float mean = kLayer ? p.mean[place] : 0;
      rstd[i] = p.rstd[place];
      float weight[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) weight[e] = 1;
      if (p.weight) load_parameter(p.weight, p, head, at.unit, weight);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        normed[i][e] = (normed[i][e] - mean) * rstd[i];
        if (kLayer) bias_sum[i][e] += dz[i][e];
        weight_sum[i][e] += dz[i][e] * normed[i][e];
        dz[i][e] *= weight[e];
        if (kLayer) mean_g[i] += dz[i][e];
        mean_gn[i] += dz[i][e] * normed[i][e];
      }
    }
    if (p.norm != RowNorm::kNone) {
      if (kLayer) sum_up(mean_g, at, p.over_all, shared.next_sums());
      sum_up(mean_gn, at, p.over_all, shared.next_sums());
    }
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const int head = at.head(i, static_cast<int>(p.heads));
      if (head < 0) continue;
      if (p.norm != RowNorm::kNone) {
        const float g = mean_g[i] * inverse, gn = mean_gn[i] * inverse;
#pragma unroll
        for (int e = 0; e < 8; ++e) dz[i][e] = rstd[i] * (dz[i][e] - g - normed[i][e] * gn);
      }
      Eight<T> dx;
      dx.narrow_from(dz[i]);
      dx.store(unit_address<T>(p.dx, here, head, at.unit));
    }
  }
  if (p.dweight) store_sums<kHeads>(p, weight_sum, 0, at);
  if (kLayer && p.dbias) store_sums<kHeads>(p, bias_sum, p.dweight ? 1 : 0, at);
}

constexpr int kColumns = 32, kSlices = 8;

// dweight or dbias (block_index_y), 32 columns: a slice of the blocks' shares a thread, the slices in order.
ARD_KERNEL(kColumns* kSlices, 4) add_blocks(const ARD_GRID_CONSTANT OnGpu<NormRopeBackward> p) {
  const int which = block_index_y(), width = static_cast<int>(p.parameter_width());
  const int column = block_index() * kColumns + thread_index() % kColumns, slice = thread_index() / kColumns;
  const int first = slice * p.blocks / kSlices, last = (slice + 1) * p.blocks / kSlices;
  float total = 0;
  if (column < width) {
    const float* from = p.workspace + (static_cast<int64_t>(first) * p.sums() + which) * width + column;
#pragma unroll 4
    for (int b = first; b < last; ++b, from += static_cast<int64_t>(p.sums()) * width) total += *from;
  }
  float* const shared = reinterpret_cast<float*>(shared_memory());
  store_shared(shared + thread_index(), total);
  sync_block();
  if (slice > 0 || column >= width) return;
  total = 0;
  for (int i = 0; i < kSlices; ++i) total += load_shared(shared + i * kColumns + thread_index());
  const Parameter& out = which == 0 && p.dweight ? p.dweight : p.dbias;
  if (out.dtype == DType::kFloat32) {
    static_cast<float*>(out.data)[column] = total;
  } else if (out.dtype == DType::kBFloat16) {
    static_cast<bfloat16*>(out.data)[column] = narrow<bfloat16>(total);
  } else {
    static_cast<float16*>(out.data)[column] = narrow<float16>(total);
  }
}

}  // namespace

void norm_rope_backward_gpu(const NormRopeBackward& params, int blocks, void* stream) {
  const OnGpu<NormRopeBackward> p = on_gpu(params, blocks);
  const int threads = kLanesOfWarp * p.geometry.warps;
  const int shared_bytes = Shared::bytes(p.geometry.warps);  // holds a unit of each thread: enough for store_sums
  const auto s = static_cast<Stream>(stream);
  with_heads(p.dtype, p.geometry.heads_each, [&](auto zero, auto heads) {
    using T = decltype(zero);
    constexpr int kHeads = decltype(heads)::value;
    if (p.norm == RowNorm::kLayer) {
      launch<norm_rope_backward<T, kHeads, true>>(blocks, 1, threads, shared_bytes, s, p);
    } else {
      launch<norm_rope_backward<T, kHeads, false>>(blocks, 1, threads, shared_bytes, s, p);
    }
  });
  if (p.sums() == 0) return;
  const int64_t columns = (p.parameter_width() + kColumns - 1) / kColumns;
  launch<add_blocks>(columns, p.sums(), kColumns * kSlices, kColumns * kSlices * sizeof(float), s, p);
}

}  // namespace ard
