"""Peers of segment_attention and what checks them, memory, and the share of useful FLOPs in the GPU kernels' tiles."""

import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from ard_kernels import SegmentMask
from ard_kernels.block_causal_attention.reference import segment_attention as reference
from ard_kernels.block_causal_attention.spec import Segments
from ard_kernels.block_causal_attention.tiles import useful_share
from benchmarks import measure
from benchmarks.block_causal_attention import peers
from benchmarks.exact import exact_attention
from benchmarks.files import ROOT
from benchmarks.growth.bench_attention_memory import peaks
from benchmarks.measure import How
from benchmarks.ops import STREAMS, attention_job, cpu_jobs, gpu_jobs, segment_job
from benchmarks.tables import candidate_errors_table, right_table, words
from testing import cases
from testing.cases import SEGMENT, Case

CPU = torch.device("cpu")
FP32 = {"D": 16, "dtype": torch.float32}
CASES = [
    Case(SEGMENT, 2, (5,) * 6, H=4, kv_heads=2, mask="teacher-forcing", **FP32),
    Case(SEGMENT, 2, (7, 3, 1, 6), H=3, kv_heads=1, mask="block-causal", **FP32),
    Case(SEGMENT, 1, (4,) * 6, H=2, mask="block-causal, window 4", packed=False, **FP32),
    Case("block_causal_attention", 2, (5, 2, 6, 3), H=2, mask="M3", **FP32),
    Case("block_causal_attention", 2, (5, 5, 5), H=2, mask="M1", **FP32),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)


def rows_of(starts, most):
    """(start, stop) of packed sequences; none is longer than promised."""
    rows = list(pairwise(starts.tolist()))
    assert starts.dtype == torch.int32 and max(stop - start for start, stop in rows) == most
    return rows


def attend(q, k, v):
    """Attention of (tokens, heads, D)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[0].transpose(0, 1)


def packed_call(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """What flash_attn_varlen_func computes."""
    ranges = zip(rows_of(cu_seqlens_q, max_seqlen_q), rows_of(cu_seqlens_k, max_seqlen_k), strict=True)
    return torch.cat([attend(q[a:b], k[c:d], v[c:d]) for (a, b), (c, d) in ranges])


class Blocks(NamedTuple):
    """FlashAttention-4's BlockSparseTensorsTorch."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple[int, int]

    def seen(self):
        """Which column blocks each row block sees whole; none is seen in part."""
        assert not self.mask_block_cnt.any() and all(x.dtype == torch.int32 for x in self[:4])
        assert self.mask_block_cnt.shape == self.full_block_cnt.shape and self.mask_block_idx.shape == self[3].shape
        sees = torch.zeros_like(self.full_block_idx[0, 0], dtype=torch.bool)
        for row, count, which in zip(sees, self.full_block_cnt[0, 0], self.full_block_idx[0, 0], strict=True):
            row[which[:count].long()] = True
        return sees


def dense_call(q, k, v, block_sparse_tensors=None, block_sparse_tensors_bwd=None):
    """What flash_attn_func computes of (B, T, H, D); FlashAttention-4 returns a log-sum-exp, too."""
    mask = None
    if block_sparse_tensors is not None:
        sees = block_sparse_tensors.seen()
        assert torch.equal(sees.T, block_sparse_tensors_bwd.seen())
        mask = sees.repeat_interleave(peers.BLOCK[0], 0).repeat_interleave(peers.BLOCK[1], 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2), None


def ranges_call(q, k, v, *, q_ranges, k_ranges, attn_type_map):
    """What flex_flash_attn_func computes of full ranges: a query that is in several sees the keys of all."""
    assert attn_type_map.tolist() == [0] * len(q_ranges) and q_ranges.dtype == k_ranges.dtype == torch.int32
    seen: dict = {}
    for rows, keys in zip(q_ranges.tolist(), k_ranges.tolist(), strict=True):
        seen.setdefault(tuple(rows), []).append(torch.arange(*keys))
    return torch.cat([attend(q[a:b], k[torch.cat(ks)], v[torch.cat(ks)]) for (a, b), ks in sorted(seen.items())]), None


