"""Kernels prove themselves on the machine they run on: small calls of each kind against PyTorch in float64.

A *kind* is (op, backend, dtype, width). Its check runs the op's trials (a room's trials.py: every class of tiles,
ragged segments, masks, all gradients) on the backend, compares every result with the torch backend in float64 by the
rule of tolerance.py, and repeats them: they have to be bit-equal. `findings.py` keeps what was found.

The first time that a GPU kernel would be chosen without having been named, its kind is checked, once per machine and
version; one that fails is refused from then on. Never in a compiled region, a CUDA graph capture or a backward pass:
there the record decides, or findings.VERIFIED_ON_HARDWARE. ARD_SELF_CHECK=0 turns all of it off.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ard_kernels.common import findings, record
from ard_kernels.common.findings import FAILED, PASSED, RUNNING, UNKNOWN, Finding, Kind
from ard_kernels.common.gpu_support import architecture
from ard_kernels.common.library import constant_in_graphs, private
from ard_kernels.common.tolerance import BACKWARD_FACTOR, FORWARD_FACTOR, rounding_floor

QUICK, THOROUGH = 3, 50  # runs of a trial: at the first use, and by doctor
GPU_KERNELS = ("cuda", "triton")
NEEDED_ON = {"cuda"}  # device types on which they are checked at their first use
OF_OTHERS = ("flash",)  # backends that are not our kernels: checked wherever they run, also when they are named

Tensors = dict[str, Tensor]


class Trial(NamedTuple):
    """One small call of an op.

    inputs: on the CPU, in the dtypes of a call. run(backend, **inputs): results by name, on the inputs' device and in
    whatever dtype they are. gradients: whether results are differentiated with respect to all inputs.
    """

    label: str
    inputs: Tensors
    run: Callable[..., Tensors]
    gradients: bool = True


class Draw:
    """Normal numbers, the same in every run, whoever else draws."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float32).to(dtype)


class Unit(NamedTuple):
    """How kernels are checked. op: the name under which findings are kept, which ops over the same kernels share.

    trials(draw, dtype, width). widths: those that doctor checks.
    """

    op: str
    trials: Callable[[Draw, torch.dtype, int], Iterable[Trial]]
    widths: tuple[int, ...]


UNITS: dict[str, Unit] = {}  # by what users call
_local = threading.local()  # .ignores: in this thread the record refuses nothing
_one_at_a_time = threading.Lock()
epoch = 0  # counts how often the record was read anew
_settled: dict[tuple, str | None] = {}  # what has been answered by (op, backend, device, dtype, width)
_graph_task = private("_C._current_graph_task_id")  # of the backward pass that is running; -1 outside


def _asked() -> bool:
    text = os.environ.get("ARD_SELF_CHECK") or "1"
    if text not in ("0", "1"):
        raise ValueError(f"environment ARD_SELF_CHECK is {text!r}; expected 0 or 1")
    return text == "1"


ENABLED = _asked()


def register_trials(unit: Unit, *ops: str) -> None:
    """Declare how the kernels behind `ops` are checked."""
    UNITS.update(dict.fromkeys(ops, unit))


class _Call:
    """A trial on a device, its inputs and the gradients of its results in one dtype, or as they are."""

    def __init__(self, trial: Trial, device: torch.device, dtype: torch.dtype | None):
        self.trial = trial
        self.leaves = {
            name: x.to(device, dtype or x.dtype).requires_grad_(trial.gradients) for name, x in trial.inputs.items()
        }
        self.grads: list[Tensor] = []

    def __call__(self, backend: str) -> Tensors:
        """Results, and the gradients of the inputs, named d<input>."""
        outputs = self.trial.run(backend, **self.leaves)
        found = {name: x.detach() for name, x in outputs.items()}
        if self.trial.gradients:
            draw = Draw()
            self.grads = self.grads or [draw(*x.shape).to(x.device, x.dtype) for x in found.values()]
            of_inputs = torch.autograd.grad(list(outputs.values()), list(self.leaves.values()), self.grads)
            found |= {f"d{name}": grad for name, grad in zip(self.leaves, of_inputs, strict=True)}
        return found


class _NoReferenceError(Exception):
    """PyTorch itself cannot run a trial here, so that nothing is known of the kernel."""


def _difference(got: Tensor, exact: Tensor) -> Tensor:
    """inf where only one of them is finite, or both are infinite and of different signs."""
    if got.shape != exact.shape:
        return torch.full_like(exact, float("inf"))
    got, inf = got.double(), float("inf")
    return torch.where(got == exact, 0.0, got - exact).nan_to_num(inf, inf, inf)


def _norms(x: Tensor) -> tuple[float, float]:
    """2-norms of all of x and of its largest row: one wrong row of many is lost in the first, in 16 bits."""
    return x.norm().item(), x.norm(dim=-1).max().item()


