"""`python -m ard_kernels.doctor [--check]`: versions, devices, each op's backends; and whether they are right here."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from typing import IO, NamedTuple

import numpy
import torch

import ard_kernels
from ard_kernels.block_causal_attention import flash
from ard_kernels.common import extension, findings, machine, self_check
from ard_kernels.common.backends import BACKENDS, has_backend, refusal
from ard_kernels.common.findings import CHIPS, FAILED, PASSED, UNKNOWN, VERIFIED_ON_HARDWARE, Finding, Kind

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REFUSED = "refused"
KIND_SECONDS = 300.0  # for one kind, compilation included
GO_ON = 75  # exit status of a child that cannot go on, but has said all it knows
CHILD = (sys.executable, "-m", "ard_kernels.doctor", "--child")


class Checked(NamedTuple):
    """What `check` says of one kind of call.

    status: passed; failed; refused: not checked, as the backend does not serve it; unknown: the check itself could not
    be made (no memory for it). why: the reason, but of what passed.
    """

    device: str
    op: str
    backend: str
    dtype: str
    width: int
    status: str
    why: str
    ratio: float
    repeats: int
    seconds: float


def _verified(op: str, backend: str) -> str:
    """Where `backend` of `op` has passed on hardware, chip by chip."""
    known = VERIFIED_ON_HARDWARE.get((op, backend), {})
    missing = [chip for chip in CHIPS[backend] if chip not in known]
    parts = [f"{chip} verified on {known[chip]}" for chip in CHIPS[backend] if chip in known]
    return "; ".join(parts + [f"{', '.join(missing)} not yet verified on hardware"] * bool(missing))


def _devices() -> list[torch.device]:
    return [torch.device("cpu")] + [torch.device("cuda", 0)] * torch.cuda.is_available()


def report() -> str:
    """The whole diagnosis as text."""
    lines = [
        f"ard-kernels {ard_kernels.__version__}  Python {platform.python_version()}  {platform.machine()}",
        f"torch {torch.__version__}  numpy {numpy.__version__}  triton {machine.triton_version() or 'not installed'}",
        f"CPU: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    ]
    if extension.module is None:
        lines.append(f"extension: {extension.missing}")
    else:
        lines.append(f"extension: ard_kernels._C, row kernels compiled for and running {extension.module.cpu_isa()}")
        has_cuda = hasattr(extension.module, "gpu")
        lines.append(
            f"CUDA C++ kernels: {'built in' if has_cuda else 'not in this build (no nvcc, or ARD_BUILD_CUDA=0)'}"
        )
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        lines.append(f"GPU: {properties.name}, sm_{properties.major}{properties.minor}, CUDA {torch.version.cuda}")
    else:
        lines.append("GPU: none visible to torch")
    packages = [kind.described() for kind in flash.PACKAGES if kind.installed()]
    lines.append(f"flash-attn: {', '.join(packages) or 'not installed'}")
    for device in _devices():
        lines.append(f"\nbackends on {device.type} (choice: see `ard_kernels.common.backends.automatic_order`):")
        for op, table in ard_kernels.backends(device).items():
            lines.append(f"  {op}")
            for name, status in table.items():
                words = f"refused: {status.reason}" if not status.available else f"available {status.reason}".rstrip()
                if name == "flash" and status.available:
                    words += f", by {flash.dense(device, 64).described()}"
                lines.append(f"    {name:<7}{words}")
        lines += _on_record(device)
    lines.append("\nGPU kernels:")
    for op in ard_kernels.backends("cpu"):
        for name in self_check.GPU_KERNELS:
            if has_backend(op, name):
                lines.append(f"  {op} {name}: {_verified(op, name)}")
    return "\n".join(lines)


def _on_record(device: torch.device) -> list[str]:
    """What self-checks have found on this machine."""
    known = sorted(self_check.known(device).items(), key=lambda item: item[0].label)
    if not known:
        return [f"\nself-checks on {device.type}: none on record; `python -m ard_kernels.doctor --check`"]
    lines = [f"\nself-checks on {device.type} ({findings.folder(device)}):"]
    return lines + [f"  {finding.date} {kind.label}: {self_check.said(finding)}" for kind, finding in known]


def _kinds(device: torch.device, ops: Sequence[str]) -> Iterator[tuple[Kind, str | None]]:
    """All that could be checked, and why it cannot be."""
    for unit in dict.fromkeys(self_check.UNITS[op] for op in ops or self_check.UNITS):
        for backend in BACKENDS:
            if backend == "torch" or not has_backend(unit.op, backend):
                continue
            for dtype in DTYPES:
                for width in unit.widths:
                    with self_check.ignoring_the_record():
                        why = refusal(unit.op, backend, device, dtype, width)
                    if device.type == "cpu" and backend in self_check.GPU_KERNELS:
                        why = why or "it is only simulated on the CPU"
                    yield Kind(unit.op, backend, dtype, width), why


def check(ops: Sequence[str] = (), child: Sequence[str] = CHILD, seconds: float = KIND_SECONDS) -> Iterator[Checked]:
    """Run every backend of `ops` on every device of this machine, on small shapes of every class of tiles, against
    PyTorch in float64, and 50 times over; in a process of its own, which a kernel may take with it.

    What is found is kept: a backend that failed is refused from then on, by itself and by name, until it passes.

    Args:
        ops: names in `backends()`; empty for all.
        child: the command of that process.
        seconds: the time it has for one kind of call, compilation included.

    Yields:
        One entry for each op, backend, dtype and width, as it is known.

    Raises:
        ValueError: an op that there is not.
        RuntimeError: the process cannot be started.
    """
    for op in ops:
        if op not in self_check.UNITS:
            raise ValueError(f"doctor: op is {op!r}; expected one of {', '.join(sorted(self_check.UNITS))}")
    for device in _devices():
        kinds = dict(_kinds(device, ops))
        asked = [kind for kind, why in kinds.items() if why is None]
        refused = [(kind, Finding(REFUSED, why)) for kind, why in kinds.items() if why is not None]
        for kind, finding in chain(refused, _in_children(asked, device, child, seconds)):
            if finding.status != REFUSED:
                findings.keep(device, kind, finding)
                self_check.forget()
            name = str(kind.dtype).removeprefix("torch.")
            where = (device.type, kind.op, kind.backend, name, kind.width)
            yield Checked(*where, finding.status, finding.why, finding.ratio, finding.repeats, finding.seconds)


def _in_children(
    kinds: list[Kind], device: torch.device, command: Sequence[str], seconds: float
) -> Iterator[tuple[Kind, Finding]]:
    """What a process finds of each; after one that took the process with it another goes on."""
    waiting = list(kinds)
    while waiting:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdin and child.stdout
        asked = [[kind.op, kind.backend, str(kind.dtype).removeprefix("torch."), kind.width] for kind in waiting]
        threading.Thread(target=_send, args=(child.stdin, json.dumps([str(device), asked])), daemon=True).start()
        late = threading.Event()
        started = False
        while True:
            watch = threading.Timer(seconds, lambda c=child, late=late: (late.set(), c.kill()))
            watch.start()
            line = child.stdout.readline()
            watch.cancel()
            if not line:
                break
            if line == "ready\n":
                started = True
            elif line.startswith("finding "):
                yield waiting.pop(0), Finding(*json.loads(line.removeprefix("finding ")))
            else:
                sys.stderr.write(line)
        status = child.wait()
        if not started:
            raise RuntimeError(f"doctor: the process that checks did not start, it ended with {status}: {command}")
        if waiting and status != GO_ON:
            why = f"no answer in {seconds:g} s" if late.is_set() else f"its process ended with status {status}"
            yield waiting.pop(0), Finding(FAILED, why)


def _send(pipe: IO[str], text: str) -> None:
    try:
        with pipe:
            pipe.write(text)
    except BrokenPipeError:  # it died; its exit status tells
        pass


def answer() -> None:
    """The child: reads kinds from stdin, writes a line for each."""
    name, asked = json.load(sys.stdin)
    device = torch.device(name)
    print("ready", flush=True)
    for op, backend, dtype, width in asked:
        finding = self_check.examine(Kind(op, backend, getattr(torch, dtype), width), device, self_check.THOROUGH)
        print(f"finding {json.dumps(finding)}", flush=True)
        if finding.status == FAILED and device.type == "cuda":
            try:
                torch.cuda.synchronize(device)
            except RuntimeError:  # an error in a kernel breaks all that comes after it
                sys.exit(GO_ON)


def table(checked: Iterable[Checked]) -> str:
    """`check`'s result as text: a line for kinds that fared alike."""
    checked = sorted(checked, key=lambda row: row[:2])
    lines = []
    for (device, op), of_op in groupby(checked, key=lambda row: row[:2]):
        lines.append(f"{op} on {device}")
        for (backend, status, why), alike in groupby(of_op, key=lambda row: (row.backend, row.status, row.why)):
            rows = list(alike)
            widths = {
                dtype: [str(row.width) for row in each if row.width]
                for dtype, each in groupby(rows, lambda row: row.dtype)
            }
            kinds = "; ".join(" ".join([dtype, ", ".join(each)]).rstrip() for dtype, each in widths.items())
            if status == PASSED:
                ratio, runs = max(row.ratio for row in rows), min(row.repeats for row in rows)
                why = f"error at most {ratio:.2f} of what is allowed, {runs} runs bit-equal"
            lines.append(f"  {backend:<7}{status:<8}{why if status == REFUSED else f'{kinds}: {why}'}")
    if not any(row.device == "cuda" for row in checked):
        lines.append("no GPU is visible to torch: no GPU kernel was checked")
    counts = {status: sum(row.status == status for row in checked) for status in (PASSED, FAILED, REFUSED, UNKNOWN)}
    return "\n".join([*lines, ", ".join(f"{count} {status}" for status, count in counts.items() if count)])


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 where a check failed."""
    parser = argparse.ArgumentParser(prog="python -m ard_kernels.doctor", description=__doc__.partition(": ")[2])
    how = "run every kernel, or those of the ops named, and compare, in about a minute"
    parser.add_argument("--check", nargs="*", metavar="OP", help=how)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        answer()
        return 0
    print(report())
    if options.check is None:
        return 0
    try:
        checked = list(check(options.check))
    except ValueError as error:
        parser.error(str(error))
    print(f"\nself-check, against PyTorch in float64:\n{table(checked)}")
    return int(any(row.status == FAILED for row in checked))


if __name__ == "__main__":
    sys.exit(main())
