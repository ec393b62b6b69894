// Attention forward with mma.sync, for sm_80 and newer (as FlashAttention-2, arXiv 2307.08691):
//   s = scale q k^T where the mask sees,  out = softmax(s) v,  lse = ln sum exp(s)
//
// One thread block per query tile of one head; the key tiles that the table lists, two stages of K and V deep, with a
// running maximum and total. With splits, several blocks share the keys of a query tile and leave partial results
// (history_attention with few queries).
//
// Tensor cores bound it: 4 D FLOPs per query and key that it sees, for 4 D bytes of K and V per key and tile of 128
// queries, 128 FLOPs per byte; the heads of a group find K and V in L2. History attention at batch 1 is bound by the 4
// D bytes per key of the cache.
//
// A warp holds 32 queries (16 at D > 96, or the outputs spill), so each fragment of K and V that it reads serves two
// mma.
#pragma once

#include "mma_tiles.h"
#include "params.h"

namespace ard {

constexpr float kLog2E = 1.4426950408889634f;

template <int kHeadDim_, int kBlockM_>
struct ForwardTraits {
  static constexpr int kHeadDim = kHeadDim_, kBlockM = kBlockM_, kStages = 2;
  static constexpr int kBlockN = forward_block_n(kHeadDim), kMTiles = kHeadDim <= 96 ? 2 : 1;
  static constexpr int kThreads = kBlockM / kMTiles * 2, kWarpRows = 16 * kMTiles;
  // Kept in registers Q costs D / 4 of them per 16 rows and saves a third of the reads; at D > 64 they spill.
  static constexpr bool kKeepQ = kHeadDim <= 64;
  static constexpr int kBytesQ = Tile<kHeadDim>::bytes(kBlockM), kBytesK = Tile<kHeadDim>::bytes(kBlockN);
  static constexpr int kSharedBytes = kBytesQ + 2 * kStages * kBytesK;
  static constexpr int kBlocks = (kHeadDim <= 96 ? 256 : 128) / kBlockM;  // per multiprocessor, by registers
};

// Online softmax over one tile of scores, in base 2: scores become weights exp2(scale * s - maximum).
template <class Traits>
struct Softmax {
  static constexpr int kMTiles = Traits::kMTiles, kTiles = Traits::kBlockN / 8;
  float maximum_[kMTiles][2], total[kMTiles][2];  // of scale * s; the totals of this lane's columns only

  ARD_DEVICE void reset() {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      maximum_[m][0] = maximum_[m][1] = -INFINITY;
      total[m][0] = total[m][1] = 0;
    }
  }

  ARD_DEVICE void step(float (&s)[kMTiles][kTiles][4], float (&o)[kMTiles][Traits::kHeadDim / 8][4], float scale) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = s[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          highest = maximum(highest, maximum(s[m][n][2 * half], s[m][n][2 * half + 1]));
        }
        highest = maximum(highest, shuffle_xor(highest, 1));
        highest = maximum(highest, shuffle_xor(highest, 2));
        const float next = maximum(maximum_[m][half], highest * scale);
        // A row that has seen no key yet: -inf - -inf is not a number.
        const float finite = next == -INFINITY ? 0.f : next;
        const float factor = exp2_approx(maximum_[m][half] - finite);
        maximum_[m][half] = next;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) sum += s[m][n][i] = exp2_approx(s[m][n][i] * scale - finite);
        }
        total[m][half] = total[m][half] * factor + sum;
#pragma unroll
        for (int n = 0; n < Traits::kHeadDim / 8; ++n) o[m][n][2 * half] *= factor, o[m][n][2 * half + 1] *= factor;
      }
    }
  }

  // Totals of whole rows, on every lane of the row.
  ARD_DEVICE void finish() {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        total[m][half] += shuffle_xor(total[m][half], 1);
        total[m][half] += shuffle_xor(total[m][half], 2);
      }
    }
  }
};

// Scores of columns that a row does not see become -inf; +inf when a negative scale follows. They are those of a masked
// tile from its column `first` on, of rows from `row` on.
template <int kMTiles, int kTiles>
ARD_DEVICE void mask_scores(float (&s)[kMTiles][kTiles][4], const TileTables& tables, const MaskedTile& tile, int row,
                            int first, bool negative, int lane) {
  const float unseen = negative ? INFINITY : -INFINITY;
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 16 * m + fragment_row(lane, 2 * half);
      const RowBounds own(tables.bounds[tile.at + tables.row_segments[r]]);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[m][n][i] = own.sees(first + 8 * n + fragment_column(lane, i)) ? s[m][n][i] : unseen;
        }
      }
    }
  }
}

