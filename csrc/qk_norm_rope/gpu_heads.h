// How the kernels hold a token: a row of D elements, one head's, is D / 8 units of 8, which lie side by side in the
// lanes of one warp; a warp takes floor(32 / units) rows, and the block all heads of the token, up to two per thread.
//   D = 128: 32 of 32 lanes busy, 72: 27, 64: 32, 96: 24
#pragma once

#include <type_traits>

#include "../common/eight.h"
#include "params.h"

namespace ard {

constexpr int kLanesOfWarp = 32, kMostWarpsOfBlock = 16;

// Threads of a block, at most, with so many heads to each thread: see norm_rope_geometry.
constexpr int most_threads(int heads_each) { return heads_each == 1 ? 256 : kLanesOfWarp * kMostWarpsOfBlock; }

// What the kernels take: kParams is NormRopeForward or NormRopeBackward.
template <class kParams>
struct OnGpu : kParams {
  BlockGeometry geometry;
  int blocks = 0;
  bool table_vectors = false;  // see vector_tables
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

// Goes through a block's run of tokens: the n-th of all is token `token` of sample `batch`, and reads row `row` of the
// tables. Counted on, as a division of 64 bits for every token would cost more than the token.
struct Cursor {
  int batch, token, row, tokens, rows, left;

  ARD_DEVICE Cursor(const NormRope& p, int blocks)
      : tokens(static_cast<int>(p.tokens)), rows(p.tables.rows ? static_cast<int>(p.tables.rows) : 1) {
    const int64_t all = p.batch * p.tokens, start = block_index() * all / blocks;
    left = static_cast<int>((block_index() + 1) * all / blocks - start);
    batch = static_cast<int>(start / tokens), token = static_cast<int>(start % tokens), row = token % rows;
  }

  ARD_DEVICE void advance() {
    --left;
    ++token, ++row;
    if (row == rows) row = 0;
    if (token == tokens) token = 0, row = 0, ++batch;
  }

