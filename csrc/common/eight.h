// Eight consecutive elements of a row, the unit of these kernels: head dims are multiples of 8, and eight elements are
// one 16-byte access (two for fp32).
#pragma once

#include <cstring>

#include "numbers.h"

namespace ard {

template <class T>
struct Eight {
  static constexpr int kWords = 2 * sizeof(T);
  Words words[kWords / 4];

  ARD_DEVICE void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) words[i] = load_global(reinterpret_cast<const char*>(from) + 16 * i);
  }

  ARD_DEVICE void load_once(const T* from) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) words[i] = load_global_once(reinterpret_cast<const char*>(from) + 16 * i);
  }

  ARD_DEVICE void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) store_global(reinterpret_cast<char*>(to) + 16 * i, words[i]);
  }

  ARD_DEVICE void widen_to(float (&x)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (sizeof(T) == 4) {
        std::memcpy(&x[i], &words[i / 4].word[i % 4], 4);
      } else {
        x[i] = widen(T{static_cast<uint16_t>(words[0].word[i / 2] >> 16 * (i % 2))});
      }
    }
  }

  ARD_DEVICE void narrow_from(const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(T) == 4) {
        std::memcpy(&words[i / 4].word[i % 4], &x[i], 4);
      } else {
        words[0].word[i] = narrow2<T>(x[2 * i], x[2 * i + 1]);
      }
    }
  }
};

}  // namespace ard
