"""Files that are whole or absent: temporary folder -> fsync -> rename. JSON and safetensors, no pickle."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

LARGEST_JSON = 1 << 25  # bytes; the manifest of a store has some 200 for each shard
_TEMPORARY = ".ard-tmp-"  # what the names of temporary folders begin with, and nobody else's names do


class DamagedFile(ValueError):
    """A file is not what was written: bytes differ from their sha256, or the file is cut off or missing."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success flushes it to disk and renames it to ``path``.

    Raises ValueError if ``path`` is there and no file: a rename would replace a device, such as /dev/null.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is {'a folder' if path.is_dir() else 'a device'}; expected a file or a new name")
    with _temporary_folder(path.parent) as folder:
        temporary = folder / path.name
        with _naming(path):
            yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a new temporary folder beside ``path``; on success flushes its files and renames it to ``path``.

    ``path`` must not exist. The files are flushed before the rename, so a folder with the final name is whole.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists; expected a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_folder(path.parent) as folder:
        temporary = folder / path.name
        temporary.mkdir()
        yield temporary
        for file in sorted(temporary.iterdir()):
            _flush(file)
        _flush(temporary)
        os.rename(temporary, path)
        _flush(path.parent)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds ``path`` to an error of the system that names no file: a full disk while a file is written."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_folder(path: Path) -> None:
    """Removes a folder so that no kill leaves a part of it under its name."""
    with _temporary_folder(path.parent) as doomed:
        os.rename(path, doomed / path.name)


def remove_temporary(folder: Path) -> None:
    """Removes what killed writers have left in ``folder``; no other writer may be at work there."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """A new folder in ``parent``, removed in the end. What safetensors writes beside a file on its way is in it too."""
    folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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

    def __exit__(self, *_: object) -> None:
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
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically; NaN and infinity are refused, since they are not JSON."""
    write_text(path, _json_text(value))


def write_sealed_json(path: Path, value: Mapping[str, Any]) -> None:
    """`write_json` with the sha256 of the content as its last entry; `read_sealed_json` finds any changed byte."""
    write_json(path, {**value, "sha256": _seal(value)})


def read_sealed_json(path: Path) -> dict[str, Any]:
    """The content that `write_sealed_json` wrote. Raises DamagedFile if a single bit of the file differs."""
    try:
        text = json_text(path)
        value = parse_json(text)
        seal = value.pop("sha256")
        intact = seal == _seal(value) and text == _json_text({**value, "sha256": seal})
    except (FileNotFoundError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise DamagedFile(f"{path}: cannot be read ({type(error).__name__}); expected sealed JSON") from error
    if not intact:
        raise DamagedFile(f"{path}: its content differs from its sha256")
    return value


def json_text(path: Path) -> str:
    """Text of a JSON file. Raises ValueError for what is no regular file, is not UTF-8 or exceeds LARGEST_JSON."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file")
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; expected at most {LARGEST_JSON}")
    return path.read_bytes().decode()


def parse_json(text: str) -> Any:
    """`json.loads`, whose errors are all ValueErrors."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def shown(value: Any) -> str:
    """A value from a file, for a message: at most 80 characters of its repr."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _seal(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(_json_text(value).encode()).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Writes a safetensors file atomically and returns its sha256."""
    with atomic_path(path) as temporary:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(whole, temporary, {"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({_first_line(error)})") from error
        return file_sha256(temporary)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises DamagedFile for one that is not whole, ValueError for one
    that exceeds the machine's memory."""
    with whole_tensors(path):
        size, memory = path.stat().st_size, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if size > memory:
            raise ValueError(f"{path} has {size} bytes; expected at most this machine's memory of {memory}")
        return load_file(path)


@contextmanager
def whole_tensors(path: Path) -> Iterator[None]:
    """What safetensors says of a damaged file, in the body, becomes a DamagedFile that names it.

    Raises FileNotFoundError for what is no regular file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected safetensors")
    try:
        yield
    except SafetensorError as error:
        raise DamagedFile(f"{path} is not a whole safetensors file ({_first_line(error)})") from error
    except RuntimeError as error:  # PyTorch's, where the file exceeds what may be mapped
        raise OSError(f"{path} cannot be opened ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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
