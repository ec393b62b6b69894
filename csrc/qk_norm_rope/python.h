// How a call of qk_norm_rope comes from Python: see ard_kernels/qk_norm_rope/native.py.
#pragma once

#include <pybind11/pybind11.h>

#include "../common/python.h"
#include "params.h"

namespace ard {

void bind_qk_norm_rope_cpu(pybind11::module_& m);

// (address, dtype code), or None.
inline Parameter parameter_of(const pybind11::handle& from) {
  if (from.is_none()) return {};
  const auto fields = pybind11::reinterpret_borrow<pybind11::tuple>(from);
  return {pointer<void>(fields[0].cast<uintptr_t>()), static_cast<DType>(fields[1].cast<int>())};
}

// Fill what a NormRope has from (B, T, H, D, dtype code, norm, over all, half, eps), weight, bias and the tables
// (cos, sin, dtype code, rows, pairs) or None.
inline void read_norm_rope(NormRope& p, const pybind11::tuple& rule, const pybind11::object& weight,
                           const pybind11::object& bias, const pybind11::object& tables) {
  p.batch = rule[0].cast<int64_t>();
  p.tokens = rule[1].cast<int64_t>();
  p.heads = rule[2].cast<int64_t>();
  p.head_dim = rule[3].cast<int64_t>();
  p.dtype = static_cast<DType>(rule[4].cast<int>());
  p.norm = static_cast<RowNorm>(rule[5].cast<int>());
  p.over_all = rule[6].cast<bool>();
  p.half = rule[7].cast<bool>();
  p.eps = rule[8].cast<float>();
  p.weight = parameter_of(weight);
  p.bias = parameter_of(bias);
  if (tables.is_none()) return;
  const auto fields = pybind11::reinterpret_borrow<pybind11::tuple>(tables);
  p.tables.cos = fields[0].cast<HeadsView>();
  p.tables.sin = fields[1].cast<HeadsView>();
  p.tables.dtype = static_cast<DType>(fields[2].cast<int>());
  p.tables.rows = fields[3].cast<int64_t>();
  p.tables.pairs = fields[4].cast<int64_t>();
}

using Object = pybind11::object;

// (rule, weight, bias, tables, x, y, mean, rstd)
inline NormRopeForward forward_of(const pybind11::tuple& rule, const Object& weight, const Object& bias,
                                  const Object& tables, const HeadsView& x, const HeadsView& y, uintptr_t mean,
                                  uintptr_t rstd) {
  NormRopeForward p;
  read_norm_rope(p, rule, weight, bias, tables);
  p.x = x, p.y = y, p.mean = pointer<float>(mean), p.rstd = pointer<float>(rstd);
  return p;
}

// (rule, weight, tables, grad_y, x, mean, rstd, dx, dweight, dbias, workspace)
inline NormRopeBackward backward_of(const pybind11::tuple& rule, const Object& weight, const Object& tables,
                                    const HeadsView& grad_y, const HeadsView& x, uintptr_t mean, uintptr_t rstd,
                                    const HeadsView& dx, const Object& dweight, const Object& dbias,
                                    uintptr_t workspace) {
  NormRopeBackward p;
  read_norm_rope(p, rule, weight, pybind11::none(), tables);
  p.grad_y = grad_y, p.x = x, p.dx = dx;
  p.mean = pointer<const float>(mean), p.rstd = pointer<const float>(rstd);
  p.dweight = parameter_of(dweight), p.dbias = parameter_of(dbias);
  p.workspace = pointer<float>(workspace);
  return p;
}

}  // namespace ard
