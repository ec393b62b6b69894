// How the kernels hold a token: a row of D elements, one head's, is D / 8 units of 8, which lie side by side in the lanes
// of one warp; a warp takes floor(32 / units) rows, and the block all heads of the token, up to two per thread.
//   D = 128: 32 of 32 lanes busy, 72: 27, 64: 32, 96: 24
#pragma once

#include <type_traits>

#include "../common/eight.h"
#include "params.h"

namespace ard {

constexpr int kLanesOfWarp = 32, kMostWarpsOfBlock = 16;

// What the kernels take: kParams is NormRopeForward or NormRopeBackward.
template <class kParams>
struct OnGpu : kParams {
  BlockGeometry geometry;
  int blocks = 0;
  bool table_vectors = false;  // tables can be read in vectors: 4 entries side by side, 8 of pairs (i, i + P)
};

struct Spot {
  int thread, lane, warp, warps, units, rows, unit, row;

  ARD_DEVICE explicit Spot(const BlockGeometry& g)
      : thread(thread_index()),
        lane(thread % kLanesOfWarp),
        warp(thread / kLanesOfWarp),
        warps(g.warps),
        units(g.units),
        rows(g.rows_per_warp),
        unit(lane % g.units),
        row(lane / g.units) {}

  // The i-th head of this thread; -1 when it has none.
  ARD_DEVICE int head(int i, int heads) const {
    const int h = (warp + i * warps) * rows + row;
    return row < rows && h < heads ? h : -1;
  }
};

// A block's run of tokens.
struct TokenRun {
  int64_t start, stop;

  ARD_DEVICE TokenRun(int64_t tokens, int blocks)
      : start(block_index() * tokens / blocks), stop((block_index() + 1) * tokens / blocks) {}
};

template <class T>
ARD_DEVICE T* unit_address(const HeadsView& x, int64_t batch, int64_t token, int head, int unit) {
  return static_cast<T*>(x.data) + batch * x.stride_batch + token * x.stride_token + head * x.stride_head + 8 * unit;
}

// Sums over the lanes of a row, on each of them: a tree of ceil(log2(units)) steps, then back from the first.
ARD_DEVICE float sum_of_row(float sum, const Spot& at) {
  for (int width = at.units; width > 1; width = (width + 1) / 2) {
    const int half = (width + 1) / 2;
    const float other = shuffle(sum, (at.lane + half) % kLanesOfWarp);
    if (at.unit + half < width) sum += other;
  }
  return shuffle(sum, at.lane - at.unit);
}

// Sums over the row, or over all rows of the token, on every thread. value[i] is of the thread's i-th head, 0 when it has
// none. `shared`: kMostWarpsOfBlock floats that no warp still reads.
template <int kHeads>
ARD_DEVICE void sum_up(float (&value)[kHeads], const Spot& at, bool over_all, float* shared) {
  if (!over_all) {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) value[i] = sum_of_row(value[i], at);
    return;
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) sum += value[i];
#pragma unroll
  for (int mask = kLanesOfWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (at.lane == 0) store_shared(shared + at.warp, sum);
  sync_block();
  sum = 0;
#pragma unroll 1
  for (int w = 0; w < at.warps; ++w) sum += load_shared(shared + w);
#pragma unroll
  for (int i = 0; i < kHeads; ++i) value[i] = sum;
}

// The sums' places in shared memory, used in turns: a barrier lies between two uses of one.
class SumPlaces {
 public:
  ARD_DEVICE float* next() {
    float* const place = reinterpret_cast<float*>(shared_memory()) + turn * kMostWarpsOfBlock;
    turn ^= 1;
    return place;
  }
  static constexpr int kBytes = 2 * kMostWarpsOfBlock * sizeof(float);

 private:
  int turn = 0;
};

// 8 values of a parameter (D,) or (H * D,), from element `first` on.
ARD_DEVICE void load_parameter(const Parameter& from, int first, float (&x)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (from.dtype == DType::kFloat32) {
      const Words w = load_global(static_cast<const float*>(from.data) + first + 4 * half);
#pragma unroll
      for (int i = 0; i < 4; ++i) std::memcpy(&x[4 * half + i], &w.word[i], 4);
      continue;
    }
    const Words2 w = load_global2(static_cast<const uint16_t*>(from.data) + first + 4 * half);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint16_t bits = static_cast<uint16_t>(w.word[i / 2] >> 16 * (i % 2));
      x[4 * half + i] = from.dtype == DType::kBFloat16 ? widen(bfloat16{bits}) : widen(float16{bits});
    }
  }
}

// One entry of a table.
ARD_DEVICE float table_entry(const void* row, DType dtype, int i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(row)[i];
  const uint16_t bits = static_cast<const uint16_t*>(row)[i];
  return dtype == DType::kBFloat16 ? widen(bfloat16{bits}) : widen(float16{bits});
}

// Of a token and head: what its pairs are turned by.
struct Angles {
  const char *cos, *sin;
  DType dtype;
  int pairs;
  bool half, vectors;
  float sign;  // -1 turns back

  ARD_DEVICE Angles(const NormRope& p, bool vectors_, int64_t batch, int64_t token, int head, float sign_)
      : dtype(p.tables.dtype), pairs(static_cast<int>(p.tables.pairs)), half(p.half), vectors(vectors_), sign(sign_) {
    cos = row(p.tables.cos, p, batch, token, head);
    sin = row(p.tables.sin, p, batch, token, head);
  }

  // Entry of the e-th element of a unit; -1 past the pairs.
  ARD_DEVICE int entry(int unit, int e) const {
    const int element = 8 * unit + e;
    if (element >= 2 * pairs) return -1;
    return !half ? element / 2 : element < pairs ? element : element - pairs;
  }

