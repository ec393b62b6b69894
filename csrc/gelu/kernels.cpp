// One pass forward (8 bytes an element in fp32), one backward (12). With tanh(u) = 2 s(2 u) - 1, s(z) = 1 / (1 + e^-z):
//
//     y = x s(z)     dy/dx = s + x s (1 - s) z'     z = x (a + b x^2)     z' = a + 3 b x^2
//
// Compiled once per ISA (ARD_KERNELS names the table).
#include "kernels.h"

#include "../common/exp.h"
#include "../common/rows.h"

namespace ard {
namespace {

constexpr float kA = 1.5957691216057308f, kB = kA * 0.044715f;  // 2 sqrt(2 / pi)

// s(z); 0 below -87, where e^-z ends.
ARD_INLINE Lanes sigmoid(const Lanes& z) {
  const Lanes s = 1 / (1 + exp_lanes(-at_least(z, Lanes{} - 87.0f)));
  return z < -87.0f ? Lanes{} : s;
}

ARD_INLINE Lanes value(const Lanes& x) { return x * sigmoid(x * (kA + kB * x * x)); }

ARD_INLINE Lanes slope(const Lanes& x) {
  const Lanes s = sigmoid(x * (kA + kB * x * x));
  return s + x * s * (1 - s) * (kA + 3 * kB * x * x);
}

// Where results are made: in place, or in `scratch` when they have to be narrowed or a register would pass the end.
float* made_in(void* out, int64_t n, DType dtype, float* scratch) {
  return dtype == DType::kFloat32 && n % kLanes == 0 ? static_cast<float*>(out) : scratch;
}

// body(i, lanes read at i of the row, so many of them are meant)
template <class Body>
ARD_INLINE void each_register(const float* row, int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, load_lanes(row + i));
  if (i == n) return;
  float rest[kLanes] = {};
  std::memcpy(rest, row + i, (n - i) * sizeof(float));
  body(i, load_lanes(rest));
}

void forward(const void* x, void* y, int64_t n, DType dtype, float* scratch) {
  const float* row = widen_row(x, dtype, n, scratch);
  float* out = made_in(y, n, dtype, scratch + kGeluChunk);
  each_register(row, n, [&](int64_t i, const Lanes& v) { store_lanes(out + i, value(v)); });
  store_row(y, dtype, n, false, out, nullptr);
}

void backward(const void* grad, const void* x, void* dx, int64_t n, DType dtype, float* scratch) {
  const float *row = widen_row(x, dtype, n, scratch), *of_y = widen_row(grad, dtype, n, scratch + kGeluChunk);
  float* out = made_in(dx, n, dtype, scratch + 2 * kGeluChunk);
  each_register(row, n, [&](int64_t i, const Lanes& v) { store_lanes(out + i, slope(v)); });
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] *= of_y[i];
  store_row(dx, dtype, n, false, out, nullptr);
}

}  // namespace

extern const GeluKernels ARD_KERNELS = {ARD_ISA, forward, backward};

}  // namespace ard
