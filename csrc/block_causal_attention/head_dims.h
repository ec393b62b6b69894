// The head dims that the attention kernels are compiled for: ARD_HEAD_DIMS of CMakeLists.txt, on the compiler's command
// line of the bindings as a list such as 64,72,128.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace ard {

template <int... kHeadDims, class Use>
void for_each_of(std::integer_sequence<int, kHeadDims...>, const Use& use) {
  (use(std::integral_constant<int, kHeadDims>()), ...);
}

// use(dim) for each; `dim` is a constant, as a template's argument too.
template <class Use>
void for_each_head_dim(const Use& use) {
  for_each_of(std::integer_sequence<int, ARD_HEAD_DIMS>(), use);
}

inline bool is_compiled(int head_dim) {
  bool found = false;
  for_each_head_dim([&](auto dim) { found |= head_dim == dim; });
  return found;
}

// use(dim) with the constant that equals `head_dim`.
template <class Use>
void with_head_dim(int head_dim, const Use& use) {
  if (!is_compiled(head_dim)) {
    throw std::invalid_argument("attention: head dim " + std::to_string(head_dim) + " is not compiled");
  }
  for_each_head_dim([&](auto dim) {
    if (head_dim == dim) use(dim);
  });
}

}  // namespace ard
