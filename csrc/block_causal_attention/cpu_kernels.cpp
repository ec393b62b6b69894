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

#include "cpu_rows.h"
#include "cpu_softmax.h"

namespace ard {
namespace {

constexpr float kLn2 = 0.69314718055994530942f;

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

void multiply_lanes(float* x, int64_t rows, int64_t lanes, const float* by) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < lanes; c += kLanes)
      store_lanes(x + i * lanes + c, load_lanes(x + i * lanes + c) * load_lanes(by + c));
}

// Tiles that see the same keys go through them together, so many at a time: each block of keys comes from memory once
// for all of them.
constexpr int64_t kTogether = 4;

// Whether two tiles see the same keys, as those do that have the same pieces. One without any begins where the next
// does.
bool alike(const Tile& a, const Tile& b) { return a.first_piece == b.first_piece && a.stop_piece == b.stop_piece; }

// Calls run(head, first, count) for the tiles of a unit.
template <class Run>
void for_tiles(const AttentionCall& p, const AttentionTiles& tiles, const AttentionUnit& unit, Run run) {
  for (int64_t head = unit.kv_head * p.group(); head < (unit.kv_head + 1) * p.group(); ++head) {
    for (int64_t first = unit.first_tile, i = first; first < unit.last_tile; first = i) {
      while (i < unit.last_tile && i - first < kTogether && alike(tiles.tiles[i], tiles.tiles[first])) ++i;
      run(head, first, i - first);
    }
  }
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
  const int64_t tile = padded_dim(p.head_dim) * kRows + 32, keys = p.keys * p.head_dim + 32;
  return 2 * keys + (1 + (backward ? 5 : 2) * kTogether) * tile + 2 * (kKeyBlock * kRows + 32);
}

// The keys or values of a unit, those that its tiles see. Rows that lie apart are brought together when several tiles
// read them.
Rows keys_of(const AttentionCall& p, const HeadsView& x, const AttentionTiles& tiles, const AttentionUnit& unit,
             Bump& scratch) {
  int64_t first = p.keys, stop = 0;
  for (int64_t i = unit.first_tile; i < unit.last_tile; ++i) {
    const Tile& tile = tiles.tiles[i];
    if (tile.first_piece == tile.stop_piece) continue;
    const int64_t start = tiles.pieces[tile.first_piece].start, end = tiles.pieces[tile.stop_piece - 1].stop;
    first = start < first ? start : first, stop = end > stop ? end : stop;
  }
  const Rows packed{scratch.take(p.keys * p.head_dim), p.head_dim};
  if (first >= stop) return packed;
  const bool once = (unit.last_tile - unit.first_tile) * p.group() <= 4, together = x.stride_token == p.head_dim;
  const Rows seen = read_rows(Head(p, x, unit.batch, unit.kv_head), first, stop - first, p.head_dim, once || together,
                              {packed.row(first), packed.step});
  return {seen.data - first * seen.step, seen.step};
}

// Sums over D are sums of partial ones: gradients of a row that sees few keys are small differences, and one chain of
// 224 roundings gave 3.6 times the error of plain PyTorch (so 1.6 times).
constexpr int64_t kPart = 24;

// x (keys, lanes) = the products of a block of keys' rows with columns (D, lanes).
void scores(const KeyBlock& block, const Rows& keys, int64_t D, const float* columns, int64_t lanes, float* x) {
  product(block.count, lanes, D, {keys.row(block.start), keys.step, 1}, columns, lanes, x, lanes, false, kPart);
}

struct ForwardTile {
  Tile tile;
  int64_t rows, lanes;
  float *q_lanes, *out_lanes;
  Softmax softmax;
};

