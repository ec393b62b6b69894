// The GPU kernels built for the host, as a Python module: what `_C.gpu` has, and the emulator's knobs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>

#include "block_causal_attention/mma_tiles.h"
#include "block_causal_attention/sm90_layout.h"
#include "block_causal_attention/tile_range.h"
#include "common/gpu.h"
#include "gpu_bindings.h"
#include "probes.h"

namespace {

// The layouts of the Hopper kernel.
void bind_sm90(pybind11::module_ m) {
  using namespace ard::sm90;
  pybind11::class_<TileLayout>(m, "TileLayout")
      .def_property_readonly("groups",
                             [](const TileLayout& layout) {
                               std::vector<std::tuple<int, int, int>> groups;
                               for (int g = 0; g < layout.groups; ++g) {
                                 const ColumnGroup& group = layout.group[g];
                                 groups.emplace_back(group.first, group.columns, group.swizzle);
                               }
                               return groups;
                             })
      .def("bytes", &TileLayout::bytes)
      .def("offset", [](const TileLayout& layout, int row, int column) { return layout.offset(row, column); })
      .def("step_offset", &TileLayout::step_offset)
      .def("score_descriptor", [](const TileLayout& layout, int step) { return score_descriptor(layout, step); })
      .def("value_descriptor", [](const TileLayout& layout, int group) { return value_descriptor(layout, group); });
  m.def("score_layout", &score_layout);
  m.def("value_layout", &value_layout);
  m.def("stages", &stages);
  m.def("accumulator_row", &accumulator_row);
  m.def("accumulator_column", &accumulator_column);
  m.def("columns_below", &columns_below);
}

}  // namespace

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

  m.def("probe", [](uintptr_t from, uintptr_t to, int mistake) {
    using namespace ard::probes;
    const Params params{reinterpret_cast<const float*>(from), reinterpret_cast<float*>(to), Mistake(mistake)};
    ard::launch<reverse>(1, 1, 64, 4096, nullptr, params);
  });

  // Index algebra of the kernels, for tests of its own.
  bind_sm90(m.def_submodule("sm90"));
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
  m.def("sees", [](int32_t bounds, int column) { return ard::RowBounds(bounds).sees(column); });
  m.def("fragment_element",
        [](int lane, int i) { return std::pair(ard::fragment_row(lane, i), ard::fragment_column(lane, i)); });
}
