"""What the adaLN family is measured against: eager PyTorch, and torch.compile of both useful forms of it.

The forms differ in how a row (B, S, C) meets its L tokens: "rows" broadcasts (B, S, 1, C) over x seen as (B, S, L, C),
"repeat" spreads the rows with repeat_interleave. The seams of video models are measured against the code of Wan.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from testing.cases import EPS, Case


def modulate_rows(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    y = F.layer_norm(x, x.shape[-1:], eps=EPS).unflatten(1, (shift.shape[1], -1))
    return (y * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2).to(x.dtype)


def gate_rows(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    S = gate.shape[1]
    h = x.unflatten(1, (S, -1)) + gate.unsqueeze(2) * branch.unflatten(1, (S, -1))
    return h.flatten(1, 2).to(x.dtype)


def gated_rows(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    h = gate_rows(x, branch, gate)
    return h, modulate_rows(h, shift, scale)


def spread(row: Tensor, tokens: int) -> Tensor:
    """(B, S, C) to (B, T, C)."""
    return row.repeat_interleave(tokens // row.shape[1], 1)


def modulate_repeat(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    T = x.shape[1]
    return (F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + spread(scale, T)) + spread(shift, T)).to(x.dtype)


def gate_repeat(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return (x + spread(gate, x.shape[1]) * branch).to(x.dtype)


def gated_repeat(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    h = gate_repeat(x, branch, gate)
    return h, modulate_repeat(h, shift, scale)


FORMS = {
    "adaln_modulate": {"rows": modulate_rows, "repeat": modulate_repeat},
    "gate_residual_adaln": {"rows": gated_rows, "repeat": gated_repeat},
    "gate_residual": {"rows": gate_rows, "repeat": gate_repeat},
}


def frames(x: Tensor, rows: Tensor) -> Tensor:
    """(B, T, C) as (B, F, L, C), against rows (B, F, 1, C)."""
    return x.unflatten(1, (rows.shape[1], -1))


def wan_norm(h: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Computed in fp32, given in h's dtype."""
    return F.layer_norm(h.float(), h.shape[-1:], weight, bias, EPS).to(h.dtype)


def wan_norm3(x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    h = (x + (frames(branch, gate) * gate).flatten(1, 2)).to(x.dtype)
    return h, wan_norm(h, weight, bias)


def wan_modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (frames(wan_norm(h), scale) * (1 + scale) + shift).flatten(1, 2).to(h.dtype)


def wan_no_gate(x: Tensor, branch: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    h = x + branch
    return h, wan_modulated(h, shift, scale)


def wan_frames(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    h = (x + (frames(branch, gate) * gate).flatten(1, 2)).to(x.dtype)
    return h, wan_modulated(h, shift, scale)


# As the code of Wan's causal models has it: norms in fp32, (1 + e1) * norm + e0, x + y * e2, rows (B, F, 1, C).
WAN = {"norm3": wan_norm3, "no gate": wan_no_gate, "frames": wan_frames}


def adaln_peers(case: Case, device: torch.device, compiled: bool) -> dict[str, Callable[[], Callable]]:
    """Makers by name; not `compiled`: Inductor is left out, for a dry run."""
    forms = FORMS[case.op] if case.seam is None else {"rows": WAN[case.seam]}
    how = {"dynamic": False} if compiled else {"backend": "aot_eager"}
    peers = {"eager": lambda: forms["rows"]}
    return peers | {f"compile_{name}": lambda f=form: torch.compile(f, **how) for name, form in forms.items()}
