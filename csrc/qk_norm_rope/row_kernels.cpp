// Rows of qk_norm_rope on the CPU. Compiled once per ISA (ARD_KERNELS names the table, the compiler's -m flags pick
// the instructions), so everything but the table has internal linkage and no standard template is used.
//
// Bytes that must move per element, fp32: 8 forward (x, y), 12 backward (dy, x, dx). A token of H * D channels (Wan: 6
// KB) is read from memory once and worked on in L1, in as many passes as the formula has; so memory bounds it. Tables
// and parameters are widened into scratch: a table's row serves all heads of its token, parameters a whole chunk.
#include "row_kernels.h"

#include <cmath>
#include <cstring>

#include "../common/rows.h"
#include "cpu_vectors.h"

namespace ard {
namespace {

// cos and sin of one head of one token. Interleaved: for each element, sin with the sign that its partner has in the
// formula; half: for each pair.
struct Turn {
  float *cos, *sin;
  int64_t pairs;
  bool half;

  // backward: by the negative angle
  void read(const NormRope& p, int64_t batch, int64_t token, int64_t head, bool backward) {
    const RotaryTables& t = p.tables;
    const auto at = [&](const HeadsView& v) {
      const int64_t offset = batch * v.stride_batch + token % t.rows * v.stride_token + head * v.stride_head;
      return static_cast<const char*>(v.data) + offset * size_of(t.dtype);
    };
    // Widened into the upper half of the buffers, then spread from there: element i is read before 2 i + 1 is written.
    float* const spread = half ? nullptr : cos + pairs;
    const float* c = widen_row(at(t.cos), t.dtype, pairs, half ? cos : spread);
    const float* s = widen_row(at(t.sin), t.dtype, pairs, half ? sin : sin + pairs);
    const float sign = backward ? -1.f : 1.f;
    for (int64_t i = 0; i < pairs; ++i) {
      const float own_cos = c[i], own_sin = sign * s[i];
      if (half) {
        cos[i] = own_cos, sin[i] = own_sin;
      } else {
        cos[2 * i] = cos[2 * i + 1] = own_cos;
        sin[2 * i] = -own_sin, sin[2 * i + 1] = own_sin;
      }
    }
  }

  // out = the row turned; out may be the row.
  void apply(const float* row, int64_t n, float* out) const {
    if (half) {
      turn_halves(row, out);
    } else {
      turn_neighbours(row, out);
    }
    if (out != row) std::memcpy(out + 2 * pairs, row + 2 * pairs, (n - 2 * pairs) * sizeof(float));
  }

 private:
  void turn_halves(const float* row, float* out) const {
    const int64_t vectors = pairs / 8 * 8;
    each_vector(vectors, [&](int64_t i, auto kind) {
      using V = decltype(kind);
      const V a = load<V>(row + i), b = load<V>(row + pairs + i), c = load<V>(cos + i), s = load<V>(sin + i);
      save(out + i, a * c - b * s);
      save(out + pairs + i, b * c + a * s);
    });
    for (int64_t i = vectors; i < pairs; ++i) {
      const float a = row[i], b = row[pairs + i];
      out[i] = a * cos[i] - b * sin[i];
      out[pairs + i] = b * cos[i] + a * sin[i];
    }
  }

  void turn_neighbours(const float* row, float* out) const {
    const int64_t vectors = 2 * pairs / 8 * 8;
    each_vector(vectors, [&](int64_t i, auto kind) {
      using V = decltype(kind);
      const V v = load<V>(row + i);
      save(out + i, v * load<V>(cos + i) + exchange(v) * load<V>(sin + i));
    });
    for (int64_t i = vectors; i < 2 * pairs; i += 2) {
      const float a = row[i], b = row[i + 1];
      out[i] = a * cos[i] + b * sin[i];
      out[i + 1] = b * cos[i + 1] + a * sin[i + 1];
    }
  }
};

// The scratch of a thread, and the parameters in it.
struct Buffers {
  float *first, *second, *out, *spare, *weight_sum, *bias_sum, *wide_weight;
  Turn turn;
  const float* weight = nullptr;

