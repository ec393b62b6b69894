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

// How rows of C elements are laid over threads: a row has `threads`, a block works on `rows` at a time.
struct RowGeometry {
  int elements = 0, threads = 0, rows = 0;  // elements per thread
};

// On the GPU a block takes a chunk of tokens that lie in one segment of one sample; grid: samples x chunks. The tables
// are those of ard_kernels/segment_adaln/chunks.py. Outputs are contiguous; a pointer stands for a device's memory.
struct GpuChunks {
  const int32_t* chunks = nullptr;  // (chunk_count, 3): segment, first token, stop token
  const int32_t* spans = nullptr;   // (segments, 2): first and last + 1 chunk of a segment
  int batch = 0, chunk_count = 0, segments = 0;
  bool rows_per_token = false;  // gate, shift, scale are (B, T, C), and so are their gradients
  // Set by the launch:
  RowGeometry geometry;
  int stages = 0;  // tokens of a row that are on their way in shared memory
};

struct GpuForwardParams : ForwardParams {
  GpuChunks work;
};

// workspace is (B, chunk_count, row_sums(), C) here: partial sums of dgate, dshift, dscale, those that there are.
struct GpuBackwardParams : BackwardParams {
  GpuChunks work;
};

RowGeometry forward_geometry(int channels);
RowGeometry backward_geometry(int channels);

// `shared_limit`: bytes of shared memory that a block of this device may have.
void forward_gpu(GpuForwardParams params, int shared_limit, void* stream);
void backward_gpu(GpuBackwardParams params, int shared_limit, void* stream);

}  // namespace ard
