// Rows between memory, of any dtype, and fp32 in L1; writes past the caches. Internal linkage: see row_kernels.cpp.
#pragma once

#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../common/convert.h"
#include "../common/tensor.h"

namespace ard {
namespace {

// The row as fp32: in place when it is fp32, else converted into `buffer`.
inline const float* load(const View& view, int64_t batch, int64_t index, int64_t n, float* buffer) {
  const void* row = view.row(batch, index);
  if (view.dtype == DType::kFloat32) return static_cast<const float*>(row);
  const uint16_t* half = static_cast<const uint16_t*>(row);
  if (view.dtype == DType::kBFloat16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = from_bfloat16(half[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = from_float16(half[i]);
  }
  return buffer;
}

// The row, or `absent` everywhere.
inline const float* load_or(const View& view, float absent, int64_t batch, int64_t index, int64_t n, float* buffer) {
  if (view) return load(view, batch, index, n, buffer);
  for (int64_t i = 0; i < n; ++i) buffer[i] = absent;
  return buffer;
}

// Where to compute the row: in place unless it needs a conversion or goes past the caches.
inline float* target(const View& view, int64_t batch, int64_t index, bool stream, float* buffer) {
  return view.dtype == DType::kFloat32 && !stream ? static_cast<float*>(view.row(batch, index)) : buffer;
}

inline void copy_streaming(char* out, const char* in, int64_t bytes) {
#if defined(__AVX512F__)
  constexpr int64_t kWidth = 64;
#elif defined(__AVX__)
  constexpr int64_t kWidth = 32;
#elif defined(__SSE2__)
  constexpr int64_t kWidth = 16;
#else
  constexpr int64_t kWidth = 1;
#endif
  int64_t i = 0;
  const int64_t head = (kWidth - reinterpret_cast<uintptr_t>(out) % kWidth) % kWidth;
  if (head < bytes) {
    std::memcpy(out, in, head);
#if defined(__AVX512F__)
    for (i = head; i + kWidth <= bytes; i += kWidth)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), _mm512_loadu_si512(in + i));
#elif defined(__AVX__)
    for (i = head; i + kWidth <= bytes; i += kWidth)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i)));
#elif defined(__SSE2__)
    for (i = head; i + kWidth <= bytes; i += kWidth)
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
#endif
  }
  std::memcpy(out + i, in + i, bytes - i);
}

// Bring a row computed in `target(...)` to its place; `spare` holds the narrowed row on its way past the caches.
inline void store(const View& view, int64_t batch, int64_t index, int64_t n, bool stream, const float* row,
                  float* spare) {
  void* out = view.row(batch, index);
  if (view.dtype == DType::kFloat32) {
    if (stream) {
      copy_streaming(static_cast<char*>(out), reinterpret_cast<const char*>(row), n * 4);
    } else if (out != row) {
      std::memcpy(out, row, n * 4);
    }
    return;
  }
  uint16_t* half = static_cast<uint16_t*>(stream ? static_cast<void*>(spare) : out);
  if (view.dtype == DType::kBFloat16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) half[i] = to_bfloat16(row[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) half[i] = to_float16(row[i]);
  }
  if (stream) copy_streaming(static_cast<char*>(out), static_cast<const char*>(static_cast<void*>(half)), n * 2);
}

// The row as a half-precision tensor holds it, without reading back what may have gone past the caches.
inline const float* rounded(DType dtype, const float* row, int64_t n, float* buffer) {
  if (dtype == DType::kBFloat16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = from_bfloat16(to_bfloat16(row[i]));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = from_float16(to_float16(row[i]));
  }
  return buffer;
}

inline void fence(bool streamed) {
#if defined(__SSE2__)
  if (streamed) _mm_sfence();
#else
  (void)streamed;
#endif
}

}  // namespace
}  // namespace ard
