// Tiles of 16-bit numbers in shared memory and the tensor-core products of them that attention needs, for mma.sync.
//
//   rows_times_rows      (rows, columns) += A B^T    A, B: (rows | columns, D) tiles            Q K^T, dO V^T
//   weights_times_rows   (rows, D) += W B            W: (rows, columns) in registers, B a tile   P V, dS K
//
// A warp holds kMTiles x 16 rows. An ldmatrix reads one 16-byte chunk (8 numbers) of 32 rows, or two of 16 rows.
// A head dim is taken exactly: chunks pair up for k = 16, an odd last one (D = 72, 88) is an mma with k = 8.
#pragma once

#include "../common/gpu.h"
#include "../common/numbers.h"
#include "../common/tensor.h"

namespace ard {

// A (rows, kHeadDim) tile. The pitch is an odd number of 16-byte chunks, so the same chunk of eight successive rows
// lies in eight different groups of four banks: ldmatrix and 16-byte copies are free of conflicts, D = 72 without
// padding.
template <int kHeadDim>
struct Tile {
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kPitch = (kChunks | 1) * 16;
  static constexpr int bytes(int rows) { return rows * kPitch; }
  static constexpr int offset(int row, int chunk) { return row * kPitch + chunk * 16; }
};

// Where element i (0 to 3) of a lane's accumulator lies in its 16 x 8 tile.
constexpr int fragment_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
constexpr int fragment_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

// One (batch, head) of a tensor.
ARD_DEVICE char* head_pointer(const HeadsView& x, int batch, int head) {
  return static_cast<char*>(x.data) + (batch * x.stride_batch + head * x.stride_head) * 2;
}

// Start copying rows start .. start + kRows of a head into a tile; rows at or past `stop` become zeros. A thread keeps
// to one chunk and goes down the rows by a constant step, so that it needs one address, not one per copy.
template <int kHeadDim, int kRows, int kThreads>
ARD_DEVICE void copy_tile(char* sX, const char* gX, int64_t stride_token, int start, int stop, int thread) {
  constexpr int kChunks = Tile<kHeadDim>::kChunks, kStep = kThreads / kChunks;
  const int first = thread / kChunks, chunk = thread % kChunks;
  if (kThreads % kChunks != 0 && first >= kStep) return;
  const char* from = gX + ((start + first) * stride_token + chunk * 8) * 2;
  char* to = sX + Tile<kHeadDim>::offset(first, chunk);
#pragma unroll
  for (int i = 0; i < (kRows + kStep - 1) / kStep; ++i) {
    const int row = first + i * kStep;
    if (kRows % kStep == 0 || row < kRows) cp_async(to + i * Tile<kHeadDim>::bytes(kStep), from, start + row < stop);
    from += kStep * stride_token * 2;
  }
}

// A operands for two chunks (k = 16), chunk and chunk + 1, of kMTiles x 16 rows from `sRows` on. With `last` the second
// chunk does not exist: words 2 and 3 are not used (k = 8).
template <int kHeadDim, int kMTiles, bool kLast>
ARD_DEVICE void load_operands(uint32_t (&a)[kMTiles][4], const char* sRows, int chunk, int lane) {
  using Rows = Tile<kHeadDim>;
  if constexpr (kLast && kMTiles == 2) {
    uint32_t words[4];
    ldmatrix(words, sRows + Rows::offset(lane, chunk));
    a[0][0] = words[0], a[0][1] = words[1], a[1][0] = words[2], a[1][1] = words[3];
  } else {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      ldmatrix(a[m], sRows + Rows::offset(16 * m + lane % 16, kLast ? chunk : chunk + lane / 16));
    }
  }
}

// The A operands of a whole row block, for reuse over many column tiles.
template <int kHeadDim, int kMTiles>
struct Operands {
  static constexpr int kSteps = (Tile<kHeadDim>::kChunks + 1) / 2;
  uint32_t words[kSteps][kMTiles][4];

  // `flip` is xor-ed onto every word (0x80008000 changes all signs).
  ARD_DEVICE void load(const char* sRows, int lane, uint32_t flip) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (2 * step + 1 < Tile<kHeadDim>::kChunks) {
        load_operands<kHeadDim, kMTiles, false>(words[step], sRows, 2 * step, lane);
      } else {
        load_operands<kHeadDim, kMTiles, true>(words[step], sRows, 2 * step, lane);
      }
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) words[step][m][i] ^= flip;
      }
    }
  }
};

// One k-step of rows_times_rows. An ldmatrix brings two chunks of 16 columns, so that the two words of a B operand come
// into registers side by side, as mma takes them: apart, moves were half of dQ's instructions at D = 72 (SASS of nvcc
// 13.0). Of a last, odd chunk it brings up to 32 columns.
template <class T, int kHeadDim, int kMTiles, int kColumns>
ARD_DEVICE void multiply_step(float (&s)[kMTiles][kColumns / 8][4], const uint32_t (&a)[kMTiles][4], const char* sB,
                              int step, int lane) {
  using Rows = Tile<kHeadDim>;
  if (2 * step + 1 < Rows::kChunks) {
#pragma unroll
    for (int block = 0; block < kColumns / 16; ++block) {
      uint32_t b[4];
      const int column = 16 * block + (lane >> 4) * 8 + (lane & 7), chunk = 2 * step + (lane >> 3 & 1);
      ldmatrix(b, sB + Rows::offset(column, chunk));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) mma<T>(s[m][2 * block + i], a[m], b[2 * i], b[2 * i + 1]);
      }
    }
  } else {
    constexpr int kAtOnce = kColumns < 32 ? kColumns : 32;
#pragma unroll
    for (int block = 0; block < kColumns / kAtOnce; ++block) {
      uint32_t b[4];
      ldmatrix(b, sB + Rows::offset(kAtOnce * block + lane % kAtOnce, 2 * step));
#pragma unroll
      for (int i = 0; i < kAtOnce / 8; ++i) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          mma_k8<T>(s[m][kAtOnce / 8 * block + i], a[m][0], a[m][1], b[i]);
        }
      }
    }
  }
}

