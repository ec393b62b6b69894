// Parameters of the CUDA attention kernels: pointers, strides and sizes, checked by the Python side.
#pragma once

#include <cstdint>

#include "../common/tensor.h"
#include "tile_range.h"

namespace ard {

// Tile sizes of the mma.sync kernels, for the tables. Many queries: 128 to a block. Few (history_attention): 64, which
// fill more multiprocessors.
constexpr int kForwardBlockM = 128, kHistoryBlockM = 64;
constexpr int kBackwardBlockM = 128, kBackwardBlockN = 64;
constexpr int forward_block_n(int head_dim) { return head_dim == 96 ? 32 : 64; }  // 96: scores of 64 keys would spill

// The tables of tiles.py for one mask and tile size, on the device, and the grid over (batch, head, tile).
struct TileTables {
  const TileItem* items = nullptr;
  const MaskedTile* masked = nullptr;
  const int32_t *bounds = nullptr, *row_segments = nullptr;  // padded: rows of a whole tile can be looked up
  int32_t tiles = 0, group = 0;
};

// B, H, T_q of the queries, H_kv, T_k of the keys; query head h reads key head h / share, share = H / H_kv.
struct AttentionSizes {
  int32_t batch = 0, heads = 0, kv_heads = 0, tokens = 0, key_tokens = 0;

  constexpr int32_t share() const { return heads / kv_heads; }
};

// lse = ln sum exp(scale * q k^T), out = softmax(scale * q k^T) v; a query that sees nothing: -inf and 0
struct AttentionParams : AttentionSizes {
  HeadsView q, k, v, out;  // q, out: (B, H, T_q, D); k, v: (B, H_kv, T_k, D)
  float* lse = nullptr;    // (B, H, T_q)
  TileTables tiles;
  float scale = 0;    // |scale| * log2(e), never 0
  uint32_t flip = 0;  // 0x80008000 for a negative scale: xor-ed onto pairs of q, else 0
  // Split keys: block y takes the column tiles from y * tiles_per_split on; see store_partial of sm80_forward.h.
  float* workspace = nullptr;
  int32_t splits = 1, tiles_per_split = 0;
};

// delta = rowsum(grad_out * out) - grad_lse, ds = p * (grad_out v^T - delta); dq = scale ds k, dk = scale ds^T q, dv =
// p^T grad_out
struct AttentionBackwardParams : AttentionSizes {
  HeadsView grad_out, q, k, v, out, dq, dk, dv;     // as in AttentionParams
  const float *lse = nullptr, *grad_lse = nullptr;  // (B, H, T_q); grad_lse may be null: zeros
  // (2, B, H, T_q), written by the dQ kernel, read by the other: lse * log2(e), 0 for a query that sees nothing; delta
  float* statistics = nullptr;
  TileTables by_query, by_key;
  float scale = 0, scale2 = 0;  // scale2: times log2(e), never 0
};

// One head dim; each is compiled to an object of its own.
template <int kHeadDim>
void attention_forward_sm80(const AttentionParams& params, DType dtype, void* stream);
template <int kHeadDim>
void attention_history_sm80(const AttentionParams& params, DType dtype, void* stream);
template <int kHeadDim>
void attention_backward_sm80(const AttentionBackwardParams& params, DType dtype, void* stream);
// The most shared memory that a block of these kernels takes.
template <int kHeadDim>
int attention_shared_bytes_sm80();

}  // namespace ard
