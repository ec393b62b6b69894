// GELU in its tanh form on the CPU: dense arrays of n elements.
#pragma once

#include <cstdint>

#include "../common/tensor.h"

namespace ard {

// Elements of a chunk, the unit of a thread: of each array it stays in L1.
constexpr int64_t kGeluChunk = 2048;

struct GeluKernels {
  const char* isa;
  // One chunk or less. scratch: 3 kGeluChunk floats.
  void (*forward)(const void* x, void* y, int64_t n, DType dtype, float* scratch);
  void (*backward)(const void* grad, const void* x, void* dx, int64_t n, DType dtype, float* scratch);
};

extern const GeluKernels gelu_kernels_baseline;
extern const GeluKernels gelu_kernels_avx2;
extern const GeluKernels gelu_kernels_avx512;

void gelu_forward_cpu(const void* x, void* y, int64_t n, DType dtype, int threads);
void gelu_backward_cpu(const void* grad, const void* x, void* dx, int64_t n, DType dtype, int threads);

}  // namespace ard
