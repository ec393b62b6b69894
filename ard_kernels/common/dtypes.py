"""Dtypes, said once: which ones the ops take, and what they accumulate in."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EXPECTED = "float32, bfloat16, float16 or float64"
FLOAT64_REFUSED = "float64 is served by the torch backend only"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of statistics and sums: fp32, for fp64 inputs fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
