"""Training checkpoints: all a run needs to continue, bit for bit. safetensors and JSON only.

    <run>/checkpoints/step-00005000/
        model.safetensors  ema.safetensors  optimizer.safetensors  rng.safetensors  ...    named groups of tensors
        checkpoint.json    step, facts, and the sha256 of each file; sealed with its own

Tensors are whole, not sharded, so any number of processes can continue. A checkpoint is written to a temporary folder,
flushed and renamed: a folder with a final name is complete. Loading verifies every byte and takes the newest good one.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ard.storage.files import (
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

FORMAT, FORMAT_VERSION = "ard-checkpoint", 1
CHECKPOINT_NAME = "checkpoint.json"
_SUFFIX = ".safetensors"

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
        return read_tensors(self.folder / f"{part}{_SUFFIX}")


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
    if path.exists() and is_ours(path):
        remove_folder(path)
    with atomic_folder(path) as temporary:
        sha256 = {name: write_tensors(temporary / f"{name}{_SUFFIX}", parts[name]) for name in parts}
        content = {"format": FORMAT, "version": FORMAT_VERSION, "step": step, "facts": facts, "parts": sha256}
        write_sealed_json(temporary / CHECKPOINT_NAME, content)
    for other in _folders(folder):
        if _step(other) > step and is_ours(other):
            remove_folder(other)
    tidy(folder, step, keep_last=keep_last)
    return Checkpoint(path, step, dict(facts), sha256)


def set_steps(checkpoint: Checkpoint, steps: int) -> None:
    """Notes that the run of the checkpoint is to have so many updates in all: its fact "steps"."""
    remove_temporary(checkpoint.folder)  # what a death while this was written has left
    path = checkpoint.folder / CHECKPOINT_NAME
    content = read_sealed_json(path)
    if content["facts"].get("steps") != steps:
        write_sealed_json(path, {**content, "facts": {**content["facts"], "steps": steps}})


def tidy(folder: Path, step: int, *, keep_last: int) -> None:
    """Removes what killed writers have left, and all but the ``keep_last`` newest checkpoints up to ``step``."""
    remove_temporary(folder)
    upto = [path for path in _folders(folder) if _step(path) <= step]
    for path in upto[keep_last:]:
        if is_ours(path):
            remove_folder(path)


def verified(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``. Raises DamagedFile if any byte of any of its files differs or a file is missing."""
    content = read_sealed_json(folder / CHECKPOINT_NAME)
    if content.get("format") != FORMAT or content.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder / CHECKPOINT_NAME} says format={content.get('format')!r}, version={content.get('version')!r}; "
            f"expected {FORMAT!r}, {FORMAT_VERSION}"
        )
    step, facts, parts = content.get("step"), content.get("facts"), content.get("parts")
    if (
        type(step) is not int
        or step < 0
        or not isinstance(facts, dict)
        or not isinstance(parts, dict)
        or not all(re.fullmatch(r"\w+", name) and isinstance(sha256, str) for name, sha256 in parts.items())
    ):
        raise DamagedFile(f"{folder / CHECKPOINT_NAME}: expected a step, facts, and parts by plain names")
    for name, sha256 in parts.items():
        path = folder / f"{name}{_SUFFIX}"
        if not path.is_file():
            raise DamagedFile(f"{path} is missing")
        if file_sha256(path) != sha256:
            raise DamagedFile(f"{path}: sha256 differs from {CHECKPOINT_NAME}")
    return Checkpoint(folder, step, facts, parts)


def newest(folder: Path) -> Checkpoint | None:
    """The newest good checkpoint in ``folder``, None if there is none at all.

    Warns of each newer one that is damaged; raises DamagedFile if all are.
    """
    found = read_newest(folder, ())
    return found and found[0]


def read_newest(folder: Path, parts: Sequence[str]) -> tuple[Checkpoint, list[dict[str, Tensor]]] | None:
    """`newest` and the tensors of these groups of it, also while its run is being trained.

    That run may remove a checkpoint while it is read here; then there is a newer one.
    """
    candidates, warned = _folders(folder), set()
    while candidates:
        for path in candidates:
            try:
                checkpoint = verified(path)
                return checkpoint, [checkpoint.read(part) for part in parts]
            except (DamagedFile, OSError) as error:
                if not path.exists():
                    break
                if path not in warned:
                    text = f"checkpoint {path.name} is damaged, falling back to the one before: {error}"
                    warnings.warn(text, stacklevel=2)
                    warned.add(path)
        else:
            raise DamagedFile(f"{folder}: all {len(candidates)} checkpoints are damaged")
        candidates = _folders(folder)
    return None


def remove_all(folder: Path) -> None:
    """Removes every checkpoint in ``folder``, and what killed writers have left there."""
    remove_temporary(folder)
    for path in _folders(folder):
        if is_ours(path):
            remove_folder(path)


def is_ours(folder: Path) -> bool:
    """Whether ``folder`` is a checkpoint that this module wrote, and may remove: it holds nothing else."""
    files = list(folder.iterdir())
    names = {file.name for file in files if file.is_file() and not file.is_symlink()}
    if (
        folder.is_symlink()
        or len(names) < len(files)
        or any(name != CHECKPOINT_NAME and not name.endswith(_SUFFIX) for name in names)
    ):
        return False
    try:
        return json.loads((folder / CHECKPOINT_NAME).read_bytes())["format"] == FORMAT
    except (OSError, ValueError, TypeError, KeyError):  # damaged, or lost: then by its other files
        return {f"model{_SUFFIX}", f"ema{_SUFFIX}"} <= names


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = (path for path in folder.glob("step-*") if path.is_dir() and re.fullmatch(r"step-\d{8,}", path.name))
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
