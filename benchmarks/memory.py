"""Peak memory of one call, above what was held before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.timing import give_back_freed_memory

PROCESS = Path("/proc/self")


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """On a GPU of PyTorch's allocator; on the CPU of the whole process, as the kernel counts its resident pages.

    None where the system does not let a process reset that count (not Linux, or /proc/self/clear_refs not writable).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    try:
        give_back_freed_memory()  # blocks that glibc keeps would be used again, and not seen
        (PROCESS / "clear_refs").write_text("5")  # sets the peak to the present size
    except (OSError, AttributeError):
        return None
    held = _kibibytes("VmRSS")
    run()
    return max(0, _kibibytes("VmHWM") - held) * 1024


def _kibibytes(entry: str) -> int:
    text = (PROCESS / "status").read_text()
    return int(text.split(f"{entry}:")[1].split()[0])
