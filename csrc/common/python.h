// How pointers and tensors come from Python: an address; a View is (pointer, batch stride, row stride, dtype code), a
// HeadsView (pointer, batch stride, head stride, token stride), an absent one None. Plain tuples: a call of seven
// tensors costs a microsecond.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor.h"

namespace ard {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace ard

namespace pybind11::detail {

template <>
struct type_caster<ard::View> {
  PYBIND11_TYPE_CASTER(ard::View, const_name("tuple[int, int, int, int] | None"));

  bool load(handle source, bool) {
    value = ard::View{};
    if (source.is_none()) return true;
    if (!isinstance<tuple>(source) || len(source) != 4) return false;
    const auto fields = reinterpret_borrow<tuple>(source);
    value = {reinterpret_cast<void*>(fields[0].cast<uintptr_t>()), fields[1].cast<int64_t>(), fields[2].cast<int64_t>(),
             static_cast<ard::DType>(fields[3].cast<int>())};
    return true;
  }
};

template <>
struct type_caster<ard::HeadsView> {
  PYBIND11_TYPE_CASTER(ard::HeadsView, const_name("tuple[int, int, int, int] | None"));

  bool load(handle source, bool) {
    value = ard::HeadsView{};
    if (source.is_none()) return true;
    if (!isinstance<tuple>(source) || len(source) != 4) return false;
    const auto fields = reinterpret_borrow<tuple>(source);
    value = {reinterpret_cast<void*>(fields[0].cast<uintptr_t>()), fields[1].cast<int64_t>(), fields[2].cast<int64_t>(),
             fields[3].cast<int64_t>()};
    return true;
  }
};

}  // namespace pybind11::detail
