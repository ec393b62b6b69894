// Parameters of qk_norm_rope: what is done to one section, q or k, (B, T, H, D). Per token and head:
//   n = (x - m) * rstd, z = n * weight + bias (no norm: z = x)     y_a = z_a cos - z_b sin, y_b = z_b cos + z_a sin
// The statistics are over D, or over all H * D channels of the token; elements past 2 * pairs: y = z.
#pragma once

#include <cstdint>

#include "../common/tensor.h"

namespace ard {

enum class RowNorm : int { kNone = 0, kRms = 1, kLayer = 2 };

// A weight, bias or its gradient: (D,), or (H * D,) over all heads.
struct Parameter {
  void* data = nullptr;
  DType dtype = DType::kFloat32;

  explicit constexpr operator bool() const { return data != nullptr; }
};

// (batch, row, head) of a cos or sin with `pairs` elements; strides of what broadcasts are 0.
struct RotaryTables {
  HeadsView cos, sin;
  DType dtype = DType::kFloat32;
  int64_t rows = 0, pairs = 0;  // token t reads row t % rows
};

struct NormRope {
  int64_t batch = 0, tokens = 0, heads = 0, head_dim = 0;
  DType dtype = DType::kFloat32;  // of x, y and their gradients
  RowNorm norm = RowNorm::kNone;
  bool over_all = false, half = false;  // statistics over all heads; pairs (i, i + P), else (2i, 2i + 1)
  float eps = 0;
  Parameter weight, bias;
  RotaryTables tables;

  // constexpr, and so for device code too
  constexpr int64_t channels() const { return heads * head_dim; }
  constexpr int64_t parameter_width() const { return over_all ? channels() : head_dim; }
};

struct NormRopeForward : NormRope {
  HeadsView x, y;
  float *mean = nullptr, *rstd = nullptr;  // (B, T, H), or (B, T) over all heads
};

// With dz = dy turned back, g = dz * weight:
//   dx = rstd * (g - mean(g) - n * mean(g * n)), mean(g) of kLayer alone     dweight = sum dz * n     dbias = sum dz
struct NormRopeBackward : NormRope {
  HeadsView grad_y, x, dx;
  const float *mean = nullptr, *rstd = nullptr;
  Parameter dweight, dbias;
  float* workspace = nullptr;  // (chunks of tokens, those of dweight and dbias that there are, parameter width)

  constexpr int sums() const { return (dweight ? 1 : 0) + (dbias ? 1 : 0); }
};

void norm_rope_forward_cpu(const NormRopeForward& params, int threads);
void norm_rope_backward_cpu(const NormRopeBackward& params, int threads);
int64_t norm_rope_chunks_cpu(int64_t tokens);  // of all samples

// On the GPU a block takes a run of the batch * tokens, a token at a time, its heads' rows spread over the block: a
// thread holds 8 elements, a *unit*, of one head, and as many of a second one where there are many heads.
struct BlockGeometry {
  int units = 0;          // of a row, one lane each
  int rows_per_warp = 0;  // heads
  int heads_each = 0;     // of a thread
  int warps = 0;
};

BlockGeometry norm_rope_geometry(int heads, int head_dim);

// blocks: what the workspace has rows for.
void norm_rope_forward_gpu(const NormRopeForward& params, int blocks, void* stream);
void norm_rope_backward_gpu(const NormRopeBackward& params, int blocks, void* stream);

}  // namespace ard
