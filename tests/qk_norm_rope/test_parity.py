"""Values and gradients of qk_norm_rope on every backend against the fp64 reference, under the 1.5x / 2x rule."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ard_kernels import qk_norm_rope, qk_norm_rope_packed
from ard_kernels.common import extension
from ard_kernels.qk_norm_rope import reference
from testing import plain
from testing.devices import on_devices
from testing.drawing import TIERS
from testing.oracle import BACKWARD_FACTOR, assert_all_close

BACKENDS = ("torch", "cpu", "triton", "cuda")
SLOW = ("triton", "cuda")  # on the CPU: so with smaller cases
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
on_every_backend = pytest.mark.parametrize(("backend", "device"), on_devices(*BACKENDS))


@dataclass(frozen=True)
class Shape:
    """A call. tables: None, or how many dims they come with; segment: rows of the tables, None for T."""

    B: int = 2
    T: int = 6
    H: int = 3
    kv_heads: int = 2
    D: int = 72
    dtype: torch.dtype = FP32
    norm: str | None = "rms"
    over: str = "head"
    weighted: bool = True
    parameter_dtype: torch.dtype = FP32
    pairs: str = "interleaved"
    P: int = 36
    tables: int | None = 2
    table_dtype: torch.dtype = FP32
    segment: int | None = None
    kind: str = "packed"  # one packed projection in and out; else two tensors: contiguous, strided, bthd

    @property
    def heads(self) -> tuple[int, int]:
        return self.H, self.H if self.kind == "packed" else self.kv_heads


def make_tables(shape: Shape, device):
    """(arguments, as (B or 1, L, H or 1, P))."""
    if shape.tables is None:
        return {}, None
    rows = shape.segment or shape.T
    size = {2: (rows, shape.P), 3: (shape.B, rows, shape.P), 4: (shape.B, rows, shape.H, shape.P)}[shape.tables]
    angles = torch.randn(size, device=device) * 3
    cos, sin = angles.cos().to(shape.table_dtype), angles.sin().to(shape.table_dtype)
    view = (1,) * (shape.tables == 2) + size[:-1] + (1,) * (shape.tables < 4) + size[-1:]
    return {"cos": cos, "sin": sin, "segment_length": shape.segment}, [t.reshape(view) for t in (cos, sin)]


def make_parameters(shape: Shape, device) -> dict[str, torch.Tensor]:
    """Leaves: q_weight, k_weight and, of a LayerNorm, q_bias, k_bias; those that the call has."""
    made = {}
    if shape.norm and shape.weighted:
        for name, heads in zip("qk", shape.heads, strict=True):
            width = heads * shape.D if shape.over == "all" else shape.D
            made[f"{name}_weight"] = 1 + torch.randn(width, device=device) / 2
            if shape.norm == "layer":
                made[f"{name}_bias"] = torch.randn(width, device=device)
    return {name: p.to(shape.parameter_dtype).requires_grad_() for name, p in made.items()}


def make_sections(shape: Shape, device):
    """(leaves, q and k or qkv as the op takes them, q and k as (B, T, H, D))."""
    B, T, D = shape.B, shape.T, shape.D
    if shape.kind == "packed":
        qkv = torch.randn(B, T, 3, shape.H, D, device=device).to(shape.dtype).requires_grad_()
        return [qkv], (qkv,), qkv.unbind(2)[:2]
    leaves, given, views = [], [], []
    for heads in shape.heads:
        if shape.kind == "contiguous":  # (B, H, T, D) memory
            leaf = torch.randn(B, heads, T, D, device=device)
        elif shape.kind == "strided":  # every other token of a wider, offset buffer
            leaf = torch.randn(B, 2 * T + 1, heads, D + 8, device=device)
        else:
            leaf = torch.randn(B, T, heads, D, device=device)
        leaf = leaf.to(shape.dtype).requires_grad_()
        x = leaf[:, 1::2, :, 8:].transpose(1, 2) if shape.kind == "strided" else leaf
        leaves.append(leaf)
        given.append(x)
        views.append(x if shape.kind == "bthd" else x.transpose(1, 2))
    return leaves, given, views


def run_op(shape: Shape, given, tables, parameters, backend):
    """q and k as (B, T, H, D)."""
    settings = dict(norm=shape.norm, over=shape.over, pairs=shape.pairs, backend=backend, **tables, **parameters)
    if shape.kind == "packed":
        out = qk_norm_rope_packed(*given, **settings)
        assert out.is_contiguous() and torch.equal(out[:, :, 2], given[0][:, :, 2])
        return out.unbind(2)[:2]
    layout = "bthd" if shape.kind == "bthd" else "bhtd"
    outputs = qk_norm_rope(*given, layout=layout, **settings)
    outputs = outputs if layout == "bthd" else tuple(y.transpose(1, 2) for y in outputs)
    assert all(y.is_contiguous() for y in outputs)
    return outputs


def run_other(shape: Shape, views, tables, parameters, exact: bool):
    """The reference, or plain PyTorch."""
    outputs = []
    for name, x in zip("qk", views, strict=True):
        own = parameters.get(f"{name}_weight"), parameters.get(f"{name}_bias")
        if exact:
            x = reference.norm(x, shape.norm, shape.over == "all", *own) if shape.norm else x.double()
            outputs.append(reference.rotate(x, *tables, shape.pairs == "half") if tables else x)
            continue
        x = plain.qk_norm(x, shape.norm, shape.over, *own)
        spread = tables and [t.repeat(1, shape.T // t.shape[1], 1, 1) for t in tables]
        outputs.append(plain.rotate(x, *spread, shape.pairs) if tables else x)
    return outputs


def check(shape: Shape, backend, device):
    tables, wide = make_tables(shape, device)
    parameters = make_parameters(shape, device)
    leaves, given, views = make_sections(shape, device)
    outputs = (
        run_op(shape, given, tables, parameters, backend),
        run_other(shape, views, wide, parameters, exact=False),
        run_other(shape, views, wide, parameters, exact=True),
    )
    assert all(y.dtype == shape.dtype for y in outputs[0])
    assert_all_close(*outputs, label=f"{shape} forward")
    grads_out = [torch.randn_like(y) for y in outputs[0]]
    wanted = [*leaves, *parameters.values()]
    grads = [
        torch.autograd.grad(ys, wanted, [g.to(y.dtype) for g, y in zip(grads_out, ys, strict=True)]) for ys in outputs
    ]
    # autograd rounds the reference's gradient to the leaf's dtype; that rounding is the oracle's floor.
    assert_all_close(grads[0], grads[1], [g.double() for g in grads[2]], factor=BACKWARD_FACTOR, label=f"{shape} grad")


WAN = Shape(D=128, H=12, P=64, over="all", kind="bthd", kv_heads=12, tables=2)
MODELS = {
    "wan": WAN,
    "ltx2": Shape(D=64, H=4, kv_heads=4, P=32, over="all", kind="bthd", pairs="half", tables=4),
    "flux": Shape(D=128, H=4, P=64, kind="contiguous", kv_heads=4),
    "flux packed, bf16": Shape(D=128, H=4, P=64, dtype=BF16, parameter_dtype=BF16),
    "sd3": Shape(D=64, H=4, tables=None, kind="contiguous", kv_heads=4, dtype=FP16),
    "lightningdit": Shape(norm=None, segment=3, H=4),
    "layer, grouped": Shape(norm="layer", kind="strided", D=64, P=32, tables=3, dtype=BF16),
    "layer, all, partial half": Shape(norm="layer", over="all", pairs="half", P=16, segment=2),
    "partial interleaved, fp16 tables": Shape(P=10, dtype=FP16, table_dtype=FP16, weighted=False),
    "half, odd pieces": Shape(pairs="half", P=36, dtype=BF16, kind="bthd"),
}


@on_every_backend
@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
def test_models(backend, device, shape, poisoned):
    check(replace(shape, B=1, T=4, segment=shape.segment and 2) if backend in SLOW else shape, backend, device)


def shapes(largest: int):
    """Any call of at most `largest` tokens in each of the segments."""

    @st.composite
    def draw(pick):
        D = 8 * pick(st.integers(1, 32 if largest > 8 else 18))
        segment, count = pick(st.integers(1, largest)), pick(st.integers(1, 3))
        dtype = pick(st.sampled_from((FP32, BF16, FP16)))
        kind = pick(st.sampled_from(["packed", "contiguous", "strided", "bthd"]))
        tables = pick(st.sampled_from([None, 2, 3, 4]))
        heads = pick(st.integers(1, 7))
        half = pick(st.booleans())
        P = 4 * pick(st.integers(1, D // 8)) if half else pick(st.integers(1, D // 2))
        return Shape(
            pick(st.integers(1, 3)), segment * count, heads, heads if tables == 4 else pick(st.integers(1, 4)), D,
            dtype,
            pick(st.sampled_from(["rms", "layer", None])), pick(st.sampled_from(["head", "all"])), pick(st.booleans()),
            pick(st.sampled_from([dtype, FP32])), "half" if half else "interleaved", P, tables,
            pick(st.sampled_from([dtype, FP32])), pick(st.sampled_from([None, segment])), kind,
        )  # fmt: skip

    return draw()


EXAMPLES = {"torch": (15, 200), "cpu": (25, 300), "triton": (3, 20), "cuda": (10, 100)}


@on_every_backend
@TIERS
def test_drawn_cases(backend, device, tier):
    @settings(max_examples=EXAMPLES[backend][tier])
    @given(shapes(4 if backend in SLOW else 40))
    def draw(shape):
        check(shape, backend, device)

    draw()


@on_every_backend
def test_gradients_reach_everything_that_is_learned(backend, device):
    """Cut off q, k, a weight or a bias in the backward (LongLive fcd6475 lost its norms' weights) and this fails."""
    shape = Shape(B=1, T=4, norm="layer", kind="bthd", D=16, P=8)
    tables, wide = make_tables(shape, device)
    parameters = make_parameters(shape, device)
    leaves, given, views = make_sections(shape, device)
    named = dict(zip("qk", leaves, strict=True)) | parameters
    assert set(named) == {"q", "k", "q_weight", "k_weight", "q_bias", "k_bias"}
    loss, exact = (
        sum(y.double().sin().sum() for y in ys)
        for ys in (
            run_op(shape, given, tables, parameters, backend),
            run_other(shape, views, wide, parameters, exact=True),
        )
    )
    for name, leaf in named.items():
        got, expected = (torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (loss, exact))
        assert got.abs().min() > 0, f"no gradient to {name}"
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=name)