  Buffers(const NormRope& p, float* scratch) {
    const int64_t stride = buffer_stride(p.channels());
    float** const all[kTokenBuffers] = {&first, &second, &out, &spare, &weight_sum, &bias_sum, &wide_weight};
    for (int64_t i = 0; i < kTokenBuffers; ++i) *all[i] = scratch + i * stride;
    float* const tables = scratch + kTokenBuffers * stride;
    turn = {tables, tables + buffer_stride(p.head_dim), p.tables.pairs, p.half};
    if (p.weight) weight = widen_row(p.weight.data, p.weight.dtype, p.parameter_width(), wide_weight);
  }
};

inline char* address(const HeadsView& x, DType dtype, int64_t batch, int64_t token, int64_t head) {
  const int64_t offset = batch * x.stride_batch + token * x.stride_token + head * x.stride_head;
  return static_cast<char*>(x.data) + offset * size_of(dtype);
}

// The rows of a token's heads as fp32: those in memory where they are fp32, else widened into `buffer`.
struct TokenRows {
  const float* data;
  int64_t stride;

  TokenRows(const NormRope& p, const HeadsView& x, int64_t batch, int64_t token, float* buffer) {
    const char* const row = address(x, p.dtype, batch, token, 0);
    if (p.dtype == DType::kFloat32) {
      data = reinterpret_cast<const float*>(row), stride = x.stride_head;
      return;
    }
    data = buffer, stride = p.head_dim;
    for (int64_t h = 0; h < p.heads; ++h)
      widen_row(row + h * x.stride_head * size_of(p.dtype), p.dtype, p.head_dim, buffer + h * p.head_dim);
  }

  const float* head(int64_t h) const { return data + h * stride; }
};

// The rows of the next token, which is in the next sample where this one is a sample's last; of this one where it is
// its chunk's `last`. A token is worked on in several passes, and only the first would touch memory; in a packed
// projection each token is in pages of its own, which no hardware foresees.
struct NextRows {
  const char* row;
  int64_t head_bytes, row_bytes;

  NextRows(const NormRope& p, const HeadsView& x, int64_t batch, int64_t token, bool last)
      : head_bytes(x.stride_head * size_of(p.dtype)), row_bytes(p.head_dim * size_of(p.dtype)) {
    const bool ends = token + 1 == p.tokens;
    row = last ? address(x, p.dtype, batch, token, 0) : address(x, p.dtype, batch + ends, ends ? 0 : token + 1, 0);
  }