  ARD_DEVICE int64_t index() const { return static_cast<int64_t>(batch) * tokens + token; }
};

template <class T>
ARD_DEVICE T* unit_address(const HeadsView& x, const Cursor& n, int head, int unit) {
  return static_cast<T*>(x.data) + opaque(n.batch) * x.stride_batch + n.token * x.stride_token + head * x.stride_head +
         8 * unit;
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

// Sums over the row, or over all rows of the token, on every thread. value[i] is of the thread's i-th head, 0 when it
// has none. `shared`: kMostWarpsOfBlock floats that no warp still reads.
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

// The block's shared memory: the sums' places, used in turns, so that a barrier lies between two uses of one; then a
// unit of each thread, by planes of 32 lanes, hence free of bank conflicts.
class Shared {
 public:
  ARD_DEVICE float* next_sums() {
    turn ^= 1;
    return memory() + turn * kMostWarpsOfBlock;
  }
  ARD_DEVICE static float* units_of_warp(int warp) {
    return memory() + 2 * kMostWarpsOfBlock + warp * 8 * kLanesOfWarp;
  }
  static constexpr int bytes(int warps) {
    return (2 * kMostWarpsOfBlock + warps * 8 * kLanesOfWarp) * static_cast<int>(sizeof(float));
  }

 private:
  ARD_DEVICE static float* memory() { return reinterpret_cast<float*>(shared_memory()); }
  int turn = 0;
};

struct Four {
  float value[4];
};

ARD_DEVICE float float_of_word(uint32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

ARD_DEVICE float widen(uint16_t bits, DType dtype) {
  return dtype == DType::kBFloat16 ? widen(bfloat16{bits}) : widen(float16{bits});
}

// Four entries of memory of any dtype, aligned to their width.
ARD_DEVICE Four load_four(const void* from, DType dtype) {
  if (dtype == DType::kFloat32) {
    const Words w = load_global(from);
    return {{float_of_word(w.word[0]), float_of_word(w.word[1]), float_of_word(w.word[2]), float_of_word(w.word[3])}};
  }
  const Words2 w = load_global2(from);
  const auto half = [&](int i) { return widen(static_cast<uint16_t>(w.word[i / 2] >> 16 * (i % 2)), dtype); };
  return {{half(0), half(1), half(2), half(3)}};
}

ARD_DEVICE int bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A unit's values of a parameter (D,), or (H * D,) over all heads.
ARD_DEVICE void load_parameter(const Parameter& from, const NormRope& p, int head, int unit, float (&x)[8]) {
  const int first = (p.over_all ? head * static_cast<int>(p.head_dim) : 0) + 8 * unit;
  const char* const data = static_cast<const char*>(from.data) + first * bytes_of(from.dtype);
  const Four low = load_four(data, from.dtype), high = load_four(data + 4 * bytes_of(from.dtype), from.dtype);
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = low.value[i], x[4 + i] = high.value[i];
}

// A token's row of cos or sin.
ARD_DEVICE const char* table_row(const HeadsView& table, const Cursor& n, int head, DType dtype) {
  const int64_t at = opaque(n.batch) * table.stride_batch + n.row * table.stride_token + head * table.stride_head;
  return static_cast<const char*>(table.data) + at * bytes_of(dtype);
}

ARD_DEVICE float table_entry(const char* row, DType dtype, int i) {
  if (dtype == DType::kFloat32) return reinterpret_cast<const float*>(row)[i];
  return widen(reinterpret_cast<const uint16_t*>(row)[i], dtype);
}

// Entries of four elements or pairs; entry(i): of the i-th, -1 when it has none. vectors: they follow each other.
template <class Entry>
ARD_DEVICE Four load_entries(const char* row, DType dtype, bool vectors, Entry entry) {
  if (vectors) return load_four(row + entry(0) * bytes_of(dtype), dtype);
  const auto one = [&](int i) { return entry(i) < 0 ? 0.f : table_entry(row, dtype, entry(i)); };
  return {{one(0), one(1), one(2), one(3)}};
}

// Pairs (2 i, 2 i + 1) of a unit; sign -1 turns back. Elements past the pairs are not looked at: an infinity beside
// must not become a NaN.
ARD_DEVICE void turn_neighbours(float (&z)[8], const char* cos, const char* sin, const NormRope& p, bool vectors,
                                int unit, float sign) {
  const int pairs = static_cast<int>(p.tables.pairs), first = 4 * unit;
  if (first >= pairs) return;
  const auto entry = [&](int i) { return first + i < pairs ? first + i : -1; };
  const Four c = load_entries(cos, p.tables.dtype, vectors, entry);
  const Four s = load_entries(sin, p.tables.dtype, vectors, entry);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + i >= pairs) continue;
    const float a = z[2 * i], b = z[2 * i + 1], turned = s.value[i] * sign;
    z[2 * i] = a * c.value[i] - b * turned;
    z[2 * i + 1] = b * c.value[i] + a * turned;
  }
}

// Pairs (i, i + P): the other of a pair is another lane's, and comes by way of the warp's shared memory.
ARD_DEVICE void turn_halves(float (&z)[8], const char* cos, const char* sin, const NormRope& p, bool vectors,
                            const Spot& at, float sign) {
  float* const units = Shared::units_of_warp(at.warp);
  const int pairs = static_cast<int>(p.tables.pairs);
#pragma unroll
  for (int e = 0; e < 8; ++e) store_shared(units + e * kLanesOfWarp + at.lane, z[e]);
  sync_warp();
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int first = 8 * opaque(at.unit) + 4 * part;  // four elements; `vectors`: of one half
    if (at.row >= at.rows || first >= 2 * pairs) continue;
    const auto entry = [&](int i) {
      const int element = first + i;
      return element >= 2 * pairs ? -1 : element < pairs ? element : element - pairs;
    };
    const Four c = load_entries(cos, p.tables.dtype, vectors, entry);
    const Four s = load_entries(sin, p.tables.dtype, vectors, entry);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int element = first + i, e = 4 * part + i;
      if (element >= 2 * pairs) continue;
      const bool is_first = element < pairs;
      const int other = is_first ? element + pairs : element - pairs;
      const float value = load_shared(units + other % 8 * kLanesOfWarp + at.lane - at.unit + other / 8);
      z[e] = z[e] * c.value[i] + value * (is_first ? -sign : sign) * s.value[i];
    }
  }
  sync_warp();
}

// Turn the pairs of a unit. All lanes of a warp call.
ARD_DEVICE void turn(float (&z)[8], const NormRope& p, bool vectors, const Cursor& n, int head, const Spot& at,
                     float sign) {
  const char* const cos = table_row(p.tables.cos, n, head < 0 ? 0 : head, p.tables.dtype);
  const char* const sin = table_row(p.tables.sin, n, head < 0 ? 0 : head, p.tables.dtype);
  if (p.half) {
    turn_halves(z, cos, sin, p, vectors, at, sign);
  } else if (head >= 0) {
    turn_neighbours(z, cos, sin, p, vectors, at.unit, sign);
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

// Whether the tables' entries can be read in vectors of 4.
inline bool vector_tables(const NormRope& p) {
  const int64_t bytes = size_of(p.tables.dtype), width = 4 * bytes;
  if (p.tables.pairs % 4) return false;
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