@on_every_backend
def test_not_rounded_between_norm_and_rotation(backend, device):
    """Rows whose norm is no bf16 number, turned by 45 degrees: one rounding, that of the exact result."""
    x = torch.randn(1, 1, 8, 64, device=device).bfloat16()
    angle = torch.full((8, 32), 0.7853981633974483, device=device)
    y = qk_norm_rope(x, cos=angle.cos(), sin=angle.sin(), backend=backend)
    n = reference.norm(x.transpose(1, 2), "rms", False)
    exact = reference.rotate(n, *(t[None, :, None] for t in (angle.cos(), angle.sin())), False).transpose(1, 2)
    assert (y != exact.bfloat16()).sum() <= 1, "a tie of fp32 arithmetic may fall the other way"


@on_every_backend
def test_an_infinity_stays_where_it_is(backend, device):
    """Elements past 2 P are copied, whatever is beside them; without a norm only its pair sees an infinity."""
    x = torch.randn(1, 1, 4, 24, device=device)
    x[0, 0, 1, 3] = x[0, 0, 2, 21] = float("inf")
    angle = torch.randn(4, 5, device=device)
    y = qk_norm_rope(x, cos=angle.cos(), sin=angle.sin(), norm=None, backend=backend)
    strange = (~y.isfinite()).nonzero()[:, 2:].tolist()
    assert strange == [[1, 2], [1, 3], [2, 21]]


