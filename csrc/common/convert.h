// Half precision <-> fp32, one value at a time in integer arithmetic: the loops over them vectorise on every ISA.
// Round to nearest even, NaN stays NaN, subnormals exact (also when the caller flushes fp32 subnormals).
#pragma once

#include <cstdint>
#include <cstring>

namespace ard {
namespace {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float from_bfloat16(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
}

inline float from_float16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;                                            // inf, NaN
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);  // exact
  const uint32_t bits = magnitude >= 0x7c00u ? special : (magnitude < 0x0400u ? subnormal : normal);
  return float_of(bits | sign);
}

inline uint16_t to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 puts the rounding position of fp32 at 2^-24, the unit of fp16 subnormals.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN, and all that rounds past 65504
  const uint32_t half = magnitude >= 0x477ff000u ? special : (magnitude < 0x38800000u ? subnormal : normal);
  return static_cast<uint16_t>(half | sign);
}

}  // namespace
}  // namespace ard
