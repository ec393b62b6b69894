// adaln_modulate, gate_residual_adaln and gate_residual, backward; the formulas stand in params.h.
//
// Memory bounds it. The least that must move is 3 tensors (dy, h, dx) for adaln_modulate, 6 (dy, dh, h, branch, dx,
// dbranch) for gate_residual_adaln, 3 for gate_residual: 6.9, 13.8 and 6.9 KB per token at C = 1152 in 16 bits. Blocks
// walk over the chunks as forward, with fp32 sums of the chunk's row gradients in registers; a token is read twice from
// shared memory, for the two means (one barrier) and for dx, which leaves the registers to the sums. Partial sums go to
// a workspace once per chunk, 3 x 4 bytes per channel against the chunk's tokens x 12, and a second kernel adds the
// chunks of a segment in order, a third one the segments' shares of dweight and dbias: no atomics, so results are the
// same in every run.
//
// At C = 1152 registers allow 3 blocks of 160 threads on a multiprocessor (at most 124 each): up to 110 KB in flight.
#include "gpu_sums.h"

namespace ard {

// One warp per row up to 256 channels, 4 rows in a block. Beyond 4096 channels a thread owns 16 and has 128 registers:
// there gate and scale are read again for every token, the sum of dgate is in shared memory, and accesses of 16-bit
// activations are 8 bytes wide (with 16 the compiler spills).
RowGeometry backward_geometry(int channels) {
  const int elements = channels > 4096 ? 16 : 8;
  const int warps = (channels + kLanes * elements - 1) / (kLanes * elements);
  return {elements, kLanes * warps, warps == 1 ? 4 : 1};
}

namespace {

struct alignas(8) Pair {
  float first, second;
};
constexpr int kMostWarps = 16;
constexpr int kPairsBytes = 2 * kMostWarps * sizeof(Pair);  // of this token and, maybe, still of the one before

// Sums over the row on all of its threads. `shared`: kMostWarps Pairs that no warp still reads.
ARD_DEVICE void row_sums(Pair& sums, const Place& at, Pair* shared) {
  sums = {warp_sum(sums.first), warp_sum(sums.second)};
  const int warps = at.threads / kLanes;
  if (warps == 1) return sync_warp();  // a barrier to the compiler too: it shall not keep the token in registers
  if (at.thread % kLanes == 0) store_shared(shared + at.thread / kLanes, sums);
  sync_block();
  sums = {0, 0};
#pragma unroll 1
  for (int w = 0; w < warps; ++w) {
    const Pair part = load_shared(shared + w);
    sums.first += part.first, sums.second += part.second;
  }
}

// A row of gate, or (1 + scale) * weight: kept in registers, or read where a vector of it is needed.
template <class Layout, Rows kRows>
struct Factor {
  static constexpr bool kGeneral = kRows != Rows::kPlain;
  static constexpr bool kKeep = Layout::kElements == 8 && kRows != Rows::kToken;
  float kept[kKeep ? Layout::kVectors : 1][Layout::kVector];

  ARD_DEVICE void load(int v, const View& view, const View& times, int batch, int row, float plus, const Place& at) {
    float (&values)[Layout::kVector] = kept[kKeep ? v : 0];
    const int e = at.element<Layout>(v);
#pragma unroll
    for (int i = 0; i < Layout::kVector; ++i) values[i] = kGeneral ? plus : 0;
    if (e >= at.channels) return;
    if (!kGeneral || view.data) {
      load_vector<Layout::kAligned>(row_address(view, batch, row) + e * bytes_of(view.dtype), view.dtype, values);
#pragma unroll
      for (int i = 0; i < Layout::kVector; ++i) values[i] += plus;
    }
    if (kGeneral && times.data) {
      float factor[Layout::kVector];
      load_row_vector<Layout>(times, 0, 0, v, at, 0, factor);
#pragma unroll
      for (int i = 0; i < Layout::kVector; ++i) values[i] *= factor[i];
    }
  }

  ARD_DEVICE void load_kept(const View& view, const View& times, int batch, int row, float plus, const Place& at) {
    if constexpr (kKeep) {
#pragma unroll
      for (int v = 0; v < Layout::kVectors; ++v) load(v, view, times, batch, row, plus, at);
    }
  }

