// Attention backward with mma.sync, for sm_80 and newer, in two launches, so that every output has one writer and
// gradients are bit-equal over runs:
//
//   dQ      a block per query tile walks over its key tiles    p = exp2(scale2 q k^T - lse2),  delta = rowsum(do * o)
//                                                              ds = p (do v^T - delta),        dq = scale ds k
//           (delta also less the gradient of lse, where there is one)
//   dK, dV  a block per key tile walks over the query tiles    dk = scale ds^T q,              dv = p^T do
//
// with scale2 = scale log2(e), lse2 = lse log2(e). Scores of the second are transposed: keys are rows. 7 products where
// 5 are useful; adding dQ up over blocks through memory would cost more (see ../../docs/gpu.md).
//
// 14 D FLOPs per query and key that it sees, for 4 D bytes per column and tile of 128 rows. On Hopper reads of shared
// memory bound it before the tensor cores do (docs/predictions.md): each warp reads the columns' fragments for itself.
#pragma once

#include "sm80_forward.h"

namespace ard {

// Reads of shared memory bound it, so fragments of the columns serve 32 rows a warp where registers allow: up to D =
// 72, two blocks on a multiprocessor. dK and dV have two outputs, and take 16 columns at a time then; by `python -m
// benchmarks.predict` that takes 0.80 of the cycles of shared memory that warps of 16 rows take. Above, one block of
// twice the warps, with 16 rows each.
template <int kHeadDim_, int kMTiles_, int kStep_>
struct BackwardTraits {
  static constexpr int kHeadDim = kHeadDim_, kMTiles = kMTiles_, kWarpRows = 16 * kMTiles;
  static constexpr int kBlockM = kBackwardBlockM, kBlockN = kBackwardBlockN, kStages = 2;
  // Columns at a time: scores and their gradient take kMTiles * kStep registers.
  static constexpr int kStep = kStep_;
  static constexpr int kThreads = kBlockM / kMTiles * 2;
  static constexpr int kBytesRows = Tile<kHeadDim>::bytes(kBlockM), kBytesColumns = Tile<kHeadDim>::bytes(kBlockN);
  static constexpr int kBytesStatistics = 2 * kBlockN * 4;  // lse and delta of the columns
  static constexpr int kBytesStage = 2 * kBytesColumns + kBytesStatistics;
  static constexpr int kSharedBytes = 2 * kBytesRows + kStages * kBytesStage;
  static constexpr int kBlocks = kMTiles;  // per multiprocessor, by registers
};

// The scores of kStep columns become weights p, and dp becomes ds / scale = p (dp - delta). A row's or a column's lse2
// and delta come from `statistics(m, n, i)`; columns that a row does not see get 0 when `bounds` is given.
template <class Traits, class Statistics>
ARD_DEVICE void score_gradient(float (&s)[Traits::kMTiles][Traits::kStep / 8][4],
                               float (&dp)[Traits::kMTiles][Traits::kStep / 8][4], float scale2,
                               const Statistics& statistics) {
#pragma unroll
  for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kStep / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto [lse2, delta] = statistics(m, n, i);
        s[m][n][i] = exp2_approx(s[m][n][i] * scale2 - lse2);
        dp[m][n][i] = s[m][n][i] * (dp[m][n][i] - delta);
      }
    }
  }
}

struct RowStatistics {
  float lse2, delta;
};

// The statistics of a warp's rows, also written to memory: each lane takes one row, then hands it to the lanes that
// hold elements of it. A row that sees nothing has scores of -inf alone, and -inf - -inf is not a number: lse2 is 0
// there.
template <class T, class Traits>
ARD_DEVICE void row_statistics(RowStatistics (&own)[Traits::kMTiles][2], const AttentionBackwardParams& p,
                               const char* sGradRows, int batch_head, int row, int row_stop, int lane) {
  const int r = lane % Traits::kWarpRows;
  const bool here = row + r < row_stop;
  const int64_t at = static_cast<int64_t>(batch_head) * p.tokens + row + r;
  float delta = 0, lse2 = 0;
  if (here) {
    const char* gOut =
        head_pointer(p.out, batch_head / p.heads, batch_head % p.heads) + (row + r) * p.out.stride_token * 2;
    for (int chunk = 0; chunk < Traits::kHeadDim / 8; ++chunk) {
      const Words out = load_global(gOut + 16 * chunk);
      const Words grad =
          load_shared(reinterpret_cast<const Words*>(sGradRows + Tile<Traits::kHeadDim>::offset(r, chunk)));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto low = [](uint32_t word) { return widen(T{static_cast<uint16_t>(word)}); };
        const auto high = [](uint32_t word) { return widen(T{static_cast<uint16_t>(word >> 16)}); };
        delta += low(out.word[i]) * low(grad.word[i]) + high(out.word[i]) * high(grad.word[i]);
      }
    }
    const float lse = p.lse[at];
    if (lse != -INFINITY) {
      lse2 = lse * kLog2E;
      if (p.grad_lse) delta -= p.grad_lse[at];
    }
    p.statistics[at] = lse2;
    p.statistics[static_cast<int64_t>(p.batch) * p.heads * p.tokens + at] = delta;
  }
