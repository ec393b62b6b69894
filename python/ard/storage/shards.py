"""Rows of named tensors in sharded safetensors, written by any number of processes, each of which may be killed.

A store is one folder:

    manifest.json              its kind, what was asked for (the spec) and, once complete, every shard with its sha256
    shard-00000.safetensors    the rows [0, shard_size) of every tensor
    shard-00000.json           the shard's sha256, until the manifest takes it over
    shard-00001.safetensors    ...

Every file is written to a temporary name, flushed to disk and renamed; a shard counts once its JSON is there. The
ranks take turns over the shards that are missing, so a killed generation that is started again, with any number of
processes, writes what is missing and nothing twice. The JSON files hold their own sha256: no changed bit goes unseen.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ard.common.process import Process
from ard.common.settings import build
from ard.storage.files import (
    DamagedFile,
    FolderLock,
    file_sha256,
    read_sealed_json,
    readable_size,
    remove_temporary,
    shown,
    whole_tensors,
    write_sealed_json,
    write_tensors,
)

FORMAT_VERSION = 3
MANIFEST_NAME = "manifest.json"
_LARGEST_COUNT = 1 << 40


Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # by name


class ShardSpec:
    """What a store holds: base of frozen dataclasses of JSON values."""

    count: int  # rows
    shard_size: int  # rows per shard; the last one may have fewer

    def tensors(self, rows: int) -> Tensors:
        """What a shard of so many rows holds."""
        raise NotImplementedError

    def wrong_values(self, name: str, tensor: Tensor) -> str | None:
        """What is wrong with the values of a tensor whose name, shape and dtype are right; None for nothing."""
        return None


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def write_shards(
    folder: Path,
    kind: str,
    spec: ShardSpec,
    make_rows: Callable[[range], dict[str, Tensor]],
    *,
    batch_size: int,
    row_bytes: int,
    process: Process | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Writes the missing shards of a store; returns when all ranks have written theirs and the manifest is complete.

    folder: made if absent; if it holds a store, its kind and spec must be these.
    spec: a `ShardSpec`, a dataclass of JSON values.
    make_rows: range of global indices, at most ``batch_size`` -> rows of every tensor.
    row_bytes: bytes of one row of all tensors, for the check of free space.
    on_progress: called with the number of rows just finished by all ranks, counted on this one.
    Raises ValueError if another job writes to the folder.
    """
    process = process or Process()
    if process.is_main and not (folder / MANIFEST_NAME).exists():
        _require_space(folder, spec.count * row_bytes)
    with FolderLock(folder) if process.is_main else nullcontext():
        if process.is_main:
            _prepare(folder, kind, spec, row_bytes)
        process.barrier()
        missing = _missing(folder, kind, spec)
        process.barrier()  # all ranks have listed the same shards; now they may write
        report = on_progress or (lambda count: None)
        report(spec.count - _row_count(spec, missing))
        for shard in missing[process.rank :: process.world_size]:
            _write_shard(folder, shard, _rows(spec, shard), make_rows, batch_size, report, process)
        process.barrier()
        if process.is_main:
            _complete(folder, kind, spec)
        process.barrier()


