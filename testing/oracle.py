"""Assertions of the tolerance rule, which ard_kernels/common/tolerance.py states."""

import torch

from ard_kernels.common.tolerance import BACKWARD_FACTOR as BACKWARD_FACTOR
from ard_kernels.common.tolerance import FORWARD_FACTOR, rounding_floor


def error_norm(got: torch.Tensor, reference: torch.Tensor) -> float:
    assert got.shape == reference.shape, (got.shape, reference.shape)
    assert torch.isfinite(got).all(), "not finite"
    return (got.double() - reference).norm().item()


def assert_close(got, plain, reference, *, factor=FORWARD_FACTOR, label="") -> float:
    """Fail unless err(got) <= factor * err(plain PyTorch) + floor; return the ratio err(got) / err(plain)."""
    error, allowed = error_norm(got, reference), error_norm(plain, reference)
    floor = rounding_floor(reference.norm().item(), got.dtype)
    assert error <= factor * allowed + floor, f"{label}: error {error:.3e} > {factor} x {allowed:.3e} + {floor:.3e}"
    return error / allowed if allowed else float(error > 0)


def assert_all_close(got, plain, reference, *, factor=FORWARD_FACTOR, label="") -> None:
    for i, tensors in enumerate(zip(got, plain, reference, strict=True)):
        assert_close(*tensors, factor=factor, label=f"{label}[{i}]")
