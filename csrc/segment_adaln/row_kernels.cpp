// Rows of the adaLN family on the CPU. Compiled once per ISA (ARD_KERNELS names the table, the compiler's -m flags
// pick the instructions), so everything but the table has internal linkage and no standard template is used.
//
// Bytes that must move per element, fp32: adaln_modulate 8 (x, y), its backward 12 (dy, x, dx), gate_residual_adaln 16,
// its backward 24. A row (C = 1152: 4.6 KB) is read from memory once and worked on in L1, so memory bounds all of them.
#include "row_kernels.h"

#include <cmath>
#include <cstring>

#include "../common/rows.h"
#include "../common/vec.h"

namespace ard {
namespace {

inline const float* load(const View& view, int64_t batch, int64_t index, int64_t n, float* buffer) {
  return widen_row(view.row(batch, index), view.dtype, n, buffer);
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

// Bring a row computed in `target(...)` to its place; `spare`: see store_row.
inline void store(const View& view, int64_t batch, int64_t index, int64_t n, bool stream, const float* row,
                  float* spare) {
  store_row(view.row(batch, index), view.dtype, n, stream, row, spare);
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

// The row that the next token will load. A row is worked on in several passes, and only the first would touch memory;
// asking for the next row from within them keeps memory busy (backward, 4x1024x1152 fp32: 1.4x faster).
struct NextRow {
  const char* row;
  int64_t element;
  ARD_INLINE void prefetch(int64_t i) const { __builtin_prefetch(row + i * element); }
};

inline NextRow next_row(const View& view, const Unit& u, int64_t t) {
  const int64_t next = t + 1 < u.end ? t + 1 : t;
  return {static_cast<const char*>(view.row(u.batch, next)), size_of(view.dtype)};
}

// Four independent sums hide the latency of an addition; `term(i)` gives 16 values at i, `tail(i)` a single one.
constexpr int kChains = 4;

template <typename Term, typename Tail>
ARD_INLINE float sum_over(int64_t n, Term term, Tail tail) {
  Vec chains[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kVec <= n; i += kChains * kVec)
    for (int c = 0; c < kChains; ++c) chains[c] += term(i + c * kVec);
  for (; i + kVec <= n; i += kVec) chains[0] += term(i);
  float sum = sum_lanes((chains[0] + chains[1]) + (chains[2] + chains[3]));
  for (; i < n; ++i) sum += tail(i);
  return sum;
}

// Biased variance in two passes over the row in L1: E[x^2] - E[x]^2 cancels. An RMSNorm's mean is 0.
inline void statistics(const float* __restrict x, int64_t n, float eps, bool rms, float& mean, float& rstd) {
  const auto value = [=](int64_t i) { return load_vec(x + i); };
  const float centre = rms ? 0.0f : sum_over(n, value, [=](int64_t i) { return x[i]; }) / n;
  const auto square = [](auto value) { return value * value; };
  const float squares = sum_over(
      n, [=](int64_t i) { return square(load_vec(x + i) - centre); }, [=](int64_t i) { return square(x[i] - centre); });
  mean = centre;
  rstd = 1.0f / std::sqrt(squares / n + eps);
}

// y = n * factor + shift: factor = (1 + scale) * weight, shift = shift + (1 + scale) * bias.
struct Modulation {
  const float *factor, *shift;
};

inline Modulation modulation(const CpuForwardParams& p, int64_t batch, int64_t segment, float* factor, float* moved,
                             float* spare) {
  const int64_t n = p.channels;
  const float* scale = load_or(p.scale, 0.0f, batch, segment, n, factor);
  for (int64_t i = 0; i < n; ++i) factor[i] = 1.0f + scale[i];
  const float* shift = load_or(p.shift, 0.0f, batch, segment, n, moved);
  if (p.bias) {
    const float* bias = load(p.bias, 0, 0, n, spare);
    for (int64_t i = 0; i < n; ++i) moved[i] = shift[i] + factor[i] * bias[i];
    shift = moved;
  }
  if (p.weight) {
    const float* weight = load(p.weight, 0, 0, n, spare);
    for (int64_t i = 0; i < n; ++i) factor[i] *= weight[i];
  }
  return {factor, shift};
}

void forward(const CpuForwardParams& p, const Segments& segments, const Unit& u, float* scratch) {
  const int64_t n = p.channels;
  float* buffers[kForwardBuffers];
  for (int i = 0; i < kForwardBuffers; ++i) buffers[i] = scratch + i * buffer_stride(n);
  float* const spare = buffers[6];
  int64_t segment = u.segment, stop = u.begin;
  const float* __restrict gate = nullptr;
  Modulation rows{};
  for (int64_t t = u.begin; t < u.end; ++t) {
    if (t == stop) {  // a segment begins
      stop = segments.start(segment + 1);
      if (p.branch) gate = load_or(p.gate, 1.0f, u.batch, segment, n, buffers[0]);
      if (p.y) rows = modulation(p, u.batch, segment, buffers[1], buffers[2], spare);
      ++segment;
    }
    const float* x = load(p.x, u.batch, t, n, buffers[3]);
    if (p.branch) {
      const float* branch = load(p.branch, u.batch, t, n, buffers[4]);
      float* h = target(p.h, u.batch, t, p.stream_h, buffers[5]);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) h[i] = x[i] + gate[i] * branch[i];
      store(p.h, u.batch, t, n, p.stream_h, h, spare);
      // The norm reads h as stored, so that the backward, which has only that, sees the same normalised row.
      x = p.h.dtype == DType::kFloat32 ? h : rounded(p.h.dtype, h, n, buffers[3]);
    }
    if (p.y) {
      float mean, rstd;
      statistics(x, n, p.eps, p.mean == nullptr, mean, rstd);
      if (p.mean) p.mean[u.batch * p.tokens + t] = mean;
      p.rstd[u.batch * p.tokens + t] = rstd;
      float* y = target(p.y, u.batch, t, p.stream_y, buffers[4]);
      const float* __restrict factor = rows.factor, * __restrict shift = rows.shift;
      const NextRow next_x = next_row(p.x, u, t), next_branch = p.branch ? next_row(p.branch, u, t) : next_x;
      int64_t i = 0;
      for (; i + kVec <= n; i += kVec) {
        next_x.prefetch(i);
        next_branch.prefetch(i);
        store_vec(y + i, (load_vec(x + i) - mean) * rstd * load_vec(factor + i) + load_vec(shift + i));
      }
      for (; i < n; ++i) y[i] = (x[i] - mean) * rstd * factor[i] + shift[i];
      store(p.y, u.batch, t, n, p.stream_y, y, spare);
    }
  }
  fence(p.stream_h || p.stream_y);
}

// dx = rstd * (g - mean(g) - n * mean(g * n)) + dh; adds this token to shifts and scales. RMSNorm: `rms`,
// mean = 0.
inline void normalise_backward(const float* __restrict dy, const float* __restrict h, const float* __restrict factor,
                               const float* dh, float mean, float rstd, bool rms, int64_t n, float* __restrict dx,
                               float* __restrict shifts, float* __restrict scales, const NextRow& next_dy,
                               const NextRow& next_h) {
  Vec chain_g[2] = {}, chain_gn[2] = {};
  int64_t i = 0;
  for (; i + 2 * kVec <= n; i += 2 * kVec) {
    for (int c = 0; c < 2; ++c) {
      const int64_t at = i + c * kVec;
      next_dy.prefetch(at);
      const Vec grad = load_vec(dy + at), normalised = (load_vec(h + at) - mean) * rstd;
      const Vec g = grad * load_vec(factor + at);
      chain_g[c] += g;
      chain_gn[c] += g * normalised;
      store_vec(shifts + at, load_vec(shifts + at) + grad);
      store_vec(scales + at, load_vec(scales + at) + grad * normalised);
    }
  }
  float sum_g = sum_lanes(chain_g[0] + chain_g[1]), sum_gn = sum_lanes(chain_gn[0] + chain_gn[1]);
  for (; i < n; ++i) {
    const float normalised = (h[i] - mean) * rstd, g = dy[i] * factor[i];
    sum_g += g;
    sum_gn += g * normalised;
    shifts[i] += dy[i];
    scales[i] += dy[i] * normalised;
  }
  const float mean_g = rms ? 0.0f : sum_g / n, mean_gn = sum_gn / n;
  for (i = 0; i + kVec <= n; i += kVec) {
    next_h.prefetch(i);
    const Vec normalised = (load_vec(h + i) - mean) * rstd, g = load_vec(dy + i) * load_vec(factor + i);
    store_vec(dx + i, rstd * (g - mean_g - normalised * mean_gn));
  }
  for (; i < n; ++i) {
    const float normalised = (h[i] - mean) * rstd, g = dy[i] * factor[i];
    dx[i] = rstd * (g - mean_g - normalised * mean_gn);
  }
  if (dh == nullptr) return;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) dx[j] += dh[j];
}

// What a unit works on: the rows of the segment at hand, its sums, buffers for a token.
struct Backward {
  float* buffers[kBackwardBuffers];
  const float *gate = nullptr, *factor = nullptr, *weight = nullptr, *bias = nullptr;
  float *plus, *shifts, *scales, *dgate, *dweight, *dbias, *spare;  // plus: 1 + scale

