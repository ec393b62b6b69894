#include "../gpu_bindings.h"

#include "../common/python.h"
#include "params.h"

namespace ard {

void bind_history_cache(pybind11::module_&) {}

}  // namespace ard
