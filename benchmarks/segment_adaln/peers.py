"""What the adaLN family is measured against: eager PyTorch, and torch.compile of both useful forms of it.

The forms differ in how a row (B, S, C) meets its L tokens: "rows" broadcasts (B, S, 1, C) over x seen as (B, S, L, C),
"repeat" spreads the rows with repeat_interleave. The seams of video models are measured against the code of Wan. On a
GPU also the norms of Liger and quack, whose result PyTorch modulates; Liger's RMSNorm modulates by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from testing.cases import EPS, Case

Norm = Callable[[Tensor], Tensor]


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def modulated_rows(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    y = normed.unflatten(1, (shift.shape[1], -1))
    return (y * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2).to(normed.dtype)


def modulate_rows(x: Tensor, shift: Tensor, scale: Tensor, norm: Norm = layer_norm) -> Tensor:
    return modulated_rows(norm(x), shift, scale)


def gate_rows(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    S = gate.shape[1]
    h = x.unflatten(1, (S, -1)) + gate.unsqueeze(2) * branch.unflatten(1, (S, -1))
    return h.flatten(1, 2).to(x.dtype)


def gated_rows(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, norm: Norm = layer_norm
) -> tuple[Tensor, Tensor]:
    h = gate_rows(x, branch, gate)
    return h, modulate_rows(h, shift, scale, norm)


def spread(row: Tensor, tokens: int) -> Tensor:
    """(B, S, C) to (B, T, C)."""
    return row.repeat_interleave(tokens // row.shape[1], 1)


def modulate_repeat(x: Tensor, shift: Tensor, scale: Tensor, norm: Norm = layer_norm) -> Tensor:
    T = x.shape[1]
    return (norm(x) * (1 + spread(scale, T)) + spread(shift, T)).to(x.dtype)


def gate_repeat(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return (x + spread(gate, x.shape[1]) * branch).to(x.dtype)


def gated_repeat(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, norm: Norm = layer_norm
) -> tuple[Tensor, Tensor]:
    h = gate_repeat(x, branch, gate)
    return h, modulate_repeat(h, shift, scale, norm)


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


def liger_norm(case: Case, device: torch.device) -> Norm:
    from liger_kernel.transformers.functional import liger_layer_norm

    weight, bias = (make(case.C, dtype=case.dtype, device=device) for make in (torch.ones, torch.zeros))
    return lambda x: liger_layer_norm(x, weight, bias, EPS)


def liger_modulated(case: Case, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """RMSNorm and rows in one kernel. Not in place: its backward would write over the gradient that it is given."""
    from liger_kernel.transformers.functional import liger_modulated_rms_norm

    return lambda x, shift, scale: liger_modulated_rms_norm(x, None, scale, shift, EPS, in_place=False)


def quack_norm(case: Case, device: torch.device) -> Norm:
    """LayerNorm of rows (tokens, C), in two functions without autograd; RMSNorm has it."""
    from quack.rmsnorm import layernorm_bwd, layernorm_fwd, rmsnorm

    weight = torch.ones(case.C, device=device)

    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y, rstd, mean = layernorm_fwd(x, weight, eps=EPS, return_rstd=True, return_mean=True)
            ctx.save_for_backward(x, rstd, mean)
            return y

        @staticmethod
        def backward(ctx, grad):
            x, rstd, mean = ctx.saved_tensors
            return layernorm_bwd(x, weight, grad.contiguous(), rstd, mean, has_bias=False)[0]

    if case.norm == "rms":
        return lambda x: rmsnorm(x, weight, eps=EPS)
    return lambda x: LayerNorm.apply(x.flatten(0, 1)).view_as(x)


def with_norm(case: Case, norm: Norm, **how) -> Callable:
    """A package's norm; PyTorch compiles what is around it."""
    modulate = torch.compile(modulated_rows, **how)
    return gated(case, lambda x, *rows: modulate(norm(x), *rows), **how)


def gated(case: Case, modulate: Callable[[Tensor, Tensor, Tensor], Tensor], **how) -> Callable:
    """adaln_modulate as the case's op: behind a gated residual that PyTorch compiles."""
    if case.op == "adaln_modulate":
        return modulate
    gate_rows_compiled = torch.compile(gate_rows, **how)

    def run(x, branch, gate, shift, scale):
        h = gate_rows_compiled(x, branch, gate)
        return h, modulate(h, shift, scale)

    return run


def adaln_peers(case: Case, device: torch.device, compiled: bool) -> dict[str, Callable[[], Callable]]:
    """Makers by name; not `compiled`: Inductor is left out, for a dry run."""
    forms = FORMS[case.op] if case.seam is None else {"rows": WAN[case.seam]}
    if case.norm == "rms":
        forms = {name: partial(form, norm=rms_norm) for name, form in forms.items()}
    how = {"dynamic": False} if compiled else {"backend": "aot_eager"}
    peers = {"eager": lambda: forms["rows"]}
    peers |= {f"compile_{name}": lambda f=form: torch.compile(f, **how) for name, form in forms.items()}
    if device.type == "cuda" and case.seam is None and case.op != "gate_residual":
        peers["quack"] = lambda: with_norm(case, quack_norm(case, device), **how)
        if case.norm == "rms":
            peers["liger"] = lambda: gated(case, liger_modulated(case, device), **how)
        else:
            peers["liger"] = lambda: with_norm(case, liger_norm(case, device), **how)
    return peers