@on_every_backend
@pytest.mark.parametrize("size", [(0, 3, 4, 16), (2, 3, 0, 16), (2, 0, 4, 16)], ids=str)
def test_empty(backend, device, size):
    x = torch.randn(size, device=device, requires_grad=True)
    weight = torch.randn(16, device=device, requires_grad=True)
    table = torch.randn(size[2], 8, device=device)
    y = qk_norm_rope(x, cos=table, sin=table, q_weight=weight, backend=backend)
    assert y.shape == size
    y.sum().backward()
    assert x.grad.shape == size and not weight.grad.any()


@on_every_backend
def test_expanded_inputs_and_gradients(backend, device):
    x = torch.randn(1, 1, 4, 16, device=device, requires_grad=True)
    y = qk_norm_rope(x.expand(3, 2, 4, 16), backend=backend)
    expected = reference.norm(x.expand(3, 2, 4, 16), "rms", False)
    torch.testing.assert_close(y, expected.float())
    grads = [torch.autograd.grad(v[..., ::2].sum(), x)[0] for v in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["rms", "layer", None])
@pytest.mark.parametrize("over", ["head", "all"])
def test_gradcheck(over, norm, device):
    shape = Shape(B=1, T=4, D=8, P=3, H=2, dtype=torch.float64, norm=norm, over=over, segment=2, kind="bthd")
    shape = replace(shape, table_dtype=torch.float64, parameter_dtype=torch.float64)
    tables, _ = make_tables(shape, device)
    parameters = make_parameters(shape, device)
    leaves, _, _ = make_sections(shape, device)

    def run(q, k, *values):
        return run_op(shape, (q, k), tables, dict(zip(parameters, values, strict=True)), None)

    assert torch.autograd.gradcheck(run, (*leaves, *parameters.values()))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_every_instruction_set_of_this_cpu(dtype, poisoned):
    best = extension.module.cpu_isa()
    try:
        for name in extension.module.cpu_isas():
            extension.module.use_cpu_isa(name)
            for norm, over, pairs in (("layer", "head", "interleaved"), ("rms", "all", "half")):
                for D, P in ((72, 36), (40, 20), (128, 24)):
                    check(Shape(T=40, D=D, P=P, norm=norm, over=over, pairs=pairs, dtype=dtype), "cpu", "cpu")
    finally:
        extension.module.use_cpu_isa(best)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("backend", "device"), on_devices("cpu"))
def test_outputs_past_the_caches(backend, device, dtype, poisoned):
    """Above the streaming threshold of the C++ kernel (8 MiB). Without weights: sums over so many rows are long."""
    check(
        Shape(B=1, T=(9 << 20) // (4 * 72 * dtype.itemsize), H=4, kv_heads=1, kind="bthd", dtype=dtype, weighted=False),
        "cpu",
        "cpu",
    )