// What the sums of a softmax end in: a row's lse, and in `fade` what its output is to be multiplied by.
void finish(Softmax& softmax, const AttentionTiles& tiles, const Tile& tile, float* lse) {
  const int64_t rows = tile.stop - tile.start;
  float logs[kRows];
  Ints blank{};
  for (int64_t c = 0; c < lanes_of(tile); c += kLanes) {
    const Lanes sum = load_lanes(softmax.sum + c);
    store_lanes(logs + c, load_lanes(softmax.base + c) + log2_lanes(sum) * kLn2);
    store_lanes(softmax.fade + c, 1 / sum);
    blank |= sum == 0.0f;
  }
  if (any(blank)) {  // rows that see nothing; of one whose scores are all -inf a softmax makes NaN
    for (int64_t r = 0; r < rows; ++r) {
      if (softmax.sum[r] != 0) continue;
      logs[r] = -kInfinity;
      softmax.fade[r] = sees_a_key(tiles, tile, r) ? kInfinity - kInfinity : 0;
    }
  }
  if (lse) std::memcpy(lse, logs, rows * sizeof(float));
}

// The weights and what they take of the values, of one block of keys.
void attend(const KeyBlock& block, const Rows& k, const Rows& v, int64_t D, bool first, float* weights,
            ForwardTile& at) {
  const int64_t n = block.count, lanes = at.lanes;
  scores(block, k, D, at.q_lanes, lanes, weights);
  hide(block, lanes, -kInfinity, weights);
  if (at.softmax.take(weights, n, lanes, first) && !first) multiply_lanes(at.out_lanes, D, lanes, at.softmax.fade);
  product(D, lanes, n, {v.row(block.start), 1, v.step}, weights, lanes, at.out_lanes, lanes, !first);
}

bool forward(const AttentionCall& p, const AttentionTiles& tiles, const AttentionUnit& unit, float* memory) {
  const int64_t D = p.head_dim, step = padded_dim(D);
  Bump scratch{memory};
  const Rows rows{scratch.take(kRows * step), step};
  float* weights = scratch.take(kKeyBlock * kRows);
  ForwardTile together[kTogether];
  for (ForwardTile& at : together) at.q_lanes = scratch.take(kRows * step), at.out_lanes = scratch.take(kRows * step);
  const Rows k = keys_of(p, p.k, tiles, unit, scratch), v = keys_of(p, p.v, tiles, unit, scratch);
  bool finite = true;
  for_tiles(p, tiles, unit, [&](int64_t head, int64_t first_tile, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      ForwardTile& at = together[i];
      at.tile = tiles.tiles[first_tile + i], at.rows = at.tile.stop - at.tile.start, at.lanes = lanes_of(at.tile);
      const Rows q = read_rows(Head(p, p.q, unit.batch, head), at.tile.start, at.rows, D, true, rows);
      to_lanes(q, at.rows, D, p.scale, at.lanes, at.q_lanes);
      prefetch_rows(Head(p, p.out, unit.batch, head), at.tile.start, at.tile.stop, D);
    }
    bool first = true;
    for_key_blocks(tiles, together[0].tile, [&](const KeyBlock& block) {
      for (int64_t i = 0; i < count; ++i) attend(block, k, v, D, first, weights, together[i]);
      first = false;
    });
    for (int64_t i = 0; i < count; ++i) {
      ForwardTile& at = together[i];
      if (first) {
        std::memset(at.out_lanes, 0, D * at.lanes * sizeof(float));
        at.softmax = Softmax{};
      }
      finish(at.softmax, tiles, at.tile,
             p.lse ? p.lse + (unit.batch * p.heads + head) * p.rows + at.tile.start : nullptr);
      write_lanes(Head(p, p.out, unit.batch, head), at.tile.start, at.rows, D, at.lanes, at.out_lanes, at.softmax.fade,
                  rows);
      finite = finite && (!tiles.has_unseen() || are_finite(at.out_lanes, D * at.lanes));
    }
  });
  return finite;
}

struct BackwardTile {
  Tile tile;
  int64_t rows, lanes;
  Rows q_buffer, grad_buffer, q, grad;  // where rows are copied to, where they are
  float *q_lanes, *grad_lanes, *dq_lanes;
  float base[kRows], delta[kRows], dlse[kRows];
};