def _judge(trial: Trial, backend: str, device: torch.device, repeats: int) -> tuple[float, str]:
    """(the largest error over what is allowed, what is wrong or "")."""
    call = _Call(trial, device, None)
    try:
        exact, plain = _Call(trial, device, torch.float64)("torch"), call("torch")
    except Exception as cause:  # `sdpa_kernel` of the caller has no kernel for float64; the GPU has failed before
        raise _NoReferenceError(f"PyTorch itself failed: {_one_line(cause)}") from cause
    # What the allocator gives to the kernel next is NaN: what it leaves unwritten is then no right result of before.
    poison = [torch.full_like(x, float("nan")) for x in plain.values() for _ in range(2)]
    del poison
    got = call(backend)
    gradients = {f"d{name}" for name in trial.inputs}
    largest, wrong = 0.0, []
    for name, value in got.items():
        factor = BACKWARD_FACTOR if name in gradients else FORWARD_FACTOR
        errors, allowances = _norms(_difference(value, exact[name])), _norms(_difference(plain[name], exact[name]))
        sizes = _norms(exact[name].nan_to_num(0.0, 0.0, 0.0))
        for error, allowed, size, what in zip(errors, allowances, sizes, ("error", "error of a row"), strict=True):
            limit = factor * allowed + rounding_floor(size, value.dtype)
            ratio = error / max(limit, 1e-300)
            largest = max(largest, ratio)
            if not error <= limit:
                wrong.append(f"{name}: {what} {error:.2e}, {ratio:.3g} times what is allowed beside plain PyTorch's")
                break
    if wrong:
        return largest, f"{trial.label}: {'; '.join(wrong)}"
    for _ in range(repeats - 1):
        again = call(backend)
        moved = [name for name, value in got.items() if not torch.equal(value, again[name])]
        if moved:
            return largest, f"{trial.label}: {', '.join(moved)} not bit-equal in a second run"
    return largest, ""


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def ignoring_the_record() -> Iterator[None]:
    """In this thread nothing is refused, nor checked, for what is known of it."""
    before, _local.ignores = getattr(_local, "ignores", False), True
    try:
        yield
    finally:
        _local.ignores = before


def examine(kind: Kind, device: torch.device, repeats: int) -> Finding:
    """Run the check of one kind, whatever the record says. In a thread of its own: no mode, autocast, hook of saved
    tensors or transform of the caller reaches it."""
    unit = UNITS[kind.op]
    finding = Finding(FAILED, "its thread ended")

    def work() -> None:
        nonlocal finding
        record.silence()
        begin, largest = time.perf_counter(), 0.0
        try:
            with ignoring_the_record():
                for trial in unit.trials(Draw(), kind.dtype, kind.width):
                    ratio, why = _judge(trial, kind.backend, device, repeats)
                    largest = max(largest, ratio)
                    if why:
                        break
            finding = Finding(FAILED if why else PASSED, why, largest, repeats)
        except torch.cuda.OutOfMemoryError:
            finding = Finding(UNKNOWN, "no memory for its check")
        except _NoReferenceError as error:
            finding = Finding(UNKNOWN, str(error))
        except Exception as error:  # a compiler that gives up, a kernel that cannot be launched
            finding = Finding(FAILED, _one_line(error), largest)
        finding = finding._replace(seconds=round(time.perf_counter() - begin, 2))

    thread = threading.Thread(target=work, name="ard-kernels-self-check")
    thread.start()
    thread.join()
    return finding


def lasting(device: torch.device) -> bool:
    """Whether what is answered now holds for later calls too, until `epoch` changes."""
    return not getattr(_local, "ignores", False) and _why_not_now(device) is None


def forget() -> None:
    """Read the record again: for who has changed it."""
    global epoch
    _settled.clear()
    known.cache_clear()
    epoch += 1  # last: what another thread has settled meanwhile is kept for the epoch before


@cache
def known(device: torch.device) -> dict[Kind, Finding]:
    """The record, and what this process has found since. A check that died twice counts as failed: once may have been
    a user or a scheduler, who ends processes most often while they start."""
    found = findings.load(device)
    for kind, finding in found.items():
        if finding.repeats > 1 and findings.abandoned(finding):
            found[kind] = finding._replace(status=FAILED, why="two checks of it ended their processes")
    return found


def _reason(kind: Kind, finding: Finding) -> str:
    return (
        f"it failed its self-check on this machine ({finding.date}, {kind.label}): {finding.why}; "
        "`python -m ard_kernels.doctor --check` repeats it, ARD_SELF_CHECK=0 ignores it"
    )


