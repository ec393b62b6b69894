"""compute-sanitizer over a few tiny shapes of every op, each backend in a process of its own.

`python -m benchmarks.gpu.sanitize BACKEND` is the program it watches. Without PyTorch's caching allocator, which would
hide accesses past the end of a tensor.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import torch

from ard_kernels.backends import refusal
from benchmarks import cases
from benchmarks.cases import ADALN, ATTENTION, BACKENDS, OPS, Case
from benchmarks.gpu import checklist
from benchmarks.gpu.machine import find_tool, load_emulator, repair_interpreter
from benchmarks.gpu.record import ROOT, Record

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# Seconds a tool gets for a backend at least: torch's start and, for Triton, the compiler are most of it.
LEAST_SECONDS = 60.0


def program(backend: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu.sanitize", backend]


def options(tool: str) -> list[str]:
    """The exit status of compute-sanitizer is 1 when it finds an error; the program's is passed through."""
    return ["--tool", tool, "--error-exitcode", "1", "--target-processes", "all", "--print-limit", "20"]


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


def main(backend: str) -> None:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        repair_interpreter()
        load_emulator()
    for case in reduced_cases(device):
        reason = refusal(case.registered_op, backend, device, case.dtype, case.width)
        if reason:
            print(f"not served: {case.label}: {reason}", flush=True)
            continue
        inputs = cases.make_inputs(case, device)
        outputs = cases.run_ours(case, inputs, backend)
        if case.op != "history_attention":
            torch.autograd.grad(outputs, inputs, [torch.randn_like(y) for y in outputs])
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(f"ran {case.label}", flush=True)


def watch(tool: str, backend: str, prefix: list[str], timeout: float) -> dict:
    """Run the program and keep what it printed first and last; over its time, it and what it started are ended."""
    child = subprocess.Popen(
        prefix + program(backend), cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        text = child.communicate(timeout=timeout)[0]
        status = child.returncode
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        text, status = child.communicate()[0], 124
    return {
        "tool": tool,
        "backend": backend,
        "command": [*prefix, "python3", *program(backend)[1:]],
        "exit_status": status,
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
    """memcheck, racecheck, initcheck, synccheck, each on both backends; fails where compute-sanitizer is not found."""
    path = find_tool("compute-sanitizer")
    if record.dry:
        words = [f"{name}={value}" for name, value in ENVIRONMENT.items()] + ["compute-sanitizer", *options("memcheck")]
        print(f"  would run: {' '.join(words)} python3 -m benchmarks.gpu.sanitize cuda")
        print(f"  for each of {', '.join(TOOLS)} and {', '.join(BACKENDS)}; here the program alone")
    elif path is None:
        record.fail("compute-sanitizer is neither on PATH nor beside nvcc; it comes with the CUDA toolkit")
        return "not run"
    served = {b for op in OPS for b in checklist.serving(record, cases.tiny_case(op))}
    work = [(tool, b) for tool in (["none"] if record.dry else TOOLS) for b in BACKENDS if b in served]
    for i, (tool, backend) in enumerate(work):
        if record.over:
            break
        timeout = max(LEAST_SECONDS, record.seconds_left / (len(work) - i))
        result = watch(tool, backend, [] if record.dry else [path, *options(tool)], timeout)
        record.add(result, f"{tool} on {backend}: exit status {result['exit_status']}")
        if result["exit_status"] == 124:
            record.fail(f"{tool} on {backend}: still running after {timeout:.0f} s")
        elif result["exit_status"]:
            record.fail(f"{tool} on {backend}: exit status {result['exit_status']}: {findings(result['output'])}")
    return f"{len(record.rows)} of {len(work)} runs of the program{' without the tools' if record.dry else ''}"


if __name__ == "__main__":
    main(sys.argv[1])