  ARD_INLINE void prefetch(int64_t head) const {
    for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(row + head * head_bytes + byte);
  }
};

// Where to compute a token's output, whose heads follow each other in memory: there, unless it needs a conversion or
// goes past the caches.
inline float* target(const NormRope& p, const HeadsView& y, int64_t batch, int64_t token, bool stream, float* buffer) {
  return p.dtype == DType::kFloat32 && !stream ? reinterpret_cast<float*>(address(y, p.dtype, batch, token, 0))
                                               : buffer;
}

// Mean and 1 / sqrt(var + eps) of `rows` rows, one after the other at `stride`; in two passes for kLayer.
inline void statistics(const NormRope& p, const float* x, int64_t rows, int64_t stride, float& mean, float& rstd) {
  const int64_t n = p.head_dim;
  const float count = static_cast<float>(rows * n);
  mean = 0;
  if (p.norm == RowNorm::kLayer) {
    for (int64_t h = 0; h < rows; ++h) {
      const float* row = x + h * stride;
      mean += sum_over(n, [=](int64_t i, auto kind) { return load<decltype(kind)>(row + i); });
    }
    mean /= count;
  }
  float squares = 0;
  for (int64_t h = 0; h < rows; ++h) {
    const float* row = x + h * stride;
    const float centre = mean;
    squares += sum_over(n, [=](int64_t i, auto kind) {
      const auto d = load<decltype(kind)>(row + i) - centre;
      return d * d;
    });
  }
  rstd = 1.0f / std::sqrt(squares / count + p.eps);
}

// z = (x - mean) * rstd * weight + bias
inline void normalise(const float* x, float mean, float rstd, const float* weight, const float* bias, int64_t n,
                      float* z) {
  each_vector(n, [=](int64_t i, auto kind) {
    using V = decltype(kind);
    V v = (load<V>(x + i) - mean) * rstd;
    if (weight) v *= load<V>(weight + i);
    if (bias) v += load<V>(bias + i);
    save(z + i, v);
  });
}

void forward(const NormRopeForward& p, int64_t begin, int64_t end, bool stream, float* scratch) {
  Buffers b(p, scratch);
  const int64_t D = p.head_dim;
  const float* bias = p.bias ? widen_row(p.bias.data, p.bias.dtype, p.parameter_width(), b.bias_sum) : nullptr;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t batch = n / p.tokens, token = n % p.tokens;
    const TokenRows x(p, p.x, batch, token, b.first);
    const NextRows next_x(p, p.x, batch, token, n + 1 == end);
    float* const y = target(p, p.y, batch, token, stream, b.out);
    float mean = 0, rstd = 0;
    if (p.norm != RowNorm::kNone && p.over_all) {
      statistics(p, x.data, p.heads, x.stride, mean, rstd);
      p.rstd[n] = rstd;
      if (p.mean) p.mean[n] = mean;
    }
    for (int64_t h = 0; h < p.heads; ++h) {
      next_x.prefetch(h);
      const float* row = x.head(h);
      float* const out = y + h * D;
      if (p.norm != RowNorm::kNone) {
        if (!p.over_all) {
          statistics(p, row, 1, 0, mean, rstd);
          p.rstd[n * p.heads + h] = rstd;
          if (p.mean) p.mean[n * p.heads + h] = mean;
        }
        const int64_t at = p.over_all ? h * D : 0;
        normalise(row, mean, rstd, b.weight ? b.weight + at : nullptr, bias ? bias + at : nullptr, D, out);
        row = out;
      }
      if (p.tables.pairs) {
        if (h == 0 || p.tables.cos.stride_head || p.tables.sin.stride_head) b.turn.read(p, batch, token, h, false);
        b.turn.apply(row, D, out);
      } else if (row != out) {
        std::memcpy(out, row, D * sizeof(float));
      }
    }
    store_row(address(p.y, p.dtype, batch, token, 0), p.dtype, p.channels(), stream, y, b.spare);
  }
  fence(stream);
}

// Sums of g and g * n of one row, and its share of dweight and dbias.
struct RowSums {
  float g = 0, gn = 0;

