#include "../gpu_bindings.h"

#include "../common/python.h"
#include "params.h"

namespace ard {

void bind_segment_adaln(pybind11::module_&) {}

}  // namespace ard
