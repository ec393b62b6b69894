// Attention to a cache on the CPU.
#pragma once

#include "../block_causal_attention/cpu_params.h"

namespace ard {

// p.k and p.v are the cache, whose rows from `start` on get k and v (batch, kv_heads, p.rows, head_dim) before they are
// read. Tiles without `unseen`.
void history_attention_cpu(const AttentionCall& p, const AttentionTiles& tiles, const HeadsView& k, const HeadsView& v,
                           int64_t start);

}  // namespace ard
