"""Memory that shows what was never written."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned() -> Iterator[None]:
    """Every torch.empty inside comes back full of NaN: an output or workspace that is not fully written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # on a GPU plain PyTorch has some that are not
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
