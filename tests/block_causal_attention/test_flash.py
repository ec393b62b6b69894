"""Backend flash on stand-ins for the flash-attn packages, with their signatures; on a GPU on those it has."""

import importlib.machinery
import subprocess
import sys
from types import ModuleType

import pytest
import torch

import ard_kernels
from ard_kernels import SegmentMask, block_causal_attention, segment_attention, segment_attention_packed
from ard_kernels.block_causal_attention import flash
from ard_kernels.common import findings, gpu_support, self_check, tuning
from ard_kernels.common.backends import automatic_order, resolve
from testing.attention_checks import MEMORY, check, leaves

BF16, FP16 = torch.bfloat16, torch.float16
HOLES = SegmentMask([[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 1], [0, 1, 0, 0, 0]])  # row 1 and column 3: empty
CHIPS = {flash.FlashAttention2: 80, flash.FlashAttention3: 90, flash.FlashAttention4: 100}


def check_rows(*tensors):
    """A kernel copies 16 bytes at a time."""
    for x in tensors:
        steps = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
        assert x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and not any(step % 8 for step in steps)


def attention(q, k, v, scale):
    """out (B, T, H, D) and the natural log-sum-exp (B, H, T)."""
    check_rows(q, k, v)
    wide = [x.float().repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (q, k, v)]
    scores = scale * wide[0] @ wide[1].mT
    return (scores.softmax(-1) @ wide[2]).transpose(1, 2).to(q.dtype), scores.logsumexp(-1)


def attention_backward(dout, q, k, v, out, lse, dq, dk, dv, scale, dlse=None):
    """Writes dq, dk, dv; of grouped heads the sum."""
    check_rows(dout, q, k, v, out, dq, dk, dv)
    assert lse.is_contiguous() and lse.dtype == torch.float32
    share = q.shape[2] // k.shape[2]
    wide = [x.float().repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (dout, q, k, v, out)]
    dout, wide_q, wide_k, wide_v, out = wide
    p = (scale * wide_q @ wide_k.mT - lse[..., None]).exp()
    delta = (dout * out).sum(-1, keepdim=True) - (0 if dlse is None else dlse[..., None])
    ds = scale * p * (dout @ wide_v.mT - delta)
    dq.copy_((ds @ wide_k).transpose(1, 2))
    for whole, each_head in ((dk, ds.mT @ wide_q), (dv, p.mT @ dout)):
        whole.copy_(each_head.unflatten(1, (-1, share)).sum(2).transpose(1, 2))


def forward_2(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
    return_softmax,
):  # fmt: skip
    assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
    assert alibi_slopes is None and return_softmax is False
    return *attention(q, k, v, softmax_scale), torch.empty(0), torch.empty(2, dtype=torch.int64)


def backward_2(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
    softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
    assert alibi_slopes is None and deterministic is True and rng_state is None
    attention_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale)
    return torch.empty(0)


def forward_3(
    q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None,
    seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None,
    leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None,
    v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0,
    softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
):  # fmt: skip
    return *attention(q, k, v, softmax_scale), torch.empty(0), torch.empty(0)


def backward_3(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
    max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
    window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
):  # fmt: skip
    assert deterministic is True and cu_seqlens_q is None
    attention_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale)
    return torch.empty(0)


def forward_4(q, k, v, qv=None, softmax_scale=None, causal=False, return_lse=False, out=None, lse=None):
    """The arguments that matter of some forty."""
    out, lse = attention(q, k, v, softmax_scale)
    return out, lse if return_lse else None, None, None, None


def backward_4(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, deterministic=False, dq=None, dk=None, dv=None, dlse=None
):
    assert deterministic is True
    attention_backward(dout, q, k, v, out, lse, dq, dk, dv, softmax_scale, dlse)
    return dq, dk, dv


def forget():
    """What was found before."""
    flash._reason.cache_clear()
    flash.serving.cache_clear()


FUNCTIONS = {
    flash.FlashAttention2: (forward_2, backward_2),
    flash.FlashAttention3: (forward_3, backward_3),
    flash.FlashAttention4: (forward_4, backward_4),
}


def module(monkeypatch, name, folder=None, **functions):
    """`name` among what Python has imported."""
    made = ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=folder is not None)
    if folder is not None:
        made.__spec__.submodule_search_locations = [str(folder)]
    vars(made).update(functions)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture(autouse=True)
