"""Values and gradients of every backend against the fp64 reference, under the 1.5x / 2x rule."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ard_kernels import block_causal_attention, block_causal_attention_packed
from ard_kernels.block_causal_attention import cuda, tiles, torch_impl
from ard_kernels.block_causal_attention.reference import block_causal_attention as reference
from ard_kernels.block_causal_attention.spec import dense_mask
from ard_kernels.common import extension, tuning
from testing.oracle import BACKWARD_FACTOR, assert_all_close, assert_close

BACKENDS = ["torch", "triton"]  # triton: in its interpreter, so with fewer and smaller cases
CUDA_HEAD_DIMS = cuda.HEAD_DIMS  # 16-bit dtypes only
MASKS = {"M1": (1, 0), "M2": (2, 0), "M3": (1, 1), "M4": (None, 0), "window2_sink1": (2, 1)}


def plain(q, k, v, lengths, window, sink):
    """Plain PyTorch in the same dtype: softmax attention under a dense mask."""
    mask = dense_mask(lengths, q.shape[2], window, sink)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def make_qkv(B, H, T, D, dtype, kind="packed"):
    """q, k, v (B, H, T, D) leaf-backed, in one of the memory layouts a user may bring."""
    if kind == "packed":
        leaf = torch.randn(B, T, 3, H, D, dtype=dtype).requires_grad_()
        return (leaf,), tuple(x.transpose(1, 2) for x in leaf.unbind(2))
    if kind == "offset":  # strided in T and D, starting past the storage's beginning
        leaf = torch.randn(3, B, H, 2 * T + 1, D + 8, dtype=dtype).requires_grad_()
        return (leaf,), tuple(leaf[:, :, :, 1::2, 8:].unbind(0))
    if kind == "transposed_last":  # out of the no-copy contract, still right
        leaf = torch.randn(3, B, H, D, T, dtype=dtype).requires_grad_()
        return (leaf,), tuple(leaf.transpose(-1, -2).unbind(0))
    leaf = torch.randn(3, B, H, T, D, dtype=dtype).requires_grad_()
    return (leaf,), tuple(leaf.unbind(0))


def check(backend, lengths, mask, B=2, H=3, D=16, dtype=torch.float32, kind="packed"):
    segment_length = lengths[0] if len(lengths) == 1 else lengths
    tokens = sum(lengths) if len(lengths) > 1 else 3 * lengths[0]
    leaves, (q, k, v) = make_qkv(B, H, tokens, D, dtype, kind)
    window, sink = mask
    out, lse = block_causal_attention(
        q, k, v, segment_length=segment_length, window=window, sink=sink, return_lse=True, backend=backend
    )
    expected, expected_lse = reference(q, k, v, lengths, window, sink)
    plain_out = plain(q, k, v, lengths, window, sink)
    assert_close(out, plain_out, expected, label="out")
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-5, atol=2e-2 if dtype != torch.float32 else 1e-4)
    grad_out = torch.randn_like(out)
    results = [torch.autograd.grad(y, leaves, grad_out.to(y.dtype)) for y in (out, plain_out, expected)]
    references = [g.double() for g in results[2]]
    assert_all_close(results[0], results[1], references, factor=BACKWARD_FACTOR, label="grad")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("D", [64, 72, 128])
def test_equal_segments(backend, dtype, mask, D, poisoned):
    B, H = (2, 3) if backend == "torch" else (1, 2)
    check(backend, [16], mask, B, H, D, dtype)


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def chip(request, monkeypatch):
    """The chip whose forward kernel the emulator runs; the backward is the same for all."""
    monkeypatch.setattr(cuda, "architecture", lambda device: request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("D", CUDA_HEAD_DIMS)
def test_equal_segments_cuda(dtype, mask, D, chip, poisoned):
    check("cuda", [48], mask, 1, 1, D, dtype)


KINDS = ["packed", "contiguous", "offset", "transposed_last"]


def alone(patch):
    """Backend torch gives short segments, too, a call each."""
    make = torch_impl._make_plan
    patch.setattr(torch_impl, "_make_plan", lambda *shape_and_mask: make(*shape_and_mask[:-1], False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_layouts_of_segments_alone(backend, kind, mask, monkeypatch, poisoned):
    alone(monkeypatch)
    B, H = (2, 3) if backend == "torch" else (2, 1)
    check(backend, [24], mask, B, H, D=72, kind=kind)


draw_cases = given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    mask=st.tuples(st.one_of(st.none(), st.integers(1, 7)), st.integers(0, 6)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([8, 16, 24, 72, 80])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kind=st.sampled_from(KINDS),
    grouped=st.booleans(),
)


@draw_cases
def test_drawn_cases(lengths, mask, shape, dtype, kind, grouped):
    with pytest.MonkeyPatch.context() as patch:
        if not grouped:
            alone(patch)
        check("torch", lengths, mask, *shape, dtype, kind)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    mask=st.tuples(st.one_of(st.none(), st.integers(1, 5)), st.integers(0, 4)),
    D=st.sampled_from([8, 16, 24, 40, 64, 72, 80, 96, 112, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kind=st.sampled_from(KINDS),
)
def test_drawn_cases_triton(lengths, mask, D, dtype, kind):
    check("triton", lengths, mask, 1, 1, D, dtype, kind)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    mask=st.tuples(st.one_of(st.none(), st.integers(1, 5)), st.integers(0, 4)),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.sampled_from(CUDA_HEAD_DIMS)),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 5),
    arch=st.sampled_from([80, 90]),
)
def test_drawn_cases_cuda(lengths, mask, shape, dtype, kind, seed, arch):
    extension.emulated.set_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "architecture", lambda device: arch)
        check("cuda", lengths, mask, *shape, dtype, kind)


@pytest.mark.parametrize("D", CUDA_HEAD_DIMS)
def test_every_order_of_warps_cuda(D, chip):
    """Bit-equal however the emulator orders the warps, and free of bank conflicts."""
    results = []
    for seed in range(6):
        extension.emulated.set_seed(seed)
        qkv = torch.randn(1, 200, 3, 1, D, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        out = block_causal_attention_packed(qkv, segment_length=[100, 60, 40], backend="cuda")
        conflicts = extension.emulated.counts()
        grad = torch.autograd.grad(out.float().sin().sum(), qkv)[0]
        results.append((out, grad))
        for counts in (conflicts, extension.emulated.counts()):
            assert counts["bank_conflicts"] == 0
    extension.emulated.set_seed(0)
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("scale", [-0.7, 0.0, -0.0, 1.5])
@pytest.mark.parametrize("segment_length", [64, [50, 14, 64]], ids=["full_tiles", "masked_tiles"])
def test_any_scale_cuda(scale, segment_length, chip):
    q, k, v = (torch.randn(1, 1, 128, 72, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    grad_out = torch.randn_like(q)
    results = []
    for run in (
        lambda *x: block_causal_attention(*x, segment_length=segment_length, scale=scale, backend="cuda"),
        lambda *x: block_causal_attention(*x, segment_length=segment_length, scale=scale, backend="torch"),
        lambda *x: reference(*x, [64] if segment_length == 64 else segment_length, scale=scale)[0],
    ):
        out = run(q, k, v)
        results.append([x.to(out.dtype) for x in (out, *torch.autograd.grad(out, (q, k, v), grad_out.to(out.dtype)))])
    ours, plain_results, expected = results
    if scale == 0:  # dq and dk are exactly 0
        assert not ours[1].any() and not ours[2].any()
        ours, plain_results, expected = ([x[0], x[3]] for x in (ours, plain_results, expected))
    assert_all_close(ours, plain_results, expected, factor=BACKWARD_FACTOR)


def test_unaligned_inputs_are_copied_cuda(chip):
    """A view that starts 2 bytes off a 16-byte boundary."""
    leaf = torch.randn(3, 1, 1, 64, 80, dtype=torch.bfloat16)
    q, k, v = leaf[..., 1:73].unbind(0)
    ours = block_causal_attention(q, k, v, segment_length=32, backend="cuda")
    copies = (x.contiguous() for x in (q, k, v))
    assert torch.equal(ours, block_causal_attention(*copies, segment_length=32, backend="cuda"))


@pytest.mark.parametrize("blocks", [(16, 16), (16, 64), (64, 32)], ids=str)
@pytest.mark.parametrize("D", [136, 160, 176, 256])
def test_tile_shapes_and_wide_heads_triton(blocks, D, monkeypatch):
    config = dict(zip(("BLOCK_M", "BLOCK_N"), blocks, strict=True))
    monkeypatch.setattr(tuning, "lookup", lambda *args, **kwargs: config)
    check("triton", [50, 7, 33], (2, 1), 1, 2, D, torch.bfloat16)


def test_many_heads_in_groups_triton(monkeypatch):
    """More (batch, head) pairs than one group holds, and a last group that is not full."""
    monkeypatch.setattr(tiles, "GROUP_BYTES", 2 * 48 * 24 * 4 * 3)
    check("triton", [16], (None, 0), B=2, H=4, D=24)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 1.5])
@pytest.mark.parametrize("segment_length", [32, [20, 12, 32]], ids=["full_tiles", "masked_tiles"])
def test_any_scale_triton(scale, segment_length):
    q, k, v = (torch.randn(1, 1, 64, 16, requires_grad=True) for _ in range(3))
    results = []
    for run in (
        lambda: block_causal_attention(q, k, v, segment_length=segment_length, scale=scale, backend="triton"),
        lambda: reference(q, k, v, [32] if segment_length == 32 else segment_length, scale=scale)[0],
    ):
        out = run()
        results.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, v))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "dtype", "D"),
    [(backend, dtype, 24) for backend in BACKENDS for dtype in (torch.float32, torch.bfloat16)]
    + [("cuda", torch.float16, 72)],
)
@pytest.mark.parametrize("lengths", [[64], [16], [8, 24, 16]], ids=["one_segment", "equal", "ragged"])
@pytest.mark.parametrize("mask", [(None, 0), (1, 0), (1, 1)])
def test_packed_equals_three_tensors(backend, dtype, D, lengths, mask, poisoned):
    tokens = sum(lengths) if len(lengths) > 1 else 64
    leaf = torch.randn(2, tokens, 3, 2, D, dtype=dtype, requires_grad=True)
    arguments = {"segment_length": lengths[0] if len(lengths) == 1 else lengths, "window": mask[0], "sink": mask[1]}
    arguments |= {"return_lse": True, "backend": backend}
    ours, our_lse = block_causal_attention_packed(leaf, **arguments)
    expected, expected_lse = block_causal_attention(*leaf.unbind(2), layout="bthd", **arguments)
    assert ours.is_contiguous() and torch.equal(ours, expected) and torch.equal(our_lse, expected_lse)
    grads = [torch.autograd.grad(out, leaf, torch.ones_like(out).cos())[0] for out in (ours, expected)]
    assert grads[0].is_contiguous() and torch.equal(*grads)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_matmul_path_of_devices_without_the_fused_kernel(mask, monkeypatch):
    """The composition that serves every non-CPU device, run here on CPU tensors."""
    monkeypatch.setattr(torch_impl, "_fused", lambda device: False)
    check("torch", [16], mask, D=72)
    check("torch", [5, 9, 30], mask, D=72, dtype=torch.bfloat16)


def test_autocast_leaves_the_matmuls_in_float32(monkeypatch):
    """Of the composition that serves other devices, and of forward mode."""
    q, k, v = (torch.randn(1, 2, 24, 64).bfloat16().requires_grad_() for _ in range(3))

    def run(q):
        return block_causal_attention(q, k, v, segment_length=6, return_lse=True, backend="torch")

    def results():
        out, lse = run(q)
        tangent = torch.func.jvp(lambda q: run(q)[0], (q.detach(),), (k.detach(),))[1]
        return [out, lse, tangent, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]

    monkeypatch.setattr(torch_impl, "_fused", lambda device: False)
    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        got = results()
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_empty_tensors_of_any_strides():
    x = torch.randn(2, 0, 16, 16)[..., ::2]
    with FlopCounterMode(display=False):
        assert block_causal_attention(x, x, x, segment_length=4).shape == x.shape


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
def test_layouts_agree(backend, mask):
    q, k, v = (torch.randn(2, 1, 48, 72, dtype=torch.bfloat16) for _ in range(3))
    arguments = {"segment_length": 16, "window": mask[0], "sink": mask[1], "backend": backend}
    out = block_causal_attention(q, k, v, **arguments)
    other = block_causal_attention(*(x.transpose(1, 2) for x in (q, k, v)), layout="bthd", **arguments)
    assert torch.equal(out, other.transpose(1, 2))
    assert other.is_contiguous(), "(B, T, H, D) memory: reshape to (B, T, C) is free"


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_inputs_and_gradients(backend):
    q = torch.randn(1, 1, 48, 16, requires_grad=True)
    x = q.expand(2, 3, 48, 16)
    block_causal_attention(x, x, x, segment_length=16, backend=backend).sum().backward()
    expected = torch.autograd.grad(reference(x, x, x, [16])[0].sum(), q)[0]
    torch.testing.assert_close(q.grad, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [4, 64])
@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
def test_tokens_that_overlap_in_memory(backend, length, dtype):
    """A sliding window over a signal, one row as all tokens, and a gradient that is the same for all tokens."""
    if backend == "cuda" and dtype == torch.float32:
        pytest.skip("the tensor cores of cuda would round fp32")
    signal = torch.randn(1, 1, 2 * length + 63).to(dtype)
    sliding, repeated = signal.unfold(-1, 64, 1), torch.randn(1, 1, 1, 64).to(dtype).expand(1, 1, 2 * length, 64)
    assert sliding.stride(2) == 1 and repeated.stride(2) == 0
    for q, k, v in ((sliding,) * 3, (repeated, sliding, repeated)):
        results = []
        for inputs in ((q, k, v), (q.contiguous(), k.contiguous(), v.contiguous())):
            leaves = [x.detach().as_strided(x.shape, x.stride()).requires_grad_() for x in inputs]
            out = block_causal_attention(*leaves, segment_length=length, backend=backend)
            grads = torch.autograd.grad(out.sum(2), leaves, torch.ones(1, 1, 64, dtype=dtype))
            results.append((out, *grads))
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "grad_out"])
@pytest.mark.parametrize("length", [1, 4, 16, 64])
def test_what_is_not_finite_reaches_who_sees_it_and_nobody_else(which, length, value):
    """Whatever the shape, and so whatever the calls that the torch backend makes of it."""
    tensors = [torch.randn(1, 2, 4 * length, 16) for _ in range(4)]
    spoiled = [x.clone() for x in tensors]
    spoiled[which][:, :, 2 * length] = value  # of segment 2, which segments 0 and 1 do not see
    results = []
    for *inputs, grad_out in (tensors, spoiled):
        leaves = [x.requires_grad_() for x in inputs]
        out = block_causal_attention(*leaves, segment_length=length)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad_out)])
    for name, clean, got in zip(["out", "dq", "dk", "dv"], *results, strict=True):
        # queries before segment 2 see nothing of it; keys after it are not seen by it
        untouched = slice(0, 2 * length) if name in ("out", "dq") else slice(3 * length, 4 * length)
        if which in (1, 2) and name in ("dk", "dv"):  # queries of segments 2 and 3 are spoiled, and see all keys
            continue
        torch.testing.assert_close(got[:, :, untouched], clean[:, :, untouched], rtol=1e-5, atol=1e-5)
        assert name not in ("out", "dq") or (name == "out" and which == 3) or not got[:, :, 2 * length].isfinite().any()


def test_many_tiny_segments_share_calls():
    """One token a segment: not a call for each."""
    q, k, v = (torch.randn(1, 2, 512, 16, requires_grad=True) for _ in range(3))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        block_causal_attention(q, k, v, segment_length=1, window=3).sum().backward()
    calls = {event.key: event.count for event in profiler.key_averages() if "flash_attention" in event.key}
    assert sum(calls.values()) == 2 * 512 // torch_impl.GROUP


def test_scale_and_single_segment():
    q, k, v = (torch.randn(1, 2, 40, 72) for _ in range(3))
    out = block_causal_attention(q, k, v, segment_length=40, scale=0.3)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=0.3))


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
@pytest.mark.parametrize("shape", [(0, 2, 32, 64), (2, 0, 32, 64), (2, 2, 0, 64)])
def test_empty(backend, shape):
    q = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
    out, lse = block_causal_attention(q, q, q, segment_length=16, return_lse=True, backend=backend)
    assert out.shape == shape and lse.shape == shape[:3]
    out.sum().backward()
    assert q.grad.shape == shape


@pytest.mark.parametrize("grouped", [True, False])
def test_gradcheck(grouped, monkeypatch):
    if not grouped:
        alone(monkeypatch)
    for mask in MASKS.values():
        q, k, v = (torch.randn(1, 2, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))

        def run(q, k, v, mask=mask):
            return block_causal_attention(q, k, v, segment_length=[2, 3, 4], window=mask[0], sink=mask[1])

        assert torch.autograd.gradcheck(run, (q, k, v))

        def run_packed(qkv, mask=mask):
            return block_causal_attention_packed(qkv, segment_length=[2, 3, 4], window=mask[0], sink=mask[1])

        assert torch.autograd.gradcheck(
            run_packed, (torch.stack((q, k, v), 2).transpose(1, 3).detach().requires_grad_(),)
        )
