// Rows of tensors as fp32, along the lanes and back: a tile's queries, a head's keys.
#pragma once

#include "cpu_lanes.h"
#include "cpu_params.h"

namespace ard {
namespace {

constexpr int64_t kRows = kTileRows;

using Tile = AttentionTiles::Tile;

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

int64_t lanes_of(const Tile& tile) { return rounded_up(tile.stop - tile.start, kLaneStep); }

// Tokens of one head.
struct Head {
  char* data;
  int64_t step;  // elements
  DType dtype;

  Head(const AttentionCall& p, const HeadsView& x, int64_t batch, int64_t head)
      : data(static_cast<char*>(x.data) + (batch * x.stride_batch + head * x.stride_head) * size_of(p.dtype)),
        step(x.stride_token),
        dtype(p.dtype) {}

  char* row(int64_t token) const { return data + token * step * size_of(dtype); }
};

// Rows as fp32, so many floats apart.
struct Rows {
  float* data;
  int64_t step;

  float* row(int64_t i) const { return data + i * step; }
};

// Of q, k, v in one projection each row is in a page of its own, where no hardware foresees the next one.
constexpr int64_t kRowsAhead = 8;

// Brings rows [first, stop) of D elements towards this core, also those that are about to be written.
void prefetch_rows(const Head& x, int64_t first, int64_t stop, int64_t D) {
  for (int64_t token = first; token < stop; ++token)
    for (int64_t i = 0; i < D * size_of(x.dtype); i += 64) __builtin_prefetch(x.row(token) + i);
}

// Tokens [first, first + count) as fp32: in place where that is allowed and they are, else copied to `buffer`, with
// zeros behind a row's end.
Rows read_rows(const Head& x, int64_t first, int64_t count, int64_t D, bool in_place, const Rows& buffer) {
  if (in_place && x.dtype == DType::kFloat32) {
    if (x.step != D) prefetch_rows(x, first, first + count, D);
    return {static_cast<float*>(static_cast<void*>(x.row(first))), x.step};
  }
  for (int64_t r = 0; r < count; ++r) {
    if (r + kRowsAhead < count) prefetch_rows(x, first + r + kRowsAhead, first + r + kRowsAhead + 1, D);
    float* to = buffer.row(r);
    const float* from = widen_row(x.row(first + r), x.dtype, D, to);
    if (from != to)
      for (int64_t d = 0; d < D; d += 8) std::memcpy(to + d, from + d, 8 * sizeof(float));
    for (int64_t d = D; d < buffer.step; d += 8) std::memset(to + d, 0, 8 * sizeof(float));
  }
  return buffer;
}

// x (D, lanes) = rows (count, D) * factor, and zeros in the lanes that no row fills.
void to_lanes(const Rows& rows, int64_t count, int64_t D, float factor, int64_t lanes, float* x) {
  alignas(64) static const float zeros[256] = {};
  transpose(
      lanes, D, [&](int64_t i) { return i < count ? rows.row(i) : zeros; }, [&](int64_t) { return factor; },
      [&](int64_t d) { return x + d * lanes; });
}

// Tokens [first, first + count) = x (D, lanes) * factor, a number for each lane.
void write_lanes(const Head& to, int64_t first, int64_t count, int64_t D, int64_t lanes, const float* x,
                 const float* factor, const Rows& buffer) {
  const bool direct = to.dtype == DType::kFloat32;
  const Rows rows = direct ? Rows{static_cast<float*>(static_cast<void*>(to.row(first))), to.step} : buffer;
  alignas(64) float dropped[256];
  float* of_lane[kRows];
  for (int64_t i = 0; i < lanes; ++i) of_lane[i] = i < count ? rows.row(i) : dropped;
  transpose(
      D, rounded_up(count, kBlock), [&](int64_t d) { return x + d * lanes; }, [&](int64_t i) { return factor[i]; },
      [&](int64_t i) { return of_lane[i]; });
  if (direct) return;
  for (int64_t r = 0; r < count; ++r) store_row(to.row(first + r), to.dtype, D, false, rows.row(r), nullptr);
}

bool all_zero(const Lanes& x) { return !any(x != 0.0f); }

// n: a multiple of 4 kLanes.
bool are_finite(const float* x, int64_t n) {
  Lanes a{}, b{}, c{}, d{};  // an array of them, indexed, would be in memory
  for (int64_t i = 0; i < n; i += 4 * kLanes) {
    a += load_lanes(x + i) * 0.0f, b += load_lanes(x + i + kLanes) * 0.0f;
    c += load_lanes(x + i + 2 * kLanes) * 0.0f, d += load_lanes(x + i + 3 * kLanes) * 0.0f;
  }
  return all_zero((a + b) + (c + d));
}

}  // namespace
}  // namespace ard
