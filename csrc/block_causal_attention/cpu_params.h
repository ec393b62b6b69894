// What attention over segments on the CPU is asked for: tensors, and the tiles of
// ard_kernels/block_causal_attention/cpu_tiles.py.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "../common/tensor.h"

namespace ard {

// Rows of a tile; its lanes are these, rounded up to kLaneStep.
constexpr int64_t kTileRows = 64, kLaneStep = 16;

struct AttentionTiles {
  struct Tile {
    int32_t start, stop;  // rows
    int32_t first_piece, stop_piece;
  };
  struct Piece {
    int32_t start, stop;  // keys that the same rows of the tile see
    int32_t unseen;       // these rows are 1 in `unseen`, kTileRows from here on; -1: every row sees them
  };
  std::vector<Tile> tiles;
  std::vector<Piece> pieces;
  std::vector<int32_t> unseen;  // 0 or -1

  bool has_unseen() const { return !unseen.empty(); }
};

struct AttentionCall {
  int64_t batch, heads, kv_heads, rows, keys, head_dim;
  DType dtype;
  float scale;
  int threads;
  HeadsView q, k, v, out;
  float* lse;  // nullptr: not wanted

  int64_t group() const { return heads / kv_heads; }
};

struct AttentionGradients {
  HeadsView grad_out, dq, dk, dv;
  const float* grad_lse;  // nullptr: 0
};

// Makes the keys and values of a head, before they are read.
using PrepareHead = std::function<void(int64_t batch, int64_t kv_head)>;

// Each returns whether what it wrote is finite, or true where no tile has an `unseen`: weights of 0 make NaN of an
// infinity there, and the caller repeats the call with tiles that have none.
bool attention_forward_cpu(const AttentionCall&, const AttentionTiles&, const PrepareHead& = {});
bool attention_backward_cpu(const AttentionCall&, const AttentionGradients&, const AttentionTiles&);

}  // namespace ard