// A number of each row, in its lane; 0 in other lanes and where there are none.
void copy_lanes(const float* from, int64_t rows, int64_t lanes, float* to) {
  std::memset(to, 0, lanes * sizeof(float));
  if (from) std::memcpy(to, from, rows * sizeof(float));
}

// Of each row: lse, its gradient, and delta = sum over D of grad_out * out. Summed as the scores' gradients are, so
// that the difference to them is exactly 0 where a row sees one key.
void row_statistics(const AttentionCall& p, const AttentionGradients& g, int64_t batch, int64_t head,
                    const Rows& buffer, BackwardTile& at) {
  const int64_t first = (batch * p.heads + head) * p.rows + at.tile.start, D = p.head_dim;
  float* const out_lanes = at.dq_lanes;  // not in use yet
  const Rows out = read_rows(Head(p, p.out, batch, head), at.tile.start, at.rows, D, true, buffer);
  to_lanes(out, at.rows, D, 1, at.lanes, out_lanes);
  for (int64_t c = 0; c < at.lanes; c += kLanes) {
    Lanes delta{};
    for (int64_t begin = 0; begin < D; begin += kPart) {
      Lanes sum{};
      for (int64_t d = begin; d < D && d < begin + kPart; ++d)
        sum += load_lanes(out_lanes + d * at.lanes + c) * load_lanes(at.grad_lanes + d * at.lanes + c);
      delta += sum;
    }
    store_lanes(at.delta + c, delta);
  }
  copy_lanes(p.lse + first, at.rows, at.lanes, at.base);
  copy_lanes(g.grad_lse ? g.grad_lse + first : nullptr, at.rows, at.lanes, at.dlse);
}

// All that one block of keys gives and gets.
void attend_backward(const KeyBlock& block, const Rows& k, const Rows& v, const Rows& dk, const Rows& dv, int64_t D,
                     bool first, float* weights, float* dscores, BackwardTile& at) {
  const int64_t n = block.count, lanes = at.lanes, dim_lanes = rounded_up(D, kLanes), start = block.start;
  scores(block, k, D, at.q_lanes, lanes, weights);
  scores(block, v, D, at.grad_lanes, lanes, dscores);
  for (int64_t c = 0; c < lanes; c += kLanes) {
    const Lanes base = load_lanes(at.base + c), delta = load_lanes(at.delta + c), dlse = load_lanes(at.dlse + c);
    for (int64_t j = 0; j < n; ++j) {
      float *weight = weights + j * lanes + c, *dscore = dscores + j * lanes + c;
      const Lanes w = exp_lanes(load_lanes(weight) - base);
      store_lanes(weight, w), store_lanes(dscore, w * ((load_lanes(dscore) - delta) + dlse));
    }
  }
  hide(block, lanes, 0, weights), hide(block, lanes, 0, dscores);
  product(n, dim_lanes, at.rows, {weights, lanes, 1}, at.grad.data, at.grad.step, dv.row(start), dv.step, true);
  product(n, dim_lanes, at.rows, {dscores, lanes, 1}, at.q.data, at.q.step, dk.row(start), dk.step, true);
  product(D, lanes, n, {k.row(start), 1, k.step}, dscores, lanes, at.dq_lanes, lanes, !first);
}

