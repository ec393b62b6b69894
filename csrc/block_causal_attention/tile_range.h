// Which tiles a thread block works on: the GPU kernels' reading of the tables that
// ard_kernels/block_causal_attention/tiles.py makes once per mask and tile size. Index algebra only, no data movement;
// tested on the host against the dense mask.
#pragma once

#include <cstdint>

namespace ard {

// One row tile of `items`: its rows, at most two runs of full column tiles, its masked column tiles.
struct alignas(16) TileItem {
  int32_t row, row_stop;
  int32_t first_start, first_tiles, second_start, second_tiles;
  int32_t masked_begin, masked_end;

  constexpr int full_tiles() const { return first_tiles + second_tiles; }
  constexpr int column_tiles() const { return full_tiles() + masked_end - masked_begin; }
};
static_assert(sizeof(TileItem) == 32);

// One column tile of `masked`: no row sees columns at or past `stop`; a row of segment s has bounds[at + s].
struct alignas(16) MaskedTile {
  int32_t start, stop, at, unused;
};

// What a row sees of a column tile, columns counted from its start: those below first_stop, and start <= column < stop.
struct RowBounds {
  int32_t first_stop, start, stop;

  constexpr explicit RowBounds(int32_t packed)
      : first_stop(packed & 1023), start(packed >> 10 & 1023), stop(packed >> 20) {}

  // & and |, not && and ||: no branches.
  constexpr bool sees(int column) const { return (column < first_stop) | ((start <= column) & (column < stop)); }
};

// First column of the j-th column tile, j < item.full_tiles().
constexpr int full_tile_start(const TileItem& item, int j, int block_columns) {
  return j < item.first_tiles ? item.first_start + j * block_columns
                              : item.second_start + (j - item.first_tiles) * block_columns;
}

struct HeadTile {
  int tile, batch_head;
};

// What the program-th of tiles * batch_heads thread blocks does: heads in groups, within a group the first tile of all
// heads, then their next. `items` has the longest tiles first.
constexpr HeadTile head_tile(int64_t program, int batch_heads, int group, int tiles) {
  const int64_t per_group = static_cast<int64_t>(group) * tiles;
  const int first = static_cast<int>(program / per_group) * group;
  const int size = group < batch_heads - first ? group : batch_heads - first;
  const int within = static_cast<int>(program % per_group);
  return {within / size, first + within % size};
}

}  // namespace ard
