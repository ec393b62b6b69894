// The GPU kernels built for the host, as a Python module: what `_C.gpu` has, and the emulator's knobs.
#include <pybind11/pybind11.h>

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
}
