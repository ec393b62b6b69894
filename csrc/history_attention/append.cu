// Append a segment to the cache, k and q normalised over the head dim if asked: cache_k = norm(k), cache_v = v,
// normed_q = norm(q). Memory bounds it: 4 * B * H * L * D elements in and out, 6 with a norm of q.
//
// A thread moves one unit, 8 elements, of k, v and q alike: up to three 16-byte loads in flight, one set of indices.
// The units of one head follow each other in the order of the cache, so that its writes are whole; reads from a packed
// projection are rows of 2 * D bytes (for D = 72, 4.5 sectors of 32 bytes: the half that is left is the next head's).
//
// Without a norm every lane is busy. With one, a row's units lie within a warp, which takes floor(32 / (D / 8)) rows:
// 27 of 32 lanes busy at D = 72, 32 at 64 and 128, 24 at 96 (groups of a power of two would keep 18 at 72), no fewer
// than 17 (D = 136). Statistics in fp32, two passes over registers.
#include "../common/eight.h"
#include "params.h"

namespace ard {
namespace {

constexpr int kThreads = 256;

// Where a thread's unit lies: token `token` of its head, elements 8 * unit and on; nowhere when not `here`.
struct Place {
  int token, unit;
  bool here;
};

// Units one after the other, whatever row they are of.
ARD_DEVICE Place place_of_copy(int block, int thread, int units, int tokens) {
  const int i = block * kThreads + thread;
  return {i / units, i % units, i < tokens * units};
}

// Whole rows within a warp.
ARD_DEVICE Place place_in_warp(int block, int thread, int units, int tokens) {
  const int rows = 32 / units, row = thread % 32 / units;
  const int token = (block * (kThreads / 32) + thread / 32) * rows + row;
  return {token, thread % 32 % units, row < rows && token < tokens};
}

template <class T>
ARD_DEVICE T* unit_of(const HeadsView& x, int batch, int head, const Place& at) {
  return static_cast<T*>(x.data) + batch * x.stride_batch + head * x.stride_head + at.token * x.stride_token +
         8 * at.unit;
}

// Sums over the `units` lanes of a row, on each of them: a tree of ceil(log2(units)) steps, then back from the first.
ARD_DEVICE void add_rows(float (&sum)[2], int units, int unit) {
  const int lane = thread_index() % 32;
  for (int width = units; width > 1; width = (width + 1) / 2) {
    const int half = (width + 1) / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float other = shuffle(sum[i], (lane + half) % 32);
      if (unit + half < width) sum[i] += other;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) sum[i] = shuffle(sum[i], lane - unit);
}

// A unit of a parameter (D,) of dtype T or fp32; `absent` when there is none.
template <class T>
ARD_DEVICE void load_parameter(float (&x)[8], const void* parameter, bool is_float, float absent, int unit) {
  if (!parameter) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = absent;
  } else if (is_float) {
    Eight<float> own;
    own.load(static_cast<const float*>(parameter) + 8 * unit);
    own.widen_to(x);
  } else {
    Eight<T> own;
    own.load(static_cast<const T*>(parameter) + 8 * unit);
    own.widen_to(x);
  }
}

// Rows of q and k at once, each by its norm and times its weight; biases are left to add. All lanes of a warp call;
// those that have no row bring zeros.
ARD_DEVICE void normalise(float (&x)[2][8], const float (&weight)[2][8], const HeadNormParams (&norm)[2], int head_dim,
                          int unit) {
  const int units = head_dim / 8;
  if (norm[0].kind == NormKind::kLayer || norm[1].kind == NormKind::kLayer) {
    float sum[2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[0] += x[0][i], sum[1] += x[1][i];
    add_rows(sum, units, unit);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float mean = norm[row].kind == NormKind::kLayer ? sum[row] / head_dim : 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) x[row][i] -= mean;
    }
  }
  float squares[2] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) squares[0] += x[0][i] * x[0][i], squares[1] += x[1][i] * x[1][i];
  add_rows(squares, units, unit);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float factor = rsqrt(squares[row] / head_dim + norm[row].eps);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[row][i] *= factor * weight[row][i];
  }
}

// Grid (head_blocks * batch * heads). 80 registers with a norm: with fewer, fp32 rows spill.
template <class T, bool kNorm>
ARD_KERNEL(kThreads, kNorm ? 3 : 8)
append(const ARD_GRID_CONSTANT AppendGpuParams p) {
  const int block = block_index() % p.head_blocks, batch_head = block_index() / p.head_blocks;
  const int batch = batch_head / p.heads, head = batch_head % p.heads, units = p.head_dim / 8;
  const Place at = kNorm ? place_in_warp(block, thread_index(), units, p.tokens)
                         : place_of_copy(block, thread_index(), units, p.tokens);
  const bool normed_q = kNorm && p.norm[0].kind != NormKind::kNone;
  const bool normed_k = kNorm && p.norm[1].kind != NormKind::kNone;
  Eight<T> q{}, k{}, v{};
  if (at.here) {
    if (normed_q) q.load_once(unit_of<T>(p.q, batch, head, at));
    k.load_once(unit_of<T>(p.k, batch, head, at));
    v.load_once(unit_of<T>(p.v, batch, head, at));
  }
  if constexpr (kNorm) {
    float x[2][8], weight[2][8];  // the weights arrive while the rows do; biases are rare
#pragma unroll
    for (int i = 0; i < 2; ++i) load_parameter<T>(weight[i], p.norm[i].weight, p.norm[i].weight_is_float, 1, at.unit);
    q.widen_to(x[0]);
    k.widen_to(x[1]);
    normalise(x, weight, p.norm, p.head_dim, at.unit);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float bias[8];
      load_parameter<T>(bias, p.norm[row].bias, p.norm[row].bias_is_float, 0, at.unit);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[row][i] += bias[i];
    }
    if (normed_q) q.narrow_from(x[0]);
    if (normed_k) k.narrow_from(x[1]);
  }
  if (at.here) {
    if (normed_q) q.store(unit_of<T>(p.normed_q, batch, head, at));
    k.store(unit_of<T>(p.cache_k, batch, head, at));
    v.store(unit_of<T>(p.cache_v, batch, head, at));
  }
}

template <class T>
void launch_append(AppendGpuParams p, Stream stream) {
  const bool norm = p.norm[0].kind != NormKind::kNone || p.norm[1].kind != NormKind::kNone;
  const int64_t units = p.head_dim / 8;
  const int64_t per_block = norm ? kThreads / 32 * (32 / units) : kThreads;
  p.head_blocks = static_cast<int32_t>(((norm ? p.tokens : p.tokens * units) + per_block - 1) / per_block);
  const int64_t blocks = static_cast<int64_t>(p.head_blocks) * p.batch * p.heads;
  if (norm) {
    launch<append<T, true>>(blocks, 1, kThreads, 0, stream, p);
  } else {
    launch<append<T, false>>(blocks, 1, kThreads, 0, stream, p);
  }
}

}  // namespace

void append_gpu(AppendGpuParams p, DType dtype, void* stream) {
  const auto s = static_cast<Stream>(stream);
  switch (dtype) {
    case DType::kFloat32:
      return launch_append<float>(p, s);
    case DType::kBFloat16:
      return launch_append<bfloat16>(p, s);
    case DType::kFloat16:
      return launch_append<float16>(p, s);
  }
}

}  // namespace ard
