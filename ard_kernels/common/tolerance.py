"""The tolerance rule, said once: a kernel may err 1.5x (gradients 2x) what plain PyTorch errs in the same dtype.

Errors are 2-norms of the difference to an fp64 reference: a maximum over a small tensor is one draw of a random
variable, a norm is not, and a single wrong element of it still dominates; of a large one every row is held to the rule,
too (self_check.py). The floor is one rounding of the reference to the tensor's dtype, so that a case where plain
PyTorch happens to be exact does not forbid the last bit.
"""

from __future__ import annotations

import torch

FORWARD_FACTOR = 1.5
BACKWARD_FACTOR = 2.0


def rounding_floor(size: float, dtype: torch.dtype) -> float:
    """The error of a result of this 2-norm that is right up to one unit in the last place everywhere."""
    return torch.finfo(dtype).eps * size