// The j-th column tile of an item: where it starts, and where its columns stop to count.
template <int kBlockN>
ARD_DEVICE MaskedTile column_tile(const TileItem& item, const MaskedTile* masked, int j) {
  if (j >= item.full_tiles()) return masked[item.masked_begin + j - item.full_tiles()];
  const int start = full_tile_start(item, j, kBlockN);
  return {start, start + kBlockN, 0, 0};
}

struct alignas(8) FloatPair {
  float first, second;
};

// Partial results of a split: (splits, rows) outputs that are not divided by their total yet, then maxima and totals.
template <class Traits>
ARD_DEVICE void store_partial(const AttentionParams& p, const Softmax<Traits>& softmax,
                              const float (&o)[Traits::kMTiles][Traits::kHeadDim / 8][4], int batch_head, int row,
                              int row_stop, int lane) {
  const int64_t all_rows = static_cast<int64_t>(p.batch) * p.heads * p.tokens;
  float* statistics = p.workspace + p.splits * all_rows * Traits::kHeadDim;
#pragma unroll
  for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 16 * m + fragment_row(lane, 2 * half);
      if (r >= row_stop) continue;
      const int64_t at = block_index_y() * all_rows + static_cast<int64_t>(batch_head) * p.tokens + r;
#pragma unroll
      for (int n = 0; n < Traits::kHeadDim / 8; ++n) {
        float* to = p.workspace + at * Traits::kHeadDim + 8 * n + fragment_column(lane, 0);
        *reinterpret_cast<FloatPair*>(to) = {o[m][n][2 * half], o[m][n][2 * half + 1]};
      }
      if (lane % 4 == 0) {
        *reinterpret_cast<FloatPair*>(statistics + 2 * at) = {softmax.maximum_[m][half], softmax.total[m][half]};
      }
    }
  }
}

template <class Traits, class T>
ARD_DEVICE void store_result(const AttentionParams& p, const Softmax<Traits>& softmax,
                             const float (&o)[Traits::kMTiles][Traits::kHeadDim / 8][4], char* sRows, int batch_head,
                             int row, int row_stop, int lane) {
  float inverse[Traits::kMTiles][2];
#pragma unroll
  for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = softmax.total[m][half] == 0 ? 1 : softmax.total[m][half];  // 0: a row that sees nothing
      inverse[m][half] = 1 / total;
      const int r = row + 16 * m + fragment_row(lane, 2 * half);
      if (p.lse && lane % 4 == 0 && r < row_stop) {
        p.lse[static_cast<int64_t>(batch_head) * p.tokens + r] =
            (softmax.maximum_[m][half] + log2_approx(total)) / kLog2E;
      }
    }
  }
  char* gOut = head_pointer(p.out, batch_head / p.heads, batch_head % p.heads);
  store_rows<T, Traits::kHeadDim, Traits::kMTiles>(sRows, gOut, p.out.stride_token, row, row_stop, o, inverse, lane);
}

