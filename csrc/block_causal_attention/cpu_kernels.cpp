// Attention over segments on the CPU. Compiled once per ISA (ARD_KERNELS names the table, the compiler's -m flags pick
// the instructions), so everything but the table has internal linkage and no standard template is used.
//
// A tile of up to 64 queries lies along the lanes: scores are S^T (keys x queries), so a softmax runs down the rows
// without a sum over lanes, keys and values are read where they are, one broadcast number at a time, and queries that
// see different keys differ by a mask of lanes. Products, each of 2 D FLOPs a pair:
//
//     forward    S^T = K Q^T    O^T += V^T P^T
//     backward   S^T = K Q^T    dP^T = V dO^T    dV += P^T dO    dK += dS^T Q    dQ^T += K^T dS^T
//
// One pass over the tiles makes all five: dQ of a tile is complete after its last key, dK and dV add up in scratch over
// the tiles of a unit. Two passes without sums in memory would make seven.
#include "cpu_kernels.h"

#include <cmath>

#include "cpu_lanes.h"

namespace ard {
namespace {

constexpr int64_t kRows = kTileRows;
constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
const float kInfinity = __builtin_inff();

using Tile = AttentionTiles::Tile;

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

int64_t lanes_of(const Tile& tile) { return rounded_up(tile.stop - tile.start, kLaneStep); }

char* row_of(const HeadsView& x, DType dtype, int64_t batch, int64_t head, int64_t token) {
  const int64_t offset = batch * x.stride_batch + head * x.stride_head + token * x.stride_token;
  return static_cast<char*>(x.data) + offset * size_of(dtype);
}

// Of q, k, v in one projection each row is in a page of its own, where no hardware foresees the next one.
constexpr int64_t kRowsAhead = 8;

void prefetch_row(const AttentionCall& p, const HeadsView& x, int64_t batch, int64_t head, int64_t token) {
  const char* row = row_of(x, p.dtype, batch, head, token);
  for (int64_t i = 0; i < p.head_dim * size_of(p.dtype); i += 64) __builtin_prefetch(row + i);
}

// Tokens of one head as fp32: so many floats apart.
struct Rows {
  const float* data;
  int64_t step;

