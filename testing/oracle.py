"""The tolerance rule, said once: a kernel may err 1.5x (gradients 2x) what plain PyTorch errs in the same dtype.

Errors are 2-norms of the difference to an fp64 reference: a maximum over a small tensor is one draw of a random
variable, a norm is not, and a single wrong element still dominates it. The floor is one rounding of the reference
to the tensor's dtype, so that a case where plain PyTorch happens to be exact does not forbid the last bit.
"""

import torch

FORWARD_FACTOR = 1.5
BACKWARD_FACTOR = 2.0


def error_norm(got: torch.Tensor, reference: torch.Tensor) -> float:
    assert got.shape == reference.shape, (got.shape, reference.shape)
    assert torch.isfinite(got).all(), "not finite"
    return (got.double() - reference).norm().item()


def rounding_floor(reference: torch.Tensor, dtype: torch.dtype) -> float:
    """The error of a result that is right up to one unit in the last place everywhere."""
    return torch.finfo(dtype).eps * reference.norm().item()


def assert_close(got, plain, reference, *, factor=FORWARD_FACTOR, label="") -> float:
    """Fail unless err(got) <= factor * err(plain PyTorch) + floor; return the ratio err(got) / err(plain)."""
    error, allowed = error_norm(got, reference), error_norm(plain, reference)
    floor = rounding_floor(reference, got.dtype)
    assert error <= factor * allowed + floor, f"{label}: error {error:.3e} > {factor} x {allowed:.3e} + {floor:.3e}"
    return error / allowed if allowed else float(error > 0)


def assert_all_close(got, plain, reference, *, factor=FORWARD_FACTOR, label="") -> None:
    for i, tensors in enumerate(zip(got, plain, reference, strict=True)):
        assert_close(*tensors, factor=factor, label=f"{label}[{i}]")