def unchecked(monkeypatch, tmp_path):
    """A machine that nothing is known of, whose kernels are taken as they are."""
    monkeypatch.setenv("ARD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(self_check, "ENABLED", False)
    findings.folder.cache_clear()
    self_check.forget()
    yield
    findings.folder.cache_clear()
    self_check.forget()


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Calls put stand-ins of packages where Python finds them, on a GPU of the compute capability that is given."""

    def put(*kinds, arch, **functions):
        for kind in kinds:
            module(monkeypatch, kind.module, **(dict(zip(kind.functions, FUNCTIONS[kind], strict=True)) | functions))
            if kind is flash.FlashAttention4:
                (tmp_path / "cute").mkdir(exist_ok=True)
                (tmp_path / "cute" / "interface.py").touch()
                module(monkeypatch, "flash_attn", tmp_path)
            elif kind is flash.FlashAttention2:
                module(monkeypatch, "flash_attn_2_cuda")
        monkeypatch.setattr(flash, "refuses_device", lambda device: None)
        monkeypatch.setattr(flash, "architecture", lambda device: arch)
        forget()

    yield put
    forget()


@pytest.fixture(params=flash.PACKAGES, ids=lambda kind: kind.name)
def package(request, device, install, monkeypatch):
    """The package that serves."""
    kind = request.param
    monkeypatch.setattr(flash, "PACKAGES", (kind,))
    if device.type == "cpu":
        install(kind, arch=CHIPS[kind])
    else:
        forget()
        if reason := flash.refuses(device, BF16, 72):
            pytest.skip(reason)
    return kind


@pytest.mark.parametrize(
    ("mask", "lengths", "k_lengths", "heads"),
    [
        (SegmentMask.block_causal(3), [16] * 3, None, (2, 1)),
        (SegmentMask.block_causal(3, window=1), [16] * 3, None, (1, 3)),
        (SegmentMask.block_causal(4, window=2, sink=1), [9, 30, 1, 12], None, (2, 2)),
        (SegmentMask.teacher_forcing(3, window=2, sink=1), [9, 12, 10] * 2, None, (1, 2)),
        (HOLES, [30, 4, 21, 33], [16, 16, 40, 5, 30], (2, 2)),
        (SegmentMask([[1, 1]]), [20], [8, 9], (1, 1)),
    ],
    ids=["block_causal", "diagonal", "window_and_sink", "teacher_forcing", "holes", "one_row"],
)
def test_values_and_gradients(package, device, mask, lengths, k_lengths, heads):
    """Under the rule of oracle.py, with a gradient of lse; heads of keys, and of queries for each."""
    for dtype, D in ((BF16, 72), (FP16, 64)):
        check("flash", device, mask, lengths, k_lengths or lengths, 2, *heads, D=D, dtype=dtype)


@pytest.mark.parametrize("memory", MEMORY)
def test_memory_of_the_inputs(package, device, memory):
    check(
        "flash", device, SegmentMask.block_causal(3), [16, 9, 20], [16, 9, 20], 2, 2, 2, 72, BF16, memory=[memory] * 3
    )


def test_packed_equals_three_tensors(package, device):
    qkv = torch.randn(2, 60, 3, 2, 72, device=device).bfloat16().requires_grad_()
    how = {"segment_length": [10, 20, 10, 20], "return_lse": True, "backend": "flash"}
    mask = SegmentMask.teacher_forcing(2)
    ours = segment_attention_packed(qkv, mask, **how)
    expected = segment_attention(*qkv.unbind(2), mask, layout="bthd", **how)
    grads = [torch.autograd.grad(out.sum() + lse.cos().sum(), qkv)[0] for out, lse in (ours, expected)]
    assert torch.equal(ours[0], expected[0]) and torch.equal(*grads)


def test_the_widest_heads(package, device):
    """Where the backward takes no gradient of lse, that needs heads which are wider by 8."""
    if package.takes_lse_gradient:
        check("flash", device, SegmentMask.block_causal(2), [20] * 2, [20] * 2, D=256, dtype=BF16)
    else:
        check("flash", device, SegmentMask.block_causal(2), [20] * 2, [20] * 2, D=248, dtype=BF16)
        assert f"{package.name} " in (reason := flash.refuses(device, BF16, 256)) and "up to 248; got 256" in reason


def test_compiles_to_one_graph(package, device):
    q, k, v = leaves(device, BF16, 1, 2, 1, 32, 32, 64)

    def run(q):
        return block_causal_attention(q, k, v, segment_length=8, backend="flash")

    out = torch.compile(run, fullgraph=True, backend="aot_eager")(q)
    assert torch.equal(out, run(q))


@pytest.mark.parametrize("arch, kind", [(80, 2), (86, 2), (90, 3), (100, 4), (103, 4), (120, 2)])
def test_the_package_of_each_chip(install, arch, kind):
    install(*flash.PACKAGES, arch=arch)
    assert flash.dense(torch.device("cpu"), 72).name == f"FlashAttention-{kind}"


def test_a_package_that_serves_some_head_dims_leaves_the_others(install, monkeypatch):
    install(*flash.PACKAGES, arch=100)
    assert [flash.dense(torch.device("cpu"), D).name[-1] for D in (128, 160, 256)] == ["4", "2", "4"]
    monkeypatch.setattr(flash, "PACKAGES", (flash.FlashAttention4,))
    forget()
    with pytest.raises(ValueError, match=r"'flash'.*FlashAttention-4.*head dims up to 128, and 256; got 160"):
        q = torch.randn(1, 1, 8, 160).bfloat16()
        block_causal_attention(q, q, q, segment_length=4, backend="flash")


def test_refused_with_the_reason(install, monkeypatch):
    cpu = torch.device("cpu")
    if not any(kind.installed() for kind in flash.PACKAGES):
        with pytest.raises(
            ValueError, match=r"'flash'.*no flash-attn package is installed; expected flash-attn, flash_"
        ):
            resolve("segment_attention", "flash", cpu, BF16, 72)
    install(flash.FlashAttention4, arch=86)
    monkeypatch.setattr(flash, "PACKAGES", (flash.FlashAttention4,))
    assert "made for compute capability 9.0 to 11.x" in flash.refuses(cpu, BF16, 72)
    assert "bfloat16 and float16" in flash.refuses(cpu, torch.float32, 72)
    monkeypatch.setattr(flash, "refuses_device", gpu_support.refuses_device)
    forget()
    assert "written for NVIDIA GPUs" in flash.refuses(cpu, BF16, 72)
    assert not ard_kernels.backends("cpu")["segment_attention"]["flash"].available
    assert "no flash implementation" in ard_kernels.backends("cpu")["adaln_modulate"]["flash"].reason


def test_a_package_that_is_broken_or_of_another_version(install, monkeypatch):
    cpu, kind = torch.device("cpu"), flash.FlashAttention3
    monkeypatch.setattr(flash, "PACKAGES", (kind,))
    install(kind, arch=90, _flash_attn_backward=None)
    assert "importing it: ImportError: flash_attn_interface has no _flash_attn_backward" in flash.refuses(cpu, BF16, 72)
    q = torch.randn(1, 1, 8, 64).bfloat16()
    for forward, message in (
        (lambda q, k, v, scale: (q, q), "unexpected keyword argument"),
        (lambda q, k, v, softmax_scale: (q,), "unpack"),
        (lambda q, k, v, softmax_scale: (q, q), r"returned lse \(2, 4, 1, 64\); expected \(2, 1, 4\)"),
    ):
        install(kind, arch=90, _flash_attn_forward=forward)
        with pytest.raises(RuntimeError, match=f"backend flash: .*FlashAttention-3.*{message}"):
            block_causal_attention(q, q, q, segment_length=4, window=1, backend="flash")


def test_a_package_that_is_wrong_is_found_by_the_self_check(install, monkeypatch, capfd):
    """As FlashAttention-4 of 2026 at D = 72 on Hopper: dq is wrong and nothing says so."""

    def backward(q, k, v, *others, dq, **settings):
        backward_4(q, k, v, *others, dq=dq, **settings)
        if q.shape[-1] == 72:
            dq.mul_(1.1)
        return dq, settings["dk"], settings["dv"]

    monkeypatch.setattr(flash, "PACKAGES", (flash.FlashAttention4,))
    monkeypatch.setattr(self_check, "ENABLED", True)
    install(flash.FlashAttention4, arch=90, _flash_attn_bwd=backward)
    for D in (64, 72):
        q = torch.randn(1, 2, 8, D).bfloat16()
        if D == 64:
            block_causal_attention(q, q, q, segment_length=4, backend="flash")
        else:
            with pytest.raises(ValueError, match=r"'flash' .*dq"):
                block_causal_attention(q, q, q, segment_length=4, backend="flash")
    assert "passed" in (said := capfd.readouterr().err) and "failed" in said


def test_automatic_only_where_it_was_measured(monkeypatch):
    device, op = torch.device("cuda", 0), "block_causal_attention"
    monkeypatch.setattr(gpu_support, "_capability", lambda index: (9, 0))
    assert "flash" not in automatic_order(op, device, BF16, 128)
    monkeypatch.setattr(tuning, "FASTEST", {"sm90": {f"{op}/16bit/128": "flash"}})
    assert automatic_order(op, device, BF16, 128) == ("flash", "triton", "torch")
    assert "flash" not in automatic_order(op, device, BF16, 72)


def test_importing_the_library_imports_no_package(tmp_path):
    for name in ("flash_attn_2_cuda", "flash_attn_interface", "flash_attn"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(1)")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import ard_kernels; "
    code += "print(ard_kernels.backends('cpu')['segment_attention']['flash'].reason)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "written for NVIDIA GPUs" in done.stdout
