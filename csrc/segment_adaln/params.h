// Parameters of the adaLN family. Views whose data is null are absent; what is present says which op it is:
//   adaln_modulate: shift, scale, y      gate_residual: branch, gate, h      gate_residual_adaln: all of them
#pragma once

#include <cstdint>
#include <vector>

#include "../common/tensor.h"

namespace ard {

// How the T tokens of each of B samples fall into segments; row s of shift, scale, gate serves segment s.
struct Segments {
  int64_t batch = 0, tokens = 0, channels = 0;
  int64_t length = 0;            // equal segments; ignored when offsets are given
  std::vector<int64_t> offsets;  // ragged: S + 1 entries, 0 first, T last
  int threads = 1;

  int64_t count() const {
    return offsets.empty() ? (length == 0 ? 0 : tokens / length) : static_cast<int64_t>(offsets.size()) - 1;
  }
  int64_t start(int64_t segment) const { return offsets.empty() ? segment * length : offsets[segment]; }
};

// h = x + gate * branch;  y = (h - mean) * rstd * (1 + scale) + shift
struct ForwardParams {
  View x, branch;           // (B, T, C)
  View gate, shift, scale;  // (B, S, C)
  View h, y;                // (B, T, C)
  float* mean = nullptr;    // (B, T)
  float* rstd = nullptr;    // (B, T)
  float eps = 0;
  int64_t tokens = 0, channels = 0;
  bool stream_h = false, stream_y = false;  // write past the caches
};

// n = (h - mean) * rstd, g = dy * (1 + scale):
//   dx = rstd * (g - mean_C(g) - n * mean_C(g * n)) + dh     dbranch = gate * dx
//   dshift = sum_t dy     dscale = sum_t dy * n     dgate = sum_t dx * branch
struct BackwardParams {
  View grad_h, grad_y, h, branch;  // (B, T, C)
  View gate, scale;                // (B, S, C)
  View dx, dbranch;                // (B, T, C)
  View dgate, dshift, dscale;      // (B, S, C)
  const float* mean = nullptr;     // (B, T)
  const float* rstd = nullptr;     // (B, T)
  float* workspace = nullptr;      // partial row sums, workspace_floats() of them
  int64_t tokens = 0, channels = 0;
  bool stream_dx = false, stream_dbranch = false;

  int row_sums() const { return (dgate ? 1 : 0) + (dshift ? 2 : 0); }
};

void forward_cpu(ForwardParams params, const Segments& segments);
void backward_cpu(BackwardParams params, const Segments& segments);
int64_t workspace_floats(const Segments& segments, int row_sums);

}  // namespace ard
