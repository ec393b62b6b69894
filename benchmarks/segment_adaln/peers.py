"""What the adaLN family is measured against: eager PyTorch, and torch.compile of both useful forms of it.

The forms differ in how a row (B, S, C) meets its L tokens: "rows" broadcasts (B, S, 1, C) over x seen as (B, S, L, C),
"repeat" spreads the rows with repeat_interleave. The seams of video models are measured against the code of Wan. On a
GPU also the LayerNorms of Liger and quack, whose result PyTorch modulates.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from testing.cases import EPS, Case


def modulated_rows(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    y = normed.unflatten(1, (shift.shape[1], -1))
    return (y * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2).to(normed.dtype)


def modulate_rows(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return modulated_rows(F.layer_norm(x, x.shape[-1:], eps=EPS), shift, scale)


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


def liger_norm(case: Case, device: torch.device) -> Callable[[Tensor], Tensor]:
    from liger_kernel.transformers.functional import liger_layer_norm

    weight, bias = (make(case.C, dtype=case.dtype, device=device) for make in (torch.ones, torch.zeros))
    return lambda x: liger_layer_norm(x, weight, bias, EPS)


def quack_norm(case: Case, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Of rows (tokens, C), in two functions without autograd."""
    from quack.rmsnorm import layernorm_bwd, layernorm_fwd

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

    return lambda x: LayerNorm.apply(x.flatten(0, 1)).view_as(x)


def with_norm(case: Case, norm: Callable[[Tensor], Tensor], **how) -> Callable:
    """A package's norm between parts that PyTorch compiles."""
    modulate, gated = (torch.compile(part, **how) for part in (modulated_rows, gate_rows))

    def gated_modulate(x, branch, gate, shift, scale):
        h = gated(x, branch, gate)
        return h, modulate(norm(h), shift, scale)

    return gated_modulate if case.op == "gate_residual_adaln" else lambda x, *rows: modulate(norm(x), *rows)


def adaln_peers(case: Case, device: torch.device, compiled: bool) -> dict[str, Callable[[], Callable]]:
    """Makers by name; not `compiled`: Inductor is left out, for a dry run."""
    forms = FORMS[case.op] if case.seam is None else {"rows": WAN[case.seam]}
    how = {"dynamic": False} if compiled else {"backend": "aot_eager"}
    peers = {"eager": lambda: forms["rows"]}
    peers |= {f"compile_{name}": lambda f=form: torch.compile(f, **how) for name, form in forms.items()}
    if device.type == "cuda" and case.seam is None and case.op != "gate_residual":
        norms = {"liger": liger_norm, "quack": quack_norm}
        peers |= {name: lambda norm=norm: with_norm(case, norm(case, device), **how) for name, norm in norms.items()}
    return peers
