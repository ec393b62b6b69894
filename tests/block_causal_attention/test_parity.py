"""Values and gradients of every backend against the fp64 reference, under the 1.5x / 2x rule."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ard_kernels import block_causal_attention, block_causal_attention_packed
from ard_kernels.block_causal_attention import cuda, dense, tiles
from ard_kernels.block_causal_attention.reference import block_causal_attention as reference
from ard_kernels.block_causal_attention.triton_impl import KERNELS
from ard_kernels.common import extension, tuning
from testing import plain
from testing.devices import SIMULATED, on_devices
from testing.drawing import TIERS
from testing.oracle import BACKWARD_FACTOR, assert_all_close, assert_close

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES, HALVES = (FP32, BF16, FP16), (BF16, FP16)
WIDTHS = [(FP32, 24), (BF16, 24)]
CUDA_HEAD_DIMS = cuda.HEAD_DIMS  # 16-bit dtypes only
MASKS = {"M1": (1, 0), "M2": (2, 0), "M3": (1, 1), "M4": (None, 0), "window2_sink1": (2, 1)}
KINDS = ["packed", "contiguous", "offset", "transposed_last"]
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
on_every_backend = pytest.mark.parametrize(("backend", "device"), on_devices("torch", "cpu", "triton", "cuda"))


def make_qkv(B, H, T, D, dtype, kind="packed", device="cpu"):
    """q, k, v (B, H, T, D) leaf-backed, in one of the memory layouts a user may bring."""

    def leaf(*shape):
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    if kind == "packed":
        qkv = leaf(B, T, 3, H, D)
        return (qkv,), tuple(x.transpose(1, 2) for x in qkv.unbind(2))
    if kind == "offset":  # strided in T and D, starting past the storage's beginning
        wide = leaf(3, B, H, 2 * T + 1, D + 8)
        return (wide,), tuple(wide[:, :, :, 1::2, 8:].unbind(0))
    if kind == "transposed_last":  # out of the no-copy contract, still right
        turned = leaf(3, B, H, D, T)
        return (turned,), tuple(turned.transpose(-1, -2).unbind(0))
    qkv = leaf(3, B, H, T, D)
    return (qkv,), tuple(qkv.unbind(0))


def check(backend, device, lengths, mask, B=1, H=2, D=16, dtype=FP32, kind="packed", scale=None):
    segment_length = lengths[0] if len(lengths) == 1 else lengths
    tokens = sum(lengths) if len(lengths) > 1 else 3 * lengths[0]
    leaves, (q, k, v) = make_qkv(B, H, tokens, D, dtype, kind, device)
    window, sink = mask
    how = {"segment_length": segment_length, "window": window, "sink": sink, "scale": scale, "return_lse": True}
    out, lse = block_causal_attention(q, k, v, **how, backend=backend)
    expected, expected_lse = reference(q, k, v, lengths, window, sink, scale)
    plain_out = plain.block_causal_attention(q, k, v, lengths, window, sink, scale)
    assert_close(out, plain_out, expected, label="out")
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-5, atol=2e-2 if dtype != FP32 else 1e-4)
    grad_out = torch.randn_like(out)
    grads = [torch.autograd.grad(y, leaves, grad_out.to(y.dtype)) for y in (out, plain_out, expected)]
    references = [g.double() for g in grads[2]]
    assert_all_close(grads[0], grads[1], references, factor=BACKWARD_FACTOR, label="grad")


def every_mask(*first, rest=()):
    """(D, dtype, mask) of each mask at the `first` (D, dtype), and of the one with all its parts at the `rest`."""
    return [(*pair, mask) for pair in first for mask in MASKS] + [(*pair, "window2_sink1") for pair in rest]


@pytest.mark.parametrize(
    ("backend", "device", "D", "dtype", "mask"),
    on_devices(
        torch=every_mask(*((72, dtype) for dtype in DTYPES)),
        cpu=every_mask(*((72, dtype) for dtype in DTYPES), rest=[(8, FP32), (256, BF16)]),
        triton=every_mask((72, BF16), rest=[(72, FP32), (64, BF16), (128, FP16)]),
        cuda=every_mask((72, BF16), rest=[(72, FP16)]),
    ),
)
def test_equal_segments(backend, device, D, dtype, mask, poisoned):
    check(backend, device, [16], MASKS[mask], D=D, dtype=dtype)


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def chip(request, monkeypatch):
    """The chip whose forward kernel runs, of the emulator or of the GPU; the backward is the same for all."""
    if not SIMULATED and request.param == 90 and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this GPU cannot run the kernel for sm_90")
    monkeypatch.setattr(cuda, "architecture", lambda device: request.param)


@pytest.mark.parametrize(
    ("backend", "device", "D", "dtype", "mask"),
    on_devices(cuda=every_mask((72, BF16), rest=[*((D, BF16) for D in CUDA_HEAD_DIMS[2:]), (64, FP16), (128, FP16)])),
)
def test_equal_segments_of_each_chip(backend, device, D, dtype, mask, chip, poisoned):
    check(backend, device, [48], MASKS[mask], 1, 1, D, dtype)


# What a drawn case of each backend may have, and how many are drawn in the fast and the exhaustive tests.
DRAWN = {
    "torch": {"longest": 40, "segments": 12, "sizes": 3, "dims": [8, 16, 24, 72, 80], "dtypes": DTYPES},
    # Wider heads, whose dq of queries with few keys is noise without a floor: test_segments.py and test_cpu_numbers.py.
    "cpu": {"longest": 90, "segments": 12, "sizes": 3, "dims": [8, 16, 24, 72, 80], "dtypes": DTYPES},
    "triton": {"longest": 24, "segments": 4, "sizes": 1, "dims": [8, 16, 24, 40, 64, 72, 96, 112], "dtypes": DTYPES},
    "cuda": {"longest": 90, "segments": 5, "sizes": 2, "dims": CUDA_HEAD_DIMS, "dtypes": HALVES},
}
EXAMPLES = {"torch": (60, 400), "cpu": (60, 400), "triton": (8, 30), "cuda": (12, 60)}


@on_every_backend
@TIERS
def test_drawn_cases(backend, device, tier):
    most = DRAWN[backend]

    @settings(max_examples=EXAMPLES[backend][tier])
    @given(
        lengths=st.lists(st.integers(1, most["longest"]), min_size=1, max_size=most["segments"]),
        mask=st.tuples(st.one_of(st.none(), st.integers(1, 7)), st.integers(0, 6)),
        shape=st.tuples(st.integers(1, most["sizes"]), st.integers(1, most["sizes"]), st.sampled_from(most["dims"])),
        dtype=st.sampled_from(most["dtypes"]),
        kind=st.sampled_from(KINDS),
        ampere=st.booleans(),
        seed=st.integers(0, 5),
    )
    def draw(lengths, mask, shape, dtype, kind, ampere, seed):
        with pytest.MonkeyPatch.context() as patch:
            if backend == "cuda" and SIMULATED:
                extension.emulated.set_seed(seed)
                patch.setattr(cuda, "architecture", lambda device: 80 if ampere else 90)
            # The error of a few rows is one draw of a random variable: as many of them as make a norm.
            B, *rest = shape
            B *= 8 if sum(lengths) < 8 and backend in ("torch", "cpu") else 1
            check(backend, device, lengths, mask, B, *rest, dtype, kind)

    draw()


@pytest.mark.simulated
@pytest.mark.parametrize("D", [72, 128, *(pytest.param(D, marks=pytest.mark.slow) for D in (64, 80, 96))])
def test_every_order_of_warps_cuda(D, chip, emulated):
    """Bit-equal however the emulator orders the warps, and free of bank conflicts."""
    results = []
    for seed in range(4):
        emulated.set_seed(seed)
        qkv = torch.randn(1, 200, 3, 1, D, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        out = block_causal_attention_packed(qkv, segment_length=[100, 60, 40], backend="cuda")
        conflicts = emulated.counts()
        grad = torch.autograd.grad(out.float().sin().sum(), qkv)[0]
        results.append((out, grad))
        for counts in (conflicts, emulated.counts()):
            assert counts["bank_conflicts"] == 0
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize(("backend", "device"), on_devices("cuda"))
@pytest.mark.parametrize("scale", [-0.7, 0.0, -0.0, 1.5])
@pytest.mark.parametrize("lengths", [[64], [50, 14, 64]], ids=["full_tiles", "masked_tiles"])
def test_any_scale_of_each_chip(backend, device, scale, lengths, chip):
    any_scale(backend, device, lengths, scale, 72, BF16)


@pytest.mark.parametrize(
    ("backend", "device", "scale"),
    on_devices(torch=[-0.7, 0.0], cpu=[-0.7, 0.0, 1.5], triton=[-0.7, 0.0, 1.5]),
)
@pytest.mark.parametrize("lengths", [[32], [20, 12, 32]], ids=["full_tiles", "masked_tiles"])
def test_any_scale(backend, device, scale, lengths):
    any_scale(backend, device, lengths, scale, 16, FP32)


def any_scale(backend, device, lengths, scale, D, dtype):
    tokens = 2 * lengths[0] if len(lengths) == 1 else sum(lengths)
    leaves, qkv = make_qkv(1, 1, tokens, D, dtype, "contiguous", device)
    grad_out = torch.randn(1, 1, tokens, D, device=device).to(dtype)
    segment_length = lengths[0] if len(lengths) == 1 else lengths
    outputs = (
        block_causal_attention(*qkv, segment_length=segment_length, scale=scale, backend=backend),
        plain.block_causal_attention(*qkv, lengths, scale=scale),
        reference(*qkv, lengths, scale=scale)[0],
    )
    assert_close(*outputs, label="out")
    grads = [torch.autograd.grad(out, leaves, grad_out.to(out.dtype))[0] for out in outputs]
    if scale == 0:  # dq and dk are exactly 0
        assert not grads[0][:2].any()
        grads = [g[2] for g in grads]
    assert_close(grads[0], grads[1], grads[2].double(), factor=BACKWARD_FACTOR, label="grad")


@pytest.mark.parametrize(("backend", "device"), on_devices("cuda"))
def test_unaligned_inputs_are_copied(backend, device, chip):
    """A view that starts 2 bytes off a 16-byte boundary."""
    leaf = torch.randn(3, 1, 1, 64, 80, device=device).bfloat16()
    q, k, v = leaf[..., 1:73].unbind(0)
    ours = block_causal_attention(q, k, v, segment_length=32, backend=backend)
    copies = (x.contiguous() for x in (q, k, v))
    assert torch.equal(ours, block_causal_attention(*copies, segment_length=32, backend=backend))


@pytest.mark.parametrize(("backend", "device"), on_devices("triton"))
@pytest.mark.parametrize(
    ("D", "blocks"), [(136, (16, 16)), (160, (16, 64)), (176, (64, 32)), (256, (16, 16)), (256, (64, 32))], ids=str
)
def test_tile_shapes_and_wide_heads(backend, device, blocks, D):
    config = dict(zip(("BLOCK_M", "BLOCK_N"), blocks, strict=True))
    with tuning.override(dict.fromkeys(KERNELS, config)):
        check(backend, device, [40, 7, 22], (2, 1), 1, 1, D, BF16)


@pytest.mark.parametrize(("backend", "device"), on_devices("triton"))
def test_many_heads_in_groups(backend, device, monkeypatch):
    """More (batch, head) pairs than one group holds, and a last group that is not full."""
    monkeypatch.setattr(tiles, "GROUP_BYTES", 2 * 48 * 24 * 4 * 3)
    check(backend, device, [16], (None, 0), B=2, H=4, D=24)


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "D"),
    on_devices(torch=WIDTHS, cpu=WIDTHS, triton=WIDTHS, cuda=[(FP16, 72)]),
)
@pytest.mark.parametrize(
    ("lengths", "mask"),
    [([64], (None, 0)), ([16], (1, 0)), ([16], (None, 0)), ([8, 24, 16], (1, 1)), ([8, 24, 16], (None, 0))],
    ids=str,
)
def test_packed_equals_three_tensors(backend, device, dtype, D, lengths, mask, poisoned):
    tokens = sum(lengths) if len(lengths) > 1 else 64
    leaf = torch.randn(2, tokens, 3, 1, D, device=device).to(dtype).requires_grad_()
    arguments = {"segment_length": lengths[0] if len(lengths) == 1 else lengths, "window": mask[0], "sink": mask[1]}
    arguments |= {"return_lse": True, "backend": backend}
    ours, our_lse = block_causal_attention_packed(leaf, **arguments)
    expected, expected_lse = block_causal_attention(*leaf.unbind(2), layout="bthd", **arguments)
    assert ours.is_contiguous() and torch.equal(ours, expected) and torch.equal(our_lse, expected_lse)
    grads = [torch.autograd.grad(out, leaf, torch.ones_like(out).cos())[0] for out in (ours, expected)]
    assert grads[0].is_contiguous() and torch.equal(*grads)


@each_mask
def test_matmul_path_of_devices_without_the_fused_kernel(mask, device, monkeypatch):
    """The composition that serves every non-CPU device, run on CPU tensors, too."""
    monkeypatch.setattr(dense, "_fused", lambda device: False)
    check("torch", device, [16], mask, 2, 3, D=72)
    check("torch", device, [5, 9, 30], mask, 2, 3, D=72, dtype=BF16)


def test_autocast_leaves_the_matmuls_in_float32(device, monkeypatch):
    """Of the composition that serves other devices, and of forward mode."""
    q, k, v = (torch.randn(1, 2, 24, 64, device=device).bfloat16().requires_grad_() for _ in range(3))

    def run(q):
        return block_causal_attention(q, k, v, segment_length=6, return_lse=True, backend="torch")

    def results():
        out, lse = run(q)
        tangent = torch.func.jvp(lambda q: run(q)[0], (q.detach(),), (k.detach(),))[1]
        return [out, lse, tangent, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]

    monkeypatch.setattr(dense, "_fused", lambda device: False)
    expected = results()
    with torch.autocast(device.type, torch.bfloat16):
        got = results()
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_empty_tensors_of_any_strides(device):
    x = torch.randn(2, 0, 16, 16, device=device)[..., ::2]
    with FlopCounterMode(display=False):
        assert block_causal_attention(x, x, x, segment_length=4).shape == x.shape


@each_mask
@on_every_backend
def test_layouts_agree(backend, device, mask):
    q, k, v = (torch.randn(2, 1, 48, 72, device=device).bfloat16() for _ in range(3))
    arguments = {"segment_length": 16, "window": mask[0], "sink": mask[1], "backend": backend}
    out = block_causal_attention(q, k, v, **arguments)
    other = block_causal_attention(*(x.transpose(1, 2) for x in (q, k, v)), layout="bthd", **arguments)
    assert torch.equal(out, other.transpose(1, 2))
    assert other.is_contiguous(), "(B, T, H, D) memory: reshape to (B, T, C) is free"


@pytest.mark.parametrize(("backend", "device"), on_devices("torch", "cpu", "triton"))
def test_expanded_inputs_and_gradients(backend, device):
    q = torch.randn(1, 1, 48, 16, device=device, requires_grad=True)
    x = q.expand(2, 3, 48, 16)
    block_causal_attention(x, x, x, segment_length=16, backend=backend).sum().backward()
    expected = torch.autograd.grad(reference(x, x, x, [16])[0].sum(), q)[0]
    torch.testing.assert_close(q.grad, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("backend", "device", "dtype"), on_devices(torch=[FP32, BF16], cpu=[FP32, BF16], triton=[FP32, BF16], cuda=[BF16])
)
@pytest.mark.parametrize("length", [4, 36])
def test_tokens_that_overlap_in_memory(backend, device, length, dtype):
    """A sliding window over a signal, one row as all tokens, and a gradient that is the same for all tokens."""
    signal = torch.randn(1, 1, 2 * length + 63, device=device).to(dtype)
    sliding = signal.unfold(-1, 64, 1)
    repeated = torch.randn(1, 1, 1, 64, device=device).to(dtype).expand(1, 1, 2 * length, 64)
    assert sliding.stride(2) == 1 and repeated.stride(2) == 0
    for q, k, v in ((sliding,) * 3, (repeated, sliding, repeated)):
        results = []
        for inputs in ((q, k, v), (q.contiguous(), k.contiguous(), v.contiguous())):
            leaves = [x.detach().as_strided(x.shape, x.stride()).requires_grad_() for x in inputs]
            out = block_causal_attention(*leaves, segment_length=length, backend=backend)
            grads = torch.autograd.grad(out.sum(2), leaves, torch.ones(1, 1, 64, device=device, dtype=dtype))
            results.append((out, *grads))
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "grad_out"])
@pytest.mark.parametrize("length", [1, 4, 16, 64])
@pytest.mark.parametrize(("backend", "device"), on_devices("torch", "cpu"))
def test_what_is_not_finite_reaches_who_sees_it_and_nobody_else(backend, device, which, length, value):
    """Whatever the shape, and so whatever calls the torch backend makes of it, or tiles the cpu backend."""
    tensors = [torch.randn(1, 2, 4 * length, 16, device=device) for _ in range(4)]
    spoiled = [x.clone() for x in tensors]
    spoiled[which][:, :, 2 * length] = value  # of segment 2, which segments 0 and 1 do not see
    results = []
    for *inputs, grad_out in (tensors, spoiled):
        leaves = [x.requires_grad_() for x in inputs]
        out = block_causal_attention(*leaves, segment_length=length, backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad_out)])
    for name, clean, got in zip(["out", "dq", "dk", "dv"], *results, strict=True):
        # queries before segment 2 see nothing of it; keys after it are not seen by it
        untouched = slice(0, 2 * length) if name in ("out", "dq") else slice(3 * length, 4 * length)
        if which in (1, 2) and name in ("dk", "dv"):  # queries of segments 2 and 3 are spoiled, and see all keys
            continue
        torch.testing.assert_close(got[:, :, untouched], clean[:, :, untouched], rtol=1e-5, atol=1e-5)
        assert name not in ("out", "dq") or (name == "out" and which == 3) or not got[:, :, 2 * length].isfinite().any()


def test_scale_and_single_segment(device):
    q, k, v = (torch.randn(1, 2, 40, 72, device=device) for _ in range(3))
    out = block_causal_attention(q, k, v, segment_length=40, scale=0.3)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=0.3))


@on_every_backend
@pytest.mark.parametrize("shape", [(0, 2, 32, 64), (2, 0, 32, 64), (2, 2, 0, 64)])
def test_empty(backend, device, shape):
    q = torch.randn(shape, dtype=BF16, device=device, requires_grad=True)
    out, lse = block_causal_attention(q, q, q, segment_length=16, return_lse=True, backend=backend)
    assert out.shape == shape and lse.shape == shape[:3]
    out.sum().backward()
    assert q.grad.shape == shape


@pytest.mark.parametrize(
    "mask", [(2, 1), *(pytest.param(mask, marks=pytest.mark.slow) for mask in list(MASKS.values())[:4])], ids=str
)
def test_gradcheck(mask, device):
    how = {"segment_length": [2, 3, 4], "window": mask[0], "sink": mask[1]}
    qkv = torch.randn(1, 9, 3, 2, 8, dtype=torch.float64, device=device, requires_grad=True)
    leaves = [x.detach().transpose(1, 2).clone().requires_grad_() for x in qkv.unbind(2)]
    assert torch.autograd.gradcheck(lambda q, k, v: block_causal_attention(q, k, v, **how), leaves)
    assert torch.autograd.gradcheck(lambda qkv: block_causal_attention_packed(qkv, **how), (qkv,))
