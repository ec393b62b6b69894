// How the Hopper kernel lays its tiles out: shared memory and its swizzles, boxes of the copy engine, descriptors of
// the matrix instruction, which thread holds which element. Constants and index algebra only; tested on the host.
//
// A tile is `rows` tokens x head dim. Its columns are cut into groups, and a group into atoms: atom a of a group holds,
// for every row, the next `swizzle` bytes (32, 64 or 128); rows follow each other without a gap. One box of the copy
// engine fills one atom. The 16-byte chunks of a row are permuted by the swizzle, an exclusive or on address bits, so
// that 8 rows of one chunk lie in 32 different banks.
#pragma once

#include <cstdint>

namespace ard::sm90 {

constexpr int kBlockM = 128, kBlockN = 128;  // queries and keys of a tile
constexpr int kElementBytes = 2;

// Columns that one matrix instruction reads (V) or that share a swizzle (Q, K).
struct ColumnGroup {
  int first = 0, columns = 0, swizzle = 128;

  constexpr int atom_columns() const { return swizzle / kElementBytes; }
  constexpr int atoms() const { return (columns + atom_columns() - 1) / atom_columns(); }
};

// Address with its 16-byte chunks permuted within a span of `swizzle` bytes; the pattern repeats every 8 spans.
constexpr int swizzled(int address, int swizzle) { return address ^ ((address >> 7 & (swizzle / 16 - 1)) << 4); }

struct TileLayout {
  int rows = 0, groups = 0;
  ColumnGroup group[2];

  constexpr int atom_bytes(int g) const { return rows * group[g].swizzle; }
  constexpr int group_bytes(int g) const { return group[g].atoms() * atom_bytes(g); }
  constexpr int group_offset(int g) const { return g == 0 ? 0 : group_bytes(0); }
  constexpr int bytes() const { return groups == 1 ? group_bytes(0) : group_bytes(0) + group_bytes(1); }
  constexpr int columns() const { return group[groups - 1].first + group[groups - 1].columns; }
  constexpr int group_of(int column) const { return groups == 2 && column >= group[1].first ? 1 : 0; }

  // Byte offset of an element in the tile; `within` is its column less the first one of its group.
  constexpr int offset(int g, int row, int within) const {
    const int width = group[g].atom_columns(), atom = group_offset(g) + within / width * atom_bytes(g);
    return swizzled(atom + row * group[g].swizzle + within % width * kElementBytes, group[g].swizzle);
  }
  constexpr int offset(int row, int column) const {
    return offset(group_of(column), row, column - group[group_of(column)].first);
  }
  // Where the columns 16 * step .. of row 0 start, before the swizzle: what a descriptor for Q K^T points to.
  constexpr int step_offset(int step) const {
    const int column = 16 * step, g = group_of(column), within = column - group[g].first;
    const int width = group[g].atom_columns();
    return group_offset(g) + within / width * atom_bytes(g) + within % width * kElementBytes;
  }
};

// To whole steps of the matrix instruction; swizzles of 32, 64 and 128 bytes hold 16, 32 or 64 columns, so 48
// become 64.
constexpr int padded(int head_dim) {
  const int columns = (head_dim + 15) / 16 * 16;
  return columns % 64 == 48 ? columns + 16 : columns;
}

// Q and K: as many whole atoms of 128 bytes as the head dim has, and one smaller atom for the rest. Columns past the
// head dim (72..79, 112..127) are outside of the tensor, so they are zero.
constexpr TileLayout score_layout(int head_dim, int rows) {
  const int columns = padded(head_dim), whole = columns / 64 * 64, rest = columns - whole;
  TileLayout layout;
  layout.rows = rows;
  layout.groups = rest ? 2 : 1;
  layout.group[0] = {0, whole, 128};
  if (rest) layout.group[1] = {whole, rest, rest * kElementBytes};
  return layout;
}

// V: the same; a group is one matrix instruction per 16 keys.
constexpr TileLayout value_layout(int head_dim, int rows) { return score_layout(head_dim, rows); }

// Stages of the K and V ring. Two of Q: the next item's queries land while this item is worked on, and the rows of a
// finished item pass through its own stage on their way out.
constexpr int kQueryStages = 2;
constexpr int kSharedBytesLimit = 227 << 10, kBarrierBytes = 1024;

constexpr int stages(int head_dim) {
  const int left = kSharedBytesLimit - kBarrierBytes - kQueryStages * score_layout(head_dim, kBlockM).bytes();
  const int fit = left / (score_layout(head_dim, kBlockN).bytes() + value_layout(head_dim, kBlockN).bytes());
  return fit < 4 ? fit : 4;
}

// Matrix descriptors: bits 0..13 the address, 16..29 the leading and 32..45 the stride byte offset, all / 16, 62..63
// the swizzle. Atoms start on multiples of 1024 bytes, so the base offset (bits 49..51) is 0.
constexpr uint64_t descriptor(int leading, int stride, int swizzle) {
  const uint64_t mode = swizzle == 128 ? 1 : swizzle == 64 ? 2 : 3;
  return static_cast<uint64_t>(leading / 16) << 16 | static_cast<uint64_t>(stride / 16) << 32 | mode << 62;
}

// Q or K, 16 columns of an atom (K-major): groups of 8 rows are `stride` apart; the leading offset is not used.
constexpr uint64_t score_descriptor(const TileLayout& layout, int step) {
  const ColumnGroup& group = layout.group[layout.group_of(16 * step)];
  return descriptor(16, 8 * group.swizzle, group.swizzle);
}

// V, 16 rows of a group (MN-major): atoms are `leading` apart, groups of 8 rows `stride`.
constexpr uint64_t value_descriptor(const TileLayout& layout, int g) {
  return descriptor(layout.atom_bytes(g), 8 * layout.group[g].swizzle, layout.group[g].swizzle);
}

// Addresses are below 2**18, so adding one in units of 16 bytes does not carry out of its field.
constexpr uint64_t at_units(uint64_t descriptor_bits, uint32_t units) {
  return (descriptor_bits & 0xffffffff00000000) | (static_cast<uint32_t>(descriptor_bits) + units);
}

// Fragments: element i of thread `thread` of a warpgroup in a 64 x n accumulator. Two neighbouring accumulators of 8
// columns, rounded, are the words of the A operand of the 16 keys they stand for.
constexpr int accumulator_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
constexpr int accumulator_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// Bit i stands for the i-th of the 32 columns (of 128) that a thread holds of each of its two rows: the columns of
// elements 4 (i / 2) + i % 2. Those below `column`, which may be negative or past the tile:
constexpr uint32_t columns_below(int thread, int column) {
  const int own = column - thread % 4 * 2;
  const int count = own < 0 ? 0 : own / 8 * 2 + (own % 8 < 2 ? own % 8 : 2);
  return count >= 32 ? 0xffffffff : (1u << count) - 1;
}

}  // namespace ard::sm90
