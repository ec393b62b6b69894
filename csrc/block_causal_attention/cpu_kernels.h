// The per-ISA half of attention on the CPU: what one thread does for some tiles of the queries of one key head.
#pragma once

#include "cpu_params.h"

namespace ard {

// Keys are worked on so many at a time.
constexpr int64_t kKeyBlock = 64;

// Floats of a row in scratch: whole registers of every ISA.
inline int64_t padded_dim(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// Tiles [first, last) of the queries of one key head, whose heads take them one after the other.
struct AttentionUnit {
  int64_t batch, kv_head, first_tile, last_tile;
};

struct AttentionKernels {
  const char* isa;
  int64_t (*scratch_floats)(const AttentionCall&, bool backward);
  // Both return whether all that was written is finite.
  bool (*forward)(const AttentionCall&, const AttentionTiles&, const AttentionUnit&, float* scratch);
  // dq, and in `sums` (2, keys, padded_dim) dk / scale and dv of these queries.
  bool (*backward)(const AttentionCall&, const AttentionGradients&, const AttentionTiles&, const AttentionUnit&,
                   float* sums, float* scratch);
  // dk and dv of a key head: so many sums, which follow each other in memory, added in order.
  bool (*reduce)(const AttentionCall&, const AttentionGradients&, int64_t batch, int64_t kv_head, const float* sums,
                 int64_t count, float* scratch);
};

extern const AttentionKernels attention_kernels_baseline;
extern const AttentionKernels attention_kernels_avx2;
extern const AttentionKernels attention_kernels_avx512;

}  // namespace ard
