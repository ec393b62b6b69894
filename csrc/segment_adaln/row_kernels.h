// The per-ISA half of the CPU kernels: what one thread does to a few tokens of one segment.
#pragma once

#include <cstdint>

#include "params.h"

namespace ard {

// Tokens [begin, end) of one sample: a piece of one segment, or whole segments from `segment` on, which write their row
// gradients themselves. `piece` is where a piece's row sums are in the workspace, -1 for whole segments; `number` where
// the unit's share of dweight and dbias is.
struct Unit {
  int64_t batch, segment, begin, end, piece, number;
};

// Units are cut always at the same tokens, so sums do not depend on the number of threads.
constexpr int64_t kUnitTokens = 32;
constexpr int kForwardBuffers = 9;
constexpr int kBackwardBuffers = 17;

struct RowKernels {
  const char* isa;
  void (*forward)(const CpuForwardParams&, const Segments&, const Unit&, float* scratch);
  void (*backward)(const CpuBackwardParams&, const Segments&, const Unit&, float* scratch);
  // One gradient of the segment that is cut into the `count` pieces from `first` on: their sums, in order. `which`: 0
  // and 1 are dshift and dscale, if any of them is wanted, the next is dgate.
  void (*reduce_rows)(const CpuBackwardParams&, const Unit& first, int64_t count, int which, float* scratch);
  // Columns [begin, end) of dweight (which = 0) or dbias: the sums of `units` units, in order.
  void (*reduce_parameter)(const CpuBackwardParams&, int64_t units, int which, int64_t begin, int64_t end,
                           float* scratch);
};

extern const RowKernels row_kernels_baseline;
extern const RowKernels row_kernels_avx2;
extern const RowKernels row_kernels_avx512;

}  // namespace ard
