"""The public contract of qk_norm_rope: errors, determinism, compile, autocast, opcheck, derivatives."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ard_kernels
from ard_kernels import block_causal_attention_packed, qk_norm_rope, qk_norm_rope_packed
from testing.devices import SIMULATED, on_devices, simulated_exhaustive, simulated_slow

on_every_backend = pytest.mark.parametrize(("backend", "device"), on_devices("torch", "cpu", "triton", "cuda"))

X, W = torch.randn(2, 3, 8, 16), torch.ones(16)
COS = torch.randn(8, 8)
BAD = {
    "rank": (lambda: qk_norm_rope(X[0]), r"q has shape \(3, 8, 16\); expected 4 dims \(B, H, T, D\)"),
    "no tensor": (lambda: qk_norm_rope([1.0]), "q is .*; expected a tensor"),
    "head dim": (lambda: qk_norm_rope(X[..., :12]), "q has head dim 12; expected a multiple of 8"),
    "heads": (
        lambda: qk_norm_rope(torch.zeros(1, 33, 1, 256)),
        r"q has 33 heads of 256; expected at most 32 \* \(256 // D\) = 32",
    ),
    "dtype": (lambda: qk_norm_rope(X.long()), "q has dtype torch.int64; expected float32"),
    "layout": (lambda: qk_norm_rope(X, layout="btd"), "layout is 'btd'; expected 'bhtd' or 'bthd'"),
    "k": (lambda: qk_norm_rope(X, X[:, :, :4]), r"k has shape \(2, 3, 4, 16\); expected q's"),
    "k dtype": (lambda: qk_norm_rope(X, X.half()), "k is torch.float16 on cpu; expected q's torch.float32"),
    "norm": (lambda: qk_norm_rope(X, norm="batch"), "norm is 'batch'; expected 'rms', 'layer' or None"),
    "over": (lambda: qk_norm_rope(X, over="token"), "over is 'token'; expected 'head' or 'all'"),
    "pairs": (lambda: qk_norm_rope(X, pairs=2), "pairs is 2; expected 'interleaved' or 'half'"),
    "eps": (lambda: qk_norm_rope(X, eps=-1.0), "eps is -1.0; expected a number >= 0"),
    "weight": (lambda: qk_norm_rope(X, q_weight=W[:8]), r"q_weight has shape \(8,\); expected \(D,\) = \(16,\)"),
    "weight of all": (lambda: qk_norm_rope(X, q_weight=W, over="all"), r"expected \(H \* D,\) = \(48,\)"),
    "weight dtype": (lambda: qk_norm_rope(X, q_weight=W.half()), "q_weight has dtype torch.float16; expected"),
    "weight device": (lambda: qk_norm_rope(X, q_weight=W.to("meta")), "q_weight is on meta; expected q's cpu"),
    "weight without norm": (lambda: qk_norm_rope(X, q_weight=W, norm=None), "q_weight is given without a norm"),
    "weight without k": (lambda: qk_norm_rope(X, k_weight=W), "k_weight is given; expected None without k"),
    "bias of rms": (lambda: qk_norm_rope(X, q_bias=W), "q_bias is given with norm 'rms'"),
    "one table": (lambda: qk_norm_rope(X, cos=COS), "sin is None; expected both tables or none"),
    "tables differ": (lambda: qk_norm_rope(X, cos=COS, sin=COS[:4]), r"sin is .*\(4, 8\); expected cos's \(8, 8\)"),
    "table rows": (lambda: qk_norm_rope(X, cos=COS[:4], sin=COS[:4]), "cos has 4 rows; expected 8, the tokens of q"),
    "segment rows": (
        lambda: qk_norm_rope(X, cos=COS, sin=COS, segment_length=4),
        "cos has 8 rows; expected 4, segment_length",
    ),
    "segments": (lambda: qk_norm_rope(X, segment_length=3), "q has 8 tokens; expected a multiple of segment_length=3"),
    "table samples": (lambda: qk_norm_rope(X, cos=COS.expand(3, 8, 8), sin=COS.expand(3, 8, 8)), "is for 3 samples"),
    "table heads": (
        lambda: qk_norm_rope(X, cos=COS[None, :, None].expand(1, 8, 2, 8), sin=COS[None, :, None].expand(1, 8, 2, 8)),
        "cos is for 2 heads; expected 1 or 3",
    ),
    "pairs of a table": (lambda: qk_norm_rope(X, cos=torch.ones(8, 9), sin=torch.ones(8, 9)), "cos has 9 pairs"),
    "table dims": (lambda: qk_norm_rope(X, cos=W, sin=W), r"cos has shape \(16,\); expected \(T, P\)"),
    "table dtype": (lambda: qk_norm_rope(X, cos=COS.half(), sin=COS.half()), "cos has dtype torch.float16; expected"),
    "learned table": (
        lambda: qk_norm_rope(X, cos=COS, sin=COS.clone().requires_grad_()),
        "sin requires a gradient, and none flows to it",
    ),
    "packed": (lambda: qk_norm_rope_packed(torch.zeros(2, 8, 2, 3, 16)), r"expected 5 dims \(B, T, 3, H, D\)"),
    "fp64": (lambda: qk_norm_rope(X.double(), backend="cpu"), "float64 is served by the torch backend only"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=rf"qk_norm_rope(_packed)?: .*{message}"):
        call()


def raw(x=X, weight=None, cos=None, norm="rms", backend="cpu", k_weight=None, name="qk_norm_rope", rstd_on="cpu"):
    arguments = (x, weight, k_weight, None, None, cos, cos)
    if name.endswith("backward"):
        _, mean, rstd = torch.ops.ard.qk_norm_rope(X, *arguments[1:], norm, False, False, 1e-6, "torch")
        arguments = (x, X, *arguments[1:], mean, rstd.to(rstd_on))
    return getattr(torch.ops.ard, name)(*arguments, norm, False, False, 1e-6, backend)


BAD_RAW = {
    "shape": (lambda: raw(X[0]), "x has shape"),
    "norm": (lambda: raw(norm="max"), "norm is 'max'"),
    "k's weight": (lambda: raw(k_weight=W), r"k_weight is .*; expected None with x \(B, H, T, D\)"),
    "strides": (lambda: raw(X.mT.contiguous().mT), "x has strides"),
    "weight strides": (lambda: raw(weight=torch.ones(32)[::2]), "q_weight has strides"),
    "table dims": (lambda: raw(cos=COS), r"cos has shape \(8, 8\); expected \(B or 1, L, H or 1, P\)"),
    "table rows": (lambda: raw(cos=COS[None, :3, None]), "q has 8 tokens; expected a multiple"),
    "backward, grad": (lambda: raw(X[:1], name="qk_norm_rope_backward"), r"grad_y is .*\(1, 3, 8, 16\); expected x's"),
    "backward, rstd": (
        lambda: raw(name="qk_norm_rope_backward", rstd_on="meta"),
        "rstd is .* on meta; expected .* on cpu",
    ),
    "backend": (lambda: raw(backend="fast"), "backend 'fast' cannot run"),
}


@pytest.mark.parametrize(("call", "message"), BAD_RAW.values(), ids=BAD_RAW)
def test_raw_ops_check_what_they_are_given(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def packed(device, B=1, T=8, H=2, D=16, P=8, dtype=torch.float32, over="all", norm="layer"):
    """qkv, parameters by name, tables; leaves."""
    qkv = torch.randn(B, T, 3, H, D, device=device).to(dtype).requires_grad_()
    width = H * D if over == "all" else D
    names = ("q_weight", "k_weight", "q_bias", "k_bias")
    parameters = {name: torch.randn(width, device=device).requires_grad_() for name in names}
    tables = dict(zip(("cos", "sin"), torch.randn(2, T, P, device=device), strict=True))
    return qkv, parameters, {**tables, "over": over, "norm": norm}


@pytest.mark.parametrize("over", ["head", "all"])
@pytest.mark.parametrize(
    ("backend", "device", "T", "D"),
    # The interpreter has no threads, and takes long: its repeats are in tests/test_model_sizes.py.
    on_devices(torch=[(96, 72)], cpu=[(96, 72), (512, 128)], cuda=[(40, 72)])
    + ([] if SIMULATED else on_devices(triton=[(40, 72)])),
)
def test_bit_equal_over_runs_and_threads(backend, device, T, D, over, thread_counts):
    qkv, parameters, settings = packed(device, 2, T, 4, D, over=over)
    grad = torch.randn_like(qkv)

    def run():
        out = qk_norm_rope_packed(qkv, **parameters, **settings, backend=backend)
        return out, *torch.autograd.grad(out, (qkv, *parameters.values()), grad)

    first = run()
    for count in thread_counts():
        for _ in range(1 if backend in ("triton", "cuda") else 3):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"{count} threads"


@on_every_backend
def test_the_packed_form_is_the_other_one(backend, device):
    qkv, parameters, settings = packed(device, 2, H=3)
    packed_out = qk_norm_rope_packed(qkv, **parameters, **settings, backend=backend)
    q, k = qk_norm_rope(*qkv.unbind(2)[:2], **parameters, **settings, layout="bthd", backend=backend)
    assert torch.equal(packed_out, torch.stack([q, k, qkv[:, :, 2]], 2))
    grad = torch.randn_like(packed_out)
    leaves = (qkv, *parameters.values())
    ours = torch.autograd.grad(packed_out, leaves, grad)
    theirs = torch.autograd.grad((q, k, qkv[:, :, 2]), leaves, grad.unbind(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("backend", "device"), simulated_exhaustive(on_devices("torch", "cpu", "triton", "cuda")))
def test_compiles_to_one_graph(backend, device):
    """Of any sizes; of fixed ones: the next test."""

    def layer(qkv, weight, cos, sin):
        y = qk_norm_rope_packed(qkv.sin(), cos, sin, q_weight=weight, segment_length=4, backend=backend)
        q, k = qk_norm_rope(*y.unbind(2)[:2], k_weight=weight, norm="layer", layout="bthd", backend=backend)
        return q * k

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, S in ((1, 2), (2, 3)):
        qkv, weight = torch.randn(B, 4 * S, 3, 2, 16, device=device), torch.randn(16, device=device)
        leaves = (qkv.requires_grad_(), weight.requires_grad_())
        tables = torch.randn(2, 4, 8, device=device).unbind(0)
        results = [torch.autograd.grad(f(*leaves, *tables).sum(), leaves) for f in (compiled, layer)]
        torch.testing.assert_close(*results)


@pytest.mark.slow
@pytest.mark.usefixtures("emulated_beside_no_gpu")
def test_compiles_with_inductor_and_follows_use_backend(device):
    qkv, parameters, settings = packed(device)

    def run():
        out = qk_norm_rope_packed(qkv.sin(), **parameters, **settings)
        return torch.autograd.grad(out.square().sum(), (qkv, *parameters.values()))

    compiled = torch.compile(lambda: qk_norm_rope_packed(qkv.sin(), **parameters, **settings), fullgraph=True)
    for name in (p.values[0] for p in on_devices("torch", "cpu", "triton", "cuda") if p.values[1] == device.type):
        with ard_kernels.use_backend(name):
            expected = run()
            got = torch.autograd.grad(compiled().square().sum(), (qkv, *parameters.values()))
            torch.testing.assert_close(got, expected)


@on_every_backend
def test_autocast_casts_as_attention_does(backend, device):
    qkv, parameters, settings = packed(device, over="head")
    with torch.autocast(device, torch.bfloat16):
        out = qk_norm_rope_packed(qkv, **parameters, **settings, backend=backend)
        q = qk_norm_rope(qkv[:, :, 0], layout="bthd", backend=backend)
        block_causal_attention_packed(out, segment_length=4)
    assert out.dtype == q.dtype == torch.bfloat16
    assert torch.equal(out, qk_norm_rope_packed(qkv.bfloat16(), **parameters, **settings, backend=backend))
    out.float().sum().backward()
    assert qkv.grad.dtype == torch.float32 and parameters["q_bias"].grad.dtype == torch.float32


def test_counted_as_no_flops(device):
    qkv, parameters, settings = packed(device)
    with FlopCounterMode(display=False) as counter:
        qk_norm_rope_packed(qkv, **parameters, **settings).sum().backward()
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize(
    ("backend", "device", "is_packed"),
    simulated_slow(on_devices(torch=[False], cpu=[True], triton=[False], cuda=[True])),
)
def test_opcheck(backend, device, is_packed):
    qkv, parameters, settings = packed(device, T=4)
    names = ("q_weight", "k_weight", "q_bias", "k_bias")
    x = qkv if is_packed else qkv.detach()[:, :, 0].transpose(1, 2).requires_grad_()
    own = [parameters[name] if is_packed or name[0] == "q" else None for name in names]
    tables = [settings[name][None, :, None] for name in ("cos", "sin")]
    rule = ("layer", True, False, 1e-6, backend)
    torch.library.opcheck(torch.ops.ard.qk_norm_rope, (x, *own, *tables, *rule))
    with torch.no_grad():
        y, mean, rstd = torch.ops.ard.qk_norm_rope(x, *own, *tables, *rule)
    saved = [None if t is None else t.detach() for t in (x, *own)]
    torch.library.opcheck(torch.ops.ard.qk_norm_rope_backward, (y, *saved, *tables, mean, rstd, *rule))


@on_every_backend
def test_offsets_beyond_int32(backend, device):
    """Two samples more than 2**31 elements apart; the memory between them is reserved, never touched."""
    storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=device)
    far = storage.as_strided((2, 2, 8, 24), (2**31 + 64, 24, 48, 1))
    near = torch.randn(2, 2, 8, 24, device=device).bfloat16()
    far.copy_(near)
    table = torch.randn(8, 12, device=device)
    results = []
    for x in (far, near):
        leaf = x.detach().requires_grad_()
        y = qk_norm_rope(leaf, cos=table, sin=table, backend=backend)
        results.append((y.detach(), torch.autograd.grad(y.square().sum(), leaf)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_forward_mode(device):
    """By a composition of PyTorch ops: the tangent is that of finite differences."""
    qkv, parameters, settings = packed(device)
    x, tangent = qkv.detach().double(), torch.randn_like(qkv).double()
    arguments = {name: p.detach().double() for name, p in parameters.items()} | settings

    def run(value):
        return qk_norm_rope_packed(value, **arguments)

    _, got = torch.func.jvp(run, (x,), (tangent,))
    torch.testing.assert_close(got, (run(x + 1e-6 * tangent) - run(x - 1e-6 * tangent)) / 2e-6, rtol=1e-6, atol=1e-6)
    with pytest.raises(NotImplementedError, match="qk_norm_rope on backend 'cpu' has no forward-mode"):
        torch.func.jvp(lambda v: qk_norm_rope(v, backend="cpu"), (X,), (X,))
