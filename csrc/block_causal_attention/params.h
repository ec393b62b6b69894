// Parameters of the CUDA attention kernels: pointers, strides and sizes, checked by the Python side.
#pragma once

#include <cstdint>

#include "../common/tensor.h"
#include "tile_range.h"

namespace ard {

// The tables of tiles.py for one mask and tile size, on the device, and the grid over (batch, head, tile).
struct TileTables {
  const TileItem* items = nullptr;
  const MaskedTile* masked = nullptr;
  const RowBounds* bounds = nullptr;  // (T,)
  int32_t tiles = 0, group = 0;
};

// lse = ln sum exp(scale * q k^T), out = softmax(scale * q k^T) v
struct AttentionParams {
  HeadsView q, k, v, out;  // (B, H, T, D)
  float* lse = nullptr;    // (B, H, T)
  TileTables tiles;
  int32_t batch = 0, heads = 0, tokens = 0;
  float scale = 0;
};

// delta = rowsum(grad_out * out), ds = p * (grad_out v^T - delta); dq = scale ds k, dk = scale ds^T q, dv = p^T
// grad_out
struct AttentionBackwardParams {
  HeadsView grad_out, q, k, v, out, dq, dk, dv;  // (B, H, T, D)
  const float* lse = nullptr;                    // (B, H, T)
  float* delta = nullptr;                        // (B, H, T), written by the dQ kernel, read by the other
  TileTables by_query, by_key;
  int32_t batch = 0, heads = 0, tokens = 0;
  float scale = 0;
};

}  // namespace ard