  const float* row(int64_t token) const { return data + token * step; }
};

// What kernels read of all keys of a unit, in place or in `packed`: other dtypes are widened, and rows that lie apart
// are brought together when several tiles read them (of packed q, k, v they lie 3 H D floats apart, a page each).
Rows keys_of(const AttentionCall& p, const HeadsView& x, const AttentionUnit& unit, float* packed) {
  const char* first = row_of(x, p.dtype, unit.batch, unit.kv_head, 0);
  const bool once = (unit.last_tile - unit.first_tile) * p.group() <= 1;
  if (p.dtype == DType::kFloat32 && (once || x.stride_token == p.head_dim))
    return {static_cast<const float*>(static_cast<const void*>(first)), x.stride_token};
  for (int64_t t = 0; t < p.keys; ++t) {
    prefetch_row(p, x, unit.batch, unit.kv_head, t + kRowsAhead < p.keys ? t + kRowsAhead : t);
    float* to = packed + t * p.head_dim;
    const float* row = widen_row(row_of(x, p.dtype, unit.batch, unit.kv_head, t), p.dtype, p.head_dim, to);
    if (row != to) std::memcpy(to, row, p.head_dim * sizeof(float));
  }
  return {packed, p.head_dim};
}

// The rows of a tile as fp32, `step` floats apart: zeros behind a row's end, and in the rows that fill up the lanes.
void read_rows(const AttentionCall& p, const HeadsView& x, int64_t batch, int64_t head, const Tile& tile, float* to,
               int64_t step) {
  const int64_t rows = tile.stop - tile.start;
  for (int64_t r = 0; r < rows; ++r, to += step) {
    prefetch_row(p, x, batch, head, tile.start + (r + kRowsAhead < rows ? r + kRowsAhead : r));
    const float* row = widen_row(row_of(x, p.dtype, batch, head, tile.start + r), p.dtype, p.head_dim, to);
    if (row != to) std::memcpy(to, row, p.head_dim * sizeof(float));
    std::memset(to + p.head_dim, 0, (step - p.head_dim) * sizeof(float));
  }
  std::memset(to, 0, (lanes_of(tile) - rows) * step * sizeof(float));
}

// n floats, a multiple of 8; whether they are finite.
bool is_finite(const float* x, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * 0.0f;
  return sum == 0;
}

// Rows from `first` on of a head; returns whether they are finite.
bool write_rows(const AttentionCall& p, const HeadsView& x, int64_t batch, int64_t head, int64_t first, int64_t rows,
                const float* from, int64_t step) {
  bool finite = true;
  for (int64_t r = 0; r < rows; ++r, from += step) {
    store_row(row_of(x, p.dtype, batch, head, first + r), p.dtype, p.head_dim, false, from, nullptr);
    finite = finite && is_finite(from, p.head_dim);
  }
  return finite;
}

// Keys that lie one after the other, and rows of them that not all lanes see.
struct KeyBlock {
  struct Hidden {
    int64_t first, stop;
    const int32_t* unseen;  // of each lane: -1, or 0 where it sees them
  };
  int64_t start, count, hidden_count;
  Hidden hidden[kKeyBlock];
};

// Calls run(block) for the keys of a tile, in order.
template <class Run>
void for_key_blocks(const AttentionTiles& tiles, const Tile& tile, Run run) {
  int64_t piece = tile.first_piece, key = piece < tile.stop_piece ? tiles.pieces[piece].start : 0;
  while (piece < tile.stop_piece) {
    KeyBlock block;
    block.start = key, block.count = block.hidden_count = 0;
    while (piece < tile.stop_piece && block.count < kKeyBlock && key == block.start + block.count) {
      const AttentionTiles::Piece& from = tiles.pieces[piece];
      const int64_t room = kKeyBlock - block.count, left = from.stop - key, taken = left < room ? left : room;
      if (from.unseen >= 0)
        block.hidden[block.hidden_count++] = {block.count, block.count + taken, &tiles.unseen[from.unseen]};
      block.count += taken, key += taken;
      if (key == from.stop && ++piece < tile.stop_piece) key = tiles.pieces[piece].start;
    }
    run(block);
  }
}

// x[key][lane] = value where the lane does not see the key.
void hide(const KeyBlock& block, int64_t lanes, float value, float* x) {
  for (int64_t h = 0; h < block.hidden_count; ++h) {
    const KeyBlock::Hidden& hidden = block.hidden[h];
    for (int64_t c = 0; c < lanes; c += kLanes) {
      const Ints unseen = load_ints(hidden.unseen + c);
      for (int64_t j = hidden.first; j < hidden.stop; ++j)
        store_lanes(x + j * lanes + c, unseen ? Lanes{} + value : load_lanes(x + j * lanes + c));
    }
  }
}

bool sees_a_key(const AttentionTiles& tiles, const Tile& tile, int64_t lane) {
  for (int64_t piece = tile.first_piece; piece < tile.stop_piece; ++piece) {
    const int64_t unseen = tiles.pieces[piece].unseen;
    if (unseen < 0 || !tiles.unseen[unseen + lane]) return true;
  }
  return false;
}

// Running softmax of the lanes: scores (count, lanes), in units of log 2, become weights relative to 2^base.
struct Softmax {
  // A base grows when weights would pass 2^kSlack, so earlier ones are rarely worked on again.
  static constexpr float kSlack = 8;
  float base[kRows], sum[kRows], fade[kRows];  // fade: what earlier weights are to be multiplied by