def _write_shard(
    folder: Path,
    shard: int,
    indices: range,
    make_rows: Callable[[range], dict[str, Tensor]],
    batch_size: int,
    report: Callable[[int], None],
    process: Process,
) -> None:
    parts = []
    for first in range(indices.start, indices.stop, batch_size):
        rows = range(first, min(first + batch_size, indices.stop))
        parts.append(make_rows(rows))
        report(len(rows) * process.world_size)
    path = folder / shard_name(shard)
    sha256 = write_tensors(path, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    entry = {"first": indices.start, "count": len(indices), "bytes": path.stat().st_size, "content_sha256": sha256}
    write_sealed_json(path.with_suffix(".json"), entry)


def shard_count(spec: ShardSpec) -> int:
    return -(-spec.count // spec.shard_size)


def _rows(spec: ShardSpec, shard: int) -> range:
    """Global indices of a shard."""
    return range(shard * spec.shard_size, min((shard + 1) * spec.shard_size, spec.count))


def _rows_of(spec: ShardSpec, name: str) -> range | None:
    """Global indices of the shard of this name, None if the store has no such shard."""
    match = re.fullmatch(r"shard-(\d{5,12})\.safetensors", name, re.ASCII)
    if not match or shard_name(int(match[1])) != name or int(match[1]) >= shard_count(spec):
        return None
    return _rows(spec, int(match[1]))


def _describes(entry: Any, rows: range | None) -> bool:
    """Whether ``entry`` is what `_write_shard` says of a shard of these rows."""
    return (
        rows is not None
        and isinstance(entry, dict)
        and (entry.get("first"), entry.get("count")) == (rows.start, len(rows))
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("content_sha256"), str)
    )


def _row_count(spec: ShardSpec, shards: Iterable[int]) -> int:
    return sum(len(_rows(spec, shard)) for shard in shards)


def _prepare(folder: Path, kind: str, spec: ShardSpec, row_bytes: int) -> None:
    """Makes the folder ready to be written to, or raises before anything is written."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporary(folder)
    if (folder / MANIFEST_NAME).exists():
        _require_spec(folder, kind, spec)
        return _require_space(folder, _row_count(spec, _missing(folder, kind, spec)) * row_bytes)
    strangers = sorted(path.name for path in folder.glob("shard-*"))
    if strangers:  # of which spec they are, only a manifest could tell
        raise ValueError(f"{folder} holds {strangers[0]} and no {MANIFEST_NAME}; expected a store or a new folder")
    manifest = {"format": f"ard-{kind}", "version": FORMAT_VERSION, "spec": _content(spec), "shards": {}}
    write_sealed_json(folder / MANIFEST_NAME, manifest)


def _content(spec: Any) -> dict[str, Any]:
    return dataclasses.asdict(spec)


def _require_spec(folder: Path, kind: str, spec: ShardSpec) -> None:
    stored = _read_manifest(folder, kind)["spec"]
    for name, expected in json.loads(json.dumps(_content(spec))).items():  # tuples as lists, as they are stored
        if stored.get(name) != expected:
            found = f"{folder} holds {kind} with {name}={shown(stored.get(name))}; expected {expected!r}"
            raise ValueError(f"{found}. Choose another folder, or remove this one")


def _finished(folder: Path, manifest: dict, spec: ShardSpec) -> dict[str, dict]:
    """Entries of the shards that are whole: in the manifest, or with a JSON of their own."""
    entries = dict(manifest["shards"])
    for path in _own_json(folder):
        try:
            entries[path.with_suffix(".safetensors").name] = read_sealed_json(path)
        except DamagedFile:
            path.unlink(missing_ok=True)  # cannot be trusted: its shard is made again
    return {
        name: entry
        for name, entry in entries.items()
        if _describes(entry, _rows_of(spec, name))
        and (folder / name).is_file()
        and (folder / name).stat().st_size == entry["bytes"]
    }


def _missing(folder: Path, kind: str, spec: ShardSpec) -> list[int]:
    """The shards that are not whole."""
    done = _finished(folder, _read_manifest(folder, kind), spec)
    return [shard for shard in range(shard_count(spec)) if shard_name(shard) not in done]


def _complete(folder: Path, kind: str, spec: ShardSpec) -> None:
    manifest = _read_manifest(folder, kind)
    shards = _finished(folder, manifest, spec)
    write_sealed_json(folder / MANIFEST_NAME, {**manifest, "shards": dict(sorted(shards.items()))})
    for path in _own_json(folder):
        path.unlink()


def _own_json(folder: Path) -> list[Path]:
    """The JSON files that `_write_shard` has written, and nobody else's."""
    return [path for path in folder.glob("shard-*.json") if re.fullmatch(r"shard-\d{5,}\.json", path.name)]


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    if needed > free:
        raise OSError(
            f"{folder}: {readable_size(needed)} are still to be written; expected at most the {readable_size(free)} "
            "that are free"
        )


def _read_manifest(folder: Path, kind: str) -> dict:
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no {MANIFEST_NAME}; expected a folder of {kind}")
    manifest = read_sealed_json(path)
    if manifest.get("format") != f"ard-{kind}" or manifest.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} says format={shown(manifest.get('format'))}, version={shown(manifest.get('version'))}; "
            f"expected 'ard-{kind}', {FORMAT_VERSION}"
        )
    for name in ("spec", "shards"):
        if not isinstance(manifest.get(name), dict):
            raise DamagedFile(f"{path}: {name} is {shown(manifest.get(name))}; expected an object")
    return manifest


