"""`--shape "op=segment_attention H=12 D=128 L=4680 S=7"`: the raw calls of a shape in words, with their backward.

What a text leaves out is as in models: q, k, v are views of (B, T, H, D) memory, rows have the tokens' dtype. Whatever
differs from that, ragged segments say, is recorded from the program itself (ARD_RECORD_SHAPES).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ard_kernels
from ard_kernels import HistoryCache, SegmentMask
from ard_kernels.tune.calls import Call, calls_of, without_launches

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHOICES: dict[str, Sequence[str]] = {
    "dtype": tuple(DTYPES), "mask": ("block_causal", "teacher_forcing"), "over": ("head", "all"),
}  # fmt: skip
REQUIRED = object()


class Shape(NamedTuple):
    """run: the op, forward and backward, on tensors of a shape. defaults: of what the shape has to say."""

    run: Callable[[dict[str, Any]], object]
    defaults: dict[str, Any]


def _empty(at: dict[str, Any], *sizes: int) -> Tensor:
    """Nothing is launched, so what is in it does not matter."""
    return torch.empty(at["B"], *sizes, dtype=DTYPES[at["dtype"]], requires_grad=True)


def _queries_keys_values(at: dict[str, Any], tokens: int) -> list[Tensor]:
    """q (B, H, T, D), k and v (B, H_kv, T, D)."""
    heads = at["H"], *(at["kv_heads"] or at["H"],) * 2
    return [_empty(at, tokens, count, at["D"]).transpose(1, 2) for count in heads]


def _backward(outputs: Tensor | tuple[Tensor, ...], inputs: Sequence[Tensor]) -> None:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, inputs, [torch.empty_like(y) for y in outputs])


def _segment_attention(at: dict[str, Any]) -> None:
    mask = getattr(SegmentMask, at["mask"])(at["S"], at["window"], at["sink"])
    q, k, v = _queries_keys_values(at, at["L"] * mask.query_segments)
    out = ard_kernels.segment_attention(q, k, v, mask, segment_length=at["L"], backend="triton")
    _backward(out, (q, k, v))


def _history_attention(at: dict[str, Any]) -> None:
    """S segments one by one, into a cache that holds them all, or with a window into one that rolls."""
    window, sizes = at["window"], (1, at["B"], at["kv_heads"] or at["H"], at["D"])
    if window is None:
        cache = HistoryCache(*sizes, at["S"] * at["L"], DTYPES[at["dtype"]])
    else:
        own = {"segment_length": at["L"], "window": window, "sink": at["sink"]}
        cache = HistoryCache.rolling(*sizes, **own, dtype=DTYPES[at["dtype"]])
    q, k, v = _queries_keys_values(at, at["L"])
    with torch.no_grad():
        for _ in range(at["S"]):
            ard_kernels.history_attention(q, k, v, cache, layer=0, sink=at["sink"], backend="triton")


def _adaln(op: str, *names: str) -> Callable[[dict[str, Any]], None]:
    """names: of the inputs: x, branch (B, T, C); gate, shift, scale (B, S, C)."""

    def run(at: dict[str, Any]) -> None:
        tokens = {"x": at["S"] * at["L"], "branch": at["S"] * at["L"]}
        inputs = {name: _empty(at, tokens.get(name, at["S"]), at["C"]) for name in names}
        outputs = getattr(ard_kernels, op)(**inputs, segment_length=at["L"], backend="triton")
        _backward(outputs, list(inputs.values()))

    return run


def _qk_norm_rope(at: dict[str, Any]) -> None:
    q, k = (_empty(at, at["T"], at["H"], at["D"]) for _ in range(2))
    weight = torch.empty(at["H"] * at["D"] if at["over"] == "all" else at["D"], requires_grad=True)
    tables = torch.empty(2, at["T"], at["D"] // 2).unbind()
    how = {"over": at["over"], "q_weight": weight, "k_weight": weight, "layout": "bthd", "backend": "triton"}
    _backward(ard_kernels.qk_norm_rope(q, k, *tables, **how), (q, k, weight))


_SHARED = {"B": 1, "dtype": "bf16"}
_ATTENTION = {"H": REQUIRED, "D": REQUIRED, "L": REQUIRED, "S": REQUIRED, "kv_heads": None, "window": None, "sink": 0}
_ADALN = {"C": REQUIRED, "L": REQUIRED, "S": REQUIRED} | _SHARED
SHAPES = {
    "segment_attention": Shape(_segment_attention, _ATTENTION | {"mask": "block_causal"} | _SHARED),
    "history_attention": Shape(_history_attention, _ATTENTION | _SHARED),
    "adaln_modulate": Shape(_adaln("adaln_modulate", "x", "shift", "scale"), _ADALN),
    "gate_residual_adaln": Shape(
        _adaln("gate_residual_adaln", "x", "branch", "gate", "shift", "scale"), _ADALN
    ),
    "gate_residual": Shape(_adaln("gate_residual", "x", "branch", "gate"), _ADALN),
    "qk_norm_rope": Shape(
        _qk_norm_rope, {"H": REQUIRED, "D": REQUIRED, "T": REQUIRED, "over": "head"} | _SHARED
    ),
}  # fmt: skip


def calls_of_shape(text: str) -> list[Call]:
    """The raw calls of a shape: NAME=VALUE, separated by blanks; op is segment_attention where it is left out.

    Raises:
        ValueError: a name, a value or a combination that the op does not take.
    """
    given = {}
    for part in text.split():
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise ValueError(f"got {part!r}; expected NAME=VALUE")
        if name in given:
            raise ValueError(f"got {name} twice; expected it once")
        given[name] = value
    op = given.pop("op", "segment_attention")
    if op not in SHAPES:
        raise ValueError(f"op is {op!r}; expected one of {', '.join(SHAPES)}")
    run, defaults = SHAPES[op]
    at = dict(defaults)
    for name, value in given.items():
        if name not in defaults:
            raise ValueError(f"got {name}={value}; expected of {op}: {', '.join(defaults)}")
        at[name] = _read(name, value)
    if missing := [name for name, value in at.items() if value is REQUIRED]:
        raise ValueError(f"{op} without {', '.join(missing)}; expected each, as in {missing[0]}=16")
    with without_launches():
        return calls_of(lambda: run(at))


def _read(name: str, value: str) -> str | int:
    if name in CHOICES:
        if value not in CHOICES[name]:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(CHOICES[name])}")
        return value
    least = 0 if name == "sink" else 1
    if not value.isdecimal() or int(value) < least:
        raise ValueError(f"{name} is {value!r}; expected an integer >= {least}")
    return int(value)
