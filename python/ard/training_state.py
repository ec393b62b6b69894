"""Training checkpoints: all a run needs to continue, bit for bit. safetensors and JSON only.

    <run>/checkpoints/step-00005000/
        model.safetensors  ema.safetensors  optimizer.safetensors  rng.safetensors  ...    named groups of tensors
        checkpoint.json    step, facts, and the sha256 of each file; sealed with its own

Tensors are whole, not sharded, so any number of processes can continue. A checkpoint is written to a temporary folder,
flushed and renamed: a folder with a final name is complete. Loading verifies every byte and takes the newest good one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ard.files import (
    DamagedFile,
    atomic_folder,
    file_sha256,
    read_sealed_json,
    read_tensors,
    remove_folder,
    remove_temporary,
    write_sealed_json,
    write_tensors,
)

FORMAT_VERSION = 1
CHECKPOINT_NAME = "checkpoint.json"
_PREFIX = "step-"

Parts = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    folder: Path
    step: int  # updates done
    facts: dict[str, Any]
    sha256: dict[str, str]  # group -> of its file

    def read(self, part: str) -> dict[str, Tensor]:
        """Tensors of one group, on the CPU."""
        if part not in self.sha256:
            raise ValueError(f"{self.folder} has no {part!r}; expected one of {sorted(self.sha256)}")
        return read_tensors(self.folder / f"{part}.safetensors")


def save(folder: Path, step: int, parts: Parts, facts: Mapping[str, Any], *, keep_last: int) -> Checkpoint:
    """Writes the checkpoint of ``step`` into ``folder``, then removes all but the ``keep_last`` newest up to ``step``.

    parts: name -> whole tensors. facts: JSON values. One process calls this. Checkpoints of later steps are removed
    too: the run has continued from an earlier one, because they were damaged.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last: got {keep_last}; expected at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporary(folder)
    path = _path(folder, step)
    if path.exists():
        remove_folder(path)
    with atomic_folder(path) as temporary:
        sha256 = {name: write_tensors(temporary / f"{name}.safetensors", parts[name]) for name in parts}
        content = {"format": "ard-checkpoint", "version": FORMAT_VERSION, "step": step, "facts": facts, "parts": sha256}
        write_sealed_json(temporary / CHECKPOINT_NAME, content)
    for other in _folders(folder):
        if other.name > path.name:
            remove_folder(other)
    tidy(folder, step, keep_last=keep_last)
    return Checkpoint(path, step, dict(facts), sha256)


def tidy(folder: Path, step: int, *, keep_last: int) -> None:
    """Removes what killed writers have left, and all but the ``keep_last`` newest checkpoints up to ``step``."""
    remove_temporary(folder)
    upto = [path for path in _folders(folder) if path.name <= _path(folder, step).name]
    for path in upto[keep_last:]:
        remove_folder(path)


def verified(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``. Raises DamagedFile if any byte of any of its files differs or a file is missing."""
    content = read_sealed_json(folder / CHECKPOINT_NAME)
    if content.get("format") != "ard-checkpoint" or content.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder / CHECKPOINT_NAME} says format={content.get('format')!r}, version={content.get('version')!r}; "
            f"expected 'ard-checkpoint', {FORMAT_VERSION}"
        )
    step, facts, parts = (content.get(name) for name in ("step", "facts", "parts"))
    plain = type(step) is int and step >= 0 and isinstance(facts, dict) and isinstance(parts, dict)
    if not plain or not all(re.fullmatch(r"\w+", name) and isinstance(parts[name], str) for name in parts):
        raise DamagedFile(f"{folder / CHECKPOINT_NAME}: expected a step, facts, and parts by plain names")
    for name, sha256 in parts.items():
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            raise DamagedFile(f"{path} is missing")
        if file_sha256(path) != sha256:
            raise DamagedFile(f"{path}: sha256 differs from {CHECKPOINT_NAME}")
    return Checkpoint(folder, step, facts, parts)


def newest(folder: Path) -> Checkpoint | None:
    """The newest good checkpoint in ``folder``, None if there is none at all.

    Warns of each newer one that is damaged; raises DamagedFile if all are.
    """
    candidates = _folders(folder)
    for path in candidates:
        try:
            return verified(path)
        except DamagedFile as error:
            warnings.warn(f"checkpoint {path.name} is damaged, falling back to the one before: {error}", stacklevel=2)
    if candidates:
        raise DamagedFile(f"{folder}: all {len(candidates)} checkpoints are damaged")
    return None


def remove_all(folder: Path) -> None:
    """Removes every checkpoint in ``folder``, and what killed writers have left there."""
    remove_temporary(folder)
    for path in _folders(folder):
        remove_folder(path)


def _path(folder: Path, step: int) -> Path:
    return folder / f"{_PREFIX}{step:08d}"


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((path for path in folder.glob(f"{_PREFIX}*") if path.is_dir()), reverse=True)