class ShardedStore:
    """A complete store, opened for reading. Tensors are memory-mapped: only the rows that are read enter memory.

    Nothing in the manifest is believed: its spec is checked by type, every shard must be a regular file of the name,
    the rows, the tensors and the dtypes that follow from the spec, and only such files are opened.
    Raises DamagedFile where they are not, ValueError where the store is unfinished.
    """

    def __init__(self, folder: Path, kind: str, spec_class: type):
        self.folder, self.kind = Path(folder), kind
        manifest = _read_manifest(self.folder, kind)
        self.spec = _build_spec(self.folder / MANIFEST_NAME, spec_class, manifest["spec"])
        self.shards: dict[str, dict] = manifest["shards"]
        self._count, self._shard_size = self.spec.count, self.spec.shard_size
        self._require_all()
        self.names = tuple(sorted(self.spec.tensors(0)))
        self._dtypes = {name: dtype for name, (dtype, _) in self.spec.tensors(0).items()}
        self._arrays: dict[str, list[np.ndarray | None]] = {name: [None] * len(self.shards) for name in self.names}
        if broken := [error for shard in range(len(self.shards)) if (error := self._header_error(shard))]:
            more = f", as {len(broken) - 1} more are" if len(broken) > 1 else ""
            raise DamagedFile(f"{broken[0]}{more}; remove such files and run the generation again")

    def _require_all(self) -> None:
        for name, entry in self.shards.items():
            if not _describes(entry, _rows_of(self.spec, name)):
                raise DamagedFile(
                    f"{self.folder / MANIFEST_NAME}: {shown(name)} is {shown(entry)}; expected a shard of the spec"
                )
            path = self.folder / name
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise DamagedFile(f"{path} is no regular file; expected a shard")
        written = {path.with_suffix(".safetensors").name for path in self.folder.glob("shard-*.json")}
        present = {name for name in written | self.shards.keys() if (self.folder / name).is_file()}
        whole, total = {name for name in present if _rows_of(self.spec, name)}, shard_count(self.spec)
        finished = whole & self.shards.keys()
        if len(finished) < total:
            known = whole if len(whole) < total else finished
            first = next(name for name in map(shard_name, range(total)) if name not in known)
            raise ValueError(
                f"{self.folder} is unfinished: {total - len(whole)} of {total} shards of {self.kind} are missing, "
                f"first {first}; run the generation again to finish it"
            )

    def __len__(self) -> int:
        return self._count

    def verify(self, on_progress: Callable[[int], None] | None = None) -> None:
        """Raises DamagedFile naming every shard whose content differs from the manifest's sha256, or whose values are
        none that the spec allows."""
        broken = []
        for name, entry in self.shards.items():
            if file_sha256(self.folder / name) != entry["content_sha256"]:
                broken.append(name)
            if on_progress:
                on_progress(entry["count"])
        if not broken:
            for shard in range(len(self.shards)):
                for name in self.names:
                    self._array(shard, name)
        if broken:
            raise DamagedFile(
                f"{self.folder}: sha256 differs from the manifest for {', '.join(broken)}; "
                "remove these files and run the generation again"
            )

    def read(self, name: str, indices: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows ``indices`` (n,) of tensor ``name``, copied to memory in the order asked.

        out: tensor to copy them to, of any strides.
        """
        if name not in self.names:
            raise ValueError(f"{self.folder}: asked for {name!r}; expected one of the stored {self.names}")
        indices = torch.as_tensor(indices, dtype=torch.int64)
        if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= len(self)):
            raise IndexError(
                f"{self.folder}: indices span [{int(indices.min())}, {int(indices.max())}]; "
                f"expected within [0, {len(self) - 1}]"
            )
        # Row by row: NumPy copies each whole, while a mask per shard costs more than the rows of a batch.
        shards, places = (numbers.tolist() for numbers in np.divmod(indices.numpy(), self._shard_size))
        first = self._array(0, name)
        rows = torch.empty((len(indices), *first.shape[1:]), dtype=self._dtypes[name]) if out is None else out
        target = _as_numpy(rows)
        for number, (shard, place) in enumerate(zip(shards, places, strict=True)):
            target[number] = self._array(shard, name)[place]
        return rows

    def _header_error(self, shard: int) -> str | None:
        """What is wrong with the names, shapes and dtypes in a shard."""
        path = self.folder / shard_name(shard)
        try:
            with self._open(shard) as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping); mapped, not read
        except DamagedFile as error:
            return str(error)
        expected = self.spec.tensors(len(_rows(self.spec, shard)))
        got = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}
        return None if got == expected else f"{path} holds {_listing(got)}; expected {_listing(expected)}"

    @contextmanager
    def _open(self, shard: int) -> Iterator[Any]:
        path = self.folder / shard_name(shard)
        with whole_tensors(path), safe_open(path, framework="pt", device="cpu") as file:
            yield file

    def _array(self, shard: int, name: str) -> np.ndarray:
        # safetensors maps the file for CPU tensors: get_tensor reads no data, indexing it reads the touched pages.
        arrays = self._arrays[name]
        array = arrays[shard]
        if array is None:
            with self._open(shard) as file:
                tensor = file.get_tensor(name)
            if error := self.spec.wrong_values(name, tensor):
                raise DamagedFile(f"{self.folder / shard_name(shard)}: {error}")
            array = arrays[shard] = _as_numpy(tensor)
        return array


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """The same memory; bfloat16, which NumPy has not, as the integers of its bits."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _build_spec(path: Path, spec_class: type, values: dict[str, Any]) -> Any:
    for name in ("count", "shard_size"):
        if type(values.get(name)) is not int or not 1 <= values[name] <= _LARGEST_COUNT:
            raise DamagedFile(f"{path}: {name} is {shown(values.get(name))}; expected 1 to {_LARGEST_COUNT}")
    try:
        spec: Any = build(spec_class, values)
    except ValueError as error:
        raise DamagedFile(f"{path}: the spec is none ({str(error)[:200]})") from error
    for name, (_, shape) in spec.tensors(1).items():
        if any(not 1 <= size <= _LARGEST_COUNT for size in shape):
            raise DamagedFile(f"{path}: {name} is of {list(shape[1:])}; expected sizes of at least 1")
    return spec


def _listing(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    parts = [f"{shown(name)} {str(dtype).removeprefix('torch.')} {shape}" for name, (dtype, shape) in tensors.items()]
    return ", ".join(parts[:8]) or "nothing"
