"""compute-sanitizer over a few tiny shapes of every op, each backend in a process of its own.

`python -m benchmarks.gpu.sanitize BACKEND` is the program it watches. Without PyTorch's caching allocator, which would
hide accesses past the end of a tensor.
"""

from __future__ import annotations

import re
import sys
from typing import NamedTuple

import torch

from ard_kernels.common.backends import refusal
from benchmarks.gpu import checklist
from benchmarks.gpu.machine import find_tool, load_emulator, output_of, repair_interpreter
from benchmarks.gpu.record import Record
from testing import cases
from testing.cases import ADALN, ATTENTION, BACKENDS, OPS, Case

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# Seconds a tool gets for a backend at most; without a tool the program compiles what Triton then has on disk.
TOOL_SECONDS, COMPILE_SECONDS = 100.0, 60.0
MOST_PRINTED = 1000  # findings; of more it could not be said that all are reviewed
DONE = "every case ran"


class Reviewed(NamedTuple):
    """A finding of racecheck (a regular expression for all of its lines, joined) that is no race, and why.

    Any other finding fails the stage. Add one only after reading the code at all of its accesses.
    """

    finding: str
    reason: str


SM90_FORWARD = r"(void )?\S*sm90::attention_forward<[^+]*>\([^+]*\)\+0x[0-9a-f]+( in \S+)?"
REVIEWED = (
    Reviewed(
        rf"Race reported between Write access at {SM90_FORWARD}( and Read access at {SM90_FORWARD} \[\d+ hazards?\])+",
        "sm90.h: the producer writes message and columns of a tile with plain stores, then arrives at the tile's "
        "mbarrier (release); consumers read them behind their wait for that phase (acquire), then arrive at the empty "
        "barrier, for which the producer waits before it writes there again",
    ),
)


def program(backend: str, ops: list[str]) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu.sanitize", backend, *ops]


def options(tool: str) -> list[str]:
    """The exit status of compute-sanitizer is 1 when it finds an error; the program's is passed through."""
    limit = ["--print-limit", str(MOST_PRINTED)]
    return ["--tool", tool, "--error-exitcode", "1", "--target-processes", "all", *limit]


def reduced_cases(device: torch.device) -> list[Case]:
    """Full, masked and ragged tiles, widths that are no powers of two, rows per segment and per token, split keys."""
    if device.type == "cpu":
        return [cases.tiny_case(op) for op in OPS]
    found = [Case(op, 1, (64, 64), H=1, D=72, C=72) for op in OPS]
    found += [Case(op, 2, (37, 90, 5), H=2, D=72, C=72, mask="M3", packed=False) for op in OPS]
    found += [Case(op, 1, (20, 20), C=1152, per_token=True) for op in ADALN]
    found += [Case(op, 1, (200, 130), H=1, D=D) for op in ATTENTION for D in (64, 128)]
    found += [Case("history_attention", 1, (64, 600), H=1, norm=norm) for norm in ("rms", "layer")]  # keys are split
    return [*found, Case("block_causal_attention", 1, (200, 130), H=1, scale=-0.1)]  # on Hopper, an older chip's kernel


def main(backend: str, ops: list[str]) -> None:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        repair_interpreter()
        load_emulator()
    for case in reduced_cases(device):
        reason = refusal(case.registered_op, backend, device, case.dtype, case.width)
        if case.op not in ops or reason:
            print(f"not served: {case.label}: {reason or 'it has ended processes'}", flush=True)
            continue
        inputs = cases.make_inputs(case, device)
        outputs = cases.run_ours(case, inputs, backend)
        if case.op != "history_attention":
            torch.autograd.grad(outputs, inputs, [torch.randn_like(y) for y in outputs])
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(f"ran {case.label}", flush=True)
    print(DONE, flush=True)


def reviewed(tool: str, text: str) -> list[str]:
    """Reasons why what racecheck has found is no race; empty when a finding has none, or the program did not end."""
    found = re.findall(r"^=+ (?:error|warning|info): (.*(?:\n=+ +and .*)*)", text, re.M | re.I)
    count = sum(map(int, re.findall(r"^=+ RACECHECK SUMMARY: (\d+) hazards? displayed", text, re.M)))
    if tool != "racecheck" or DONE not in text or not found or len(found) != count:
        return []
    found = [re.sub(r"\n=+ +", " ", finding) for finding in found]
    reasons = [next((note.reason for note in REVIEWED if re.fullmatch(note.finding, f)), None) for f in found]
    return [] if None in reasons else list(dict.fromkeys(reasons))


def watch(tool: str, backend: str, ops: list[str], prefix: list[str], timeout: float) -> dict:
    """Run the program; keep what it printed first and last, and whether it passed."""
    command = [*prefix, *program(backend, ops)]
    status, text = output_of(*command, timeout=timeout, environment=ENVIRONMENT)
    reasons = reviewed(tool, text)
    return {
        "tool": tool,
        "backend": backend,
        "command": [*prefix, "python3", *program(backend, ops)[1:]],
        "exit_status": status,
        "passed": status == 0 or (status == 1 and bool(reasons)),
        "reviewed": reasons,
        "ops": sorted(set(re.findall(r"^ran (\w+) ", text, re.M))),
        "not_served": re.findall(r"^not served: (.*)", text, re.M),
        "output": text if len(text) <= 6000 else f"{text[:4000]}\n[...]\n{text[-2000:]}",
    }


def findings(text: str) -> str:
    """The first lines that the tool (or Python, for want of such) has printed about an error."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if re.match(r"=+ (?!COMPUTE-SANITIZER|ERROR SUMMARY)", line)), -8)
    return "\n".join(lines[begin:][:8])


def sanitizer(record: Record) -> str:
    """The program on both backends without a tool, which compiles; then under each tool, memcheck first."""
    path = find_tool("compute-sanitizer")
    if record.dry:
        words = [f"{name}={value}" for name, value in ENVIRONMENT.items()] + ["compute-sanitizer", *options("memcheck")]
        print(f"  would run: {' '.join(words)} python3 -m benchmarks.gpu.sanitize cuda")
        print(f"  for each of {', '.join(TOOLS)} and {', '.join(BACKENDS)}; here the program alone")
    elif path is None:
        record.fail("compute-sanitizer is neither on PATH nor beside nvcc; it comes with the CUDA toolkit")
        return "not run"
    served = {b: [op for op in OPS if b in checklist.serving(record, cases.tiny_case(op))] for b in BACKENDS}
    work = [(tool, b) for tool in ("none", *(() if record.dry else TOOLS)) for b in BACKENDS if served[b]]
    for tool, backend in work:

        def run(tool=tool, backend=backend):
            prefix = [path, *options(tool)] if tool != "none" else []
            result = watch(tool, backend, served[backend], prefix, seconds_for(tool))
            record.add(result, f"{tool} on {backend}: exit status {result['exit_status']}{notes(result)}")
            if not result["passed"]:
                status = f"exit status {result['exit_status']}: {findings(result['output'])}"
                record.fail(f"{tool} on {backend}: {status}")

        if not record.over:
            record.attempt(f"{tool} on {backend}", run, seconds_for(tool) + 15)
    return f"{len(record.rows)} of {len(work)} runs of the program{' without the tools' if record.dry else ''}"


def seconds_for(tool: str) -> float:
    return COMPILE_SECONDS if tool == "none" else TOOL_SECONDS


def notes(result: dict) -> str:
    return (
        f", all it says is reviewed: {'; '.join(result['reviewed'])}"
        if result["passed"] and result["exit_status"]
        else ""
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
