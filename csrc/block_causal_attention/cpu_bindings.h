#pragma once

#include <pybind11/pybind11.h>

namespace ard {

void bind_attention_cpu(pybind11::module_& m);

}  // namespace ard
