"""What lies across rooms: a compiled layer, and every tile configuration that the library may choose."""

import pytest
import torch

from ard_kernels import adaln_modulate, block_causal_attention, gate_residual_adaln
from ard_kernels.common import tuning
from testing.cases import Case
from testing.devices import on_devices
from testing.model_cases import parameters
from testing.model_checks import check_values

BF16 = torch.bfloat16


def layer(x, branch, rows, qkv_weight, L: int, H: int, backend: str):
    """adaln_modulate -> attention -> gate_residual_adaln, as in a block of the student."""
    shift, scale, gate, shift2, scale2, _ = rows.chunk(6, -1)
    shared = {"segment_length": L, "backend": backend}
    y = adaln_modulate(x, shift, scale, **shared) + branch
    q, k, v = (y @ qkv_weight).unflatten(-1, (3, H, -1)).unbind(2)
    attended = block_causal_attention(q, k, v, layout="bthd", **shared).flatten(2)
    return gate_residual_adaln(x, attended, gate, shift2, scale2, **shared)


@pytest.mark.parametrize(("backend", "device"), on_devices("triton", "cuda"))
def test_a_compiled_layer_equals_eager(backend, device):
    """Outputs and gradients. Inductor may keep an intermediate of the glue in fp32 that eager rounds."""
    L, S, H, D = (16, 2, 1, 64) if device == "cpu" else (256, 4, 16, 72)
    C, calls = H * D, 1 if device == "cpu" else 3  # warm-up, recording and replay of the graph
    how = {"backend": "aot_eager"} if device == "cpu" else {"mode": "reduce-overhead"}
    compiled = torch.compile(layer, fullgraph=True, **how)
    for _ in range(calls):
        shapes = [(2, S * L, C), (2, S * L, C), (2, S, 6 * C), (C, 3 * C)]
        inputs = [torch.randn(shape, device=device).to(BF16) for shape in shapes]
        inputs = [(x * 0.05 if x.dim() == 2 else x).requires_grad_() for x in inputs]
        grad_outputs = [torch.randn(2, S * L, C, device=device).to(BF16) for _ in range(2)]
        results = []
        for function in (layer, compiled):
            if device == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            outputs = function(*inputs, L, H, backend)
            results.append([x.clone() for x in (*outputs, *torch.autograd.grad(outputs, inputs, grad_outputs))])
        names = ["h", "y", "dx", "dbranch", "drows", "dweight"]
        for name, expected, got in zip(names, *results, strict=True):
            error = (got.double() - expected.double()).norm() / expected.double().norm()
            assert error <= 4 * torch.finfo(BF16).eps, name


def table_cases(device: str) -> list[tuple[Case, bool]]:
    """A case for every class of widths and lengths in the tables of `tuning`."""
    widths = tuning.WIDTHS if device == "cuda" else {"attention": (32, 96), "adaln": (512,)}
    cases = [Case("gate_residual_adaln", 2, (64,) * 2, C=C, dtype=dtype) for dtype in (BF16, torch.float32)
             for C in widths["adaln"]]  # fmt: skip
    for op in ("block_causal_attention", "history_attention"):
        for D in widths["attention"]:
            lengths = [(64, BF16), (256, BF16), (64, torch.float32)] if device == "cuda" else [(16, BF16)]
            cases += [Case(op, 1, (L,) * 2, H=2, D=D, dtype=dtype) for L, dtype in lengths]
    return [(case, False) for case in cases]


@pytest.mark.parametrize(("backend", "device", "case"), [p for p in parameters(table_cases) if p.values[0] == "triton"])
def test_every_configuration_of_the_tables(backend, device, case):
    """What was tuned on this machine where the tuner has run, else what is shipped for its chip."""
    check_values(case, backend, torch.device(device))
