// Rows of the adaLN family on the CPU. Compiled once per ISA (ARD_ROW_KERNELS names the table, the compiler's -m flags
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

// Biased variance in two passes over the row in L1: E[x^2] - E[x]^2 cancels.
inline void statistics(const float* __restrict x, int64_t n, float eps, float& mean, float& rstd) {
  const float centre = sum_over(n, [=](int64_t i) { return load_vec(x + i); }, [=](int64_t i) { return x[i]; }) / n;
  const auto square = [](auto value) { return value * value; };
  const float squares = sum_over(
      n, [=](int64_t i) { return square(load_vec(x + i) - centre); }, [=](int64_t i) { return square(x[i] - centre); });
  mean = centre;
  rstd = 1.0f / std::sqrt(squares / n + eps);
}

void forward(const ForwardParams& p, const Unit& u, float* scratch) {
  const int64_t n = p.channels, stride = buffer_stride(n);
  float *b0 = scratch, *b1 = b0 + stride, *b2 = b1 + stride, *b3 = b2 + stride, *b4 = b3 + stride, *b5 = b4 + stride,
        *spare = b5 + stride;
  const float* __restrict gate = p.gate ? load(p.gate, u.batch, u.segment, n, b0) : nullptr;
  const float* __restrict shift = p.shift ? load(p.shift, u.batch, u.segment, n, b1) : nullptr;
  const float* __restrict scale = p.scale ? load(p.scale, u.batch, u.segment, n, b2) : nullptr;
  for (int64_t t = u.begin; t < u.end; ++t) {
    const float* x = load(p.x, u.batch, t, n, b3);
    if (p.h) {
      const float* branch = load(p.branch, u.batch, t, n, b4);
      float* h = target(p.h, u.batch, t, p.stream_h, b5);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) h[i] = x[i] + gate[i] * branch[i];
      store(p.h, u.batch, t, n, p.stream_h, h, spare);
      // LN reads h as stored, so that the backward, which has only that, sees the same normalised row.
      x = p.h.dtype == DType::kFloat32 ? h : rounded(p.h.dtype, h, n, b3);
    }
    if (p.y) {
      float mean, rstd;
      statistics(x, n, p.eps, mean, rstd);
      p.mean[u.batch * p.tokens + t] = mean;
      p.rstd[u.batch * p.tokens + t] = rstd;
      float* y = target(p.y, u.batch, t, p.stream_y, b4);
      const NextRow next_x = next_row(p.x, u, t), next_branch = p.branch ? next_row(p.branch, u, t) : next_x;
      int64_t i = 0;
      for (; i + kVec <= n; i += kVec) {
        next_x.prefetch(i);
        next_branch.prefetch(i);
        store_vec(y + i, (load_vec(x + i) - mean) * rstd * (1.0f + load_vec(scale + i)) + load_vec(shift + i));
      }
      for (; i < n; ++i) y[i] = (x[i] - mean) * rstd * (1.0f + scale[i]) + shift[i];
      store(p.y, u.batch, t, n, p.stream_y, y, spare);
    }
  }
  fence(p.stream_h || p.stream_y);
}

// dx = rstd * (g - mean(g) - n * mean(g * n)) + dh; adds this token to dshift and dscale.
inline void normalise_backward(const float* __restrict dy, const float* __restrict h, const float* __restrict scale,
                               const float* dh, float mean, float rstd, int64_t n, float* __restrict dx,
                               float* __restrict dshift, float* __restrict dscale, const NextRow& next_dy,
                               const NextRow& next_h) {
  Vec chain_g[2] = {}, chain_gn[2] = {};
  int64_t i = 0;
  for (; i + 2 * kVec <= n; i += 2 * kVec) {
    for (int c = 0; c < 2; ++c) {
      const int64_t at = i + c * kVec;
      next_dy.prefetch(at);
      const Vec grad = load_vec(dy + at), normalised = (load_vec(h + at) - mean) * rstd;
      const Vec g = grad * (1.0f + load_vec(scale + at));
      chain_g[c] += g;
      chain_gn[c] += g * normalised;
      store_vec(dshift + at, load_vec(dshift + at) + grad);
      store_vec(dscale + at, load_vec(dscale + at) + grad * normalised);
    }
  }
  float sum_g = sum_lanes(chain_g[0] + chain_g[1]), sum_gn = sum_lanes(chain_gn[0] + chain_gn[1]);
  for (; i < n; ++i) {
    const float normalised = (h[i] - mean) * rstd, g = dy[i] * (1.0f + scale[i]);
    sum_g += g;
    sum_gn += g * normalised;
    dshift[i] += dy[i];
    dscale[i] += dy[i] * normalised;
  }
  const float mean_g = sum_g / n, mean_gn = sum_gn / n;
  for (i = 0; i + kVec <= n; i += kVec) {
    next_h.prefetch(i);
    const Vec normalised = (load_vec(h + i) - mean) * rstd, g = load_vec(dy + i) * (1.0f + load_vec(scale + i));
    store_vec(dx + i, rstd * (g - mean_g - normalised * mean_gn));
  }
  for (; i < n; ++i) {
    const float normalised = (h[i] - mean) * rstd, g = dy[i] * (1.0f + scale[i]);
    dx[i] = rstd * (g - mean_g - normalised * mean_gn);
  }
  if (dh == nullptr) return;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) dx[j] += dh[j];
}

