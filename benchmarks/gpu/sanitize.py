"""compute-sanitizer over a few tiny shapes of every op. `python -m benchmarks.gpu.sanitize` is the program it watches.

Without PyTorch's caching allocator, which would hide accesses past the end of a tensor.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import torch

from benchmarks.gpu import cases
from benchmarks.gpu.cases import OPS, Case
from benchmarks.gpu.record import ROOT, Record

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def command(tool: str) -> list[str]:
    """compute-sanitizer's exit status is 1 when it finds an error; ours is passed through."""
    options = ["--tool", tool, "--error-exitcode", "1", "--target-processes", "all", "--print-limit", "20"]
    return ["compute-sanitizer", *options, sys.executable, "-m", "benchmarks.gpu.sanitize"]


def reduced_cases(device: torch.device) -> list[Case]:
    """Full, masked and ragged tiles, a width that is not a power of two, rows per segment and per token."""
    if device.type == "cpu":
        return [Case(op, 1, (16, 16), H=1, D=16, C=24) for op in OPS]
    found = [Case(op, 1, (64, 64), H=1, D=72, C=72) for op in OPS]
    found += [Case(op, 2, (37, 90, 5), H=2, D=72, C=72, mask="M3", packed=False) for op in OPS]
    return [*found, *(Case(op, 1, (20, 20), C=1152, per_token=True) for op in cases.ADALN)]


def main() -> None:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    for case in reduced_cases(device):
        for backend in cases.backends_to_check(case.op, device):
            inputs = cases.make_inputs(case, device)
            outputs = cases.run_ours(case, inputs, backend)
            if case.op != "history_attention":
                torch.autograd.grad(outputs, inputs, [torch.randn_like(y) for y in outputs])
            if device.type == "cuda":
                torch.cuda.synchronize()
            print(f"{case.label} on {backend}", flush=True)


def watch(tool: str, arguments: list[str], timeout: float) -> dict:
    """Run the program and keep the end of what it printed; over its time, it and what it started are ended."""
    child = subprocess.Popen(
        arguments, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        text = child.communicate(timeout=timeout)[0]
        status = child.returncode
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        text, status = child.communicate()[0], 124
    return {
        "tool": tool,
        "command": [*arguments[:-3], "python3", *arguments[-2:]],
        "exit_status": status,
        "output": text[-3000:],
    }


def sanitizer(record: Record) -> str:
    """memcheck, racecheck, initcheck, then synccheck; fails where compute-sanitizer is not installed."""
    if record.dry:
        words = [f"{name}={value}" for name, value in ENVIRONMENT.items()] + command("memcheck")[:-3]
        print(f"  would run: {' '.join(words)} python3 -m benchmarks.gpu.sanitize")
        print("  once per tool: " + ", ".join(TOOLS) + "; here the program alone, once")
        result = watch("none", command("none")[-3:], timeout=120)
        record.add(result)
        if result["exit_status"]:
            record.fail(f"the program exited {result['exit_status']}: {result['output'][-300:]}")
        return "the program ran without the tool"
    if shutil.which("compute-sanitizer") is None:
        record.fail("compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
        return "not run"
    ran = []
    for i, tool in enumerate(TOOLS):
        if record.over:
            break
        result = watch(tool, command(tool), timeout=max(30.0, record.seconds_left / (len(TOOLS) - i)))
        record.add(result, f"{tool}: exit status {result['exit_status']}")
        if result["exit_status"] == 124:
            record.fail(f"{tool}: still running when its time was over")
        elif result["exit_status"]:
            record.fail(f"{tool}: exit status {result['exit_status']}: {result['output'][-400:]}")
        ran.append(tool)
    return f"ran {', '.join(ran)}"


if __name__ == "__main__":
    main()
