"""Files that are whole or absent: temporary name -> fsync -> rename. JSON and safetensors, no pickle."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_TEMPORARY = ".tmp"  # what temporary names begin with; those that safetensors makes for itself do too


class DamagedFile(ValueError):
    """A file is not what was written: bytes differ from their sha256, or the file is cut off or missing."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on success flushes it to disk and renames it to ``path``.

    Raises ValueError if ``path`` is there and no file: a rename would replace a device, such as /dev/null.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is {'a folder' if path.is_dir() else 'a device'}; expected a file or a new name")
    temporary = path.with_name(f"{_TEMPORARY}-{path.name}.{os.getpid()}")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a new temporary folder beside ``path``; on success flushes its files and renames it to ``path``.

    ``path`` must not exist. The files are flushed before the rename, so a folder with the final name is whole.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists; expected a new folder")
    temporary = path.with_name(f"{_TEMPORARY}-{path.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in sorted(temporary.iterdir()):
            _flush(file)
        _flush(temporary)
        os.rename(temporary, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Removes a folder so that no kill leaves a part of it under its name."""
    doomed = path.with_name(f"{_TEMPORARY}-{path.name}.{os.getpid()}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def remove_temporary(folder: Path) -> None:
    """Removes what killed writers have left in ``folder``; no other writer may be at work there."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class FolderLock:
    """Keeps a second job out of ``folder`` (made if absent) until `release`, or this process ends in whatever way.

    Raises ValueError if another job holds it. File systems that cannot lock a folder are only warned of.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor: int | None = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise ValueError(f"{folder}: another job is writing to it; expected to be the only one") from error
        except OSError as error:
            warnings.warn(f"{folder}: cannot be locked ({error}); start no second job on it", stacklevel=2)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically; NaN and infinity are refused, since they are not JSON."""
    write_text(path, _json_text(value))


def write_sealed_json(path: Path, value: Mapping[str, Any]) -> None:
    """`write_json` with the sha256 of the content as its last entry; `read_sealed_json` finds any changed byte."""
    write_json(path, {**value, "sha256": _seal(value)})


def read_sealed_json(path: Path) -> dict[str, Any]:
    """The content that `write_sealed_json` wrote. Raises DamagedFile if a single bit of the file differs."""
    try:
        text = path.read_bytes().decode()
        value = json.loads(text)
        seal = value.pop("sha256")
        intact = seal == _seal(value) and text == _json_text({**value, "sha256": seal})
    except (FileNotFoundError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise DamagedFile(f"{path}: cannot be read ({type(error).__name__}); expected sealed JSON") from error
    if not intact:
        raise DamagedFile(f"{path}: its content differs from its sha256")
    return value


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _seal(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(_json_text(value).encode()).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Writes a safetensors file atomically and returns its sha256."""
    with atomic_path(path) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, {"format": "pt"}
        )
        return file_sha256(temporary)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def readable_size(size: float) -> str:
    """Bytes in the largest unit that they fill: "11.77 MiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:,.2f} TiB"