def with_gradients(case, function, inputs, grad_out):
    out = function(*inputs)
    return [out.detach()], list(torch.autograd.grad(out, inputs, grad_out))


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for packages that need a GPU."""
    functions = {"flash_attn_func": dense_call, "flash_attn_varlen_func": packed_call}
    for module in peers.FLASH_ATTN.values():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**functions))
    sparse = SimpleNamespace(BlockSparseTensorsTorch=Blocks)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.block_sparsity", sparse)
    monkeypatch.setitem(sys.modules, "magi_attention", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "magi_attention.api", SimpleNamespace(flex_flash_attn_func=ranges_call))


@each_case
def test_exact_attention_is_the_reference(case):
    inputs, grad_out = cases.make_inputs(case, CPU), torch.randn(case.B, case.H, case.tokens, case.D)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = with_gradients(
        case, lambda *qkv: reference(*qkv, case.segment_mask.dense(case.lengths))[0], wide, grad_out.double()
    )
    for given, returned in zip((None, [grad_out]), expected, strict=True):
        exact = exact_attention(case, inputs, given)
        assert exact.error(returned) < 1e-14
        assert exact.error([1.01 * x for x in returned]) == pytest.approx(0.01)


@each_case
def test_peers_compute_the_mask(case, packages):
    """Values and gradients, also of the packed and ranged calls, on stand-ins; FlexAttention has no CPU backward."""
    inputs, grad_out = cases.make_inputs(case, CPU), torch.randn(case.B, case.H, case.tokens, case.D)
    makers = peers.attention_peers(case, CPU, False)
    for package in peers.FLASH_ATTN:
        makers[f"{package}_loop"] = partial(peers.flash_attn_loop, case, package)
        makers[f"{package}_varlen"] = partial(peers.flash_attn_varlen, case, CPU, package)
    makers["magi"] = lambda: peers.magi(case, CPU)
    forward, backward = exact_attention(case, inputs, None), exact_attention(case, inputs, [grad_out])
    assert {"flex", "sdpa_loop_flash", "sdpa_loop_math", "sdpa_dense_bool", "sdpa_dense_float"} < set(makers)
    for name, make in makers.items():
        if name == "flex":
            assert forward.error([make()(*(x.detach() for x in inputs))]) < 1e-6
            continue
        out, grads = with_gradients(case, make(), inputs, grad_out)
        assert forward.error(out) < 1e-6 and backward.error(grads) < 1e-6, name


@pytest.mark.parametrize("mask", ["teacher-forcing", "block-causal, window 4"])
def test_block_sparse_lists_have_the_mask(mask, packages, monkeypatch):
    monkeypatch.setattr(peers, "BLOCK", (4, 2))
    case = Case(SEGMENT, 2, (8, 4, 8) * 2, H=4, kv_heads=2, mask=mask, **FP32)
    inputs, grad_out = cases.make_inputs(case, CPU), torch.randn(case.B, case.H, case.tokens, case.D)
    out, grads = with_gradients(case, peers.flash_attn_4_sparse(case, CPU), inputs, grad_out)
    assert exact_attention(case, inputs, None).error(out) < 1e-6
    assert exact_attention(case, inputs, [grad_out]).error(grads) < 1e-6
    with pytest.raises(ValueError, match="blocks seen whole need multiples of 4"):
        peers.flash_attn_4_sparse(replace(case, lengths=(8, 6) * 3), CPU)


def test_who_is_right_where(packages, monkeypatch):
    """A package that is wrong at D = 72 backward, refuses 128, and is not installed from then on."""

    def call(q, k, v):
        if q.shape[-1] == 128:
            raise RuntimeError("head dim 128 is not compiled")
        bias = (q - q.detach()).sum() * 0.01 if q.shape[-1] == 72 else 0  # 0, whose gradient is not
        return dense_call(q, k, v)[0] + bias

    sys.modules["flash_attn"].flash_attn_func = call
    ways, how = ("forward", "forward+backward"), How(0.1, 3, 1, compiled=False)

    def rows(*dims):
        jobs = [attention_job(1, 16, D, "M4", way, 1.0, S=2, H=1, dtype=torch.float32) for D in dims for way in ways]
        return [measure.measure(job, CPU, how) for job in jobs]

    def cells(measured, name):
        table = right_table([row for found in measured for row in found.rows]).splitlines()
        (line,) = [line for line in table if line.startswith(f"| {words(name)} ")]
        return [cell.strip() for cell in line.split("|")[2:-1]]

    measured = rows(64, 72, 128)
    found = cells(measured, "flash_attn_loop")
    assert found.pop(3).startswith("**wrong**, ") and found == ["right"] * 3 + ["refused"] * 2
    timed = ["flash_attn_loop" in found.timings for found in measured]
    assert timed == [True, True, True, False, False, False] and "sdpa_loop_flash" in measured[3].timings
    assert cells(measured, "cpu") == ["right"] * 6
    monkeypatch.delitem(sys.modules, "flash_attn")
    assert cells(rows(64), "flash_attn_loop")[:3] == ["not installed", "not installed", ""]


def test_of_many_pairs_some_heads_are_compared(monkeypatch):
    monkeypatch.setattr("benchmarks.exact.PAIRS", {"cpu": 1})
    case = Case(SEGMENT, 1, (3, 3), H=12, kv_heads=6, mask="block-causal", **FP32)
    inputs = [x.detach() for x in cases.make_inputs(case, CPU)]
    exact = exact_attention(case, inputs, None)
    out = reference(*inputs, case.segment_mask.dense(case.lengths))[0]
    for head, compared in ((1, True), (5, False), (11, True)):
        off = out.clone()
        off[:, head] += 1
        assert (exact.error([off]) > 0.1) == compared


def test_a_mask_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(peers, "free_bytes", lambda device: 2 * 64**2)
    job = segment_job((16,) * 4, "teacher-forcing", "forward+backward", 0.0, H=2, kv_heads=1, **FP32)
    found = measure.measure(job, CPU, How(0.1, 3, 1, compiled=False))
    assert "MemoryError: a mask of 64 x 64 takes" in found.refused["sdpa_dense_bool"]
    assert "FlexAttention does not support backward on CPU" in found.refused["flex"]
    (row,) = found.rows
    assert set(row.facts["errors"]) == {"cpu", "sdpa_loop_flash", "sdpa_loop_math"}
    assert "SDPA math, loop over prefixes" in candidate_errors_table([row])


def test_a_wrong_peer_is_not_timed_and_stands_in_the_table(monkeypatch):
    """Many wrong ones do not outvote the right: fp64 decides."""
    monkeypatch.setattr(peers, "sdpa", lambda q, k, v, mask=None: 1.01 * v[:, :, :1].expand_as(q))
    job = segment_job((16,) * 4, "block-causal", "forward", 0.0, H=2, **FP32)
    found = measure.measure(job, CPU, How(0.1, 3, 1, compiled=False))
    assert "differs from fp64" in found.refused["sdpa_loop_flash"] and "cpu" in found.timings
    assert candidate_errors_table(found.rows).count("not timed") == 4


def test_models_that_others_train_are_measured():
    gpu, cpu = ({job.case for job in jobs if job.case.op == SEGMENT} for jobs in (gpu_jobs(), cpu_jobs()))
    assert len(gpu) == len(cpu) == sum(len(stream.masks) for stream in STREAMS)
    (wan,) = [case for case in gpu if case.mask == "teacher-forcing" and case.H == 12]
    assert wan.tokens == 2 * 7 * 4680 and wan.segment_mask == SegmentMask.teacher_forcing(7)
    (small,) = [case for case in cpu if case.mask == "teacher-forcing" and case.tokens == 2 * 7 * 234]
    assert (small.H, small.D, small.dtype) == (4, 128, torch.float32)


def test_memory_grows_as_the_tokens():
    """At 8192 of them a bool mask alone would be 67 MB."""
    few, many = peaks((2048, 8192), CPU, H=1, D=16)
    if few["peak_bytes"]["ours"] is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert many["peak_bytes"]["ours"] < 20e6 and many["peak_bytes"]["dense"] > 67e6


def shares(length, mask, block):
    """Useful share of the tiles by query and by key, S = 7."""
    tokens = mask.query_segments * length
    segments = Segments(mask.code, (length,), (length,))
    return [useful_share(segments, tokens, tokens, block, by_key) for by_key in (False, True)]


def share_rows():
    """Lines of the table in docs/gpu.md."""
    masks = SegmentMask.block_causal(7), SegmentMask.teacher_forcing(7)
    columns = [(mask, block) for mask in masks for block in ((128, 128), (128, 64))]
    return [
        f"| {length} | {' | '.join('{:.3f} / {:.3f}'.format(*shares(length, *column)) for column in columns)} |"
        for length in (4680, 880, 256)
    ]


def test_useful_share_of_the_tiles():
    for mask in (SegmentMask.block_causal(7), SegmentMask.teacher_forcing(7)):
        assert min(shares(4680, mask, (128, 128))) >= 0.98
        assert shares(256, mask, (128, 128)) == shares(256, mask, (128, 64)) == [1.0, 1.0]
    assert "\n".join(share_rows()) in (ROOT / "docs" / "gpu.md").read_text()
