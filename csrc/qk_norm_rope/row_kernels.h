// The per-ISA half of the CPU kernels: what one thread does to a few tokens.
#pragma once

#include <cstdint>

#include "params.h"

namespace ard {

// Tokens of a chunk, always the same, so sums do not depend on the number of threads.
constexpr int64_t kChunkTokens = 32;
// Scratch: buffers of a token's H * D channels, and then of a table's row.
constexpr int64_t kTokenBuffers = 7, kTableBuffers = 2;

struct NormRopeKernels {
  const char* isa;
  // Tokens [begin, end) of the batch * tokens. stream: write y or dx past the caches.
  void (*forward)(const NormRopeForward&, int64_t begin, int64_t end, bool stream, float* scratch);
  void (*backward)(const NormRopeBackward&, int64_t begin, int64_t end, bool stream, float* partial, float* scratch);
  // dweight and dbias: the sums of `chunks` partials, in order.
  void (*reduce)(const NormRopeBackward&, int64_t chunks, float* scratch);
};

extern const NormRopeKernels norm_rope_kernels_baseline;
extern const NormRopeKernels norm_rope_kernels_avx2;
extern const NormRopeKernels norm_rope_kernels_avx512;

}  // namespace ard