// s += A B^T with A's operands in registers.
template <class T, int kHeadDim, int kMTiles, int kColumns>
ARD_DEVICE void rows_times_rows(float (&s)[kMTiles][kColumns / 8][4], const Operands<kHeadDim, kMTiles>& a,
                                const char* sB, int lane) {
#pragma unroll
  for (int step = 0; step < Operands<kHeadDim, kMTiles>::kSteps; ++step) {
    multiply_step<T, kHeadDim, kMTiles, kColumns>(s, a.words[step], sB, step, lane);
  }
}

// s += A B^T with A in shared memory; `flip` is xor-ed onto A's words (0x80008000 changes all signs).
template <class T, int kHeadDim, int kMTiles, int kColumns>
ARD_DEVICE void rows_times_rows(float (&s)[kMTiles][kColumns / 8][4], const char* sA, const char* sB, int lane,
                                uint32_t flip = 0) {
#pragma unroll
  for (int step = 0; step < Operands<kHeadDim, kMTiles>::kSteps; ++step) {
    uint32_t a[kMTiles][4] = {};
    if (2 * step + 1 < Tile<kHeadDim>::kChunks) {
      load_operands<kHeadDim, kMTiles, false>(a, sA, 2 * step, lane);
    } else {
      load_operands<kHeadDim, kMTiles, true>(a, sA, 2 * step, lane);
    }
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m][i] ^= flip;
    }
    multiply_step<T, kHeadDim, kMTiles, kColumns>(s, a, sB, step, lane);
  }
}

// o += w B. An accumulator of two neighbouring column tiles is the A operand of k = 16, rounded to T.
template <class T, int kHeadDim, int kMTiles, int kColumns>
ARD_DEVICE void weights_times_rows(float (&o)[kMTiles][kHeadDim / 8][4], const float (&w)[kMTiles][kColumns / 8][4],
                                   const char* sB, int lane) {
  if constexpr (kColumns == 16) {
    uint32_t a[kMTiles][4];
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m][i] = narrow2<T>(w[m][i / 2][i % 2 * 2], w[m][i / 2][i % 2 * 2 + 1]);
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; n += 2) {
      const bool pair = n + 1 < kHeadDim / 8;
      uint32_t b[4];
      ldmatrix_transposed(b, sB + Tile<kHeadDim>::offset(lane % 16, n + (pair ? lane / 16 : 0)));
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) mma<T>(o[m][n], a[m], b[0], b[1]);
#pragma unroll
      for (int m = 0; pair && m < kMTiles; ++m) mma<T>(o[m][n + 1], a[m], b[2], b[3]);
    }
  } else {
#pragma unroll
    for (int block = 0; block < kColumns / 32; ++block) {
      uint32_t a[kMTiles][2][4];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float (&pair)[4] = w[m][4 * block + i / 2];
          a[m][i / 4][i % 4] = i % 2 == 0 ? narrow2<T>(pair[0], pair[1]) : narrow2<T>(pair[2], pair[3]);
        }
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        uint32_t b[4];
        ldmatrix_transposed(b, sB + Tile<kHeadDim>::offset(32 * block + lane, n));
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) mma<T>(o[m][n], a[m][0], b[0], b[1]);
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) mma<T>(o[m][n], a[m][1], b[2], b[3]);
      }
    }
  }
}

template <int kMTiles, int kTiles>
ARD_DEVICE void clear(float (&x)[kMTiles][kTiles][4]) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[m][n][i] = 0;
    }
  }
}

// Write a warp's kMTiles x 16 rows, times `factor` of each, to rows `start ..` below `stop` of a head: through the
// warp's own rows of a tile in shared memory, so that every store has 16 bytes.
template <class T, int kHeadDim, int kMTiles>
ARD_DEVICE void store_rows(char* sRows, char* gX, int64_t stride_token, int start, int stop,
                           const float (&x)[kMTiles][kHeadDim / 8][4], const float (&factor)[kMTiles][2], int lane) {
  using Rows = Tile<kHeadDim>;
  sync_warp();  // the warp's last reads of its rows
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair = narrow2<T>(x[m][n][2 * half] * factor[m][half], x[m][n][2 * half + 1] * factor[m][half]);
        char* to = sRows + Rows::offset(16 * m + fragment_row(lane, 2 * half), n) + lane % 4 * 4;
        store_shared(reinterpret_cast<uint32_t*>(to), pair);
      }
    }
  }
  sync_warp();
  // In the order of memory, the padding included: so eight lanes never meet in a bank.
  constexpr int kPitchChunks = Rows::kPitch / 16, kStores = 16 * kMTiles * kPitchChunks;
#pragma unroll
  for (int i = 0; i < (kStores + 31) / 32; ++i) {
    const int store = 32 * i + lane, row = store / kPitchChunks, chunk = store % kPitchChunks;
    if ((kStores % 32 == 0 || store < kStores) && chunk < Rows::kChunks && start + row < stop) {
      const Words words = load_shared(reinterpret_cast<const Words*>(sRows + Rows::offset(row, chunk)));
      store_global(gX + (start + row) * stride_token * 2 + chunk * 16, words);
    }
  }
}

}  // namespace ard
