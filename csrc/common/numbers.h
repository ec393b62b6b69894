// The number types of the GPU kernels, two bytes each, and rounding to and from fp32. No CUDA header: these conversions
// are all that is needed of one, and the same source compiles for the host.
#pragma once

#include <cstdint>

#include "gpu.h"
#ifndef __CUDACC__
#include "convert.h"
#endif

namespace ard {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

ARD_DEVICE float widen(float value) { return value; }

#ifdef __CUDACC__

ARD_DEVICE float widen(bfloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

ARD_DEVICE float widen(float16 value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}

// Round to nearest even, two at a time: the first in the low half.
template <class T>
ARD_DEVICE uint32_t narrow2(float low, float high);

template <>
ARD_DEVICE uint32_t narrow2<bfloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
ARD_DEVICE uint32_t narrow2<float16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

#else

inline float widen(bfloat16 value) { return from_bfloat16(value.bits); }
inline float widen(float16 value) { return from_float16(value.bits); }

template <class T>
inline uint32_t narrow2(float low, float high);

template <>
inline uint32_t narrow2<bfloat16>(float low, float high) {
  return to_bfloat16(low) | static_cast<uint32_t>(to_bfloat16(high)) << 16;
}

template <>
inline uint32_t narrow2<float16>(float low, float high) {
  return to_float16(low) | static_cast<uint32_t>(to_float16(high)) << 16;
}

#endif

template <class T>
ARD_DEVICE T narrow(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else {
    return T{static_cast<uint16_t>(narrow2<T>(value, 0.f))};
  }
}

}  // namespace ard
