// The consumer of the Hopper kernel: 64 queries of an item, one warpgroup.
#pragma once

#include <cmath>

#include "sm90_parts.h"

namespace ard::sm90 {

constexpr float kLn2 = 0.6931471805599453f;

// s = q k^T, issued, of 64 queries from `first` on; `q` and `k` are addresses of the tiles.
template <class T, class Traits>
ARD_DEVICE void issue_scores(float (&s)[kBlockN / 2], uint32_t q, int first, uint32_t k) {
  constexpr TileLayout kQ = Traits::kQ, kK = Traits::kK;
  const uint32_t k_units = k / 16;
#pragma unroll
  for (int step = 0; step < kK.columns() / 16; ++step) {
    const uint32_t q_units = (q + first * kQ.group[kQ.group_of(16 * step)].swizzle) / 16;
    const uint64_t a = at_units(score_descriptor(kQ, step), q_units + kQ.step_offset(step) / 16);
    const uint64_t b = at_units(score_descriptor(kK, step), k_units + kK.step_offset(step) / 16);
    if (step == 0) {
      wgmma<T, false>(s, a, b);
    } else {
      wgmma<T, true>(s, a, b);
    }
  }
}

template <int kFirst, int kCount, int kAll>
ARD_DEVICE float (&registers(float (&x)[kAll])) [kCount] {
  static_assert(kFirst + kCount <= kAll);
  return *reinterpret_cast<float (*)[kCount]>(&x[kFirst]);
}

// o += p v, issued; `v` is the address of the tile.
template <class T, class Traits>
ARD_DEVICE void issue_values(float (&o)[Traits::kV.columns() / 2], const uint32_t (&p)[kBlockN / 16][4], uint32_t v) {
  constexpr TileLayout kV = Traits::kV;
  const uint32_t units = v / 16;
#pragma unroll
  for (int step = 0; step < kBlockN / 16; ++step) {
    wgmma_rows<T>(registers<0, kV.group[0].columns / 2>(o), p[step],
                  at_units(value_descriptor(kV, 0), units + step * kV.group[0].swizzle));
    if constexpr (kV.groups == 2) {
      const uint32_t second = units + kV.group_offset(1) / 16 + step * kV.group[1].swizzle;
      wgmma_rows<T>(registers<kV.group[1].first / 2, kV.group[1].columns / 2>(o), p[step],
                    at_units(value_descriptor(kV, 1), second));
    }
  }
}

// Scores of columns that a row does not see become -inf; `bounds` are those of the thread's two rows, packed.
ARD_DEVICE void mask_scores(float (&s)[kBlockN / 2], const int (&bounds)[2], int thread) {
  static_assert(kBlockN == 128, "a thread's columns of a row are 32 bits");
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto below = [=](int column) { return columns_below(thread, column); };
    const RowBounds own(bounds[half]);
    const uint32_t visible = below(own.first_stop) | (below(own.stop) & ~below(own.start));
#pragma unroll
    for (int i = 0; i < kBlockN / 4; ++i) {
      float& score = s[i / 2 * 4 + 2 * half + i % 2];
      score = visible >> i & 1 ? score : -INFINITY;
    }
  }
}

// Maximum of scale * s so far, and this thread's part of the total of exp2(scale * s - maximum), of two rows.
struct Softmax {
  float maximum_[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};

  // Scores become weights; `factor` is for what was summed before.
  ARD_DEVICE void step(float (&s)[kBlockN / 2], float scale, float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float even = s[2 * half], odd = s[2 * half + 1];
#pragma unroll
      for (int i = 4; i < kBlockN / 2; i += 4) {
        even = maximum(even, s[i + 2 * half]), odd = maximum(odd, s[i + 2 * half + 1]);
      }
      float highest = maximum(even, odd);
      highest = maximum(highest, shuffle_xor(highest, 1));
      highest = maximum(highest, shuffle_xor(highest, 2));
      const float next = maximum(maximum_[half], highest * scale);
      // A row that has seen no key yet: -inf - -inf is not a number.
      const float finite = next == -INFINITY ? 0.f : next;
      factor[half] = exp2_approx(maximum_[half] - finite);
      maximum_[half] = next;
      even = odd = 0;
#pragma unroll
      for (int i = 0; i < kBlockN / 2; i += 4) {
        even += s[i + 2 * half] = exp2_approx(s[i + 2 * half] * scale - finite);
        odd += s[i + 2 * half + 1] = exp2_approx(s[i + 2 * half + 1] * scale - finite);
      }
      total[half] = total[half] * factor[half] + (even + odd);
    }
  }

  // Totals of whole rows, on every thread of the row.
  ARD_DEVICE void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += shuffle_xor(total[half], 1);
      total[half] += shuffle_xor(total[half], 2);
    }
  }
};