#pragma unroll
  for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int from = 16 * m + fragment_row(lane, 2 * half);
      own[m][half] = {shuffle(lse2, from), shuffle(delta, from)};
    }
  }
}

// Which row and column tiles a block works on, and where its tiles lie in shared memory.
template <class Traits>
struct BackwardBlock {
  int thread, lane, batch_head, batch, head, row;
  TileItem item;
  char *sA, *sB, *sStages;  // two row tiles, then stages of two column tiles and their statistics

  // heads: of the rows.
  ARD_DEVICE BackwardBlock(int batches, int heads, const TileTables& tables) {
    thread = thread_index(), lane = thread % 32;
    const HeadTile place = head_tile(block_index(), batches * heads, tables.group, tables.tiles);
    item = tables.items[place.tile];
    batch_head = place.batch_head, batch = batch_head / heads, head = batch_head % heads;
    row = item.row + thread / 32 * Traits::kWarpRows;
    sA = shared_memory(), sB = sA + Traits::kBytesRows, sStages = sB + Traits::kBytesRows;
  }

  ARD_DEVICE char* own_rows(char* sX) const {
    return sX + thread / 32 * Tile<Traits::kHeadDim>::bytes(Traits::kWarpRows);
  }
  ARD_DEVICE char* stage(int j) const { return sStages + j % Traits::kStages * Traits::kBytesStage; }

  ARD_DEVICE void copy_rows(char* sX, const HeadsView& x) const {
    copy_tile<Traits::kHeadDim, Traits::kBlockM, Traits::kThreads>(sX, head_pointer(x, batch, head), x.stride_token,
                                                                   item.row, item.row_stop, thread);
  }
  ARD_DEVICE void copy_columns(char* sX, const HeadsView& x, int column_head, MaskedTile tile) const {
    copy_tile<Traits::kHeadDim, Traits::kBlockN, Traits::kThreads>(sX, head_pointer(x, batch, column_head),
                                                                   x.stride_token, tile.start, tile.stop, thread);
  }
};