void backward(const BackwardParams& p, const Unit& u, float* scratch) {
  const int64_t n = p.channels, stride = buffer_stride(n);
  float* buffers[kBackwardBuffers];
  for (int i = 0; i < kBackwardBuffers; ++i) buffers[i] = scratch + i * stride;
  const float* __restrict gate = p.gate ? load(p.gate, u.batch, u.segment, n, buffers[0]) : nullptr;
  const float* __restrict scale = p.scale ? load(p.scale, u.batch, u.segment, n, buffers[1]) : nullptr;
  float* __restrict dshift = buffers[2], * __restrict dscale = buffers[3], * __restrict dgate = buffers[4];
  std::memset(dshift, 0, 3 * stride * sizeof(float));
  for (int64_t t = u.begin; t < u.end; ++t) {
    const float* dx = p.grad_h ? load(p.grad_h, u.batch, t, n, buffers[5]) : nullptr;
    if (p.grad_y) {
      const float* dy = load(p.grad_y, u.batch, t, n, buffers[6]);
      const float* h = load(p.h, u.batch, t, n, buffers[7]);
      float* out = target(p.dx, u.batch, t, p.stream_dx, buffers[8]);
      const int64_t at = u.batch * p.tokens + t;
      normalise_backward(dy, h, scale, dx, p.mean[at], p.rstd[at], n, out, dshift, dscale, next_row(p.grad_y, u, t),
                         next_row(p.h, u, t));
      store(p.dx, u.batch, t, n, p.stream_dx, out, buffers[11]);
      dx = out;
    }
    if (p.branch) {
      const float* branch = load(p.branch, u.batch, t, n, buffers[9]);
      float* out = target(p.dbranch, u.batch, t, p.stream_dbranch, buffers[10]);
      const NextRow next_branch = next_row(p.branch, u, t), next_dh = p.grad_h ? next_row(p.grad_h, u, t) : next_branch;
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
      store(p.dbranch, u.batch, t, n, p.stream_dbranch, out, buffers[11]);
    }
  }
  fence(p.stream_dx || p.stream_dbranch);
  const View* outputs[3] = {&p.dshift, &p.dscale, &p.dgate};
  float* partial = u.partial < 0 ? nullptr : p.workspace + u.partial * p.row_sums() * n;
  for (int which = 0; which < 3; ++which) {
    if (!*outputs[which]) continue;
    if (partial == nullptr) {
      store(*outputs[which], u.batch, u.segment, n, false, buffers[2 + which], buffers[11]);
    } else {
      std::memcpy(partial, buffers[2 + which], n * sizeof(float));
      partial += n;
    }
  }
}

void reduce(const BackwardParams& p, const Unit& first, int64_t count, int which, float* scratch) {
  const int64_t n = p.channels, row_sums = p.row_sums();
  const View* outputs[3];
  int present = 0;
  for (const View* view : {&p.dshift, &p.dscale, &p.dgate})
    if (*view) outputs[present++] = view;
  const float* partial = p.workspace + (first.partial * row_sums + which) * n;
  float* __restrict sum = scratch;
  std::memcpy(sum, partial, n * sizeof(float));
  for (int64_t c = 1; c < count; ++c) {
    const float* __restrict next = partial + c * row_sums * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] += next[i];
  }
  store(*outputs[which], first.batch, first.segment, n, false, sum, scratch);
}

}  // namespace

extern const RowKernels ARD_ROW_KERNELS = {ARD_ISA, forward, backward, reduce};

}  // namespace ard
