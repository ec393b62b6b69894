// Append one segment's keys and values to the preallocated cache: cache[b, h, start + t, :] = x[b, h, t, :].
#pragma once

#include <cstdint>

namespace ard {

// (B, H, T, D) with a contiguous last dim; strides in elements.
struct HeadsView {
  void* data;
  int64_t stride_batch, stride_head, stride_token;
};

struct AppendParams {
  HeadsView k, v;                           // the new segment
  HeadsView cache_k, cache_v;               // the cache from token `start` on
  int64_t batch, heads, tokens, row_bytes;  // row_bytes = D elements
  int64_t element_bytes;
  int threads;
};

void append_cpu(const AppendParams& params);

}  // namespace ard