  ARD_DEVICE const float (&vector(int v, const View& view, const View& times, int batch, int row, float plus,
                                  const Place& at)) [Layout::kVector] {
    if constexpr (!kKeep) load(v, view, times, batch, row, plus, at);
    return kept[kKeep ? v : 0];
  }
};

// Write vector v of a token's row gradient; nowhere where kGeneral and nobody wants it.
template <class Layout, bool kGeneral>
ARD_DEVICE void store_own(int v, float (&term)[Layout::kVector], const View& out, int batch, int token,
                          const Place& at) {
  const int e = at.element<Layout>(v);
  if (e < at.channels && (!kGeneral || out.data)) {
    store_vector(row_address(out, batch, token) + e * bytes_of(out.dtype), out.dtype, term);
  }
}

// Add to the chunk's sum, or, with rows per token, write as the token's own.
template <class Layout, bool kGeneral, bool kShared>
ARD_DEVICE void add_or_store(Sum<Layout, kShared>& sum, int v, float (&term)[Layout::kVector], bool store,
                             const View& out, int batch, int token, const Place& at) {
  if (!store) {
    sum.add(v, term);
  } else {
    store_own<Layout, kGeneral>(v, term, out, batch, token, at);
  }
}

// With rows per token: vector v of its dshift and dscale, and of its share of dbias and dweight.
template <class Layout, bool kShared>
ARD_DEVICE void token_gradients(int v, float (&dy)[Layout::kVector], const float (&dy_n)[Layout::kVector],
                                const GpuBackwardParams& p, int batch, int token, const Place& at,
                                Sum<Layout, false>& shift_sum, Sum<Layout, kShared>& scale_sum) {
  constexpr int kVector = Layout::kVector;
  float parameter[kVector], term[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) term[i] = dy_n[i];
  if (p.weight.data) {
    load_row_vector<Layout>(p.weight, 0, 0, v, at, 0, parameter);
#pragma unroll
    for (int i = 0; i < kVector; ++i) term[i] *= parameter[i];
  }
  if (p.bias.data) {
    load_row_vector<Layout>(p.bias, 0, 0, v, at, 0, parameter);
#pragma unroll
    for (int i = 0; i < kVector; ++i) term[i] += parameter[i] * dy[i];
  }
  store_own<Layout, true>(v, term, p.dscale, batch, token, at);
  if (p.dweight.data || p.dbias.data) {
    load_row_vector<Layout>(p.scale, batch, token, v, at, 1, parameter);  // 1 + scale
#pragma unroll
    for (int i = 0; i < kVector; ++i) term[i] = parameter[i] * dy_n[i];
    scale_sum.add(v, term);
#pragma unroll
    for (int i = 0; i < kVector; ++i) term[i] = parameter[i] * dy[i];
    shift_sum.add(v, term);
  }
  store_own<Layout, true>(v, dy, p.dshift, batch, token, at);
}

enum Tensor { kGradY, kH, kBranch, kGradH, kTensors };

// One function of more than 60 lines: its two passes share all that the thread holds in registers.
template <class Layout, bool kHasGate, bool kHasNorm, Rows kRows>
ARD_KERNEL(512, 1)
adaln_backward(const ARD_GRID_CONSTANT GpuBackwardParams p) {
  constexpr int kVector = Layout::kVector;
  constexpr bool kGeneral = kRows != Rows::kPlain;
  const Chunk chunk(p.work);
  const int channels = static_cast<int>(p.channels);
  const Place at(p.work.geometry, channels);
  const bool per_token = kRows == Rows::kPlain ? p.work.rows_per_token : kRows == Rows::kToken;
  const bool rms = kGeneral && p.mean == nullptr;
  Pair* const pairs = reinterpret_cast<Pair*>(shared_memory());
  Ring<Layout, kTensors> ring(shared_memory() + kPairsBytes, p.work.stages, chunk.batch);
  ring.template add<kGradY>(kHasNorm ? p.grad_y : View{});
  ring.template add<kH>(kHasNorm ? p.h : View{});
  ring.template add<kBranch>(kHasGate ? p.branch : View{});
  ring.template add<kGradH>(p.grad_h);
  ring.start(chunk, at);

  // Shared memory for one sum of 16 elements per thread: of the gate, or, where that has none, of the scale.
  constexpr bool kShared = Layout::kElements == 16, kToken = kRows == Rows::kToken;
  char* const sum_memory = ring.memory + ring.stages * ring.stage_bytes;
  Sum<Layout, kShared && !kToken> gate_sum(sum_memory);
  Sum<Layout, false> shift_sum(nullptr);
  Sum<Layout, kShared && kToken> scale_sum(sum_memory);
  Factor<Layout, kRows> gate, scale;
  float mean = 0, rstd = 0, next_mean = 0, next_rstd = 0;
  const auto load_statistics = [&](int token) {  // a token ahead
    if (!kHasNorm || token >= chunk.stop) return;
    const int64_t index = opaque(chunk.batch) * p.tokens + token;
    next_mean = rms ? 0 : p.mean[index], next_rstd = p.rstd[index];
  };
  load_statistics(chunk.start + at.row);
  int phase = 0;

  for (int token = chunk.start + at.row; token < chunk.stop; token += at.rows) {
    const int row = per_token ? token : chunk.segment;
    if (per_token || token == chunk.start + at.row) {
      if constexpr (kHasNorm) scale.load_kept(p.scale, p.weight, chunk.batch, row, 1, at);
      if constexpr (kHasGate) gate.load_kept(p.gate, View{}, chunk.batch, row, 0, at);
    }
    mean = next_mean, rstd = next_rstd;
    load_statistics(token + at.rows);
    ring.wait();
    const auto normalised = [&](int v, float (&n)[kVector]) {
      ring.template read<kH>(v, n);
#pragma unroll
      for (int i = 0; i < kVector; ++i) n[i] = (n[i] - mean) * rstd;
    };

    Pair means{0, 0};  // of g and of g * n
    if constexpr (kHasNorm) {
#pragma unroll
      for (int v = 0; v < Layout::kVectors; ++v) {
        float dy[kVector], n[kVector];  // dy is 0 past the end of the row
        ring.template read<kGradY>(v, dy);
        normalised(v, n);
        const auto& factor = scale.vector(v, p.scale, p.weight, chunk.batch, row, 1, at);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float g = dy[i] * factor[i];
          means.first += g, means.second += g * n[i];
          n[i] *= dy[i];
        }
        if constexpr (kRows == Rows::kToken) {
          token_gradients<Layout>(v, dy, n, p, chunk.batch, token, at, shift_sum, scale_sum);
        } else {
          add_or_store<Layout, false>(shift_sum, v, dy, per_token, p.dshift, chunk.batch, token, at);
          add_or_store<Layout, false>(scale_sum, v, n, per_token, p.dscale, chunk.batch, token, at);
        }
      }
      row_sums(means, at, pairs + phase * kMostWarps);
      phase ^= 1;
      const float inverse = 1.f / static_cast<float>(opaque(channels));
      means = {rms ? 0 : means.first * inverse, means.second * inverse};
    }

#pragma unroll
    for (int v = 0; v < Layout::kVectors; ++v) {
      const int e = at.element<Layout>(v);
      float dx[kVector];
      if (p.grad_h.data) {
        ring.template read<kGradH>(v, dx);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) dx[i] = 0;
      }
      if constexpr (kHasNorm) {
        float dy[kVector], n[kVector];
        ring.template read<kGradY>(v, dy);
        normalised(v, n);
        const auto& factor = scale.vector(v, p.scale, p.weight, chunk.batch, row, 1, at);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          dx[i] += rstd * (dy[i] * factor[i] - means.first - n[i] * means.second);
        }
        float rounded[kVector];  // what goes to memory; dbranch and dgate take dx itself
#pragma unroll
        for (int i = 0; i < kVector; ++i) rounded[i] = dx[i];
        if (e < channels) {
          store_vector(row_address(p.dx, chunk.batch, token) + e * bytes_of(p.dx.dtype), p.dx.dtype, rounded);
        }
      }
      if constexpr (kHasGate) {
        const auto& factor = gate.vector(v, p.gate, View{}, chunk.batch, row, 0, at);
        float branch[kVector], dbranch[kVector];
        ring.template read<kBranch>(v, branch);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          dbranch[i] = dx[i] * factor[i];
          branch[i] *= dx[i];
        }
        if (e < channels) {
          store_vector(row_address(p.dbranch, chunk.batch, token) + e * bytes_of(p.dbranch.dtype), p.dbranch.dtype,
                       dbranch);
        }
        add_or_store<Layout, kGeneral>(gate_sum, v, branch, per_token, p.dgate, chunk.batch, token, at);
      }
    }
    ring.fetch(token + ring.stages * at.rows, chunk.stop, at);
  }
  cp_async_wait<0>();

  if (kGeneral ? p.sums == 0 : per_token) return;
  constexpr int kGates = kHasGate && !kToken, kSums = kGates + 2 * kHasNorm;
  if constexpr (kGates) store_partial(gate_sum, p, 0, kSums, at);
  if constexpr (kHasNorm) {
    store_partial(shift_sum, p, kGates, kSums, at);
    store_partial(scale_sum, p, kGates + 1, kSums, at);
  }
}

