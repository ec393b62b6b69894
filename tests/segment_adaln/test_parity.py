"""Values and gradients of the adaLN family on every backend against the fp64 reference, under the 1.5x / 2x rule."""

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import ard_kernels
from ard_kernels import adaln_modulate, gate_residual, gate_residual_adaln
from ard_kernels.common import extension, tuning
from ard_kernels.common.segments import segment_offsets
from ard_kernels.segment_adaln import reference
from ard_kernels.segment_adaln.chunks import chunk_tokens, make_chunks
from ard_kernels.segment_adaln.spec import row_of_token
from testing.oracle import BACKWARD_FACTOR, assert_all_close
from testing.traffic import adaln_over_minimum

# triton in its interpreter, cuda in the emulator of thread blocks: so with smaller cases
BACKENDS = ["torch", "cpu", "triton", "cuda"]
SLOW = ("triton", "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = ("adaln_modulate", "gate_residual_adaln", "gate_residual")
EPS = 1e-6


def plain(op, x, branch, gate, shift, scale, lengths):
    """The op as eager PyTorch code of a DiT writes it, in the dtypes given; rows spread over tokens."""
    gate, shift, scale = (r[:, row_of_token(lengths, x.shape[1])] for r in (gate, shift, scale))
    h = x if op == "adaln_modulate" else (x + gate * branch).to(x.dtype)
    if op == "gate_residual":
        return (h,)
    y = (F.layer_norm(h, h.shape[-1:], eps=EPS) * (1 + scale) + shift).to(x.dtype)
    return (y,) if op == "adaln_modulate" else (h, y)


def run_reference(op, x, branch, gate, shift, scale, lengths):
    if op == "adaln_modulate":
        return (reference.adaln_modulate(x, shift, scale, lengths, EPS),)
    if op == "gate_residual":
        return (reference.gate_residual(x, branch, gate, lengths),)
    return reference.gate_residual_adaln(x, branch, gate, shift, scale, lengths, EPS)


def run_op(op, x, branch, gate, shift, scale, segment_length, backend):
    settings = {"segment_length": segment_length, "backend": backend}
    if op == "adaln_modulate":
        return (adaln_modulate(x, shift, scale, **settings),)
    if op == "gate_residual":
        return (gate_residual(x, branch, gate, **settings),)
    return gate_residual_adaln(x, branch, gate, shift, scale, **settings)


def make_inputs(B, lengths, C, x_dtype, row_dtype, per_token, kind):
    """Leaves, then x, branch (B, T, C) and the rows as chunks of one (B, S or T, 6C) projection."""
    T = sum(lengths)
    rows = torch.randn(B, T if per_token else len(lengths), 6 * C, dtype=row_dtype).requires_grad_()
    if kind == "strided":  # every other token of a wider, offset buffer
        leaf = torch.randn(2, B, 2 * T + 1, C + 3, dtype=x_dtype).requires_grad_()
        x, branch = leaf[:, :, 1::2, 3:].unbind(0)
    elif kind == "transposed":  # out of the no-copy contract, still right
        leaf = torch.randn(2, B, C, T, dtype=x_dtype).requires_grad_()
        x, branch = leaf.transpose(-1, -2).unbind(0)
    else:
        leaf = torch.randn(2, B, T, C, dtype=x_dtype).requires_grad_()
        x, branch = leaf.unbind(0)
    return (leaf, rows), (x, branch, *rows.chunk(6, -1)[1:4])


def check(op, backend, B, lengths, C, x_dtype=torch.float32, row_dtype=None, per_token=False, kind="contiguous"):
    row_dtype = row_dtype or x_dtype
    leaves, inputs = make_inputs(B, lengths, C, x_dtype, row_dtype, per_token, kind)
    segment_length = lengths[0] if len(set(lengths)) == 1 else lengths
    row_lengths = [1] if per_token else lengths
    outputs = (
        run_op(op, *inputs, segment_length, backend),
        plain(op, *inputs, row_lengths),
        run_reference(op, *inputs, row_lengths),
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("per_token", [False, True], ids=["segment_rows", "token_rows"])
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in (a, torch.float32)], ids=str)
def test_model_width(backend, op, per_token, dtypes, poisoned):
    B, lengths = (1, [12, 12]) if backend in SLOW else (2, [40, 40, 40])
    check(op, backend, B, lengths, 1152, *dtypes, per_token=per_token)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", ["contiguous", "strided", "transposed"])