template <class T, class Traits>
ARD_KERNEL(Traits::kThreads, Traits::kBlocks)
sm80_backward_dq(const ARD_GRID_CONSTANT AttentionBackwardParams p) {
  constexpr int kHeadDim = Traits::kHeadDim, kMTiles = Traits::kMTiles, kStep = Traits::kStep;
  const TileTables& tables = p.by_query;
  const BackwardBlock<Traits> block(p.batch, p.heads, tables);
  const int kv_head = block.head / p.share();
  const auto copy = [&](int j) {
    const MaskedTile tile = column_tile<Traits::kBlockN>(block.item, tables.masked, j);
    block.copy_columns(block.stage(j), p.k, kv_head, tile);
    block.copy_columns(block.stage(j) + Traits::kBytesColumns, p.v, kv_head, tile);
  };
  block.copy_rows(block.sA, p.q);
  block.copy_rows(block.sB, p.grad_out);
  const int tiles = block.item.column_tiles();
  copy(0);
  cp_async_commit();
  cp_async_wait<0>();
  sync_block();

  char *sQ = block.own_rows(block.sA), *sGrad = block.own_rows(block.sB);
  RowStatistics own[kMTiles][2];
  row_statistics<T, Traits>(own, p, sGrad, block.batch_head, block.row, block.item.row_stop, block.lane);
  float dq[kMTiles][kHeadDim / 8][4];
  clear(dq);
  for (int j = 0; j < tiles; ++j) {
    cp_async_wait<0>();
    sync_block();  // tile j is here for all, and all are done with tile j - 1, whose stage is filled anew
    if (j + 1 < tiles) copy(j + 1);
    cp_async_commit();
#pragma unroll 1  // unrolled, two steps' fragments are in flight and spill
    for (int first = 0; first < Traits::kBlockN; first += kStep) {
      const char* sK = block.stage(j) + Tile<kHeadDim>::bytes(first);
      float s[kMTiles][kStep / 8][4], dp[kMTiles][kStep / 8][4];
      clear(s);
      clear(dp);
      rows_times_rows<T, kHeadDim, kMTiles, kStep>(s, sQ, sK, block.lane);
      rows_times_rows<T, kHeadDim, kMTiles, kStep>(dp, sGrad, sK + Traits::kBytesColumns, block.lane);
      if (j >= block.item.full_tiles()) {
        const MaskedTile tile = column_tile<Traits::kBlockN>(block.item, tables.masked, j);
        mask_scores(s, tables, tile, block.row, first, p.scale < 0, block.lane);
      }
      score_gradient<Traits>(s, dp, p.scale2, [&](int m, int, int i) { return own[m][i / 2]; });
      weights_times_rows<T, kHeadDim, kMTiles, kStep>(dq, dp, sK, block.lane);
    }
  }
  cp_async_wait<0>();
  float factor[kMTiles][2];
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) factor[m][0] = factor[m][1] = p.scale;
  store_rows<T, kHeadDim, kMTiles>(sQ, head_pointer(p.dq, block.batch, block.head), p.dq.stride_token, block.row,
                                   block.item.row_stop, dq, factor, block.lane);
}

// At D > 96 both outputs would spill: one launch each then, 8 products in all.
template <class T, class Traits, bool kDk, bool kDv>
ARD_KERNEL(Traits::kThreads, Traits::kBlocks)
sm80_backward_dkv(const ARD_GRID_CONSTANT AttentionBackwardParams p) {
  constexpr int kHeadDim = Traits::kHeadDim, kMTiles = Traits::kMTiles, kStep = Traits::kStep;
  const TileTables& tables = p.by_key;
  const BackwardBlock<Traits> block(p.batch, p.kv_heads, tables);
  // The column tiles of all query heads that read these keys, head by head: the j-th belongs to the member-th head.
  const int head_tiles = block.item.column_tiles(), share = p.share();
  const auto member = [&](int j) { return share == 1 ? 0 : j / head_tiles; };
  const auto copy = [&](int j) {
    const int head = block.head * share + member(j);
    const MaskedTile tile = column_tile<Traits::kBlockN>(block.item, tables.masked, j - member(j) * head_tiles);
    block.copy_columns(block.stage(j), p.q, head, tile);
    block.copy_columns(block.stage(j) + Traits::kBytesColumns, p.grad_out, head, tile);
    if (block.thread < Traits::kBlockN) {
      const int column = tile.start + block.thread;
      const int64_t rows = static_cast<int64_t>(p.heads) * p.tokens;
      const float* lse2 = p.statistics + block.batch * rows + static_cast<int64_t>(head) * p.tokens + column;
      char* to = block.stage(j) + 2 * Traits::kBytesColumns + 4 * block.thread;
      cp_async_4(to, lse2, column < tile.stop);
      cp_async_4(to + 4 * Traits::kBlockN, lse2 + p.batch * rows, column < tile.stop);
    }
  };
  block.copy_rows(block.sA, p.k);
  block.copy_rows(block.sB, p.v);
  const int tiles = head_tiles * share;
  copy(0);
  cp_async_commit();

  char *sK = block.own_rows(block.sA), *sV = block.own_rows(block.sB);
  float dk[kMTiles][kHeadDim / 8][4], dv[kMTiles][kHeadDim / 8][4];
  clear(dk);
  clear(dv);
  for (int j = 0; j < tiles; ++j) {
    cp_async_wait<0>();
    sync_block();  // as in dQ
    if (j + 1 < tiles) copy(j + 1);
    cp_async_commit();
    const auto* statistics = reinterpret_cast<const float*>(block.stage(j) + 2 * Traits::kBytesColumns);
#pragma unroll 1  // unrolled, two steps' fragments are in flight and spill
    for (int first = 0; first < Traits::kBlockN; first += kStep) {
      const char* sQ = block.stage(j) + Tile<kHeadDim>::bytes(first);
      const char* sGrad = sQ + Traits::kBytesColumns;
      float s[kMTiles][kStep / 8][4], ds[kMTiles][kStep / 8][4];
      clear(s);
      clear(ds);
      rows_times_rows<T, kHeadDim, kMTiles, kStep>(s, sK, sQ, block.lane);
      if constexpr (kDk) rows_times_rows<T, kHeadDim, kMTiles, kStep>(ds, sV, sGrad, block.lane);
      if (const int own = j - member(j) * head_tiles; own >= block.item.full_tiles()) {
        const MaskedTile tile = column_tile<Traits::kBlockN>(block.item, tables.masked, own);
        mask_scores(s, tables, tile, block.row, first, p.scale < 0, block.lane);
      }
      score_gradient<Traits>(s, ds, p.scale2, [&](int, int n, int i) {
        const float* column = statistics + first + 8 * n + fragment_column(block.lane, i);
        return RowStatistics{load_shared(column), load_shared(column + Traits::kBlockN)};
      });
      if constexpr (kDv) weights_times_rows<T, kHeadDim, kMTiles, kStep>(dv, s, sGrad, block.lane);
      if constexpr (kDk) weights_times_rows<T, kHeadDim, kMTiles, kStep>(dk, ds, sQ, block.lane);
    }
  }
  cp_async_wait<0>();
  float factor[kMTiles][2], one[kMTiles][2];
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) factor[m][0] = factor[m][1] = p.scale, one[m][0] = one[m][1] = 1;
  if constexpr (kDk)
    store_rows<T, kHeadDim, kMTiles>(sK, head_pointer(p.dk, block.batch, block.head), p.dk.stride_token, block.row,
                                     block.item.row_stop, dk, factor, block.lane);
  if constexpr (kDv)
    store_rows<T, kHeadDim, kMTiles>(sV, head_pointer(p.dv, block.batch, block.head), p.dv.stride_token, block.row,
                                     block.item.row_stop, dv, one, block.lane);
}