template <class Layout, Rows kRows>
void launch_backward(const GpuBackwardParams& p, int64_t shared_bytes, Stream stream) {
  const int64_t blocks = static_cast<int64_t>(p.work.batch) * p.work.chunk_count;
  const int threads = p.work.geometry.threads * p.work.geometry.rows;
  if (!p.gate) {
    launch<adaln_backward<Layout, false, true, kRows>>(blocks, 1, threads, shared_bytes, stream, p);
  } else if (!p.grad_y) {
    launch<adaln_backward<Layout, true, false, kRows>>(blocks, 1, threads, shared_bytes, stream, p);
  } else {
    launch<adaln_backward<Layout, true, true, kRows>>(blocks, 1, threads, shared_bytes, stream, p);
  }
}

bool is_plain(const GpuBackwardParams& p) {
  return (!p.gate || p.dgate) && (!p.grad_y || (p.mean && p.scale && p.dshift && p.dscale && !p.weight && !p.bias));
}

}  // namespace

void backward_gpu(GpuBackwardParams params, int shared_limit, void* stream) {
  const RowGeometry geometry = backward_geometry(static_cast<int>(params.channels));
  const int threads = geometry.threads * geometry.rows;
  const int64_t stage = stage_bytes(geometry, params.grad_y, params.h, params.branch, params.grad_h);
  params.work.geometry = geometry;
  const int64_t row_bytes = threads * geometry.elements * 4;
  const int64_t fixed = kPairsBytes + (geometry.elements == 16 ? row_bytes : 0);  // of dgate's sum
  params.work.stages = ring_stages(stage, shared_limit - fixed);
  int64_t shared_bytes = fixed + params.work.stages * stage;
  if (geometry.rows > 1 && shared_bytes < row_bytes) shared_bytes = row_bytes;  // add_rows_of_block
  GpuChunks& work = params.work;
  const bool of_parameters = params.dweight || params.dbias;
  const int64_t chunks = static_cast<int64_t>(work.batch) * work.chunk_count;
  const int64_t segments = static_cast<int64_t>(work.batch) * work.segments;
  if (of_parameters) {
    params.parameter_workspace = params.workspace + (work.rows_per_token ? 0 : chunks * params.sums * params.channels);
  }
  const auto run = [&](auto layout) {
    with_rows(is_plain(params), work.rows_per_token, [&](auto rows) {
      launch_backward<decltype(layout), decltype(rows)::value>(params, shared_bytes, static_cast<Stream>(stream));
    });
  };
  const View& like = params.h ? params.h : params.grad_h;
  with_layout<4>(like.dtype == DType::kFloat32, geometry.elements, run, params.grad_h, params.grad_y, params.h,
                 params.branch, params.gate, params.scale, params.weight, params.bias);
  const int64_t columns = (params.channels + 4 * kAddThreads - 1) / (4 * kAddThreads);
  if (params.sums > 0 && !work.rows_per_token) {
    launch<add_chunks>(segments, columns * params.sums, kAddThreads, 0, static_cast<Stream>(stream), params);
  }
  if (of_parameters) {
    launch<add_parameters>(columns, 2, kAddThreads, 0, static_cast<Stream>(stream), params);
  }
}

}  // namespace ard
