"""Values and gradients of the adaLN family on every backend against the fp64 reference, under the 1.5x / 2x rule."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ard_kernels
from ard_kernels import adaln_modulate, gate_residual, gate_residual_adaln
from ard_kernels.common import extension, tuning
from ard_kernels.common.segments import segment_offsets
from ard_kernels.segment_adaln import reference
from ard_kernels.segment_adaln.chunks import chunk_tokens, make_chunks
from ard_kernels.segment_adaln.triton_impl import KERNELS
from testing import plain
from testing.cases import SEAMS
from testing.devices import on_devices
from testing.drawing import TIERS
from testing.oracle import BACKWARD_FACTOR, assert_all_close
from testing.plain import TAKES

BACKENDS = ("torch", "cpu", "triton", "cuda")
SLOW = ("triton", "cuda")  # on the CPU: so with smaller cases
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)
OPS = tuple(TAKES)
on_every_backend = pytest.mark.parametrize(("backend", "device"), on_devices(*BACKENDS))


def of_op(op, x, branch, gate, shift, scale):
    """The inputs that `op` takes."""
    named = {"x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale}
    return [named[name] for name in TAKES[op]]


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def run_reference(op, inputs, lengths):
    return as_tuple(getattr(reference, op)(*of_op(op, *inputs), lengths))


def run_op(op, inputs, segment_length, backend):
    return as_tuple(getattr(ard_kernels, op)(*of_op(op, *inputs), segment_length=segment_length, backend=backend))


def make_inputs(B, lengths, C, x_dtype=FP32, row_dtype=FP32, per_token=False, kind="contiguous", device="cpu"):
    """Leaves, then x, branch (B, T, C) and the rows as chunks of one (B, S or T, 6C) projection."""

    def leaf(dtype, *shape):
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    T = sum(lengths)
    rows = leaf(row_dtype, B, T if per_token else len(lengths), 6 * C)
    if kind == "strided":  # every other token of a wider, offset buffer
        tokens = leaf(x_dtype, 2, B, 2 * T + 1, C + 3)
        x, branch = tokens[:, :, 1::2, 3:].unbind(0)
    elif kind == "transposed":  # out of the no-copy contract, still right
        tokens = leaf(x_dtype, 2, B, C, T)
        x, branch = tokens.transpose(-1, -2).unbind(0)
    else:
        tokens = leaf(x_dtype, 2, B, T, C)
        x, branch = tokens.unbind(0)
    return (tokens, rows), (x, branch, *rows.chunk(6, -1)[1:4])


def check(op, backend, device, B, lengths, C, x_dtype=FP32, row_dtype=None, per_token=False, kind="contiguous"):
    row_dtype = row_dtype or x_dtype
    leaves, inputs = make_inputs(B, lengths, C, x_dtype, row_dtype, per_token, kind, device)
    segment_length = lengths[0] if len(set(lengths)) == 1 else lengths
    row_lengths = [1] if per_token else lengths
    outputs = (
        run_op(op, inputs, segment_length, backend),
        plain.adaln(op, *of_op(op, *inputs), lengths=row_lengths),
        run_reference(op, inputs, row_lengths),
    )
    assert all(y.dtype == x_dtype for y in outputs[0])
    assert_all_close(*outputs, label=f"{op} forward")
    grad_outputs = [torch.randn_like(y) for y in outputs[0]]
    grads = [
        torch.autograd.grad(ys, leaves, [g.to(y.dtype) for g, y in zip(grad_outputs, ys, strict=True)])
        for ys in outputs
    ]
    # autograd rounds the reference's gradient to the leaf's dtype; that rounding is the oracle's floor.
    assert_all_close(grads[0], grads[1], [g.double() for g in grads[2]], factor=BACKWARD_FACTOR, label=f"{op} grad")


@on_every_backend
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("dtypes", "per_token"),
    [((FP32, FP32), False), ((BF16, FP32), False), ((BF16, BF16), True), ((FP16, FP32), True), ((FP16, FP16), False)],
    ids=str,
)
def test_model_width(backend, device, op, per_token, dtypes, poisoned):
    B, lengths = (1, [5, 5]) if backend in SLOW else (2, [40, 40, 40])
    check(op, backend, device, B, lengths, 1152, *dtypes, per_token=per_token)


@on_every_backend
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("kind", "lengths"),
    [
        ("contiguous", [33]),
        ("contiguous", [7, 33, 1, 20]),
        ("strided", [7, 33, 1, 20]),
        ("transposed", [7, 33, 1, 20]),
    ],
    ids=str,
)
def test_strides_and_ragged_segments(backend, device, op, kind, lengths, poisoned):
    check(op, backend, device, 1 if backend in SLOW else 3, lengths, 40, kind=kind)


NARROW = st.integers(8, 100)  # narrower rows are ill-conditioned
EIGHTS = st.integers(1, 40).map(lambda eights: 8 * eights)
# What a drawn case of each backend may have, and how many are drawn in the fast and the exhaustive tests.
DRAWN = {
    "torch": {"longest": 70, "batch": 3, "widths": NARROW, "examples": (30, 200)},
    "cpu": {"longest": 70, "batch": 3, "widths": NARROW, "examples": (30, 200)},
    "triton": {"longest": 12, "batch": 2, "widths": NARROW, "examples": (4, 15)},
    "cuda": {"longest": 16, "batch": 3, "widths": EIGHTS, "examples": (15, 40)},
}


@on_every_backend
@pytest.mark.parametrize("op", OPS)
@TIERS
def test_drawn_cases(backend, device, op, tier):
    longest = DRAWN[backend]["longest"]

    @settings(max_examples=DRAWN[backend]["examples"][tier])
    @given(
        lengths=st.one_of(
            st.lists(st.integers(1, longest), min_size=1, max_size=5),
            st.tuples(st.integers(1, longest), st.integers(1, 5)).map(lambda p: [p[0]] * p[1]),
        ),
        B=st.integers(1, DRAWN[backend]["batch"]),
        C=DRAWN[backend]["widths"],
        dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
        per_token=st.booleans(),
        kind=st.sampled_from(["contiguous", "strided", "transposed"]),
    )
    def draw(lengths, B, C, dtypes, per_token, kind):
        check(op, backend, device, B, lengths, C, *dtypes, per_token=per_token, kind=kind)

    draw()


@pytest.mark.parametrize(("backend", "device"), on_devices("cuda"))
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("C", [256, 520, 2568, 4104, 8192])
@pytest.mark.parametrize("op", OPS)
def test_widths(backend, device, op, C, dtype, poisoned):
    check(op, backend, device, 1, [3, 2], C, dtype, FP32)


@pytest.mark.parametrize(("backend", "device"), on_devices("cuda"))
@pytest.mark.parametrize("C", [72, 512, 1152, 8192])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_tokens_off_16_byte_boundaries(backend, device, C, dtype, poisoned):
    check("gate_residual_adaln", backend, device, 1, [3, 2], C, dtype, kind="strided")


@pytest.mark.parametrize(("backend", "device"), on_devices("triton", "cuda"))
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_half_precision_is_rounded_to_nearest(backend, device, dtype):
    """h = x + gate * branch with x = 0, gate = 1 is branch in the other dtype, as PyTorch rounds it."""
    branch = torch.randn(1, 4, 504, device=device) * 10 ** (torch.rand(1, 4, 504, device=device) * 6 - 3)
    one, none = torch.ones(1, 1, 504, device=device), torch.zeros(1, 4, 504, dtype=dtype, device=device)
    assert torch.equal(gate_residual(none, branch, one, segment_length=4, backend=backend), branch.to(dtype))


@pytest.mark.parametrize(("backend", "device"), on_devices("triton"))
@pytest.mark.parametrize(
    ("C", "rows", "per_token"),
    [
        (3, 2, False),
        (8, 8, True),
        (384, 1, False),
        (1000, 2, True),
        (1152, 8, False),
        (1536, 1, True),
        (8192, 2, False),
    ],
)
def test_widths_and_rows_at_a_time(backend, device, C, rows, per_token, poisoned):
    own = {name: {**tuning.lookup(name, torch.device(device), BF16, C), "ROWS": rows} for name in KERNELS}
    with tuning.override(own):
        check("gate_residual_adaln", backend, device, 1, [5, 3], C, BF16, FP32, per_token)


@TIERS
def test_chunks_cover_each_segment_once(tier):
    drawn = given(st.lists(st.integers(1, 70), min_size=1, max_size=7), st.integers(1, 40))
    settings(max_examples=(100, 1000)[tier])(drawn(check_chunks))()


def check_chunks(lengths, most):
    table, spans = make_chunks(lengths, sum(lengths), most)
    offsets = segment_offsets(lengths, sum(lengths)) if len(lengths) > 1 else [0, lengths[0]]
    assert spans[0, 0] == 0 and spans[-1, 1] == len(table) and (spans[1:, 0] == spans[:-1, 1]).all()
    for segment, (first, last) in enumerate(spans):
        own = table[first:last]
        assert (own[:, 0] == segment).all() and own[0, 1] == offsets[segment] and own[-1, 2] == offsets[segment + 1]
        sizes = own[:, 2] - own[:, 1]
        assert (own[1:, 1] == own[:-1, 2]).all() and sizes.min() > 0 and sizes.max() <= min(most, sizes.min() + 1)


@given(st.integers(1, 8192), st.integers(1, 64), st.sampled_from([16, 32, 64]))
def test_chunks_fill_the_gpu(tokens, batch, most):
    chosen = chunk_tokens(tokens, batch, most, 132)
    assert 4 <= chosen <= most and (chosen == 4 or chosen * 2 * 132 <= batch * tokens)
    assert chosen == most or 2 * chosen * 2 * 132 > batch * tokens, "no smaller than needed"


@pytest.mark.parametrize(("backend", "device"), on_devices("cpu"))
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_outputs_past_the_caches(backend, device, dtype, poisoned):
    """Above the streaming threshold of the C++ kernel (8 MiB), with rows that are not aligned to a vector."""
    tokens = (9 << 20) // (104 * dtype.itemsize) // 4
    check("gate_residual_adaln", backend, device, 1, [tokens] * 4, 104, dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_half_value_survives_the_conversions(dtype):
    """h = x + 0 * branch through fp32 and back is x, for all 65536 values; fp32 -> half rounds as PyTorch does."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(1, 64, 1024)
    zero = torch.zeros_like(x)
    h = gate_residual(x, zero, zero[:, :1], segment_length=64, backend="cpu")
    assert torch.equal(h.isnan(), x.isnan())
    assert torch.equal(h.nan_to_num(0.0) + 0.0, x.nan_to_num(0.0) + 0.0)
    fp32 = torch.cat([torch.randn(60000) * 10 ** (torch.rand(60000) * 16 - 9), x.float().flatten() * (1 + 2**-9)])
    fp32 = fp32.reshape(1, 1, -1)
    one, none = torch.ones_like(fp32), torch.zeros(1, 1, fp32.shape[-1], dtype=dtype)
    rounded = gate_residual(none, fp32, one, segment_length=1, backend="cpu")
    expected = fp32.to(dtype)
    assert torch.equal(rounded.isnan(), expected.isnan())
    assert torch.equal(rounded.nan_to_num(0.0), expected.nan_to_num(0.0))