bool backward(const AttentionCall& p, const AttentionGradients& g, const AttentionTiles& tiles,
              const AttentionUnit& unit, float* sums, float* memory) {
  const int64_t D = p.head_dim, step = padded_dim(D);
  const bool in_place = D % kLanes == 0;  // rows are read a register at a time
  Bump scratch{memory};
  const Rows rows{scratch.take(kRows * step), step}, dk{sums, step}, dv{sums + p.keys * step, step};
  float *weights = scratch.take(kKeyBlock * kRows), *dscores = scratch.take(kKeyBlock * kRows);
  BackwardTile together[kTogether];
  for (BackwardTile& at : together) {
    for (Rows* buffer : {&at.q_buffer, &at.grad_buffer}) *buffer = {scratch.take(kRows * step), step};
    for (float** lanes : {&at.q_lanes, &at.grad_lanes, &at.dq_lanes}) *lanes = scratch.take(kRows * step);
  }
  const Rows k = keys_of(p, p.k, tiles, unit, scratch), v = keys_of(p, p.v, tiles, unit, scratch);
  std::memset(sums, 0, 2 * p.keys * step * sizeof(float));
  bool finite = true;
  for_tiles(p, tiles, unit, [&](int64_t head, int64_t first_tile, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      BackwardTile& at = together[i];
      at.tile = tiles.tiles[first_tile + i], at.rows = at.tile.stop - at.tile.start, at.lanes = lanes_of(at.tile);
      at.q = read_rows(Head(p, p.q, unit.batch, head), at.tile.start, at.rows, D, in_place, at.q_buffer);
      at.grad = read_rows(Head(p, g.grad_out, unit.batch, head), at.tile.start, at.rows, D, in_place, at.grad_buffer);
      to_lanes(at.q, at.rows, D, p.scale, at.lanes, at.q_lanes);
      to_lanes(at.grad, at.rows, D, 1, at.lanes, at.grad_lanes);
      row_statistics(p, g, unit.batch, head, rows, at);
      prefetch_rows(Head(p, g.dq, unit.batch, head), at.tile.start, at.tile.stop, D);
    }
    bool first = true;
    for_key_blocks(tiles, together[0].tile, [&](const KeyBlock& block) {
      for (int64_t i = 0; i < count; ++i) attend_backward(block, k, v, dk, dv, D, first, weights, dscores, together[i]);
      first = false;
    });
    for (int64_t i = 0; i < count; ++i) {
      BackwardTile& at = together[i];
      if (first) std::memset(at.dq_lanes, 0, D * at.lanes * sizeof(float));
      float factor[kRows];
      for (float& each : factor) each = p.scale;
      write_lanes(Head(p, g.dq, unit.batch, head), at.tile.start, at.rows, D, at.lanes, at.dq_lanes, factor, rows);
      finite = finite && (!tiles.has_unseen() || are_finite(at.dq_lanes, D * at.lanes));
    }
  });
  return finite;
}

bool reduce(const AttentionCall& p, const AttentionGradients& g, int64_t batch, int64_t kv_head, const float* sums,
            int64_t count, float* row) {
  const int64_t D = p.head_dim, step = padded_dim(D);
  const bool direct = p.dtype == DType::kFloat32;
  Lanes zeros{};  // NaN once a gradient is not finite
  for (int which = 0; which < 2; ++which) {
    const Head to(p, which == 0 ? g.dk : g.dv, batch, kv_head);
    const float factor = which == 0 ? p.scale : 1;
    for (int64_t t = 0; t < p.keys; ++t) {
      if (t + kRowsAhead < p.keys) prefetch_rows(to, t + kRowsAhead, t + kRowsAhead + 1, D);
      float* const out = static_cast<float*>(static_cast<void*>(to.row(t)));
      for (int64_t d = 0; d < D; d += kLanes) {
        const float* part = sums + (which * p.keys + t) * step + d;
        Lanes sum = load_lanes(part);
        for (int64_t i = 1; i < count; ++i) sum += load_lanes(part += 2 * p.keys * step);
        sum *= factor;
        zeros += sum * 0.0f;
        store_lanes(direct && d + kLanes <= D ? out + d : row + d, sum);
      }
      if (!direct) store_row(out, p.dtype, D, false, row, nullptr);
      if (direct && D % kLanes != 0) std::memcpy(out + D - 8, row + D - 8, 8 * sizeof(float));
    }
  }
  return all_zero(zeros);
}

}  // namespace

extern const AttentionKernels ARD_KERNELS = {ARD_ISA, scratch_floats, forward, backward, reduce};

}  // namespace ard
