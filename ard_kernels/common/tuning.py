"""Tile sizes of the Triton kernels: what was tuned on this machine, else the table shipped for the architecture.

A table maps `kernel/dtype bits/width/length class` to the kernel's compile-time constants. `python -m ard_kernels.tune`
times candidates on the GPU at hand and keeps the winners in `cache_file()`, whose name holds the device, the library
and the Triton version; nothing is ever tuned during a call.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path

import torch

from ard_kernels.common import machine
from ard_kernels.common.gpu_support import architecture, assume_multiprocessors
from ard_kernels.version import __version__

SHIPPED = Path(__file__).parents[1] / "tuned"
ARCHITECTURES = (80, 86, 90, 100)
# Widths that tables have entries for: head dims, or channels of a row.
WIDTHS = {"attention": (32, 64, 72, 96, 128, 192, 256), "adaln": (512, 1152, 2048, 4096, 8192),
          "rope": (1024, 2048, 4096, 8192)}  # fmt: skip
# Tensor cores take head dims in steps of 16: 72 and 80 are the same tiles, so one entry serves both.
STEPS = {"attention": 16, "adaln": 1, "rope": 1}

Config = Mapping[str, int]  # block sizes, num_warps, num_stages
# Small blocks, so that a test of 50 tokens has several tiles, full and masked ones.
INTERPRETER: dict[str, Config] = {
    "attention": {"BLOCK_M": 32, "BLOCK_N": 16},
    "adaln": {"TOKENS": 16, "ROWS": 8, "STAGES": 1},
    "rope": {"BLOCKS": 1, "STAGES": 1},
}


def _family(name: str) -> str:
    """Of a kernel or an op."""
    return next((family for family in ("attention", "rope") if family in name), "adaln")


def _entry(family: str, width: int) -> int:
    """The width whose entry serves `width`: the least that is no smaller once padded, else the largest."""
    widths, step = WIDTHS[family], STEPS[family]
    return next((entry for entry in widths if width <= -(-entry // step) * step), widths[-1])


def key(kernel: str, dtype: torch.dtype, width: int, length: int) -> str:
    """Name of a table entry; `length` in tokens per segment, 0 for ragged. Only 16-bit attention tells short ones."""
    family = _family(kernel)
    short = family == "attention" and dtype.itemsize == 2 and 0 < length < 128
    return f"{kernel}/{8 * dtype.itemsize}bit/{_entry(family, width)}/{'short' if short else 'long'}"


def shape_class(op: str, dtype: torch.dtype, width: int) -> str:
    """Name of the shapes that one measurement of `fastest.json` speaks for: op, bits of the dtype, width's entry."""
    return f"{op}/{8 * dtype.itemsize}bit/{_entry(_family(op), width)}"


# What `python -m benchmarks.gpu.fastest` wrote from the committed results of a GPU: {"sources": {"sm90": folder},
# "backends": {"sm90": {shape class: backend}}}. Read once, here: choosing a backend happens inside compiled callers.
FASTEST: dict[str, dict[str, str]] = json.loads((SHIPPED / "fastest.json").read_text())["backends"]


def fastest(op: str, arch: int, dtype: torch.dtype, width: int | None) -> str:
    """The GPU backend (triton, cuda, flash) that was measured to be correct and fastest; triton where none was."""
    known = FASTEST.get(f"sm{arch}")
    return "triton" if known is None or width is None else known.get(shape_class(op, dtype, width), "triton")


# (configurations, what was looked up) of the open `override` blocks.
_overrides: list[tuple[Mapping[str, Config], dict[str, Config]]] = []


@contextmanager
def override(configs: Mapping[str, Config], multiprocessors: int | None = None) -> Iterator[dict[str, Config]]:
    """Inside the block a kernel has the constants that `configs` has for its `key`, or its name, whatever tables say.

    For tuners and tests: process-wide, restored on exit, blocks nest. `multiprocessors`: as if the device had so many.
    Yields what is looked up inside, by key: the constants of each kernel that was launched.

    Raises:
        ValueError: `configs` has a name that is neither a kernel's nor a key of the tables.
    """
    tabled = shipped(ARCHITECTURES[0]).keys()
    kernels = dict.fromkeys(name.split("/")[0] for name in tabled)
    for name in configs:
        if name not in tabled and name not in kernels:
            known = ", ".join(kernels)
            raise ValueError(f"tuning.override: got {name!r}; expected a key of the tables, or one of {known}")
    looked_up: dict[str, Config] = {}
    _overrides.append((configs, looked_up))
    lookup.cache_clear()
    before = None if multiprocessors is None else assume_multiprocessors(multiprocessors)
    try:
        yield looked_up
    finally:
        _overrides.pop()
        lookup.cache_clear()
        if multiprocessors is not None:
            assume_multiprocessors(before)


@lru_cache(maxsize=4096)
def lookup(kernel: str, device: torch.device, dtype: torch.dtype, width: int, length: int = 0) -> Config:
    """Constants (block sizes, num_warps, num_stages) for a kernel."""
    name = key(kernel, dtype, width, length)
    given = (configs[n] for configs, _ in reversed(_overrides) for n in (name, kernel) if n in configs)
    config = next(given, None) or _tabled(name, device)
    for _, looked_up in _overrides:
        looked_up[name] = config
    return config


def _tabled(name: str, device: torch.device) -> Config:
    """The constants for a key that nobody overrides."""
    tuned = {} if device.type == "cpu" else tuned_here(device)
    return tuned.get(name) or default(name, device)


def default(name: str, device: torch.device) -> Config:
    """The constants for a key where nothing was tuned."""
    return INTERPRETER[_family(name)] if device.type == "cpu" else shipped(architecture(device))[name]


def table_architecture(arch: int) -> int:
    """The architecture whose table serves compute capability `arch` (86 is 8.6)."""
    if arch in (86, 89) or arch >= 120:  # 99 KB of shared memory a block, matrix units of the mma.sync kind
        return 86
    return max(known for known in (80, 90, 100) if known <= max(arch, 80))


@cache
def shipped(arch: int) -> dict[str, Config]:
    """The table that serves compute capability `arch`."""
    return json.loads((SHIPPED / f"sm{table_architecture(arch)}.json").read_text())["configs"]


@cache
def tuned_here(device: torch.device) -> dict[str, Config]:
    """What the tuner found on this machine; empty when it never ran with these versions."""
    return _tuned(device)["configs"]


def tuned_on(device: torch.device) -> dict[str, str]:
    """The call, as `record.py` writes it, that each entry of `tuned_here` was found on."""
    return _tuned(device)["calls"]


def _tuned(device: torch.device) -> dict[str, dict]:
    path = cache_file(device)
    return {"configs": {}, "calls": {}} | (json.loads(path.read_text()) if path.is_file() else {})


def keep(device: torch.device, name: str, config: Config, call: str) -> None:
    """Put the winner for a key into `cache_file`, whole at any moment, from where later calls take it."""
    path, table = cache_file(device), _tuned(device)
    table["configs"][name], table["calls"][name] = dict(config), call
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(table, indent=2) + "\n")
    os.replace(partial, path)
    tuned_here.cache_clear()
    lookup.cache_clear()


def cache_file(device: torch.device) -> Path:
    """<device>-<library version>-triton<version>.json in `machine.cache_folder()`."""
    name = "interpreter" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return machine.cache_folder() / f"{machine.slug(name)}-{__version__}-triton{machine.triton_version()}.json"