template <class T>
ARD_DEVICE void round_weights(uint32_t (&p)[kBlockN / 16][4], const float (&s)[kBlockN / 2]) {
#pragma unroll
  for (int i = 0; i < kBlockN / 4; ++i) p[i / 4][i % 4] = narrow2<T>(s[2 * i], s[2 * i + 1]);
}

// A group's columns of rows first .. first + 16 of a tile, as far as there are `rows`, 16 bytes at a time.
template <class Traits, int kGroup>
ARD_DEVICE void copy_group(char* gOut, const char* sQ, int64_t stride_token, int first, int rows, int lane) {
  constexpr TileLayout kQ = Traits::kQ;
  constexpr int kBegin = kQ.group[kGroup].first, kEnd = min_int(Traits::kHeadDim, kBegin + kQ.group[kGroup].columns);
  // With fewer than 8 chunks of 16 bytes, or a multiple of them, no bank is met twice.
  constexpr int kUsed = (kEnd - kBegin) / 8, kChunks = kUsed < 8 ? kUsed : (kUsed + 7) / 8 * 8;
#pragma unroll
  for (int i = 0; i < (16 * kChunks + 31) / 32; ++i) {
    const int store = 32 * i + lane, r = store / kChunks, column = kBegin + store % kChunks * 8;
    if (store < 16 * kChunks && (kChunks == kUsed || column < kEnd) && r < rows) {
      const int at = kQ.offset(kGroup, first + r, column - kBegin);
      store_global(gOut + 2 * (r * stride_token + column), load_shared(reinterpret_cast<const Words*>(sQ + at)));
    }
  }
}

// out and lse of this warp's 16 rows of the item, `first` and on; through these rows of `sQ`, which no one reads any
// more.
template <class T, class Traits>
ARD_DEVICE void store_rows(const AttentionParams& a, const TileItem& item, const Words& heads, char* sQ, int first,
                           const Softmax& softmax, const float (&o)[Traits::kV.columns() / 2], int lane) {
  constexpr TileLayout kQ = Traits::kQ;
  const int row = item.row + first;
  const int64_t batch = as_int(heads.word[0]), head = as_int(heads.word[1]), batch_head = as_int(heads.word[2]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = accumulator_row(lane, 2 * half);
    const float total = softmax.total[half] == 0 ? 1 : softmax.total[half];  // 0: a row that sees nothing
    const float inverse = 1 / total;
    if (a.lse && lane % 4 == 0 && row + r < item.row_stop) {
      a.lse[batch_head * a.tokens + row + r] = (softmax.maximum_[half] + log2_approx(total)) * kLn2;
    }
#pragma unroll
    for (int i = 2 * half; i < Traits::kHeadDim / 2; i += 4) {
      char* const to = sQ + kQ.offset(first + r, i / 4 * 8) + accumulator_column(lane, i) % 8 * kElementBytes;
      store_shared(reinterpret_cast<uint32_t*>(to), narrow2<T>(o[i] * inverse, o[i + 1] * inverse));
    }
  }
  sync_warp();
  char* gOut = static_cast<char*>(a.out.data) + 2 * (batch * a.out.stride_batch + head * a.out.stride_head);
  gOut += 2 * row * a.out.stride_token;
  copy_group<Traits, 0>(gOut, sQ, a.out.stride_token, first, item.row_stop - row, lane);
  if constexpr (kQ.groups == 2) copy_group<Traits, 1>(gOut, sQ, a.out.stride_token, first, item.row_stop - row, lane);
}

// An item as a consumer has it.
struct Work {
  TileItem item;
  Words heads;      // batch, head, both
  int segments[2];  // of the thread's rows, for an item with masked tiles
  int stage;        // of its queries
};

template <class T, class Traits>
struct Consumer {
  static constexpr TileLayout kQ = Traits::kQ, kK = Traits::kK, kV = Traits::kV;

  const Params& p;
  char* shared;
  Barriers& barriers;
  int consumer, thread, lane, first;  // first: row of the item that is this warp's first
  Ring<kQueryStages> q{};
  Ring<Traits::kStages> k{}, v{};
  float s[kBlockN / 2], o[kV.columns() / 2];
  uint32_t weights[kBlockN / 16][4];

  ARD_DEVICE Consumer(const Params& p, char* shared, Barriers& barriers, int consumer, int thread)
      : p(p), shared(shared), barriers(barriers), consumer(consumer), thread(thread), lane(thread % 32) {
    first = 64 * consumer + thread / 32 * 16;
  }

  ARD_DEVICE void release(uint64_t* barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  }

