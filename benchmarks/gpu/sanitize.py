"""`python -m benchmarks.gpu.sanitize FOLDER`: compute-sanitizer over a few tiny shapes of every op.

Each backend in a process of its own: the program `python -m benchmarks.gpu.sanitize --program BACKEND`, first without
a tool, which compiles; then under each tool. Without PyTorch's caching allocator, which would hide accesses past the
end of a tensor. A dry run takes the program alone. Findings go to FOLDER/sanitizer.jsonl.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from ard_kernels.common.backends import refusal
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.machine import simulate
from benchmarks.gpu.processes import FAILED, find_tool, output_of
from benchmarks.timing import DEVICE, TINY
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


def options(tool: str) -> list[str]:
    """The exit status of compute-sanitizer is 1 when it finds an error; the program's is passed through."""
    limit = ["--print-limit", str(MOST_PRINTED)]
    return ["--tool", tool, "--error-exitcode", "1", "--target-processes", "all", *limit]


def reduced_cases() -> list[Case]:
    """Full, masked and ragged tiles, widths that are no powers of two, rows per segment and per token, split keys."""
    if TINY:
        return [cases.tiny_case(op) for op in OPS]
    found = [Case(op, 1, (64, 64), H=1, D=72, C=72) for op in OPS]
    found += [Case(op, 2, (37, 90, 5), H=2, D=72, C=72, mask="M3", packed=False) for op in OPS]
    found += [Case(op, 1, (20, 20), C=1152, per_token=True) for op in ADALN]
    found += [Case(op, 1, (200, 130), H=1, D=D) for op in ATTENTION for D in (64, 128)]
    found += [Case("history_attention", 1, (64, 600), H=1, norm=norm) for norm in ("rms", "layer")]  # keys are split
    return [*found, Case("block_causal_attention", 1, (200, 130), H=1, scale=-0.1)]  # on Hopper, an older chip's kernel


def program(backend: str) -> None:
    """What is watched."""
    if TINY:
        simulate()
    for case in reduced_cases():
        if reason := refusal(case.registered_op, backend, DEVICE, case.dtype, case.width):
            print(f"not served: {case.label}: {reason}", flush=True)
            continue
        inputs = cases.make_inputs(case, DEVICE)
        outputs = cases.run_ours(case, inputs, backend)
        if case.op != "history_attention":
            torch.autograd.grad(outputs, inputs, [torch.randn_like(y) for y in outputs])
        if DEVICE.type == "cuda":
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


def findings(text: str) -> str:
    """The first lines that the tool (or Python, for want of such) has printed about an error."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if re.match(r"=+ (?!COMPUTE-SANITIZER|ERROR SUMMARY)", line)), -8)
    return "\n".join(lines[begin:][:8])


def watch(tool: str, backend: str, prefix: list[str], seconds: float) -> dict:
    """Run the program; what its line in the journal says: failed, skipped where nothing is served, or passed."""
    own = ["-m", "benchmarks.gpu.sanitize", "--program", backend]
    status, text = output_of(*prefix, sys.executable, *own, timeout=seconds, environment=ENVIRONMENT)
    reasons = reviewed(tool, text)
    ops = sorted(set(re.findall(r"^ran (\w+) ", text, re.M)))
    entry = {
        "tool": tool,
        "backend": backend,
        "command": [*prefix, "python3", *own],
        "exit_status": status,
        "reviewed": reasons,
        "ops": ops,
        "not_served": re.findall(r"^not served: (.*)", text, re.M),
        "output": text if len(text) <= 6000 else f"{text[:4000]}\n[...]\n{text[-2000:]}",
    }
    if not (status == 0 or (status == 1 and reasons)):
        return entry | {"outcome": "failed", "why": f"exit status {status}: {findings(text)}"}
    return entry | ({"why": "; ".join(reasons)} if reasons else {}) | {"outcome": "passed" if ops else "skipped"}


def main(folder: Path) -> int:
    """Memcheck of both backends first."""
    journal, path = Journal(folder / "sanitizer.jsonl"), find_tool("compute-sanitizer")
    if TINY:
        words = [f"{name}={value}" for name, value in ENVIRONMENT.items()] + ["compute-sanitizer", *options("memcheck")]
        print(f"would run: {' '.join(words)} python3 -m benchmarks.gpu.sanitize --program cuda, and so on")
    elif path is None:
        why = "it is neither on PATH nor beside nvcc; it comes with the CUDA toolkit"
        journal.write(what="compute-sanitizer", outcome="failed", why=why)
        return FAILED
    done = journal.done()
    for tool in ("none", *(() if TINY else TOOLS)):
        for backend in BACKENDS:
            if (what := f"{tool} on {backend}") not in done:
                seconds = COMPILE_SECONDS if tool == "none" else TOOL_SECONDS
                with journal.piece(what, seconds + 15) as entry:
                    prefix = [path, *options(tool)] if tool != "none" else []
                    entry |= watch(tool, backend, prefix, seconds)
    return FAILED if journal.failures() else 0


if __name__ == "__main__":
    if sys.argv[1] == "--program":
        program(sys.argv[2])
    else:
        sys.exit(main(Path(sys.argv[1])))
