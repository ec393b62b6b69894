"""Dry runs of `python -m benchmarks.gpu` for the tests, with faults planted in their processes."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.rows import load_rooms

ROOT = Path(__file__).resolve().parents[1]


def plant(folder, code, *, stages_only=False):
    """The environment of a run with `code` in every Python process, or in those of the stages alone."""
    (folder / "fault.py").write_text(code)
    condition = "'--until' in sys.orig_argv" if stages_only else "True"
    (folder / "sitecustomize.py").write_text(f"import sys\nif {condition}:\n    import fault\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def gpu_check(out, *arguments, **variables):
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)


def results(out):
    """Stages by name, as a reader of result files sees them."""
    assert [path.name for path in out.iterdir()] == ["gpu_check.jsonl"], "one file comes back"
    return load_rooms(out)