def failures(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> dict[int, str]:
    """By width, why the record refuses a backend."""
    if not ENABLED or op not in UNITS:
        return {}
    # (list: another thread may be adding what it has found)
    of_kind = {kind: f for kind, f in list(known(device).items()) if kind[:3] == (UNITS[op].op, backend, dtype)}
    return {kind.width: _reason(kind, finding) for kind, finding in of_kind.items() if finding.status == FAILED}


def objection(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, width: int | None, named: bool = False
) -> str | None:
    """Why `backend`, which serves such calls, may not run them; None when it may.

    What was not named is checked first where nothing is known of it, unless that cannot be done now. What was named
    may run unless it has failed; but for kernels of others, which are always checked.
    """
    if is_compiling() or not isinstance(width, (int, NoneType)):  # a symbol, a tensor of torch.jit.trace
        answers, otherwise = _as_constants(op, backend, device, dtype, named)
        for known_width, answer in answers:
            if width == known_width:
                return answer
        return otherwise
    if getattr(_local, "ignores", False):
        return None
    try:
        return _settled[op, backend, device, dtype, width, named]
    except KeyError:
        pass
    return _settle(op, backend, device, dtype, width, named)


def _settle(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, width: int | None, named: bool
) -> str | None:
    """`objection`, kept once a check or the record has given it; what a check left open the next process asks again."""
    answer = None
    if not _is_checked(op, backend, device, named):
        answer = failures(op, backend, device, dtype).get(width or 0)
    else:
        kind = Kind(UNITS[op].op, backend, dtype, width or 0)
        finding = _decided(kind, device)
        if finding is None:
            # Before the lock: the check of who holds it may wait for this thread, if it runs a backward pass.
            if (why := _why_not_now(device)) is not None:
                return _unless_verified(kind.op, backend, device, why)
            with _one_at_a_time:
                finding = _decided(kind, device) or _check_here(kind, device)
        answer = _reason(kind, finding) if finding.status == FAILED else finding.why or None
    _settled[op, backend, device, dtype, width, named] = answer
    return answer


def _decided(kind: Kind, device: torch.device) -> Finding | None:
    """What is known, where that is a verdict."""
    finding = known(device).get(kind)
    return finding if finding is not None and finding.status in (PASSED, FAILED) else None


def _is_checked(op: str, backend: str, device: torch.device, named: bool) -> bool:
    """Whether a backend is checked before it first runs."""
    ours = not named and backend in GPU_KERNELS and device.type in NEEDED_ON
    return ENABLED and op in UNITS and (ours or backend in OF_OTHERS)


def _why_not_now(device: torch.device) -> str | None:
    """What forbids to run a check here."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    if _graph_task is not None and _graph_task() != -1:  # its threads may be those that a check would wait for
        return "a backward pass is running"
    return None


def _unless_verified(op: str, backend: str, device: torch.device, why: str) -> str | None:
    """The answer where no check can be run and none has been: what was seen on other machines of this chip."""
    chips = findings.VERIFIED_ON_HARDWARE.get((op, backend), {})
    if device.type == "cuda" and f"sm_{architecture(device)}" in chips:
        return None
    return f"it has not been checked on this machine, and cannot be now: {why}"


def _check_here(kind: Kind, device: torch.device) -> Finding:
    """At the first use of a kind, in this process: check, say so, keep it."""
    finding = Finding(UNKNOWN)
    before = known(device).get(kind)
    begun = 1 + (before.repeats if before is not None and findings.abandoned(before) else 0)
    findings.keep(device, kind, Finding(RUNNING, repeats=begun))  # stays if the check takes this process with it
    try:
        finding = examine(kind, device, QUICK)
    finally:
        findings.keep(device, kind, finding)
    known(device)[kind] = finding
    print(f"ard_kernels: first use of {kind.label}: {said(finding)}", file=sys.stderr, flush=True)
    return finding


@constant_in_graphs
def _as_constants(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, named: bool
) -> tuple[tuple[tuple[int, str | None], ...], str | None]:
    """For a caller that is being compiled: ((width, objection or None) on record, ...), and that to other widths."""
    if not _is_checked(op, backend, device, named):
        return tuple(failures(op, backend, device, dtype).items()), None
    answers = {}
    for kind, finding in list(known(device).items()):
        if kind[:3] == (UNITS[op].op, backend, dtype) and finding.status in (PASSED, FAILED):
            answers[kind.width] = _reason(kind, finding) if finding.status == FAILED else None
    otherwise = _unless_verified(UNITS[op].op, backend, device, "a compiler is tracing the call")
    if otherwise is not None and not answers:
        warnings.warn(f"ard_kernels: {op} on {backend}: {otherwise}; call it once before", stacklevel=2)
    return tuple(answers.items()), otherwise


def said(finding: Finding) -> str:
    """A finding in words."""
    if finding.status != PASSED:
        return f"{finding.status}: {finding.why}"
    return f"passed in {finding.seconds:.1f} s, its error at most {finding.ratio:.2f} of what is allowed"