  // Returns whether any fade is not 1.
  bool take(float* scores, int64_t count, int64_t lanes, bool first) {
    Ints fades{};
    for (int64_t c = 0; c < lanes; c += kLanes) {
      float* own = scores + c;
      const Lanes before = first ? Lanes{} - kInfinity : load_lanes(base + c);
      const Lanes top = largest(own, count, lanes);
      const Lanes after = top > before + kSlack ? top : before;
      const Lanes from = after == -kInfinity ? Lanes{} : after;
      Lanes total{};
      for (int64_t j = 0; j < count; ++j, own += lanes) {
        const Lanes weight = exp2_lanes(load_lanes(own) - from);
        store_lanes(own, weight);
        total += weight;
      }
      const Lanes faded = exp2_lanes(before - from);
      store_lanes(base + c, after), store_lanes(fade + c, faded);
      store_lanes(sum + c, first ? total : load_lanes(sum + c) * faded + total);
      fades |= faded != 1.0f;
    }
    for (int64_t lane = 0; lane < kLanes; ++lane)
      if (fades[lane]) return true;
    return false;
  }

  // The largest of each lane, in four chains that hide the latency of a comparison.
  static ARD_INLINE Lanes largest(const float* scores, int64_t count, int64_t lanes) {
    Lanes chains[4];
    for (Lanes& chain : chains) chain = Lanes{} - kInfinity;
    int64_t j = 0;
    for (; j + 4 <= count; j += 4, scores += 4 * lanes)
      for (int i = 0; i < 4; ++i) chains[i] = at_least(chains[i], load_lanes(scores + i * lanes));
    for (; j < count; ++j, scores += lanes) chains[0] = at_least(chains[0], load_lanes(scores));
    return at_least(at_least(chains[0], chains[1]), at_least(chains[2], chains[3]));
  }
};

void multiply_lanes(float* x, int64_t rows, int64_t lanes, const float* by) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < lanes; c += kLanes)
      store_lanes(x + i * lanes + c, load_lanes(x + i * lanes + c) * load_lanes(by + c));
}

// Memory that a unit takes from, piece after piece.
struct Bump {
  float* next;
  float* take(int64_t floats) {
    float* taken = next;
    next += rounded_up(floats, 16) + 16;  // pieces apart: see buffer_stride
    return taken;
  }
};

int64_t scratch_floats(const AttentionCall& p, bool backward) {
  const int64_t wide = (padded_dim(p.head_dim) + 32) * kRows;
  return 2 * (p.keys * p.head_dim + 32) + (backward ? 7 : 3) * wide + 2 * kKeyBlock * (kRows + 32);
}

struct ForwardBuffers {
  Rows k, v;
  float *rows, *q_lanes, *out_lanes, *weights;
};

bool forward_tile(const AttentionCall& p, const AttentionTiles& tiles, const Tile& tile, int64_t batch, int64_t head,
                  const ForwardBuffers& at) {
  const int64_t rows = tile.stop - tile.start, lanes = lanes_of(tile), D = p.head_dim, step = padded_dim(D);
  read_rows(p, p.q, batch, head, tile, at.rows, step);
  transpose(at.rows, step, lanes, D, p.scale * kLog2e, at.q_lanes, lanes);
  Softmax softmax;
  bool first = true;
  for_key_blocks(tiles, tile, [&](const KeyBlock& block) {
    product(block.count, lanes, D, {at.k.row(block.start), at.k.step, 1}, at.q_lanes, lanes, at.weights, lanes, false);
    hide(block, lanes, -kInfinity, at.weights);
    if (softmax.take(at.weights, block.count, lanes, first) && !first)
      multiply_lanes(at.out_lanes, D, lanes, softmax.fade);
    product(D, lanes, block.count, {at.v.row(block.start), 1, at.v.step}, at.weights, lanes, at.out_lanes, lanes,
            !first);
    first = false;
  });
  float* lse = p.lse + (batch * p.heads + head) * p.rows + tile.start;
  if (first) {
    std::memset(at.rows, 0, rows * step * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) lse[r] = -kInfinity;
    return write_rows(p, p.out, batch, head, tile.start, rows, at.rows, step);
  }
  for (int64_t r = 0; r < lanes; ++r) {
    const float sum = softmax.sum[r];
    // Only a row without keys and one whose scores are all -inf, of which a softmax makes NaN, have no weight.
    const bool none = sum == 0 && (r >= rows || !sees_a_key(tiles, tile, r));
    softmax.fade[r] = none ? 0 : sum == 0 ? kInfinity * 0 : 1 / sum;
    if (r < rows) lse[r] = sum == 0 ? -kInfinity : (softmax.base[r] + log2f(sum)) * kLn2;
  }
  multiply_lanes(at.out_lanes, D, lanes, softmax.fade);
  transpose(at.out_lanes, lanes, D, rounded_up(rows, 4), 1, at.rows, step);
  return write_rows(p, p.out, batch, head, tile.start, rows, at.rows, step);
}

