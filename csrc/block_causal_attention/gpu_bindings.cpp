#include "../gpu_bindings.h"

#include "../common/python.h"
#include "params.h"

namespace ard {

void bind_block_causal_attention(pybind11::module_&) {}

}  // namespace ard
