// qk_norm_rope of one section, forward: z = norm(x) * weight + bias, and its pairs turned; see params.h.
//
// Memory bounds it: 2 tensors (x, y) must move, 6 KB per token of Wan's 12 heads of 128 in 16 bits. A block asks
// for the next token before it works on this one. Parameters and tables are read for each head, from L1 but the first
// time. Statistics in fp32, two passes over registers; over all heads one barrier for each.
#include "gpu_heads.h"

namespace ard {

BlockGeometry norm_rope_geometry(int heads, int head_dim) {
  const int units = head_dim / 8, rows = kLanesOfWarp / units, groups = (heads + rows - 1) / rows;
  const int each = groups > 8 ? 2 : 1;
  return {units, rows, each, (groups + each - 1) / each};
}

namespace {

template <class T, int kHeads>
ARD_DEVICE void load_token(const NormRopeForward& p, const Cursor& n, const Spot& at, Eight<T> (&x)[kHeads]) {
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = at.head(i, static_cast<int>(p.heads));
    if (head >= 0) x[i].load_once(unit_address<T>(p.x, n, head, at.unit));
  }
}

// z = (z - mean) * rstd, and both are stored; z is 0 where the thread has no head.
template <int kHeads>
ARD_DEVICE void normalise(const NormRopeForward& p, int64_t n, const Spot& at, Shared& shared, float (&z)[kHeads][8]) {
  const float count = static_cast<float>(p.over_all ? p.channels() : p.head_dim);
  float mean[kHeads] = {}, squares[kHeads] = {};
  if (p.norm == RowNorm::kLayer) {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
#pragma unroll
      for (int e = 0; e < 8; ++e) mean[i] += z[i][e];
    }
    sum_up(mean, at, p.over_all, shared.next_sums());
  }
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    mean[i] /= count;
    if (at.head(i, static_cast<int>(p.heads)) < 0) continue;
#pragma unroll
    for (int e = 0; e < 8; ++e) z[i][e] -= mean[i], squares[i] += z[i][e] * z[i][e];
  }
  sum_up(squares, at, p.over_all, shared.next_sums());
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const float rstd = rsqrt(squares[i] / count + p.eps);
    const int head = at.head(i, static_cast<int>(p.heads));
#pragma unroll
    for (int e = 0; e < 8; ++e) z[i][e] *= rstd;
    if (p.over_all ? i > 0 || at.thread > 0 : head < 0 || at.unit > 0) continue;
    const int64_t place = p.over_all ? n : n * p.heads + head;
    p.rstd[place] = rstd;
    if (p.mean) p.mean[place] = mean[i];
  }
}

template <class T, int kHeads>
ARD_KERNEL(most_threads(kHeads), kHeads == 1 ? 3 : 1)
norm_rope_forward(const ARD_GRID_CONSTANT OnGpu<NormRopeForward> p) {
  const Spot at(p.geometry);
  Cursor n(p, p.blocks);
  Shared shared;
  Eight<T> next[kHeads] = {};
  if (n.left > 0) load_token(p, n, at, next);
  while (n.left > 0) {
    float z[kHeads][8];
#pragma unroll
    for (int i = 0; i < kHeads; ++i) next[i].widen_to(z[i]);
    const Cursor here = n;
    n.advance();
    if (n.left > 0) load_token(p, n, at, next);
    if (p.norm != RowNorm::kNone) normalise(p, here.index(), at, shared, z);
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const int head = at.head(i, static_cast<int>(p.heads));
      float parameter[8];
      if (p.weight && head >= 0) {
        load_parameter(p.weight, p, head, at.unit, parameter);
#pragma unroll
        for (int e = 0; e < 8; ++e) z[i][e] *= parameter[e];
      }
      if (p.bias && head >= 0) {
        load_parameter(p.bias, p, head, at.unit, parameter);
#pragma unroll
        for (int e = 0; e < 8; ++e) z[i][e] += parameter[e];
      }
      if (p.tables.pairs) turn(z[i], p, p.table_vectors, here, head, at, 1);
      if (head < 0) continue;
      Eight<T> y;
      y.narrow_from(z[i]);
      y.store(unit_address<T>(p.y, here, head, at.unit));
    }
  }
}

}  // namespace

void norm_rope_forward_gpu(const NormRopeForward& params, int blocks, void* stream) {
  const OnGpu<NormRopeForward> p = on_gpu(params, blocks);
  with_heads(p.dtype, p.geometry.heads_each, [&](auto zero, auto heads) {
    launch<norm_rope_forward<decltype(zero), decltype(heads)::value>>(
        blocks, 1, kLanesOfWarp * p.geometry.warps, Shared::bytes(p.geometry.warps), static_cast<Stream>(stream), p);
  });
}

}  // namespace ard
