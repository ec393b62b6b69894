// Matrix products whose result has its columns along the lanes: all seven of attention on the CPU are such ones.
//
//     c[i][lane] (+)= sum over p < depth of a(i, p) * b[p][lane]
//
// Numbers of a are broadcast from wherever they lie, rows of b and c are whole registers. A block of c stays in
// registers while p runs: 12 sums or more, as two multiply-adds a cycle of latency 4 need 8, and each loaded number
// serves 4. Sums run over p in order, so results do not depend on how blocks are cut; what is there already is added at
// the end. Long sums are sums of partial ones over `part` numbers, which rounds less.
#pragma once

#include "../common/vec.h"

namespace ard {
namespace {

// What is broadcast: number (i, p) at data[i * step + p * depth_step].
struct Broadcast {
  const float* data;
  int64_t step, depth_step;
};

template <int kRows, int kVecs>
__attribute__((noinline)) void product_block(const Broadcast& a, const float* b, int64_t b_step, int64_t depth,
                                             int64_t part, float* c, int64_t c_step, bool add) {
  const float* from = a.data;
  const int64_t step = a.step, depth_step = a.depth_step;
  for (int64_t p = 0; p < depth;) {
    const int64_t stop = depth - p < part ? depth : p + part;
    Lanes sum[kRows][kVecs];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) sum[i][v] = Lanes{};
    for (; p < stop; ++p) {
      Lanes row[kVecs];
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) row[v] = load_lanes(b + v * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const float number = from[i * step];
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) sum[i][v] += number * row[v];
      }
      from += depth_step;
      b += b_step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) {
        float* to = c + i * c_step + v * kLanes;
        store_lanes(to, add ? load_lanes(to) + sum[i][v] : sum[i][v]);
      }
    add = true;
  }
}

template <int kVecs>
ARD_INLINE void product_columns(int64_t rows, int64_t depth, int64_t part, Broadcast a, const float* b, int64_t b_step,
                                float* c, int64_t c_step, bool add) {
  // Of 16 registers 8 rows of two would have GCC keep sums in memory: 0.6 of the rate.
  constexpr int kMost = kVecs > 2 ? 4 : kVecs == 2 && kLanes < 16 ? 6 : 8;
  int64_t i = 0;
  const auto block = [&](auto run, int64_t n) {
    run(Broadcast{a.data + i * a.step, a.step, a.depth_step}, b, b_step, depth, part, c + i * c_step, c_step, add);
    i += n;
  };
  while (i + kMost <= rows) block(product_block<kMost, kVecs>, kMost);
  if (kMost > 4 && i + 4 <= rows) block(product_block<4, kVecs>, 4);
  if (i + 2 <= rows) block(product_block<2, kVecs>, 2);
  if (i < rows) block(product_block<1, kVecs>, 1);
}

// `lanes`: a multiple of kLanes; `depth`: 1 or more.
inline void product(int64_t rows, int64_t lanes, int64_t depth, const Broadcast& a, const float* b, int64_t b_step,
                    float* c, int64_t c_step, bool add, int64_t part = INT64_MAX) {
  constexpr int kMost = kLanes == 16 ? 5 : 3;  // registers: 4 rows of so many sums, and a row of b
  for (int64_t left = lanes / kLanes; left > 0;) {
    const int64_t vecs = left <= kMost ? left : left < 2 * kMost ? (left + 1) / 2 : kMost;
    if (vecs == 5) product_columns<kMost>(rows, depth, part, a, b, b_step, c, c_step, add);
    if (vecs == 4) product_columns < kMost<4 ? kMost : 4>(rows, depth, part, a, b, b_step, c, c_step, add);
    if (vecs == 3) product_columns<3>(rows, depth, part, a, b, b_step, c, c_step, add);
    if (vecs == 2) product_columns<2>(rows, depth, part, a, b, b_step, c, c_step, add);
    if (vecs == 1) product_columns<1>(rows, depth, part, a, b, b_step, c, c_step, add);
    b += vecs * kLanes, c += vecs * kLanes, left -= vecs;
  }
}

}  // namespace
}  // namespace ard
