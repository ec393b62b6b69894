// adaln_modulate, gate_residual_adaln and gate_residual, forward:
//   h = x + gate * branch (rounded to x's dtype)      y = ((h - mean) * rstd * weight + bias) * (1 + scale) + shift
// h = x without a branch, mean = 0 in an RMSNorm. The norm's parameters go into the rows when those are loaded:
//   factor = (1 + scale) * weight      moved = (1 + scale) * bias + shift      y = (h - mean) * rstd * factor + moved
//
// Memory bounds it. The least that must move is one pass over the tokens, 2 tensors (x, y) for adaln_modulate, 4 (x,
// branch, h, y) for gate_residual_adaln, 3 for gate_residual: 4.6, 9.2 and 6.9 KB per token at C = 1152 in 16 bits. A
// block walks over a chunk of one segment's tokens with the segment's rows in registers, and up to 4 tokens of each
// input on their way in shared memory. At that width registers allow 5 blocks of 96 threads on a multiprocessor (119 to
// 128 each): 46 and 92 KB in flight, where by Little's law 4.8 TB/s x 0.7 us / 132 = 25 KB would do on an H200. Rows
// per token are read with the token.
//
// A token's instructions are the next limit, most of them the same for 8 as for 16 elements of a thread: with 8, an
// H200 would issue adaln_modulate of C = 1152 for 1.7 times as long as memory takes, with 16 for 1.25 times
// (predictions of benchmarks/predict.py).
//
// Statistics in fp32 and one barrier per token. Each warp takes the mean m_w of its n_w elements, then, in registers,
// the sums d_w of the differences from it (what rounding left) and s_w of their squares; the warps' results give
//   mean = m_0 + sum_w (n_w (m_w - m_0) + d_w) / C
//   C var = sum_w (s_w + 2 (m_w - mean) d_w + n_w (m_w - mean)^2) = sum of (x - mean)^2
// which is the second pass over the whole row, for any warp means: no large squares are subtracted from each other.
#include "gpu_rows.h"

