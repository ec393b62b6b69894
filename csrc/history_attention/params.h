// Append one segment's keys and values to the preallocated cache: cache[b, h, start + t, :] = x[b, h, t, :].
#pragma once

#include <cstdint>

#include "../common/tensor.h"

namespace ard {

// In units of 8 elements, on 16-byte boundaries.
struct AppendParams {
  HeadsView k, v;              // the new segment
  HeadsView cache_k, cache_v;  // the cache from token `start` on
  int32_t batch = 0, heads = 0, tokens = 0, head_dim = 0;
  int32_t head_blocks = 0;  // thread blocks per head, set by the launch
};

void append_gpu(AppendParams params, DType dtype, void* stream);

// out[row] = sum over splits of exp2(m_i - max m) * partial_i[row] / sum over splits of exp2(m_i - max m) * total_i
struct SplitsParams {
  HeadsView out;                     // (B, H, L, D), rows on 16-byte boundaries
  const float* workspace = nullptr;  // (splits, B * H * L, D) partials, then (splits, B * H * L, 2) maxima and totals
  int32_t batch = 0, heads = 0, tokens = 0, head_dim = 0, splits = 0;
};

void add_splits_gpu(const SplitsParams& params, DType dtype, void* stream);

}  // namespace ard
