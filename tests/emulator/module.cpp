// The GPU kernels built for the host, as a Python module: what `_C.gpu` has, and the emulator's knobs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>

#include "block_causal_attention/mma_tiles.h"
#include "block_causal_attention/tile_range.h"
#include "common/gpu.h"
#include "gpu_bindings.h"

PYBIND11_MODULE(ard_emulated, m) {
  using ard::emulator::counts;
  ard::bind_gpu(m);
  m.def("set_seed", [](uint64_t seed) { ard::emulator::seed = seed; }, "Order of threads in the launches from now on.");
  m.def(
      "counts",
      [] {
        pybind11::dict d;
        d["shared_accesses"] = counts.shared_accesses;
        d["bank_conflicts"] = counts.bank_conflicts;
        d["mma"] = counts.mma;
        d["async_copies"] = counts.async_copies;
        return d;
      },
      "What the last launch did.");

  // Index algebra of the kernels, for tests of its own.
  m.def("head_tile", [](int64_t program, int batch_heads, int group, int tiles) {
    const ard::HeadTile place = ard::head_tile(program, batch_heads, group, tiles);
    return std::pair(place.tile, place.batch_head);
  });
  m.def("full_tile_starts", [](std::array<int32_t, 8> fields, int block_columns) {
    ard::TileItem item;
    std::memcpy(&item, fields.data(), sizeof item);
    std::vector<int> starts;
    for (int j = 0; j < item.full_tiles(); ++j) starts.push_back(ard::full_tile_start(item, j, block_columns));
    return starts;
  });
  m.def("sees", [](std::array<int32_t, 3> bounds, int column) {
    return ard::RowBounds{bounds[0], bounds[1], bounds[2]}.sees(column);
  });
  m.def("fragment_element",
        [](int lane, int i) { return std::pair(ard::fragment_row(lane, i), ard::fragment_column(lane, i)); });
}
