// What the CPU backends share around their row kernels.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace ard {

// An output this large is gone from the caches before anyone reads it, so it is written past them, which saves reading
// the lines first. Measured on Zen 5 with 32 MB of L3, 2 cores: see docs/performance.md.
constexpr int64_t kStreamBytes = 8 << 20;
// Below this many elements a second thread costs more than it saves.
constexpr int64_t kParallelElements = 1 << 15;

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};

inline std::unique_ptr<float[], AlignedDelete> make_scratch(int64_t floats) {
  return std::unique_ptr<float[], AlignedDelete>(
      static_cast<float*>(::operator new[](floats * sizeof(float), std::align_val_t(64))));
}

}  // namespace ard