@on_every_backend
@pytest.mark.parametrize("used", ["h", "y"])
def test_only_one_output_used(backend, device, used, poisoned):
    leaves, inputs = make_inputs(2, [20, 20], 24, device=device)
    results = []
    for run in (
        lambda: run_op("gate_residual_adaln", inputs, 20, backend),
        lambda: run_reference("gate_residual_adaln", inputs, [20, 20]),
    ):
        out = run()[0 if used == "h" else 1]
        results.append(torch.autograd.grad(out.double().sin().sum(), leaves))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@on_every_backend
def test_chained_ops_with_a_shared_table(backend, device, poisoned):
    """The trap of torch.compile: modulated LayerNorms in a chain whose rows come from one shared table."""
    leaves, (x, _, gate, shift, scale) = make_inputs(2, [16, 16, 16], 72, device=device)

    def chain(op, *settings):
        h, y = op(x, x.sin(), gate, shift, scale, *settings)
        h, y = op(h, y.sin(), gate, shift, scale, *settings)
        return op(h, y.sin(), gate, shift, scale, *settings)[1]

    ours = chain(lambda *a: gate_residual_adaln(*a[:5], segment_length=16, backend=backend))
    expected = chain(reference.gate_residual_adaln, [16])
    got = torch.autograd.grad(ours.sum(), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), leaves), rtol=1e-3, atol=2e-3)


