// The per-ISA half of the CPU kernels: what one thread does to a few tokens of one segment.
#pragma once

#include <cstdint>

#include "params.h"

namespace ard {

// Tokens [begin, end) of one segment of one sample. `partial` is the slot of this unit's row sums in the workspace,
// or -1 when the unit is the whole segment and writes its row gradients itself.
struct Unit {
  int64_t batch, segment, begin, end, partial;
};

// Segments longer than this are cut, always at the same tokens, so sums do not depend on the number of threads.
constexpr int64_t kUnitTokens = 32;
constexpr int kForwardBuffers = 7;
constexpr int kBackwardBuffers = 12;

struct RowKernels {
  const char* isa;
  void (*forward)(const ForwardParams&, const Unit&, float* scratch);
  void (*backward)(const BackwardParams&, const Unit&, float* scratch);
  // Sum of the `count` partials from slot `first` on, in order, into row (batch, segment) of output `which`.
  void (*reduce)(const BackwardParams&, const Unit& first, int64_t count, int which, float* scratch);
};

extern const RowKernels row_kernels_baseline;
extern const RowKernels row_kernels_avx2;
extern const RowKernels row_kernels_avx512;

}  // namespace ard
