// Plain descriptions of tensors: a pointer, strides in elements, a dtype. No torch here.
#pragma once

#include <cstdint>

namespace ard {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Row buffers are padded apart: at 1024 floats they would otherwise sit 4 KiB apart and alias in the store buffer.
inline int64_t buffer_stride(int64_t floats) { return (floats + 15) / 16 * 16 + 16; }

// (B, rows, C) with a contiguous last dim. rows are tokens (activations) or segments (shift, scale, gate).
struct View {
  void* data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_row = 0;
  DType dtype = DType::kFloat32;

  explicit operator bool() const { return data != nullptr; }

  void* row(int64_t batch, int64_t index) const {
    const int64_t offset = batch * stride_batch + index * stride_row;
    return static_cast<char*>(data) + offset * size_of(dtype);
  }
};

// (B, H, T, D) with a contiguous last dim; strides in elements.
struct HeadsView {
  void* data = nullptr;
  int64_t stride_batch = 0, stride_head = 0, stride_token = 0;
};

}  // namespace ard
