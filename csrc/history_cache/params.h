// Append one segment's keys and values to the preallocated cache: cache[b, h, start + t, :] = x[b, h, t, :].
#pragma once

#include <cstdint>

#include "../common/tensor.h"

namespace ard {

struct AppendParams {
  HeadsView k, v;                           // the new segment
  HeadsView cache_k, cache_v;               // the cache from token `start` on
  int64_t batch, heads, tokens, row_bytes;  // row_bytes = D elements
  int64_t element_bytes;
  int threads;
};

void append_cpu(const AppendParams& params);

}  // namespace ard
