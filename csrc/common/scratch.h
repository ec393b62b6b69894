// What the CPU backends share around their row kernels.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace ard {

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
