// Parameters of the adaLN family. Views whose data is null are absent; what is present says what is computed: h where
// there is a branch, y where there is a norm, which is an RMSNorm where no mean is. Absent: gate 1, shift 0, scale 0,
// weight 1, bias 0.
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

// h = x + gate * branch;  y = ((h - mean) * rstd * weight + bias) * (1 + scale) + shift
struct ForwardParams {
  View x, branch;           // (B, T, C)
  View gate, shift, scale;  // (B, S, C)
  View h, y;                // (B, T, C)
  float* mean = nullptr;    // (B, T); null: RMSNorm
  float* rstd = nullptr;    // (B, T)
  float eps = 0;
  int64_t tokens = 0, channels = 0;
  bool stream_h = false, stream_y = false;  // write past the caches
};

// n = (h - mean) * rstd, g = dy * (1 + scale) * weight:
//   dx = rstd * (g - mean_C(g) - n * mean_C(g * n)) + dh (an RMSNorm: without mean_C(g))     dbranch = gate * dx
//   dgate = sum_t dx * branch
// and from the sums over a segment's tokens, shifts = sum_t dy and scales = sum_t dy * n:
//   dshift = shifts     dscale = weight * scales + bias * shifts
//   dweight = sum_bs (1 + scale) * scales     dbias = sum_bs (1 + scale) * shifts
struct BackwardParams {
  View grad_h, grad_y, h, branch;  // (B, T, C)
  View gate, scale;                // (B, S, C)
  View dx, dbranch;                // (B, T, C)
  View dgate, dshift, dscale;      // (B, S, C)
  const float* mean = nullptr;     // (B, T)
  const float* rstd = nullptr;     // (B, T)
  float* workspace = nullptr;      // partial sums, workspace_floats() of them
  int64_t tokens = 0, channels = 0;
  bool stream_dx = false, stream_dbranch = false;
};

// The norm's parameters stand behind all else, here and for the GPU: where a kernel's arguments lie decides about its
// registers, and with these in the middle kernels that do not read them spilled.
struct CpuForwardParams : ForwardParams {
  View weight, bias;  // (C,): a row with strides of 0
};

struct CpuBackwardParams : BackwardParams {
  View weight, bias, dweight, dbias;     // (C,)
  float* parameter_workspace = nullptr;  // the workspace's part for dweight and dbias

  // Rows of sums for each piece of a segment: shifts and scales, dgate.
  int norm_sums() const { return dshift || dscale ? 2 : 0; }
  int row_sums() const { return norm_sums() + (dgate ? 1 : 0); }
  bool parameter_sums() const { return dweight || dbias; }
};

void forward_cpu(CpuForwardParams params, const Segments& segments);
void backward_cpu(CpuBackwardParams params, const Segments& segments);
int64_t workspace_floats(const Segments& segments, const CpuBackwardParams& params);

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
  View weight, bias;
};

// workspace is (B, chunk_count, sums, C) here: of each chunk dgate, shifts, scales, or with rows per token its shares
// of dbias and dweight. Those of segments, (B, segments, 2, C), follow.
struct GpuBackwardParams : BackwardParams {
  GpuChunks work;
  View weight, bias, dweight, dbias;
  float* parameter_workspace = nullptr;  // shares of dbias and dweight
  int sums = 0;                          // 0: nobody wants any
};

RowGeometry forward_geometry(int channels);
RowGeometry backward_geometry(int channels);

// `shared_limit`: bytes of shared memory that a block of this device may have.
void forward_gpu(GpuForwardParams params, int shared_limit, void* stream);
void backward_gpu(GpuBackwardParams params, int shared_limit, void* stream);

}  // namespace ard