namespace ard {

// One warp per row up to 512 channels, 4 rows in a block; then as many warps as the row needs, with 16 elements a
// thread beyond 1024 channels.
RowGeometry forward_geometry(int channels) {
  const int elements = (channels > 256 && channels <= 512) || channels > 1024 ? 16 : 8;
  const int warps = (channels + kLanes * elements - 1) / (kLanes * elements);
  return {elements, kLanes * warps, warps == 1 ? 4 : 1};
}

namespace {

// What a warp knows of its part of a row.
struct alignas(16) Moments {
  float count, mean, difference, squares;
};
constexpr int kMostWarps = 16;
constexpr int kMomentsBytes = 2 * kMostWarps * sizeof(Moments);  // of this token and, maybe, still of the one before

// Of the elements of a row that this warp owns; 0 elements only if the row is shorter than the warp's first.
template <class Layout>
ARD_DEVICE int warp_count(const Place& at) {
  int count = 0;
#pragma unroll
  for (int v = 0; v < Layout::kVectors; ++v) {
    const int first = Layout::kVector * (v * at.threads + at.thread / kLanes * kLanes);
    const int left = at.channels - first;
    count += left < 0 ? 0 : min_int(left, Layout::kVector * kLanes);
  }
  return count;
}

// Mean (of an RMSNorm 0) and 1 / sqrt(var + eps) of the row on all of its threads. `shared`: kMostWarps Moments that no
// warp still reads.
template <class Layout>
ARD_DEVICE void statistics(const typename Layout::Values& values, const Place& at, float count, Moments* shared,
                           float eps, bool rms, float& mean, float& rstd) {
  float sum = 0;
#pragma unroll
  for (int v = 0; v < Layout::kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < Layout::kVector; ++i) sum += values[v][i];
  }
  mean = rms ? 0 : warp_sum(sum) / count;
  float difference = 0, squares = 0;
#pragma unroll
  for (int v = 0; v < Layout::kVectors; ++v) {
    if (at.element<Layout>(v) >= at.channels) continue;
#pragma unroll
    for (int i = 0; i < Layout::kVector; ++i) {
      const float d = values[v][i] - mean;
      difference += d, squares += d * d;
    }
  }
  squares = warp_sum(squares);
  const int warps = at.threads / kLanes;
  if (warps > 1) {
    difference = warp_sum(difference);
    if (at.thread % kLanes == 0) {
      store_shared(shared + at.thread / kLanes, Moments{count, mean, difference, squares});
    }
    sync_block();
    const float origin = load_shared(shared).mean;
    float total = 0;
#pragma unroll 1
    for (int w = 0; w < warps; ++w) {
      const Moments part = load_shared(shared + w);
      total += part.count * (part.mean - origin) + part.difference;
    }
    mean = rms ? 0 : origin + total / static_cast<float>(at.channels);
    squares = 0;
#pragma unroll 1
    for (int w = 0; w < warps; ++w) {
      const Moments part = load_shared(shared + w);
      const float d = part.mean - mean;
      squares += part.squares + d * (2 * part.difference + part.count * d);
    }
  }
  rstd = rsqrt(squares / static_cast<float>(at.channels) + eps);
}

// Vector v of factor and moved, which are 1 + scale and shift, with the norm's parameters.
template <class Layout>
ARD_DEVICE void apply_parameters(const View& weight, const View& bias, int v, const Place& at,
                                 float (&factor)[Layout::kVector], float (&moved)[Layout::kVector]) {
  float parameter[Layout::kVector];
  if (bias.data) {
    load_row_vector<Layout>(bias, 0, 0, v, at, 0, parameter);
#pragma unroll
    for (int i = 0; i < Layout::kVector; ++i) moved[i] += factor[i] * parameter[i];
  }
  if (weight.data) {
    load_row_vector<Layout>(weight, 0, 0, v, at, 0, parameter);
#pragma unroll
    for (int i = 0; i < Layout::kVector; ++i) factor[i] *= parameter[i];
  }
}

// Rows per token are read a vector at a time where they are used (kLate) or before, whichever the compiler does without
// spills.
template <class Layout, bool kHasBranch, bool kHasNorm, Rows kRows>
ARD_KERNEL(Layout::kElements == 8 ? 320 : 512, Layout::kElements == 8 ? 2 : 1)
adaln_forward(const ARD_GRID_CONSTANT GpuForwardParams p) {
  constexpr int kVector = Layout::kVector;
  constexpr bool kGeneral = kRows != Rows::kPlain;
  constexpr bool kLate = kRows == Rows::kToken && (kVector == 8 || !kHasBranch);
  const Chunk chunk(p.work);
  const int channels = static_cast<int>(p.channels);
  const Place at(p.work.geometry, channels);
  Moments* const moments = reinterpret_cast<Moments*>(shared_memory());
  Ring<Layout, kHasBranch ? 2 : 1> ring(shared_memory() + kMomentsBytes, p.work.stages, chunk.batch);
  ring.template add<0>(p.x);
  if constexpr (kHasBranch) ring.template add<1>(p.branch);
  ring.start(chunk, at);

  typename Layout::Values gate, moved, factor;
  const float count = static_cast<float>(warp_count<Layout>(at));
  const bool rms = kGeneral && p.mean == nullptr;
  int phase = 0;

  const auto load_rows = [&](int row) {
    if constexpr (kHasBranch) load_row<Layout, kGeneral>(p.gate, chunk.batch, row, at, 0, 1, gate);
    if constexpr (kHasNorm) {
      load_row<Layout, kGeneral>(p.shift, chunk.batch, row, at, 0, 0, moved);
      load_row<Layout, kGeneral>(p.scale, chunk.batch, row, at, 1, 1, factor);
#pragma unroll
      for (int v = 0; kGeneral && v < Layout::kVectors; ++v) {
        apply_parameters<Layout>(p.weight, p.bias, v, at, factor[v], moved[v]);
      }
    }
  };
  if constexpr (kRows == Rows::kSegment) load_rows(chunk.segment);

  for (int token = chunk.start + at.row; token < chunk.stop; token += at.rows) {
    if (kRows == Rows::kPlain && (p.work.rows_per_token || token == chunk.start + at.row)) {
      load_rows(p.work.rows_per_token ? token : chunk.segment);
    }
    if constexpr (kRows == Rows::kToken && !kLate) load_rows(token);
    ring.wait();
    typename Layout::Values values;
#pragma unroll
    for (int v = 0; v < Layout::kVectors; ++v) ring.template read<0>(v, values[v]);
    if constexpr (kHasBranch) {
      char* const h = row_address(p.h, chunk.batch, token);
#pragma unroll
      for (int v = 0; v < Layout::kVectors; ++v) {
        float branch[kVector];
        ring.template read<1>(v, branch);
        if constexpr (kLate) load_row_vector<Layout>(p.gate, chunk.batch, token, v, at, p.gate.data ? 0 : 1, gate[v]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[v][i] += gate[v][i] * branch[i];
        const int e = at.element<Layout>(v);
        if (e < channels) store_vector(h + e * bytes_of(p.h.dtype), p.h.dtype, values[v]);
      }
    }
    ring.fetch(token + ring.stages * at.rows, chunk.stop, at);
    if constexpr (kHasNorm) {
      float mean, rstd;
      statistics<Layout>(values, at, count, moments + phase * kMostWarps, p.eps, rms, mean, rstd);
      phase ^= 1;
      char* const y = row_address(p.y, chunk.batch, token);
#pragma unroll
      for (int v = 0; v < Layout::kVectors; ++v) {
        if constexpr (kLate) {
          load_row_vector<Layout>(p.shift, chunk.batch, token, v, at, 0, moved[v]);
          load_row_vector<Layout>(p.scale, chunk.batch, token, v, at, 1, factor[v]);
          apply_parameters<Layout>(p.weight, p.bias, v, at, factor[v], moved[v]);
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          values[v][i] = (values[v][i] - mean) * rstd * factor[v][i] + moved[v][i];
        }
        const int e = at.element<Layout>(v);
        if (e < channels) store_vector(y + e * bytes_of(p.y.dtype), p.y.dtype, values[v]);
      }
      if (at.thread == 0) {
        const int64_t index = opaque(chunk.batch) * p.tokens + token;
        if (!rms) p.mean[index] = mean;
        p.rstd[index] = rstd;
      }
    }
  }
  cp_async_wait<0>();
}

template <class Layout, Rows kRows>
void launch_forward(const GpuForwardParams& p, int64_t shared_bytes, Stream stream) {
  const int64_t blocks = static_cast<int64_t>(p.work.batch) * p.work.chunk_count;
  const int threads = p.work.geometry.threads * p.work.geometry.rows;
  if (!p.branch) {
    launch<adaln_forward<Layout, false, true, kRows>>(blocks, 1, threads, shared_bytes, stream, p);
  } else if (!p.y) {
    launch<adaln_forward<Layout, true, false, kRows>>(blocks, 1, threads, shared_bytes, stream, p);
  } else {
    launch<adaln_forward<Layout, true, true, kRows>>(blocks, 1, threads, shared_bytes, stream, p);
  }
}

bool is_plain(const GpuForwardParams& p) {
  return (!p.branch || p.gate) && (!p.y || (p.mean && p.shift && p.scale && !p.weight && !p.bias));
}

}  // namespace

void forward_gpu(GpuForwardParams params, int shared_limit, void* stream) {
  const RowGeometry geometry = forward_geometry(static_cast<int>(params.channels));
  const int64_t stage = stage_bytes(geometry, params.x, params.branch);
  params.work.geometry = geometry;
  params.work.stages = ring_stages(stage, shared_limit - kMomentsBytes);
  const int64_t shared_bytes = kMomentsBytes + params.work.stages * stage;
  const auto run = [&](auto layout) {
    with_rows(is_plain(params), params.work.rows_per_token, [&](auto rows) {
      launch_forward<decltype(layout), decltype(rows)::value>(params, shared_bytes, static_cast<Stream>(stream));
    });
  };
  with_layout<8>(params.x.dtype == DType::kFloat32, geometry.elements, run, params.x, params.branch, params.gate,
                 params.shift, params.scale, params.weight, params.bias);
}

}  // namespace ard
