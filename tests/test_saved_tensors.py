"""Hooks of saved tensors, as those that keep them elsewhere: gradients stay as they are, or the change is refused."""

from contextlib import nullcontext

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from ard_kernels import (
    adaln_modulate,
    block_causal_attention,
    block_causal_attention_packed,
    gate_residual,
    gate_residual_adaln,
    gelu,
    qk_norm_rope_packed,
)
from testing.devices import on_devices

L = 4
TOKENS, ROWS = (2, 3 * L, 24), (2, 3, 24)
OPS = {
    "block_causal_attention": (lambda *x, **a: block_causal_attention(*x, segment_length=L, **a), [(2, 2, 12, 64)] * 3),
    "packed": (lambda x, **a: block_causal_attention_packed(x, segment_length=L, **a), [(2, 12, 3, 2, 64)]),
    "qk_norm_rope": (
        lambda x, c, s, q, k, **a: qk_norm_rope_packed(x, c, s, q_weight=q, k_weight=k, segment_length=L, **a),
        [(2, 12, 3, 2, 8), (L, 4), (L, 4), (8,), (8,)],
    ),
    "adaln_modulate": (lambda *x, **a: adaln_modulate(*x, segment_length=L, **a), [TOKENS, ROWS, ROWS]),
    "gate_residual": (lambda *x, **a: gate_residual(*x, segment_length=L, **a), [TOKENS, TOKENS, ROWS]),
    "gate_residual_adaln": (
        lambda *x, **a: gate_residual_adaln(*x, segment_length=L, **a),
        [TOKENS, TOKENS, ROWS, ROWS, ROWS],
    ),
    "gelu": (gelu, [TOKENS]),  # backend cpu alone: the other is PyTorch's own
}
each_op = pytest.mark.parametrize("name", OPS)
BACKENDS = on_devices("cpu", "torch", "triton", "cuda")


def gradients(name, backend, device, hooks=None):
    """Of all inputs that take one; under hooks (pack, unpack) of saved tensors."""
    op, shapes = OPS[name]
    if name == "gelu" and backend != "cpu":
        pytest.skip("no op of ours")
    torch.manual_seed(0)
    dtype, tables = torch.float16 if backend == "cuda" else torch.float32, (1, 2) if name == "qk_norm_rope" else ()
    inputs = [torch.randn(shape).to(device, dtype).requires_grad_(i not in tables) for i, shape in enumerate(shapes)]
    with hooks or nullcontext():
        y = op(*inputs, backend=backend)
    y = sum(part.sin() for part in y) if isinstance(y, tuple) else y.sin()
    return torch.autograd.grad(y.sum(), [x for x in inputs if x.requires_grad])


def in_order_of_columns(x):
    """Equal, with strides that grow from the first dim on."""
    return torch.empty(x.shape[::-1], dtype=x.dtype, device=x.device).permute(*range(x.dim())[::-1]).copy_(x)


def with_gaps(x):
    return torch.full((*x.shape, 2), float("nan"), dtype=x.dtype, device=x.device)[..., 0].copy_(x)


SAME = {
    "save_on_cpu": lambda device: save_on_cpu(),
    "numpy": lambda device: saved_tensors_hooks(lambda x: x.cpu().numpy(), lambda x: torch.from_numpy(x).to(device)),
    "other order": lambda device: saved_tensors_hooks(in_order_of_columns, lambda x: x),
    "gaps": lambda device: saved_tensors_hooks(lambda x: x, with_gaps),
}


@each_op
@pytest.mark.parametrize("hooks", SAME.values(), ids=SAME)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_the_same_values_in_other_memory(name, hooks, backend, device):
    expected, got = gradients(name, backend, device), gradients(name, backend, device, hooks(device))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a)


@each_op
def test_a_graph_of_the_gradient_under_hooks(name):
    """The op of the backward saves nothing: its own gradient is refused when it is asked for."""
    op, shapes = OPS[name]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes if shape[0] != L]
    tables = [torch.randn(shape) for shape in shapes if shape == (L, 4)]
    call = [inputs[0], *tables, *inputs[1:]]
    with save_on_cpu():
        y = op(*call, backend="cpu")
        total = sum(part.sin().sum() for part in (y if isinstance(y, tuple) else (y,)))
        gradients_of_all = torch.autograd.grad(total, inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradients of gradients are not supported"):
        sum(gradient.sum() for gradient in gradients_of_all).backward()


OTHERS = {
    "bf16": (lambda x: x.bfloat16(), "has given back torch.bfloat16 of shape"),
    "float64": (lambda x: x.double(), "has given back torch.float64"),
    "rows": (lambda x: x[:1], r"of shape \(1,.*; expected torch.float.* of shape"),
    "columns": (lambda x: x[..., :1], r", 1\) on .*; expected torch.float.* of shape"),
    "meta": (lambda x: x.to("meta"), "on meta; expected torch.float"),
}


@each_op
@pytest.mark.parametrize(("change", "message"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_others_are_refused(name, change, message, backend, device):
    """A kernel would read them as memory of what was saved."""
    with pytest.raises(ValueError, match=f"a hook of saved tensors .*{message}"):
        gradients(name, backend, device, saved_tensors_hooks(lambda x: x, change))
