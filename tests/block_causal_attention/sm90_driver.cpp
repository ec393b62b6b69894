// The Hopper forward in the emulator and its layouts, for test_sm90.py through ctypes.
#include "block_causal_attention/sm90_entry.h"
#include "block_causal_attention/sm90_layout.h"
#include "common/gpu.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace sm90 = ard::sm90;

// What went wrong, or "".
EXPORT const char* forward(const ard::AttentionParams* params, int dtype, int head_dim, int multiprocessors,
                           uint64_t seed) {
  static std::string error;
  error.clear();
  ard::emulator::seed = seed;
  try {
    ard::attention_forward_sm90(*params, static_cast<ard::DType>(dtype), head_dim, multiprocessors, nullptr);
  } catch (const std::exception& failure) {
    error = failure.what();
  }
  return error.c_str();
}

EXPORT bool serves(const ard::AttentionParams* params, int dtype, int head_dim) {
  return ard::sm90_serves(*params, static_cast<ard::DType>(dtype), head_dim);
}

EXPORT int64_t bank_conflicts() { return ard::emulator::counts.bank_conflicts; }

EXPORT int stages(int head_dim) { return sm90::stages(head_dim); }

EXPORT sm90::TileLayout layout(int head_dim, bool values, int rows) {
  return values ? sm90::value_layout(head_dim, rows) : sm90::score_layout(head_dim, rows);
}

EXPORT int tile_bytes(const sm90::TileLayout* tile) { return tile->bytes(); }
EXPORT int offset(const sm90::TileLayout* tile, int row, int column) { return tile->offset(row, column); }
EXPORT int step_offset(const sm90::TileLayout* tile, int step) { return tile->step_offset(step); }
EXPORT uint64_t score_descriptor(const sm90::TileLayout* tile, int step) { return sm90::score_descriptor(*tile, step); }
EXPORT uint64_t value_descriptor(const sm90::TileLayout* tile, int group) {
  return sm90::value_descriptor(*tile, group);
}
EXPORT int accumulator_row(int thread, int i) { return sm90::accumulator_row(thread, i); }
EXPORT int accumulator_column(int thread, int i) { return sm90::accumulator_column(thread, i); }
EXPORT uint32_t columns_below(int thread, int column) { return sm90::columns_below(thread, column); }