  ARD_DEVICE Work next_work() {
    mbarrier_wait(&barriers.full_q[q.stage], q.parity);
    const Words(&message)[3] = barriers.message[q.stage].words;
    Work work{item_of(load_shared(&message[0]), load_shared(&message[1])), load_shared(&message[2]), {}, q.stage};
    const TileItem& item = work.item;
    if (item.masked_begin < item.masked_end) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        work.segments[half] = p.attention.tiles.row_segments[item.row + first + accumulator_row(lane, 2 * half)];
      }
    }
    q.advance();
    return work;
  }

  ARD_DEVICE void start_scores(const Work& work) {
    pin_registers(s);
    wgmma_fence();
    const uint32_t base = shared_address(shared);
    issue_scores<T, Traits>(s, base + work.stage * kQ.bytes(), 64 * consumer,
                            base + Traits::kOffsetK + k.stage * kK.bytes());
    wgmma_commit();
  }

  // Scores of tile j have arrived and become weights, which are not rounded yet.
  ARD_DEVICE void weigh(const Work& work, int j, Softmax& softmax, float (&factor)[2]) {
    pin_registers(s);
    if (j < work.item.full_tiles()) {
      release(&barriers.empty_k[k.stage]);
    } else {
      const int32_t* const bounds = p.attention.tiles.bounds + as_int(load_shared(&barriers.bounds_at[k.stage]));
      sync_warp();  // all have read it
      release(&barriers.empty_k[k.stage]);
      mask_scores(s, {bounds[work.segments[0]], bounds[work.segments[1]]}, thread);
    }
    k.advance();
    softmax.step(s, p.attention.scale, factor);
    hold_until(softmax.total[0] + softmax.total[1]);  // before the wait for p v
  }

  ARD_DEVICE void start_values() {
    mbarrier_wait(&barriers.full_v[v.stage], v.parity);
    pin_registers(o);
    wgmma_fence();
    issue_values<T, Traits>(o, weights, shared_address(shared) + Traits::kOffsetV + v.stage * kV.bytes());
    wgmma_commit();
  }

  ARD_DEVICE void end_values() {
    wgmma_wait<0>();
    pin_registers(o);
    release(&barriers.empty_v[v.stage]);
    v.advance();
  }

  // An item whose scores are all done: while its last p v runs.
  ARD_DEVICE void before_finish(Softmax& softmax) {
    softmax.finish();
    barrier_sync(kOwn + consumer, 128);  // all its warps are done with the consumer's queries
  }

  ARD_DEVICE void finish(const Work& work, const Softmax& softmax) {
    // Opaque: addresses per lane, hoisted out of the loop, would take 27 registers and spill at D = 128.
    char* const sQ = shared + work.stage * kQ.bytes();
    store_rows<T, Traits>(p.attention, work.item, work.heads, sQ, first, softmax, o, opaque(lane));
    fence_async_proxy();  // before the copy engine writes where these rows were
    sync_warp();
    release(&barriers.empty_q[work.stage]);
  }

  // All key tiles of all items as one sequence: q k^T of a tile is issued with p v of the one before it, also across
  // items, so that an item's first softmax and the output of the last item hide behind matrix products too.
  ARD_DEVICE void run() {
    if (consumer == 1) barrier_arrive(kTurn + 0, 256);  // the first turn is consumer 0's
    int64_t program = block_index();
    Work work = next_work();
    Softmax softmax;
    float factor[2];
    mbarrier_wait(&barriers.full_k[k.stage], k.parity);
    start_scores(work);
    wgmma_wait<0>();
    weigh(work, 0, softmax, factor);
    clear_outputs();
    round_weights<T>(weights, s);
#pragma unroll 1
    for (int j = 1;; ++j) {  // the tile whose scores are next
      const Work before = work;
      Softmax sums = softmax;
      const bool last = j == work.item.column_tiles();
      if (last) {
        program += grid_blocks();
        if (program >= p.programs) break;
        work = next_work(), softmax = Softmax{}, j = 0;
      }
      mbarrier_wait(&barriers.full_k[k.stage], k.parity);
      barrier_sync(kTurn + consumer, 256);
      start_scores(work);
      start_values();
      barrier_arrive(kTurn + 1 - consumer, 256);
      wgmma_wait<1>();
      weigh(work, j, softmax, factor);
      if (last) before_finish(sums);
      end_values();
      if (last) {
        finish(before, sums);
        clear_outputs();
      } else {
#pragma unroll
        for (int i = 0; i < kV.columns() / 2; ++i) o[i] *= factor[i / 2 % 2];
      }
      round_weights<T>(weights, s);
    }
    start_values();
    before_finish(softmax);
    end_values();
    finish(work, softmax);
    if (consumer == 0) barrier_sync(kTurn + 0, 256);  // what consumer 1 arrived at last
  }

  ARD_DEVICE void clear_outputs() {
#pragma unroll
    for (int i = 0; i < kV.columns() / 2; ++i) o[i] = 0;
  }
};

}  // namespace ard::sm90
