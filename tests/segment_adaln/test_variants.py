"""Absent rows, RMSNorm, weight and bias of the norm, rows (B, F, 1, C): values, gradients, contract."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import ard_kernels
from ard_kernels import adaln_modulate, gate_residual, gate_residual_adaln
from ard_kernels.segment_adaln import reference
from testing import plain
from testing.devices import on_devices, simulated_exhaustive, simulated_slow
from testing.drawing import TIERS
from testing.oracle import BACKWARD_FACTOR, assert_all_close
from testing.plain import TAKES

BACKENDS = ("torch", "cpu", "triton", "cuda")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ROWS = ("gate", "shift", "scale")
on_every_backend = pytest.mark.parametrize(("backend", "device"), on_devices(*BACKENDS))
# What models ask for: (op, rows that are there, norm, weight, bias).
SEAMS = {
    "norm3": ("gate_residual_adaln", ("gate",), "layer", True, True),
    "after cross attention": ("gate_residual_adaln", ("shift", "scale"), "layer", False, False),
    "scale alone": ("gate_residual_adaln", ("gate", "scale"), "rms", True, False),  # Lumina, Z-Image
    "all": ("gate_residual_adaln", ROWS, "layer", True, True),
    "rms": ("gate_residual_adaln", ROWS, "rms", True, False),
    "bias alone": ("adaln_modulate", ("scale",), "layer", False, True),
    "shift alone": ("adaln_modulate", ("shift",), "rms", False, False),
    "no rows": ("adaln_modulate", (), "layer", True, True),
    "nothing": ("adaln_modulate", (), "rms", False, False),
    "a sum": ("gate_residual", (), "layer", False, False),
}
# (dtypes of x, branch, rows, parameters), how rows come
DTYPES = {
    "fp32": (FP32,) * 4,
    "mixed": (BF16, FP16, FP32, FP32),
    "bf16": (BF16,) * 4,
    "wide x": (FP32, BF16, BF16, FP32),
}
FORMS = ("segment", "frame", "token")  # chunks of (B, S, 6C), of (B, S, 6, C), of (B, T, 6C)


class Variant:
    """A call of `op`: leaves, its inputs, its norm, and the three computations of it."""

    def __init__(
        self, op, rows, norm, weight, bias, B, lengths, C, dtypes=DTYPES["fp32"], form="segment", device="cpu"
    ):
        x_dtype, branch_dtype, row_dtype, parameter_dtype = dtypes
        T = sum(lengths)

        def leaf(dtype, *shape):
            return torch.randn(shape, device=device).to(dtype).requires_grad_()

        shape = {"segment": (B, len(lengths), 6 * C), "frame": (B, len(lengths), 6, C), "token": (B, T, 6 * C)}[form]
        table = leaf(row_dtype, *shape)
        sections = dict(zip(ROWS, table.chunk(6, dim=2)[1:4], strict=True))
        named = {"x": leaf(x_dtype, B, T, C), "branch": leaf(branch_dtype, B, T, C)}
        named |= {name: sections[name] if name in rows else None for name in ROWS}
        self.op, self.norm, self.dtype = op, norm, x_dtype
        self.inputs = [named[name] for name in TAKES[op]]
        self.weight = leaf(parameter_dtype, C) if weight else None
        self.bias = leaf(parameter_dtype, C) if bias else None
        candidates = (named["x"], named["branch"] if "branch" in TAKES[op] else None, table if rows else None)
        self.leaves = [x for x in (*candidates, self.weight, self.bias) if x is not None]
        self.segment_length = lengths[0] if len(set(lengths)) == 1 else lengths
        self.row_lengths = [1] if form == "token" else lengths

    def of_norm(self):
        return {} if self.op == "gate_residual" else {"norm": self.norm, "weight": self.weight, "bias": self.bias}

    def ours(self, backend=None):
        how = {"segment_length": self.segment_length, "backend": backend}
        return as_tuple(getattr(ard_kernels, self.op)(*self.inputs, **how, **self.of_norm()))

    def plain(self):
        return plain.adaln(self.op, *self.inputs, lengths=self.row_lengths, **self.of_norm())

    def exact(self):
        return as_tuple(getattr(reference, self.op)(*self.inputs, self.row_lengths, **self.of_norm()))


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check(backend, *arguments, **settings):
    variant = Variant(*arguments, **settings)
    outputs = variant.ours(backend), variant.plain(), variant.exact()
    assert all(y.dtype == variant.dtype for y in outputs[0])
    assert_all_close(*outputs, label="forward")
    cotangents = [torch.randn_like(y) for y in outputs[0]]
    grads = [
        torch.autograd.grad(ys, variant.leaves, [g.to(y.dtype) for g, y in zip(cotangents, ys, strict=True)])
        for ys in outputs
    ]
    assert all(g.dtype == x.dtype and g.shape == x.shape for g, x in zip(grads[0], variant.leaves, strict=True))
    exact = [g.double() for g in grads[2]]
    assert_all_close(grads[0], grads[1], exact, factor=BACKWARD_FACTOR, label="gradient")


@on_every_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seam", SEAMS.values(), ids=SEAMS)
def test_seams(backend, device, seam, form, poisoned):
    dtypes = DTYPES[{"segment": "fp32", "frame": "mixed", "token": "bf16"}[form]]
    B, lengths = (2, [37, 3, 2, 1, 40]) if backend in ("torch", "cpu") else (1, [5, 2])
    check(backend, *seam, B, lengths, 72, dtypes, form, device)


WIDTHS = (1152, 1536, 2048, 2240, 2304, 3072, 3840, 4096, 5120, 6144)


@on_every_backend
@pytest.mark.parametrize("C", [C if C in (2240, 5120) else pytest.param(C, marks=pytest.mark.slow) for C in WIDTHS])
def test_widths_of_video_models(backend, device, C, poisoned):
    seam = SEAMS["all" if C % 1024 else "rms"]
    check(backend, *seam, 1, [2, 1], C, DTYPES["mixed"], "frame", device)


NARROW = st.integers(16, 100)  # narrower rows are ill-conditioned
EIGHTS = st.integers(2, 40).map(lambda eights: 8 * eights)
# What a drawn case of each backend may have, and how many are drawn in the fast and the exhaustive tests.
DRAWN = {
    "torch": {"longest": 70, "batch": 3, "widths": NARROW, "examples": (10, 300)},
    "cpu": {"longest": 70, "batch": 3, "widths": NARROW, "examples": (20, 500)},
    "triton": {"longest": 12, "batch": 2, "widths": NARROW, "examples": (3, 60)},
    "cuda": {"longest": 16, "batch": 3, "widths": EIGHTS, "examples": (5, 100)},
}


@on_every_backend
@TIERS
def test_drawn_variants(backend, device, tier):
    longest = DRAWN[backend]["longest"]

    @settings(max_examples=DRAWN[backend]["examples"][tier])
    @given(
        op=st.sampled_from(list(TAKES)),
        rows=st.sets(st.sampled_from(ROWS)),
        norm=st.sampled_from(["layer", "rms"]),
        weight=st.booleans(),
        bias=st.booleans(),
        lengths=st.lists(st.integers(1, longest), min_size=1, max_size=5),
        B=st.integers(1, DRAWN[backend]["batch"]),
        C=DRAWN[backend]["widths"],
        dtypes=st.tuples(*[st.sampled_from([FP32, BF16, FP16])] * 4),
        form=st.sampled_from(FORMS),
        seed=st.integers(0, 2**32),
    )
    def draw(op, rows, norm, weight, bias, lengths, B, C, dtypes, form, seed):
        torch.manual_seed(seed)
        rows, has_norm = rows & set(TAKES[op]), op != "gate_residual"
        check(
            backend, op, rows, norm, weight and has_norm, bias and has_norm and norm == "layer", B, lengths, C, dtypes,
            form, device,
        )  # fmt: skip

    draw()


@on_every_backend
def test_one_input_at_a_time(backend, device, poisoned):
    """A gradient that only one input asks for is the one that it gets beside all others: none is cut, none is lost."""
    variant = Variant(*SEAMS["all"], 1, [3, 2], 40, DTYPES["mixed"], "frame", device)
    outputs = variant.ours(backend)
    cotangents = [torch.randn_like(y) for y in outputs]
    names = [*TAKES["gate_residual_adaln"], "weight", "bias"]
    tensors = [x.detach() for x in (*variant.inputs, variant.weight, variant.bias)]
    whole = torch.autograd.grad(outputs, [*variant.inputs, variant.weight, variant.bias], cotangents)

    for name, tensor, expected in zip(names, tensors, whole, strict=True):
        leaf = tensor.clone().requires_grad_()
        given = {n: leaf if n == name else t for n, t in zip(names, tensors, strict=True)}
        got = gate_residual_adaln(**given, segment_length=[3, 2], backend=backend)
        reached = [y for y in got if y.requires_grad]  # with a gradient for weight alone h has none
        assert torch.autograd.grad(reached, leaf, cotangents[-len(reached) :])[0].equal(expected), name
        assert expected.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("backend", "device", "count", "L", "C"),
    on_devices(torch=[(2, 480, 384)], cpu=[(2, 480, 384), (100, 3, 384)], triton=[(2, 5, 24)], cuda=[(2, 20, 24)]),
)
@pytest.mark.parametrize("form", ["frame", "token"])
def test_parameters_are_bit_equal_over_runs_and_threads(backend, device, count, L, C, form, thread_counts):
    variant = Variant(*SEAMS["all"], 2, [L] * count, C, form=form, device=device)
    cotangents = [torch.randn_like(y) for y in variant.ours(backend)]

    def run():
        outputs = variant.ours(backend)
        return *outputs, *torch.autograd.grad(outputs, variant.leaves, cotangents)

    first = run()
    for threads in thread_counts():
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"{threads} threads"


@on_every_backend
@pytest.mark.parametrize("op", ["adaln_modulate", "gate_residual_adaln", "gate_residual"])
def test_no_samples_and_no_tokens(backend, device, op):
    for B, lengths in ((0, [4, 4]), (2, [])):
        rows = [name for name in ROWS if name in TAKES[op] and name != "shift"]
        x = torch.randn(B, sum(lengths), 16, device=device, requires_grad=True)
        row = torch.randn(B, len(lengths), 1, 16, device=device, requires_grad=True)
        weight = torch.randn(16, device=device, requires_grad=True)
        inputs = [{"x": x, "branch": x}.get(name, row if name in rows else None) for name in TAKES[op]]
        of_norm = {} if op == "gate_residual" else {"norm": "rms", "weight": weight}
        outputs = as_tuple(getattr(ard_kernels, op)(*inputs, segment_length=4, backend=backend, **of_norm))
        assert all(y.shape == x.shape for y in outputs)
        sum(y.sum() for y in outputs).backward()
        assert row.grad.shape == row.shape and (op == "gate_residual" or weight.grad.equal(torch.zeros_like(weight)))


@pytest.mark.parametrize("seam", SEAMS.values(), ids=SEAMS)
def test_gradcheck(seam, device):
    op, rows, norm, weight, bias = seam
    variant = Variant(op, rows, norm, weight, bias, 2, [1, 2], 8, (torch.float64,) * 4, "frame", device)
    tensors = [*variant.inputs, variant.weight, variant.bias]
    leaves = [x.detach().contiguous().requires_grad_() for x in tensors if x is not None]

    def run(*given):
        given = iter(given)
        *inputs, weight, bias = (None if x is None else next(given) for x in tensors)
        of_norm = {} if op == "gate_residual" else {"norm": norm, "weight": weight, "bias": bias}
        return getattr(ard_kernels, op)(*inputs, segment_length=[1, 2], **of_norm)

    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True)


@pytest.mark.parametrize(
    ("backend", "device", "seam"),
    simulated_exhaustive(on_devices(torch=["rms"], cpu=["norm3"], triton=["rms"], cuda=["norm3"])),
)
def test_compiles_to_one_graph(backend, device, seam):
    variant = Variant(*SEAMS[seam], 2, [4, 4], 24, form="frame", device=device)
    run = torch.compile(lambda: variant.ours(backend), fullgraph=True, backend="aot_eager")
    results = [
        torch.autograd.grad([y.sin().sum() for y in f()], variant.leaves) for f in (run, lambda: variant.ours(backend))
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("backend", "device", "seam"),
    simulated_slow(on_devices(torch=["scale alone"], cpu=["norm3"], triton=["norm3"], cuda=["scale alone"])),
)
def test_opcheck(backend, device, seam):
    variant = Variant(*SEAMS[seam], 1, [2, 6], 24, DTYPES["wide x"], device=device)
    x, branch, *rows = variant.inputs
    inputs = x, branch, *rows, variant.weight, variant.bias
    torch.library.opcheck(torch.ops.ard.segment_adaln, (*inputs, [2, 6], variant.norm, 1e-6, FP32, backend))
    h, y, mean, rstd = (t if t is None else t.detach() for t in torch.ops.ard.segment_adaln(
        *inputs, [2, 6], variant.norm, 1e-6, BF16, backend))  # fmt: skip
    saved = [t if t is None else t.detach() for t in (branch, rows[0], rows[2], variant.weight, variant.bias)]
    wanted = [True, False, rows[2] is not None, True, variant.bias is not None]
    settings = [2, 6], BF16, wanted, backend
    torch.library.opcheck(torch.ops.ard.segment_adaln_backward, (None, y, h, *saved, mean, rstd, *settings))


def test_counted_as_no_flops(device):
    with FlopCounterMode(display=False) as counter:
        for seam in SEAMS.values():
            sum(y.sum() for y in Variant(*seam, 1, [4, 4], 24, device=device).ours()).backward()
    assert counter.get_total_flops() == 0


@on_every_backend
def test_a_weight_with_steps_and_an_expanded_one(backend, device):
    x = torch.randn(1, 6, 24, device=device)
    wide, one = torch.randn(48, device=device, requires_grad=True), torch.randn(1, device=device, requires_grad=True)
    for leaf, weight in ((wide, wide[::2]), (one, one.expand(24))):
        how = {"segment_length": 3, "norm": "rms", "weight": weight}
        y, expected = adaln_modulate(x, **how, backend=backend), reference.adaln_modulate(
            x, None, None, [3, 3], norm="rms", weight=weight)  # fmt: skip
        torch.testing.assert_close(y, expected.float())
        grads = [torch.autograd.grad(v.sin().sum(), leaf)[0] for v in (y, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


X, ROW = torch.randn(2, 12, 16), torch.randn(2, 3, 16)
BAD = {
    "norm": ({"norm": "batch"}, "norm is 'batch'; expected 'layer' or 'rms'"),
    "no norm": ({"norm": None}, "norm is None; expected 'layer' or 'rms'"),
    "rms bias": ({"norm": "rms", "bias": X[0, 0]}, "bias is given with norm='rms'; expected None"),
    "weight shape": ({"weight": ROW}, r"weight has shape \(2, 3, 16\); expected \(16,\)"),
    "weight dtype": ({"weight": X[0, 0].long()}, "weight has dtype torch.int64; expected float32"),
    "weight fp64": ({"weight": X[0, 0].double()}, "weight has dtype torch.float64; expected it with float64 x only"),
    "bias device": ({"bias": X[0, 0].to("meta")}, "bias is on meta; expected x's cpu"),
    "bias type": ({"bias": 1.0}, "bias is 1.0; expected a tensor"),
    "segments": ({"segment_length": 5}, "x has 12 tokens; expected a multiple of segment_length=5"),
    "frames": (
        {"scale": ROW[:, :2, None]},
        r"scale has shape \(2, 2, 1, 16\); expected \(2, 3, 16\) .per segment, also as \(2, 3, 1, 16\)",
    ),
    "sections": ({"scale": ROW[:, :, None].expand(2, 3, 6, 16)}, r"scale has shape \(2, 3, 6, 16\); expected"),
    "forms differ": (
        {"scale": ROW, "shift": ROW[:, :, None]},
        r"scale has shape \(2, 3, 16\); expected shift's \(2, 3, 1",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=f"adaln_modulate: {message}"):
        adaln_modulate(X, **{"segment_length": 4, **arguments})
    with pytest.raises(ValueError, match=f"gate_residual_adaln: {message}"):
        gate_residual_adaln(X, X, **{"segment_length": 4, **arguments})


def raw(
    x=X, branch=None, gate=None, shift=None, scale=None, weight=None, bias=None, lengths=(4,), norm="layer", eps=1e-6
):  # fmt: skip
    settings = list(lengths), norm, eps, FP32, "cpu"
    return torch.ops.ard.segment_adaln(x, branch, gate, shift, scale, weight, bias, *settings)


def raw_backward(
    wanted=(False,) * 5, h=X, grad_h=None, grad_y=X, branch=None, gate=None, mean=True, scale=None, row_dtype=None
):  # fmt: skip
    mean, rstd = (torch.zeros(2, 12) if mean else None), torch.zeros(2, 12)
    tensors = grad_h, grad_y, h, branch, gate, scale, None, None, mean, rstd
    return torch.ops.ard.segment_adaln_backward(*tensors, [4], row_dtype, list(wanted), "cpu")


RAW = {
    "gate without branch": (lambda: raw(gate=ROW), "branch is None; expected one beside gate"),
    "row without norm": (lambda: raw(branch=X, shift=ROW, norm=None), "norm is None; expected one beside shift"),
    "four dims": (lambda: raw(shift=ROW[:, :, None]), r"shift has shape \(2, 3, 1, 16\); expected 3 dims"),
    "weight strides": (lambda: raw(weight=torch.randn(32)[::2]), r"weight has strides \(2,\)"),
    "weight": (lambda: raw(weight=torch.randn(8)), r"weight has shape \(8,\); expected \(16,\)"),
    "wanted": (lambda: raw_backward(wanted=(False, True, False, False, False)), "wanted is .*; expected true for what"),
    "nothing": (lambda: raw(norm=None), "branch and norm are None"),
    "eps": (lambda: raw(eps=-1.0), "eps is -1.0; expected a positive number"),
    "integer rows": (lambda: raw_backward(row_dtype=torch.int64), "row_dtype is torch.int64; expected a float"),
    "wide rows": (lambda: raw_backward(row_dtype=torch.float64), "row_dtype is torch.float64; expected a float"),
    "rows of two dtypes": (
        lambda: raw_backward(row_dtype=torch.bfloat16, scale=ROW),
        "row_dtype is torch.bfloat16; expected a float dtype equal to scale's",
    ),
    "few wanted": (lambda: raw_backward(wanted=()), r"wanted is \[\]"),
    "no tokens": (lambda: raw_backward(h=None, grad_y=None), "h and grad_h and branch and grad_y are None"),
    "branch without gate": (lambda: raw_backward(branch=X), "gate is None; expected one beside branch"),
    "mean without norm": (
        lambda: raw_backward(h=None, grad_y=None, grad_h=X, branch=X, gate=ROW),
        "h is None; expected one",
    ),
}


@pytest.mark.parametrize(("call", "message"), RAW.values(), ids=RAW)
def test_raw_op_checks_what_it_points_to(call, message):
    with pytest.raises(ValueError, match=f"segment_adaln: {message}"):
        call()


def test_absent_rows_are_their_neutral_values(device):
    """gate 1, shift 0, scale 0 given as tensors are the same call, to the bit on the kernels."""
    x, branch = torch.randn(2, 1, 6, 24, device=device)
    one, zero = torch.ones(1, 2, 24, device=device), torch.zeros(1, 2, 24, device=device)
    for norm, backend in itertools.product(("layer", "rms"), ("cpu", "torch") if device.type == "cpu" else ("torch",)):
        how = {"segment_length": 3, "norm": norm, "backend": backend}
        given, absent = gate_residual_adaln(x, branch, one, zero, zero, **how), gate_residual_adaln(x, branch, **how)
        assert all(map(torch.equal, given, absent))
    assert torch.equal(gate_residual(x, branch, segment_length=3), x + branch)
