"""Drawn calls of every op against a dense fp64 statement that shares no code with the library.

A seed is a case: it picks one value for each kind of DRAWS that its op has, and the numbers in its tensors. Values are
compared first, then one derivative, under the rule of oracle.py. With poison, what may not see it is compared.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fuzz import (
    CUDA_CHANNELS,
    FP32,
    FP64,
    NAN,
    Case,
    attention_by_lse,
    derive,
    layer_norm,
    plain_parts,
    reversed_attention,
)

from ard_kernels import (
    HistoryCache,
    adaln_modulate,
    block_causal_attention,
    block_causal_attention_packed,
    gate_residual,
    gate_residual_adaln,
    history_attention,
)
from testing import plain
from testing.devices import devices, on_devices
from testing.oracle import BACKWARD_FACTOR, FORWARD_FACTOR, assert_close, error_norm

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

CASES = 20_000  # 10 minutes on a core shared with others
# What each backend and each room gets of them. Triton's interpreter and the emulator of CUDA are slow.
SHARES = {"automatic": 0.4, "torch": 0.4, "cpu": 0.19, "triton": 0.005, "cuda": 0.005}
ROOMS = {"attention": 0.45, "adaln": 0.35, "history": 0.2}
EPS = 1e-5
OPS = {"adaln_modulate": adaln_modulate, "gate_residual": gate_residual, "gate_residual_adaln": gate_residual_adaln}


class Problem(NamedTuple):
    """A drawn call: three functions of its inputs. They return tuples; the first `differentiable` have gradients."""

    ours: Callable
    plains: list[Callable]  # PyTorch in the same dtypes, one or several; the worse one counts
    exact: Callable  # of fp64 inputs
    inputs: list[torch.Tensor]
    differentiable: int
    alone: float  # share of queries that see one key: their gradients cancel to 0, which the rule cannot measure
    touch: Callable  # index of an input -> (where to poison it, masks of what sees that: outputs, gradients of inputs)


def attention_problem(case: Case) -> Problem:
    cuda, packed = case.backend == "cuda", case("packed")
    dtype, B, H, D = case.dtype(*(FP32, FP64) if cuda else ()), case("batch"), case("heads"), case.head_dim()
    autocast, layout = case.autocast(dtype), "bthd" if packed else case("layout")
    _, segment_length, arguments, segment_T, sees = case.mask()
    T, scale = len(segment_T), case.scale(D)
    cast = dtype if autocast is None or dtype == FP64 else autocast

    def heads_first(x):
        return x.transpose(1, 2) if layout == "bthd" else x

    def rounded(x):  # to the dtype that autocast asks for, with the derivative 1
        return x + (x.to(cast).to(x.dtype) - x).detach()

    def dense(compute, wide):
        def run(*inputs):
            q, k, v = (heads_first(rounded(x)).to(wide) for x in (inputs[0].unbind(2) if packed else inputs))
            out, lse = compute(q, k, v, sees, D**-0.5 if scale is None else scale)
            return heads_first(out), lse

        return run

    def ours(*inputs):
        how = {"segment_length": segment_length, **arguments, "scale": scale, "return_lse": True}
        with nullcontext() if autocast is None else torch.autocast(case.device.type, autocast):
            if packed:
                return block_causal_attention_packed(*inputs, **how, backend=case.backend)
            return block_causal_attention(*inputs, **how, layout=layout, backend=case.backend)

    def touch(poisoned):
        token = case.random.randrange(T)
        queries = torch.arange(T, device=case.device) == token if not packed and poisoned == 0 else sees[:, token]
        queries_BHT, keys_BHT = torch.zeros(2, B, H, T, dtype=bool, device=case.device)
        queries_BHT[0, 0], keys_BHT[0, 0] = queries, sees[queries].any(0)
        of_q, of_k = heads_first(queries_BHT), heads_first(keys_BHT)
        if packed:
            return (0, token, slice(None), 0), (of_q, queries_BHT), [of_k[:, :, None].expand(B, T, 3, H)]
        where = (0, token, 0) if layout == "bthd" else (0, 0, token)
        return where, (of_q, queries_BHT if poisoned < 2 else torch.zeros_like(queries_BHT)), [of_q, of_k, of_k]

    alone = (sees.sum(-1) == 1).double().mean().item()
    shape = (B, T, 3, H, D) if packed else (B, T, H, D) if layout == "bthd" else (B, H, T, D)
    inputs = [case.tensor(shape, dtype) for _ in range(1 if packed else 3)]
    plains = [dense(compute, cast) for compute in (attention_by_lse, reversed_attention)]
    return Problem(ours, plains, dense(plain.attention, FP64), inputs, 1, alone, touch)


def adaln_problem(case: Case) -> Problem:
    dtype, B, C = case.dtype(), case("batch"), case("channels", lambda c: case.backend != "cuda" or c in CUDA_CHANNELS)
    op, per_token, others = case("adaln"), case("rows") == "token", [case("other dtype") or dtype for _ in range(2)]
    autocast = case.autocast(dtype, *others)
    lengths, segment_length, _, segment_T, _ = case.mask()
    T = len(segment_T)
    R, row_T = (T, torch.arange(T, device=case.device)) if per_token else (len(lengths), segment_T)
    spread_TR = F.one_hot(row_T, R)
    names = list(plain.TAKES[op])

    def dense(norm, spread, y_dtype):
        return partial(plain.adaln, op, norm=norm, spread=spread, y_dtype=y_dtype)

    def ours(*inputs):
        eps = {} if op == "gate_residual" else {"eps": EPS}
        with nullcontext() if autocast is None else torch.autocast(case.device.type, autocast):
            outputs = OPS[op](*inputs, segment_length=segment_length, **eps, backend=case.backend)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def touch(poisoned):
        name, row = names[poisoned], case.random.randrange(R)
        token = case.random.choice((row_T == row).nonzero().flatten().tolist())
        tokens_BT, rows_BR = (torch.zeros(B, size, dtype=bool, device=case.device) for size in (T, R))
        of_row = name in ("gate", "shift", "scale")
        tokens_BT[0], rows_BR[0, row] = row_T == row if of_row else torch.arange(T, device=case.device) == token, True
        outputs = [tokens_BT] if len(names) == 3 else [tokens_BT, tokens_BT]
        if name in ("shift", "scale") and len(outputs) == 2:
            outputs[0] = torch.zeros_like(tokens_BT)  # h has no part of them
        return (0, row if of_row else token), outputs, [tokens_BT if n in ("x", "branch") else rows_BR for n in names]

    kinds = {"x": (T, dtype), "branch": (T, others[0])}
    inputs = [case.tensor((B, size, C), kind) for size, kind in (kinds.get(name, (R, others[1])) for name in names)]

    plains = [dense(norm, spread, autocast or dtype) for norm, spread in plain_parts(EPS, spread_TR)]
    exact = dense(partial(layer_norm, eps=EPS), lambda x: x[:, row_T], FP64)
    return Problem(ours, plains, exact, inputs, 2 if len(names) == 5 else 1, 0.0, touch)


def compare(got, *plains_and_exact, factor, label, masks=None):
    """The rule, and the dtypes of the contract; where masks are given, only for what they do not hold."""
    for i, tensors in enumerate(zip(got, *plains_and_exact, strict=True)):
        assert tensors[0].dtype == tensors[1].dtype, f"{label}[{i}]: {tensors[0].dtype}, expected {tensors[1].dtype}"
        ours, *plains, exact = tensors if masks is None else (x[~masks[i]] for x in tensors)
        worse = max(plains, key=lambda plain: error_norm(plain, exact))
        once_more = ours.dtype == FP64  # what is called exact errs as much as the plain ones do
        assert_close(ours, worse, exact, factor=factor + once_more, label=f"{label}[{i}]")


def check_op(case: Case, problem: Problem) -> None:
    ours, plains, exact, inputs, differentiable, alone, _ = problem
    values = [*(plain(*inputs) for plain in plains), exact(*(x.double() for x in inputs))]
    cotangents = [case.tensor(y.shape, y.dtype, case("cotangent")) for y in values[0][:differentiable]]
    poison = case("poison") if not case.tiles and values[0][0].numel() else None
    if poison is not None:
        return check_poison(case, problem, poison, values, cotangents)
    outputs = ours(*inputs)
    compare(outputs, *values, factor=FORWARD_FACTOR, label="value")
    forward = case.backend in (None, "torch") and case("forward mode")
    if alone > 0.2:
        return
    kind = case("forward derivative" if forward else "derivative")
    along = case.random.sample(range(len(inputs)), case.random.randint(1, len(inputs)))
    case.drawn["along"] = along
    tangents = [case.tensor(x.shape, x.dtype, "contiguous") if i in along else None for i, x in enumerate(inputs)]
    results, given = [], (inputs, tangents, cotangents)
    for function in (ours, *plains, exact):
        tensors = [[x.double() if function is exact and x is not None else x for x in xs] for xs in given]
        results.append(derive(kind, lambda *x, f=function: f(*x)[:differentiable], *tensors))
    compare(*results, factor=FORWARD_FACTOR if kind == "vmap" else BACKWARD_FACTOR, label=kind)


def check_poison(case: Case, problem: Problem, poison: float, values, cotangents) -> None:
    """What may not see a poisoned token or row is as without it; what sees a NaN is NaN."""
    ours, plains, exact, inputs, differentiable, alone, touch = problem
    which = case.random.randrange(len(inputs))
    where, of_outputs, of_grads = touch(which)
    case.drawn["poisoned"] = which, where
    poisoned = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
    poisoned[which][where] = poison
    leaves = [x.requires_grad_() for x in poisoned]
    outputs = ours(*leaves)
    compare(outputs, *values, factor=FORWARD_FACTOR, label="value beside poison", masks=of_outputs)
    certain = outputs[differentiable - 1][of_outputs[differentiable - 1]]
    assert poison == poison or certain.isnan().all(), "a NaN is lost"
    grads = [torch.autograd.grad(outputs[:differentiable], leaves, cotangents)]
    for function in (*plains, exact):
        clean, g = ([x.double() if function is exact else x for x in xs] for xs in (inputs, cotangents))
        grads.append(derive("backward", lambda *x, f=function: f(*x)[:differentiable], clean, clean, g))
    if alone == 0:
        compare(*grads, factor=BACKWARD_FACTOR, label="gradient beside poison", masks=of_grads)
    assert all(g[~mask].isfinite().all() for g, mask in zip(grads[0], of_grads, strict=True)), "poisoned gradients"


def check_history(case: Case) -> None:
    """Ragged steps of several layers, in any order within a step, into memory full of NaN; then one token too many.

    A step may be tried with other keys, which are not kept.
    """
    half = (FP32, FP64) if case.backend == "cuda" else ()
    dtype, B, H, D, layers = case.dtype(*half), case("batch"), case("heads"), case.head_dim(), case("layers")
    lengths, _, arguments, segment_T, sees = case.mask()
    scale, layout = case.scale(D), case("layout")
    poison = None if case.tiles else case("poison")
    cache = HistoryCache(layers, B, H, D, len(segment_T) + case("spare"), dtype, case.device)
    cache.keys.fill_(NAN), cache.values.fill_(NAN)

    def step(layer, q, k, v, commit=True):
        q, k, v = (x.transpose(1, 2) if layout == "bthd" else x for x in (q, k, v))
        how = {"scale": scale, "layout": layout, "commit": commit, **arguments}
        out = history_attention(q, k, v, cache, layer=layer, backend=case.backend, **how)
        return out.transpose(1, 2) if layout == "bthd" else out

    past, spoilt = [[] for _ in range(layers)], case.random.randrange(len(lengths))
    for segment, length in enumerate(lengths):
        rows = segment_T == segment
        for layer in case.random.sample(range(layers), layers):
            q, k, v = (case.tensor((B, H, length, D), dtype) for _ in range(3))
            for _ in range(case("tries")):
                step(layer, q, *(case.tensor((B, H, length, D), dtype) for _ in range(2)), commit=False)
            past[layer].append((k, v))
            keys, values = (torch.cat(each, 2) for each in zip(*past[layer], strict=True))
            if poison is not None and segment == spoilt:
                k, v = (torch.full_like(x, poison) for x in (k, v))
            got = step(layer, q, k, v)
            seen = sees[rows, : keys.shape[2]]
            if poison is not None and seen[:, segment_T[: keys.shape[2]] == spoilt].any():
                continue
            results = []
            for compute, wide in ((attention_by_lse, dtype), (reversed_attention, dtype), (plain.attention, FP64)):
                out, _ = compute(q.to(wide), keys.to(wide), values.to(wide), seen, D**-0.5 if scale is None else scale)
                results.append((out,))
            compare((got,), *results, factor=FORWARD_FACTOR, label=f"step {segment}, layer {layer}")
    kept, segments = cache.keys.clone(), cache.segments
    with pytest.raises(ValueError, match="expected room for"):
        step(0, *(case.randn(3, B, H, cache.capacity - len(segment_T) + 1, D).to(dtype)))
    assert torch.equal(kept.view(torch.uint8), cache.keys.view(torch.uint8)) and segments == cache.segments


CHECKS = {
    "attention": lambda case: check_op(case, attention_problem(case)),
    "adaln": lambda case: check_op(case, adaln_problem(case)),
    "history": check_history,
}


AUTOMATIC = [
    pytest.param("automatic", *where.values, id=f"automatic-on-{where.values[0]}", marks=where.marks)
    for where in devices()
]


@pytest.mark.parametrize(
    "most", [pytest.param(CASES // 50, id="few"), pytest.param(CASES, id="all", marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize(("backend", "device"), [*AUTOMATIC, *on_devices("torch", "cpu", "triton", "cuda")])
@pytest.mark.parametrize("room", ROOMS)
def test_drawn_calls(room, backend, device, most):
    cases, failures = max(2, round(most * ROOMS[room] * SHARES[backend])), []
    for seed in range(cases):
        case = Case(seed, backend, device)
        try:
            CHECKS[room](case)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {str(error).splitlines()[0]}\n    {case.drawn}")
        if len(failures) == 10:
            break
    assert not failures, "\n".join([f"{len(failures)} of {seed + 1} cases", *failures])