  Backward(const CpuBackwardParams& p, float* scratch) {
    for (int i = 0; i < kBackwardBuffers; ++i) buffers[i] = scratch + i * buffer_stride(p.channels);
    plus = buffers[1], shifts = buffers[3], scales = buffers[4], dgate = buffers[5];
    dweight = buffers[12], dbias = buffers[13], spare = buffers[14];
    if (p.weight) weight = load(p.weight, 0, 0, p.channels, buffers[15]);
    if (p.bias) bias = load(p.bias, 0, 0, p.channels, buffers[16]);
    std::memset(dweight, 0, 2 * buffer_stride(p.channels) * sizeof(float));
  }

  void begin(const CpuBackwardParams& p, int64_t batch, int64_t segment) {
    const int64_t n = p.channels;
    if (p.branch) gate = load(p.gate, batch, segment, n, buffers[0]);
    if (p.grad_y) {
      const float* scale = load_or(p.scale, 0.0f, batch, segment, n, plus);
      for (int64_t i = 0; i < n; ++i) plus[i] = 1.0f + scale[i];
      factor = plus;
    }
    if (weight) {
      for (int64_t i = 0; i < n; ++i) buffers[2][i] = plus[i] * weight[i];
      factor = buffers[2];
    }
    std::memset(shifts, 0, 3 * buffer_stride(n) * sizeof(float));
  }
};

// dscale = weight * scales + bias * shifts, in place of scales or in `buffer`.
inline const float* scale_gradient(const float* scales, const float* shifts, const float* weight, const float* bias,
                                   int64_t n, float* buffer) {
  if (!weight && !bias) return scales;
  for (int64_t i = 0; i < n; ++i) {
    buffer[i] = (weight ? weight[i] * scales[i] : scales[i]) + (bias ? bias[i] * shifts[i] : 0.0f);
  }
  return buffer;
}

// Bring the sums over a segment, or over a piece of it, where they belong.
inline void finish(const CpuBackwardParams& p, const Unit& u, int64_t segment, const Backward& b) {
  const int64_t n = p.channels;
  if (p.parameter_sums()) {
    for (int64_t i = 0; i < n; ++i) {
      b.dweight[i] += b.plus[i] * b.scales[i];
      b.dbias[i] += b.plus[i] * b.shifts[i];
    }
  }
  if (u.piece < 0) {
    if (p.dshift) store(p.dshift, u.batch, segment, n, false, b.shifts, b.spare);
    if (p.dscale) {
      const float* dscale = scale_gradient(b.scales, b.shifts, b.weight, b.bias, n, b.spare);
      store(p.dscale, u.batch, segment, n, false, dscale, b.spare);
    }
    if (p.dgate) store(p.dgate, u.batch, segment, n, false, b.dgate, b.spare);
    return;
  }
  float* partial = p.workspace + u.piece * p.row_sums() * n;
  const float* const sums[3] = {b.shifts, b.scales, b.dgate};
  for (int which = 0; which < p.row_sums(); ++which) {
    std::memcpy(partial + which * n, sums[which + 2 - p.norm_sums()], n * sizeof(float));
  }
}

inline void backward_token(const CpuBackwardParams& p, const Unit& u, int64_t t, const Backward& b) {
  const int64_t n = p.channels;
  const float* dx = p.grad_h ? load(p.grad_h, u.batch, t, n, b.buffers[6]) : nullptr;
  if (p.grad_y) {
    const float* dy = load(p.grad_y, u.batch, t, n, b.buffers[7]);
    const float* h = load(p.h, u.batch, t, n, b.buffers[8]);
    float* out = target(p.dx, u.batch, t, p.stream_dx, b.buffers[9]);
    const int64_t at = u.batch * p.tokens + t;
    normalise_backward(dy, h, b.factor, dx, p.mean ? p.mean[at] : 0.0f, p.rstd[at], p.mean == nullptr, n, out, b.shifts,
                       b.scales, next_row(p.grad_y, u, t), next_row(p.h, u, t));
    store(p.dx, u.batch, t, n, p.stream_dx, out, b.spare);
    dx = out;
  }
  if (!p.branch) return;
  const float* branch = load(p.branch, u.batch, t, n, b.buffers[10]);
  float* out = target(p.dbranch, u.batch, t, p.stream_dbranch, b.buffers[11]);
  const NextRow next_branch = next_row(p.branch, u, t), next_dh = p.grad_h ? next_row(p.grad_h, u, t) : next_branch;
  const float* gate = b.gate;
  float* __restrict dgate = b.dgate;
  int64_t i = 0;
  for (; i + kVec <= n; i += kVec) {
    next_branch.prefetch(i);
    next_dh.prefetch(i);
    const Vec grad = load_vec(dx + i);
    store_vec(dgate + i, load_vec(dgate + i) + grad * load_vec(branch + i));
    store_vec(out + i, grad * load_vec(gate + i));
  }
  for (; i < n; ++i) {
    dgate[i] += dx[i] * branch[i];
    out[i] = dx[i] * gate[i];
  }
  store(p.dbranch, u.batch, t, n, p.stream_dbranch, out, b.spare);
}

void backward(const CpuBackwardParams& p, const Segments& segments, const Unit& u, float* scratch) {
  Backward b(p, scratch);
  int64_t t = u.begin;
  for (int64_t segment = u.segment; t < u.end; ++segment) {
    const int64_t start_of_next = segments.start(segment + 1), stop = start_of_next < u.end ? start_of_next : u.end;
    b.begin(p, u.batch, segment);
    for (; t < stop; ++t) backward_token(p, u, t, b);
    finish(p, u, segment, b);
  }
  fence(p.stream_dx || p.stream_dbranch);
  if (p.parameter_sums()) {
    float* sums = p.parameter_workspace + u.number * 2 * p.channels;
    std::memcpy(sums, b.dweight, p.channels * sizeof(float));
    std::memcpy(sums + p.channels, b.dbias, p.channels * sizeof(float));
  }
}

// sum[i] = the n values at `from`, at `from` + stride, ..., in order.
inline void sum_in_order(const float* from, int64_t count, int64_t stride, int64_t n, float* __restrict sum) {
  std::memcpy(sum, from, n * sizeof(float));
  for (int64_t c = 1; c < count; ++c) {
    const float* __restrict next = from + c * stride;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] += next[i];
  }
}

void reduce_rows(const CpuBackwardParams& p, const Unit& first, int64_t count, int which, float* scratch) {
  const int64_t n = p.channels, row_sums = p.row_sums(), stride = buffer_stride(n);
  const bool is_gate = which == p.norm_sums(), is_scale = !is_gate && which == 1;
  const View& out = is_gate ? p.dgate : is_scale ? p.dscale : p.dshift;
  if (!out) return;
  const float* partial = p.workspace + first.piece * row_sums * n;
  sum_in_order(partial + which * n, count, row_sums * n, n, scratch);
  const float* sum = scratch;
  if (is_scale) {
    float *shifts = scratch + stride, *spare = shifts + stride;
    if (p.bias) sum_in_order(partial, count, row_sums * n, n, shifts);
    const float* weight = p.weight ? load(p.weight, 0, 0, n, spare) : nullptr;
    const float* bias = p.bias ? load(p.bias, 0, 0, n, spare + stride) : nullptr;
    sum = scale_gradient(scratch, shifts, weight, bias, n, scratch);
  }
  store(out, first.batch, first.segment, n, false, sum, scratch);
}

void reduce_parameter(const CpuBackwardParams& p, int64_t units, int which, int64_t begin, int64_t end,
                      float* scratch) {
  View out = which == 0 ? p.dweight : p.dbias;
  if (!out) return;
  const int64_t n = p.channels;
  sum_in_order(p.parameter_workspace + which * n + begin, units, 2 * n, end - begin, scratch);
  out.data = static_cast<char*>(out.data) + begin * size_of(out.dtype);
  store(out, 0, 0, end - begin, false, scratch, scratch);
}

}  // namespace

extern const RowKernels ARD_KERNELS = {ARD_ISA, forward, backward, reduce_rows, reduce_parameter};

}  // namespace ard