// Grid (tiles * batch * heads, splits). p.scale is |scale| * log2(e); `flip` holds its sign.
template <class T, class Traits, bool kSplit>
ARD_KERNEL(Traits::kThreads, Traits::kBlocks)
sm80_forward(const ARD_GRID_CONSTANT AttentionParams p) {
  constexpr int kHeadDim = Traits::kHeadDim, kMTiles = Traits::kMTiles, kBlockN = Traits::kBlockN;
  const int thread = thread_index(), lane = thread % 32;
  const auto [tile, batch_head] = head_tile(block_index(), p.batch * p.heads, p.tiles.group, p.tiles.tiles);
  const TileItem item = p.tiles.items[tile];
  const int batch = batch_head / p.heads, head = batch_head % p.heads;
  const char *gK = head_pointer(p.k, batch, head / p.share()), *gV = head_pointer(p.v, batch, head / p.share());
  char *sQ = shared_memory(), *sKV = sQ + Traits::kBytesQ;

  const int first = kSplit ? block_index_y() * p.tiles_per_split : 0;
  const int last = kSplit ? min_int(first + p.tiles_per_split, item.column_tiles()) : item.column_tiles();
  const auto copy_columns = [&](int j) {
    const MaskedTile tile = column_tile<kBlockN>(item, p.tiles.masked, j);
    char* sK = sKV + (j - first) % Traits::kStages * 2 * Traits::kBytesK;
    copy_tile<kHeadDim, kBlockN, Traits::kThreads>(sK, gK, p.k.stride_token, tile.start, tile.stop, thread);
    copy_tile<kHeadDim, kBlockN, Traits::kThreads>(sK + Traits::kBytesK, gV, p.v.stride_token, tile.start, tile.stop,
                                                   thread);
  };
  const char* gQ = head_pointer(p.q, batch, head);
  copy_tile<kHeadDim, Traits::kBlockM, Traits::kThreads>(sQ, gQ, p.q.stride_token, item.row, item.row_stop, thread);
  if (first < last) copy_columns(first);
  cp_async_commit();

  Softmax<Traits> softmax;
  softmax.reset();
  float o[kMTiles][kHeadDim / 8][4];
  clear(o);
  Operands<kHeadDim, kMTiles> q;
  char* sRows = sQ + thread / 32 * Tile<kHeadDim>::bytes(Traits::kWarpRows);  // this warp's queries
  const int row = item.row + thread / 32 * Traits::kWarpRows;
  for (int j = first; j < last; ++j) {
    cp_async_wait<0>();
    sync_block();  // tile j is here for all, and all are done with tile j - 1, whose stage is filled anew
    if (j + 1 < last) copy_columns(j + 1);
    cp_async_commit();
    const char* sK = sKV + (j - first) % Traits::kStages * 2 * Traits::kBytesK;
    float s[kMTiles][kBlockN / 8][4];
    clear(s);
    if constexpr (Traits::kKeepQ) {
      if (j == first) q.load(sRows, lane, p.flip);
      rows_times_rows<T, kHeadDim, kMTiles, kBlockN>(s, q, sK, lane);
    } else {
      rows_times_rows<T, kHeadDim, kMTiles, kBlockN>(s, sRows, sK, lane, p.flip);
    }
    if (j >= item.full_tiles()) {
      mask_scores(s, p.tiles, column_tile<kBlockN>(item, p.tiles.masked, j), row, 0, false, lane);
    }
    softmax.step(s, o, p.scale);
    weights_times_rows<T, kHeadDim, kMTiles, kBlockN>(o, s, sK + Traits::kBytesK, lane);
  }
  cp_async_wait<0>();
  softmax.finish();
  if constexpr (kSplit) {
    store_partial<Traits>(p, softmax, o, batch_head, row, item.row_stop, lane);
  } else {
    store_result<Traits, T>(p, softmax, o, sRows, batch_head, row, item.row_stop, lane);
  }
}

template <class T, class Traits, bool kSplit>
void launch_sm80_forward(const AttentionParams& p, void* stream) {
  const int64_t blocks = static_cast<int64_t>(p.tiles.tiles) * p.batch * p.heads;
  launch<sm80_forward<T, Traits, kSplit>>(blocks, kSplit ? p.splits : 1, Traits::kThreads, Traits::kSharedBytes,
                                          static_cast<Stream>(stream), p);
}

template <int kHeadDim>
void attention_forward_sm80(const AttentionParams& p, DType dtype, void* stream) {
  using Traits = ForwardTraits<kHeadDim, kForwardBlockM>;
  dtype == DType::kBFloat16 ? launch_sm80_forward<bfloat16, Traits, false>(p, stream)
                            : launch_sm80_forward<float16, Traits, false>(p, stream);
}

template <int kHeadDim>
void attention_history_sm80(const AttentionParams& p, DType dtype, void* stream) {
  using Traits = ForwardTraits<kHeadDim, kHistoryBlockM>;
  if (p.splits > 1) {
    dtype == DType::kBFloat16 ? launch_sm80_forward<bfloat16, Traits, true>(p, stream)
                              : launch_sm80_forward<float16, Traits, true>(p, stream);
  } else {
    dtype == DType::kBFloat16 ? launch_sm80_forward<bfloat16, Traits, false>(p, stream)
                              : launch_sm80_forward<float16, Traits, false>(p, stream);
  }
}

}  // namespace ard