bool forward(const AttentionCall& p, const AttentionTiles& tiles, const AttentionUnit& unit, float* scratch) {
  const int64_t wide = padded_dim(p.head_dim) * kRows;
  Bump from{scratch};
  ForwardBuffers at;
  float *k = from.take(p.keys * p.head_dim), *v = from.take(p.keys * p.head_dim);
  at.rows = from.take(wide), at.q_lanes = from.take(wide), at.out_lanes = from.take(wide);
  at.weights = from.take(kKeyBlock * kRows);
  at.k = keys_of(p, p.k, unit, k), at.v = keys_of(p, p.v, unit, v);
  bool finite = true;
  for (int64_t head = unit.kv_head * p.group(); head < (unit.kv_head + 1) * p.group(); ++head)
    for (int64_t i = unit.first_tile; i < unit.last_tile; ++i)
      finite = forward_tile(p, tiles, tiles.tiles[i], unit.batch, head, at) && finite;
  return finite;
}

struct BackwardBuffers {
  Rows k, v;
  float *q_rows, *grad_rows, *rows, *q_lanes, *grad_lanes, *dq_lanes, *weights, *dscores;
  float *dk, *dv;  // sums of all keys
};

// Of each row: lse in units of log 2, and delta = sum over D of grad_out * out, less the gradient of lse.
void row_statistics(const AttentionCall& p, const AttentionGradients& g, const Tile& tile, int64_t batch, int64_t head,
                    const BackwardBuffers& at, float* base, float* delta) {
  const int64_t rows = tile.stop - tile.start, step = padded_dim(p.head_dim);
  const int64_t at_row = (batch * p.heads + head) * p.rows + tile.start;
  for (int64_t r = 0; r < lanes_of(tile); ++r) {
    base[r] = delta[r] = 0;
    if (r >= rows) continue;
    const float* out = widen_row(row_of(p.out, p.dtype, batch, head, tile.start + r), p.dtype, p.head_dim, at.rows);
    const float* grad = at.grad_rows + r * step;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < p.head_dim; ++d) sum += grad[d] * out[d];
    delta[r] = g.grad_lse ? sum - g.grad_lse[at_row + r] : sum;
    base[r] = p.lse[at_row + r] * kLog2e;
  }
}