  // cos and sin of each element of a unit; 1 and 0 past the pairs.
  ARD_DEVICE void read(int unit, float (&c)[8], float (&s)[8]) const {
    if (vectors) {  // a unit is turned as a whole or not at all
      const int first = entry(unit, 0);
#pragma unroll
      for (int e = 0; e < 8; ++e) c[e] = 1, s[e] = 0;
      if (first < 0) return;
      four(cos, first, 0, c), four(sin, first, 0, s);
      if (half) four(cos, first + 4, 4, c), four(sin, first + 4, 4, s);
      if (!half) {
#pragma unroll
        for (int e = 7; e > 0; --e) c[e] = c[e / 2], s[e] = s[e / 2];
      }
      return;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int i = entry(unit, e);
      c[e] = i < 0 ? 1 : table_entry(cos, dtype, i);
      s[e] = i < 0 ? 0 : table_entry(sin, dtype, i);
    }
  }

 private:
  ARD_DEVICE static const char* row(const HeadsView& table, const NormRope& p, int64_t batch, int64_t token,
                                    int head) {
    const int64_t at =
        batch * table.stride_batch + token % p.tables.rows * table.stride_token + head * table.stride_head;
    return static_cast<const char*>(table.data) + at * (p.tables.dtype == DType::kFloat32 ? 4 : 2);
  }

  ARD_DEVICE void four(const char* row, int first, int to, float (&x)[8]) const {
    if (dtype == DType::kFloat32) {
      const Words w = load_global(row + 4 * first);
#pragma unroll
      for (int i = 0; i < 4; ++i) std::memcpy(&x[to + i], &w.word[i], 4);
      return;
    }
    const Words2 w = load_global2(row + 2 * first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint16_t bits = static_cast<uint16_t>(w.word[i / 2] >> 16 * (i % 2));
      x[to + i] = dtype == DType::kBFloat16 ? widen(bfloat16{bits}) : widen(float16{bits});
    }
  }
};

// rotated[e] = x[(e + by) % 8], by from 0 to 7.
ARD_DEVICE void rotate_unit(const float (&x)[8], int by, float (&rotated)[8]) {
#pragma unroll
  for (int e = 0; e < 8; ++e) rotated[e] = x[e];
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
    float moved[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) moved[e] = by & step ? rotated[(e + step) % 8] : rotated[e];
#pragma unroll
    for (int e = 0; e < 8; ++e) rotated[e] = moved[e];
  }
}

// Turn the pairs of a unit. All lanes of a warp call: with pairs (i, i + P) the other of a pair is another lane's.
ARD_DEVICE void turn(float (&z)[8], const Angles& angles, const Spot& at) {
  float c[8], s[8];
  angles.read(at.unit, c, s);
  if (!angles.half) {
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      const float a = z[e], b = z[e + 1], turned = s[e] * angles.sign;
      const bool within = 8 * at.unit + e < 2 * angles.pairs;  // an infinity beside must not become a NaN
      z[e] = within ? a * c[e] - b * turned : a;
      z[e + 1] = within ? b * c[e] + a * turned : b;
    }
    return;
  }
  const int away = angles.pairs / 8, rest = angles.pairs % 8, first_lane = at.lane - at.unit;
  float sent[8], other[8];
#pragma unroll
  for (int second = 0; second < 2; ++second) {  // whose other is P elements ahead, and whose is P behind
    rotate_unit(z, second ? (8 - rest) % 8 : rest, sent);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int unit = second ? at.unit - away - (e < rest ? 1 : 0) : at.unit + away + (e + rest >= 8 ? 1 : 0);
      const bool inside = unit >= 0 && unit < at.units;
      const float value = shuffle(sent[e], inside ? (first_lane + unit) % kLanesOfWarp : at.lane);
      if ((8 * at.unit + e >= angles.pairs) == (second == 1)) other[e] = value;
    }
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int element = 8 * at.unit + e;
    const float turned = s[e] * angles.sign;
    if (element < angles.pairs) {
      z[e] = z[e] * c[e] - other[e] * turned;
    } else if (element < 2 * angles.pairs) {
      z[e] = z[e] * c[e] + other[e] * turned;
    }
  }
}

// Call run(T{}, std::integral_constant<int, heads of a thread>) for the dtype and geometry.
template <class Run>
void with_heads(DType dtype, int heads_each, Run run) {
  const auto choose = [&](auto zero) {
    if (heads_each == 1) return run(zero, std::integral_constant<int, 1>{});
    run(zero, std::integral_constant<int, 2>{});
  };
  switch (dtype) {
    case DType::kFloat32:
      return choose(0.f);
    case DType::kBFloat16:
      return choose(bfloat16{});
    case DType::kFloat16:
      return choose(float16{});
  }
}

// Whether the tables' entries can be read in vectors of 4 (8 of pairs (i, i + P)).
inline bool vector_tables(const NormRope& p) {
  const int64_t entries = p.half ? 8 : 4, bytes = size_of(p.tables.dtype), width = 4 * bytes;
  if (p.tables.pairs % entries) return false;
  for (const HeadsView* table : {&p.tables.cos, &p.tables.sin}) {
    if (reinterpret_cast<int64_t>(table->data) % width || table->stride_batch * bytes % width ||
        table->stride_head * bytes % width || table->stride_token * bytes % width)
      return false;
  }
  return true;
}

template <class Params>
OnGpu<Params> on_gpu(const Params& params, int blocks) {
  OnGpu<Params> p;
  static_cast<Params&>(p) = params;
  p.geometry = norm_rope_geometry(static_cast<int>(params.heads), static_cast<int>(params.head_dim));
  p.blocks = blocks;
  p.table_vectors = vector_tables(params);
  return p;
}

}  // namespace ard
