"""What self-checks have found on this machine, a small file for each kind of call.

    <cache folder>/checks/<chip>-<driver>-torch<...>-triton<...>-<version>-<digest>/<op>-<backend>-<dtype>-<width>.json

Whoever changes one of these, the library's own files or the tuned tile sizes, finds nothing and checks anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ard_kernels.common import machine, tuning
from ard_kernels.version import __version__

PASSED, FAILED, RUNNING, UNKNOWN = "passed", "failed", "running", "unknown"
# GPU kernels that `make gpu-check` has passed with: (op, backend) -> {chip: device and date}; the results are committed
# under benchmarks/results/<device>. `doctor` says of all others that they are not yet verified on hardware.
VERIFIED_ON_HARDWARE: dict[tuple[str, str], dict[str, str]] = {}
# The chips each GPU backend has kernels for; newer ones run the kernels of the nearest.
CHIPS = {"cuda": ("sm_80", "sm_90"), "triton": ("sm_80", "sm_86", "sm_90", "sm_100")}
OTHERS = ("flash-attn", "flash_attn_3", "flash-attn-4")  # packages whose kernels backends call
LONGEST_CHECK = 3600.0  # seconds after which a check that is said to be running is not


class Kind(NamedTuple):
    """What one check speaks for. width: head dim or channels."""

    op: str
    backend: str
    dtype: torch.dtype
    width: int

    @property
    def label(self) -> str:
        """As people read it."""
        return f"{self.op} on {self.backend}, {str(self.dtype).removeprefix('torch.')}, width {self.width}"

    @property
    def file(self) -> str:
        return "-".join(map(str, self)).replace("torch.", "") + ".json"


class Finding(NamedTuple):
    """What a check has found.

    status: PASSED, FAILED or RUNNING. why: where it failed. ratio: the largest of the kernel's error to what
    `tolerance.py` allows, which passes up to 1. repeats: runs that were bit-equal; of one that is running, how often
    it has been begun without an end. by: process and machine.
    """

    status: str
    why: str = ""
    ratio: float = 0.0
    repeats: int = 0
    seconds: float = 0.0
    at: float = 0.0
    by: str = ""

    @property
    def date(self) -> str:
        return time.strftime("%Y-%m-%d", time.localtime(self.at))


@cache
def folder(device: torch.device) -> Path:
    """Where this machine's findings are, also after a change of the environment."""
    facts = (machine.chip(device), machine.driver(device), f"torch{torch.__version__}")
    versions = (f"triton{machine.triton_version() or 'none'}", __version__, _digest(device))
    return machine.cache_folder() / "checks" / machine.slug("-".join(filter(None, facts + versions)))


def _digest(device: torch.device) -> str:
    """Of the library's files, by size and time, what was tuned here, and packages with kernels: all that is checked."""
    files = sorted(path for path in machine.PACKAGE.rglob("*") if path.suffix in (".py", ".so"))
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    tuned = sorted(tuning.tuned_here(device).items()) if device.type == "cuda" else []
    others = [machine.version(name) for name in OTHERS]
    return hashlib.sha256(repr((stamps, tuned, others)).encode()).hexdigest()[:8]


def load(device: torch.device) -> dict[Kind, Finding]:
    """All that is known. A file that cannot be read counts as none, with a warning."""
    found = {}
    for path in sorted(folder(device).glob("*.json")):
        try:
            content = json.loads(path.read_text())
            op, backend, dtype, width = content["kind"]
            kind = Kind(op, backend, getattr(torch, dtype), int(width))
            finding = Finding(**content["finding"])
            finding = finding._replace(at=float(finding.at), by=str(finding.by))
            if finding.status not in (PASSED, FAILED, RUNNING, UNKNOWN):
                raise ValueError(f"status {finding.status!r}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"ard_kernels: {path} holds no finding of a self-check: {error!r}", stacklevel=2)
            continue
        found[kind] = finding
    return found


def keep(device: torch.device, kind: Kind, finding: Finding) -> None:
    """Write it, whole or not at all; where that cannot be done, say so: the next process will check again."""
    finding = finding._replace(at=time.time(), by=f"{os.getpid()}@{platform.node()}")
    name = str(kind.dtype).removeprefix("torch.")
    content: dict[str, Any] = {"kind": [kind.op, kind.backend, name, kind.width], "finding": finding._asdict()}
    content["machine"] = {"chip": machine.chip(device), "driver": machine.driver(device)}
    try:
        folder(device).mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder(device), suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(content, indent=1))
        os.replace(temporary, folder(device) / kind.file)
    except OSError as error:
        warnings.warn(f"ard_kernels: cannot keep what a self-check found: {error}", stacklevel=2)


def abandoned(finding: Finding) -> bool:
    """Whether a check never ended, and took its process with it."""
    if finding.status != RUNNING:
        return False
    process, _, node = finding.by.partition("@")
    if time.time() - finding.at > LONGEST_CHECK:
        return True
    if os.name != "posix" or node != platform.node() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