template <class T, int kHeadDim>
void launch_sm80_backward(const AttentionBackwardParams& p, void* stream) {
  constexpr int kMTiles = kHeadDim <= 72 ? 2 : 1;
  using Dq = BackwardTraits<kHeadDim, kMTiles, 32>;
  using Dkv = BackwardTraits<kHeadDim, kMTiles, kMTiles == 2 ? 16 : 32>;
  const int64_t query_blocks = static_cast<int64_t>(p.by_query.tiles) * p.batch * p.heads;
  const int64_t key_blocks = static_cast<int64_t>(p.by_key.tiles) * p.batch * p.kv_heads;
  launch<sm80_backward_dq<T, Dq>>(query_blocks, 1, Dq::kThreads, Dq::kSharedBytes, static_cast<Stream>(stream), p);
  if constexpr (kHeadDim <= 96) {
    launch<sm80_backward_dkv<T, Dkv, true, true>>(key_blocks, 1, Dkv::kThreads, Dkv::kSharedBytes,
                                                  static_cast<Stream>(stream), p);
  } else {
    launch<sm80_backward_dkv<T, Dkv, true, false>>(key_blocks, 1, Dkv::kThreads, Dkv::kSharedBytes,
                                                   static_cast<Stream>(stream), p);
    launch<sm80_backward_dkv<T, Dkv, false, true>>(key_blocks, 1, Dkv::kThreads, Dkv::kSharedBytes,
                                                   static_cast<Stream>(stream), p);
  }
}

template <int kHeadDim>
int attention_shared_bytes_sm80() {
  constexpr int kForward = ForwardTraits<kHeadDim, kForwardBlockM>::kSharedBytes;
  constexpr int kBackward = BackwardTraits<kHeadDim, 1, 32>::kSharedBytes,
                kMost = kForward > kBackward ? kForward : kBackward;
  static_assert(kMost <= 163 << 10, "what a block may have on sm_80");
  return kMost;
}

template <int kHeadDim>
void attention_backward_sm80(const AttentionBackwardParams& p, DType dtype, void* stream) {
  dtype == DType::kBFloat16 ? launch_sm80_backward<bfloat16, kHeadDim>(p, stream)
                            : launch_sm80_backward<float16, kHeadDim>(p, stream);
}

}  // namespace ard