bool backward_tile(const AttentionCall& p, const AttentionGradients& g, const AttentionTiles& tiles, const Tile& tile,
                   int64_t batch, int64_t head, const BackwardBuffers& at) {
  const int64_t rows = tile.stop - tile.start, lanes = lanes_of(tile), D = p.head_dim, step = padded_dim(D);
  const int64_t dim_lanes = rounded_up(D, kLanes);
  float base[kRows], delta[kRows];
  read_rows(p, p.q, batch, head, tile, at.q_rows, step);
  read_rows(p, g.grad_out, batch, head, tile, at.grad_rows, step);
  row_statistics(p, g, tile, batch, head, at, base, delta);
  transpose(at.q_rows, step, lanes, D, p.scale * kLog2e, at.q_lanes, lanes);
  transpose(at.grad_rows, step, lanes, D, 1, at.grad_lanes, lanes);
  bool first = true;
  for_key_blocks(tiles, tile, [&](const KeyBlock& block) {
    const int64_t n = block.count;
    const Broadcast k_rows{at.k.row(block.start), at.k.step, 1}, v_rows{at.v.row(block.start), at.v.step, 1};
    product(n, lanes, D, k_rows, at.q_lanes, lanes, at.weights, lanes, false);
    product(n, lanes, D, v_rows, at.grad_lanes, lanes, at.dscores, lanes, false);
    for (int64_t c = 0; c < lanes; c += kLanes) {
      const Lanes own_base = load_lanes(base + c), own_delta = load_lanes(delta + c);
      for (int64_t j = 0; j < n; ++j) {
        float *weight = at.weights + j * lanes + c, *dscore = at.dscores + j * lanes + c;
        const Lanes w = exp2_lanes(load_lanes(weight) - own_base);
        store_lanes(weight, w), store_lanes(dscore, w * (load_lanes(dscore) - own_delta));
      }
    }
    hide(block, lanes, 0, at.weights), hide(block, lanes, 0, at.dscores);
    product(n, dim_lanes, rows, {at.weights, lanes, 1}, at.grad_rows, step, at.dv + block.start * step, step, true);
    product(n, dim_lanes, rows, {at.dscores, lanes, 1}, at.q_rows, step, at.dk + block.start * step, step, true);
    product(D, lanes, n, {at.k.row(block.start), 1, at.k.step}, at.dscores, lanes, at.dq_lanes, lanes, !first);
    first = false;
  });
  if (first) std::memset(at.dq_lanes, 0, D * lanes * sizeof(float));
  transpose(at.dq_lanes, lanes, D, rounded_up(rows, 4), p.scale, at.rows, step);
  return write_rows(p, g.dq, batch, head, tile.start, rows, at.rows, step);
}

bool backward(const AttentionCall& p, const AttentionGradients& g, const AttentionTiles& tiles,
              const AttentionUnit& unit, float* sums, float* scratch) {
  const int64_t wide = padded_dim(p.head_dim) * kRows;
  Bump from{scratch};
  BackwardBuffers at;
  float *k = from.take(p.keys * p.head_dim), *v = from.take(p.keys * p.head_dim);
  for (float** buffer : {&at.q_rows, &at.grad_rows, &at.rows, &at.q_lanes, &at.grad_lanes, &at.dq_lanes})
    *buffer = from.take(wide);
  at.weights = from.take(kKeyBlock * kRows), at.dscores = from.take(kKeyBlock * kRows);
  at.dk = sums, at.dv = sums + p.keys * padded_dim(p.head_dim);
  at.k = keys_of(p, p.k, unit, k), at.v = keys_of(p, p.v, unit, v);
  std::memset(sums, 0, 2 * p.keys * padded_dim(p.head_dim) * sizeof(float));
  bool finite = true;
  for (int64_t head = unit.kv_head * p.group(); head < (unit.kv_head + 1) * p.group(); ++head)
    for (int64_t i = unit.first_tile; i < unit.last_tile; ++i)
      finite = backward_tile(p, g, tiles, tiles.tiles[i], unit.batch, head, at) && finite;
  return finite;
}

bool reduce(const AttentionCall& p, const AttentionGradients& g, int64_t batch, int64_t kv_head, const float* sums,
            int64_t count, float* scratch) {
  const int64_t step = padded_dim(p.head_dim);
  bool finite = true;
  for (int which = 0; which < 2; ++which) {
    const float factor = which == 0 ? p.scale : 1;
    for (int64_t t = 0; t < p.keys; ++t) {
      for (int64_t d = 0; d < step; d += kLanes) {
        Lanes sum{};
        for (int64_t i = 0; i < count; ++i) sum += load_lanes(sums + ((2 * i + which) * p.keys + t) * step + d);
        store_lanes(scratch + d, sum * factor);
      }
      finite = write_rows(p, which == 0 ? g.dk : g.dv, batch, kv_head, t, 1, scratch, step) && finite;
    }
  }
  return finite;
}

}  // namespace

extern const AttentionKernels ARD_KERNELS = {ARD_ISA, scratch_floats, forward, backward, reduce};

}  // namespace ard