  void add(const float* dz, const float* x, const float* weight, float mean, float rstd, int64_t count, bool layer,
           float* weight_sum, float* bias_sum) {
    gn += sum_over(count, [=](int64_t i, auto kind) {
      using V = decltype(kind);
      const V d = load<V>(dz + i), dn = d * ((load<V>(x + i) - mean) * rstd);
      if (weight_sum) save(weight_sum + i, load<V>(weight_sum + i) + dn);
      if (bias_sum) save(bias_sum + i, load<V>(bias_sum + i) + d);
      return weight ? V(dn * load<V>(weight + i)) : dn;
    });
    if (!layer) return;
    g += sum_over(count, [=](int64_t i, auto kind) {
      using V = decltype(kind);
      const V d = load<V>(dz + i);
      return weight ? V(d * load<V>(weight + i)) : d;
    });
  }
};

// dx = rstd * (g - mean_g - n * mean_gn)
inline void finish(const float* dz, const float* x, const float* weight, float mean, float rstd, float mean_g,
                   float mean_gn, int64_t count, float* dx) {
  each_vector(count, [=](int64_t i, auto kind) {
    using V = decltype(kind);
    const V n = (load<V>(x + i) - mean) * rstd;
    V g = load<V>(dz + i);
    if (weight) g *= load<V>(weight + i);
    save(dx + i, rstd * (g - mean_g - n * mean_gn));
  });
}

void backward(const NormRopeBackward& p, int64_t begin, int64_t end, bool stream, float* partial, float* scratch) {
  Buffers b(p, scratch);
  const int64_t D = p.head_dim, width = p.parameter_width();
  const bool layer = p.norm == RowNorm::kLayer, normed = p.norm != RowNorm::kNone;
  float* const weight_sum = p.dweight ? b.weight_sum : nullptr;
  float* const bias_sum = p.dbias ? b.bias_sum : nullptr;
  // Of each head on its own, also where heads share parameters: one sum over tokens and heads in a row errs 3 times
  // what plain PyTorch's does.
  if (weight_sum) std::memset(weight_sum, 0, p.channels() * sizeof(float));
  if (bias_sum) std::memset(bias_sum, 0, p.channels() * sizeof(float));
  for (int64_t n = begin; n < end; ++n) {
    const int64_t batch = n / p.tokens, token = n % p.tokens;
    const TokenRows dy(p, p.grad_y, batch, token, b.first);
    float* const dx = target(p, p.dx, batch, token, stream, b.out);
    const TokenRows x(p, p.x, batch, token, b.second);
    const bool last = n + 1 == end;
    const NextRows next_dy(p, p.grad_y, batch, token, last), next_x(p, p.x, batch, token, last);
    RowSums sums;
    const auto finish_head = [&](int64_t h, const float* dz, float mean, float rstd, float count) {
      const float* weight = b.weight ? b.weight + (p.over_all ? h * D : 0) : nullptr;
      finish(dz, x.head(h), weight, mean, rstd, sums.g / count, sums.gn / count, D, dx + h * D);
    };
    for (int64_t h = 0; h < p.heads; ++h) {
      next_dy.prefetch(h);
      next_x.prefetch(h);
      const float* dz = dy.head(h);
      if (p.tables.pairs) {
        if (h == 0 || p.tables.cos.stride_head || p.tables.sin.stride_head) b.turn.read(p, batch, token, h, true);
        b.turn.apply(dz, D, dx + h * D);
        dz = dx + h * D;
      } else if (p.over_all || !normed) {  // is read again when all heads have been
        std::memcpy(dx + h * D, dz, D * sizeof(float));
        dz = dx + h * D;
      }
      if (!normed) continue;
      const int64_t at = p.over_all ? h * D : 0, statistic = p.over_all ? n : n * p.heads + h;
      const float mean = p.mean ? p.mean[statistic] : 0, rstd = p.rstd[statistic];
      if (!p.over_all) sums = {};
      sums.add(dz, x.head(h), b.weight ? b.weight + at : nullptr, mean, rstd, D, layer,
               weight_sum ? weight_sum + h * D : nullptr, bias_sum ? bias_sum + h * D : nullptr);
      if (!p.over_all) finish_head(h, dz, mean, rstd, static_cast<float>(D));
    }
    if (normed && p.over_all) {
      const float mean = p.mean ? p.mean[n] : 0, rstd = p.rstd[n], count = static_cast<float>(p.channels());
      for (int64_t h = 0; h < p.heads; ++h) finish_head(h, dx + h * D, mean, rstd, count);
    }
    store_row(address(p.dx, p.dtype, batch, token, 0), p.dtype, p.channels(), stream, dx, b.spare);
  }
  fence(stream);
  float* const both[2] = {weight_sum, bias_sum};
  for (float* sum : both) {
    if (sum == nullptr) continue;
    for (int64_t h = 1; h < p.heads && !p.over_all; ++h)
      each_vector(D, [=](int64_t i, auto kind) {
        using V = decltype(kind);
        save(sum + i, load<V>(sum + i) + load<V>(sum + h * D + i));
      });
    std::memcpy(partial, sum, width * sizeof(float));
    partial += width;
  }
}

void reduce(const NormRopeBackward& p, int64_t chunks, float* scratch) {
  const int64_t width = p.parameter_width(), sums = p.sums();
  int64_t which = 0;
  const Parameter* const both[2] = {&p.dweight, &p.dbias};
  for (const Parameter* out : both) {
    if (!*out) continue;
    float* __restrict sum = scratch;
    std::memset(sum, 0, width * sizeof(float));
    for (int64_t c = 0; c < chunks; ++c) {
      const float* __restrict next = p.workspace + (c * sums + which) * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) sum[i] += next[i];
    }
    store_row(out->data, out->dtype, width, false, sum, nullptr);
    ++which;
  }
}

}  // namespace

extern const NormRopeKernels ARD_KERNELS = {ARD_ISA, forward, backward, reduce};

}  // namespace ard