@on_every_backend
def test_expanded_rows_and_inputs(backend, device):
    row = torch.randn(1, 1, 48, device=device, requires_grad=True)
    x = torch.randn(1, 12, 48, device=device, requires_grad=True)
    rows = row.expand(3, 4, 48)
    y = adaln_modulate(x.expand(3, 12, 48), rows, rows, segment_length=3, backend=backend)
    expected = reference.adaln_modulate(x.expand(3, 12, 48), rows, rows, [3])
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(v.sum(), (x, row), retain_graph=True) for v in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


@on_every_backend
@pytest.mark.parametrize("shape", [(0, 8, 16), (2, 0, 16)])
def test_empty(backend, device, shape):
    B, T, C = shape
    x = torch.randn(shape, device=device, requires_grad=True)
    rows = torch.randn(B, T // 4, C, device=device, requires_grad=True)
    h, y = gate_residual_adaln(x, x, rows, rows, rows, segment_length=4, backend=backend)
    assert h.shape == y.shape == shape
    (h.sum() + y.sum()).backward()
    assert x.grad.shape == shape and rows.grad.shape == rows.shape


@pytest.mark.parametrize("lengths", [[6], [1], [2, 4]])
def test_gradcheck(lengths, device):
    def make(*shape):
        return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)

    segments = 6 // lengths[0] if len(lengths) == 1 else len(lengths)
    inputs = [make(2, 6, 8), make(2, 6, 8), *(make(2, segments, 8) for _ in range(3))]
    length = lengths[0] if len(lengths) == 1 else lengths
    for op in OPS:

        def run(*tensors, op=op):
            return getattr(ard_kernels, op)(*tensors, segment_length=length)

        assert torch.autograd.gradcheck(run, of_op(op, *inputs))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_of_this_cpu(op, dtype, poisoned):
    """The row kernels are compiled once per instruction set; the automatic choice runs only the best one."""
    best = extension.module.cpu_isa()
    names = extension.module.cpu_isas()
    assert best == names[0] and names[-1] == "baseline"
    try:
        for name in names:
            extension.module.use_cpu_isa(name)
            check(op, "cpu", "cpu", 2, [40, 5, 67], 75, dtype)
            check(op, "cpu", "cpu", 1, [33, 33], 1152, dtype)
    finally:
        extension.module.use_cpu_isa(best)
    with pytest.raises(ValueError, match="isa is 'mmx'; expected one of"):
        extension.module.use_cpu_isa("mmx")