@pytest.mark.parametrize("lengths", [[33], [7, 64, 1, 100]], ids=["one_segment", "ragged"])
def test_strides_and_ragged_segments(backend, op, kind, lengths, poisoned):
    check(op, backend, 1 if backend in SLOW else 3, lengths, 40, kind=kind)


WIDTHS = st.integers(8, 100)  # narrower rows are ill-conditioned


def draw_cases(longest, widths=WIDTHS):
    return given(
        lengths=st.one_of(
            st.lists(st.integers(1, longest), min_size=1, max_size=5),
            st.tuples(st.integers(1, longest), st.integers(1, 5)).map(lambda p: [p[0]] * p[1]),
        ),
        shape=st.tuples(st.integers(1, 3), widths),
        dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
        per_token=st.booleans(),
        kind=st.sampled_from(["contiguous", "strided", "transposed"]),
    )


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("op", OPS)
@draw_cases(longest=70)
def test_drawn_cases(backend, op, lengths, shape, dtypes, per_token, kind):
    B, C = shape
    check(op, backend, B, lengths, C, *dtypes, per_token=per_token, kind=kind)


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=30)
@draw_cases(longest=16)
def test_drawn_cases_triton(op, lengths, shape, dtypes, per_token, kind):
    B, C = shape
    check(op, "triton", B, lengths, C, *dtypes, per_token=per_token, kind=kind)


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=60)
@draw_cases(longest=16, widths=st.integers(1, 40).map(lambda eights: 8 * eights))
def test_drawn_cases_cuda(op, lengths, shape, dtypes, per_token, kind):
    B, C = shape
    check(op, "cuda", B, lengths, C, *dtypes, per_token=per_token, kind=kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("C", [256, 520, 2568, 4104, 8192])
@pytest.mark.parametrize("op", OPS)
def test_widths_cuda(op, C, dtype, poisoned):
    check(op, "cuda", 1, [3, 2], C, dtype, torch.float32)


@pytest.mark.parametrize("C", [72, 512, 1152, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_off_16_byte_boundaries_cuda(C, dtype, poisoned):
    check("gate_residual_adaln", "cuda", 1, [3, 2], C, dtype, kind="strided")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_to_nearest_triton(dtype):
    """h = x + gate * branch with x = 0, gate = 1 is branch in the other dtype, as PyTorch rounds it."""
    branch = torch.randn(1, 4, 500) * 10 ** (torch.rand(1, 4, 500) * 6 - 3)
    one, none = torch.ones(1, 1, 500), torch.zeros(1, 4, 500, dtype=dtype)
    assert torch.equal(gate_residual(none, branch, one, segment_length=4, backend="triton"), branch.to(dtype))


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("C", [3, 8, 384, 1000, 1152, 1536, 8192])
def test_widths_and_rows_at_a_time_triton(C, rows, poisoned):
    config = {**tuning.INTERPRETER["adaln"], "ROWS": rows}
    with tuning.override({"adaln_forward": config, "adaln_backward": config}):
        for per_token in (False, True):
            check("gate_residual_adaln", "triton", 1, [5, 3], C, torch.bfloat16, torch.float32, per_token)


@settings(max_examples=1000)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=7), st.integers(1, 40))
def test_chunks_cover_each_segment_once(lengths, most):
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


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_past_the_caches(backend, dtype, poisoned):
    """Above the streaming threshold of the C++ kernel (8 MiB), with rows that are not aligned to a vector."""
    tokens = (9 << 20) // (104 * dtype.itemsize) // 4
    check("gate_residual_adaln", backend, 1, [tokens] * 4, 104, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", ["h", "y"])
def test_only_one_output_used(backend, used, poisoned):
    leaves, inputs = make_inputs(2, [20, 20], 24, torch.float32, torch.float32, False, "contiguous")
    results = []
    for run in (
        lambda: run_op("gate_residual_adaln", *inputs, 20, backend),
        lambda: run_reference("gate_residual_adaln", *inputs, [20, 20]),
    ):
        out = run()[0 if used == "h" else 1]
        results.append(torch.autograd.grad(out.double().sin().sum(), leaves))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chained_ops_with_a_shared_table(backend, poisoned):
    """The trap of torch.compile: modulated LayerNorms in a chain whose rows come from one shared table."""
    leaves, (x, _, gate, shift, scale) = make_inputs(
        2, [16, 16, 16], 72, torch.float32, torch.float32, False, "contiguous"
    )

    def chain(op, *settings):
        h, y = op(x, x.sin(), gate, shift, scale, *settings)
        h, y = op(h, y.sin(), gate, shift, scale, *settings)
        return op(h, y.sin(), gate, shift, scale, *settings)[1]

    ours = chain(lambda *a: gate_residual_adaln(*a[:5], segment_length=16, backend=backend))
    expected = chain(reference.gate_residual_adaln, [16])
    got = torch.autograd.grad(ours.sum(), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), leaves), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_rows_and_inputs(backend):
    row = torch.randn(1, 1, 48, requires_grad=True)
    x = torch.randn(1, 12, 48, requires_grad=True)
    rows = row.expand(3, 4, 48)
    y = adaln_modulate(x.expand(3, 12, 48), rows, rows, segment_length=3, backend=backend)
    expected = reference.adaln_modulate(x.expand(3, 12, 48), rows, rows, [3])
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(v.sum(), (x, row), retain_graph=True) for v in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8, 16), (2, 0, 16)])
def test_empty(backend, shape):
    B, T, C = shape
    x = torch.randn(shape, requires_grad=True)
    rows = torch.randn(B, T // 4, C, requires_grad=True)
    h, y = gate_residual_adaln(x, x, rows, rows, rows, segment_length=4, backend=backend)
    assert h.shape == y.shape == shape
    (h.sum() + y.sum()).backward()
    assert x.grad.shape == shape and rows.grad.shape == rows.shape


@pytest.mark.parametrize("lengths", [[6], [1], [2, 4]])
def test_gradcheck(lengths):
    x, branch = (torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    segments = 6 // lengths[0] if len(lengths) == 1 else len(lengths)
    rows = [torch.randn(2, segments, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    length = lengths[0] if len(lengths) == 1 else lengths
    for op in OPS:
        needed = {"adaln_modulate": (x, rows[1], rows[2]), "gate_residual": (x, branch, rows[0])}
        inputs = needed.get(op, (x, branch, *rows))

        def run(*tensors, op=op):
            return getattr(ard_kernels, op)(*tensors, segment_length=length)

        assert torch.autograd.gradcheck(run, inputs)


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
            check(op, "cpu", 2, [40, 5, 67], 75, dtype)
            check(op, "cpu", 1, [33, 33], 1152, dtype)
    finally:
        extension.module.use_cpu_isa(best)
    with pytest.raises(ValueError, match="isa is 'mmx'; expected one of"):
        extension.module.use_cpu_isa("mmx")


def test_the_extension_is_built():
    """The cpu backend is part of the package: a test run without it would test nothing of it."""
    assert extension.module is not None, extension.missing
    expected_folder = os.environ.get("ARD_EXPECT_EXTENSION", "")  # make test-sanitize: really the sanitized build?
    assert extension.module.__file__.startswith(expected_folder)


@pytest.mark.parametrize("op", ["adaln_modulate", "gate_residual_adaln"])
def test_bytes_moved_over_the_minimum_triton(op):
    """With the chunks shipped for H100 and H200, counted access by access: rows and partial sums add little."""
    ratios = adaln_over_minimum(op, arch=90)
    assert ratios["forward"] <= 1.05 and ratios["backward"] <= 1.15, ratios