def test_the_extension_is_built():
    """The cpu backend is part of the package: a test run without it would test nothing of it."""
    assert extension.module is not None, extension.missing
    expected_folder = os.environ.get("ARD_EXPECT_EXTENSION", "")  # make test-sanitize: really the sanitized build?
    assert extension.module.__file__.startswith(expected_folder)


@pytest.mark.simulated
@pytest.mark.slow
@pytest.mark.parametrize(
    ("takes", "norm"),
    [
        (TAKES["adaln_modulate"], "layer"),
        (TAKES["gate_residual_adaln"], "layer"),
        (("x", "branch", *SEAMS["norm3"]), "layer"),
        (("x", "branch", *SEAMS["no gate"]), "layer"),
        (("x", "branch", "gate", "shift", "scale", "weight"), "rms"),
    ],
    ids=["modulate", "gated", "norm3", "no gate", "rms"],
)
def test_bytes_moved_over_the_minimum_triton(takes, norm):
    """With the chunks shipped for H100 and H200, counted access by access: rows and partial sums add little."""
    from testing.traffic import adaln_over_minimum  # patches the interpreter, which is not there beside a GPU

    ratios = adaln_over_minimum(takes, arch=90, norm=norm)
    assert ratios["forward"] <= 1.05 and ratios["backward"] <= 1.15, ratios
