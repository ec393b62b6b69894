"""Files and folders that are whole or absent, and JSON in which no changed byte goes unseen."""

from __future__ import annotations

import json
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from ard.storage.files import (
    DamagedFile,
    FolderLock,
    atomic_folder,
    atomic_path,
    file_sha256,
    read_sealed_json,
    remove_folder,
    remove_temporary,
    write_json,
    write_sealed_json,
    write_tensors,
    write_text,
)
from ard.storage.images import write_npz
from fault_runs import rewrite
from safetensors.torch import load_file

VALUE = {"rate": 1e-05, "ö": [1, None, {}]}


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"value": 1})
    with pytest.raises(ValueError):
        write_json(path, {"value": float("nan")})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"value": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "above" / "folder"
    with pytest.raises(RuntimeError), atomic_folder(path) as temporary:
        (temporary / "file").write_text("half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    with atomic_folder(path) as temporary:
        (temporary / "file").write_text("whole")
        assert not path.exists()
    assert list(path.parent.rglob("*")) == [path, path / "file"]
    with pytest.raises(FileExistsError, match=r"folder exists; expected a new folder"), atomic_folder(path):
        raise AssertionError("the body must not run")


@pytest.fixture
def trace(monkeypatch):
    """("fsync", path) and ("rename", from, to), in order."""
    calls, fsync = [], os.fsync

    def traced_fsync(descriptor: int) -> None:
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def traced(rename):
        return lambda source, target: (calls.append(("rename", Path(source), Path(target))), rename(source, target))

    monkeypatch.setattr(os, "fsync", traced_fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, traced(getattr(os, name)))
    return calls


def test_content_is_flushed_before_the_rename_and_the_name_after(tmp_path, trace):
    write_json(tmp_path / "file", VALUE)
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("a")
        (temporary / "b").write_text("b")
    renames = [call for call in trace if call[0] == "rename"]
    assert [target for _, _, target in renames] == [tmp_path / "file", tmp_path / "folder"]
    for rename, files in zip(renames, ([], ["a", "b"]), strict=True):
        before, after = trace[: trace.index(rename)], trace[trace.index(rename) + 1 :]
        assert all(("fsync", path) in before for path in [rename[1], *(rename[1] / name for name in files)])
        assert ("fsync", tmp_path) in after


def test_temporary_litter_is_removed_and_nothing_else(tmp_path):
    write_json(tmp_path / "kept.json", VALUE)
    (tmp_path / ".hidden").write_text("kept")
    writers = [atomic_path(tmp_path / "file"), atomic_folder(tmp_path / "folder")]
    file, folder = (writer.__enter__() for writer in writers)  # as if killed inside
    file.write_text("half")
    (folder / "part").write_text("half")
    (tmp_path / ".tmp-mine").write_text("kept")
    (tmp_path / ".tmp").mkdir()
    (tmp_path / ".ard-tmp-link").symlink_to(tmp_path / ".tmp")
    remove_temporary(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".ard-tmp-link", ".hidden", ".tmp", ".tmp-mine", "kept.json"]


def test_what_safetensors_writes_on_its_way_is_in_our_temporary_folder(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("ard.storage.files.file_sha256", lambda path: seen.append((path, os.listdir(tmp_path))) or "")
    write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    (path, names), *_ = seen
    assert names == [path.parent.name] and names[0].startswith(".ard-tmp-") and os.listdir(tmp_path) == [path.name]


def test_removed_folder_is_gone_with_its_content(tmp_path):
    (tmp_path / "folder" / "below").mkdir(parents=True)
    remove_folder(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_sealed_json_gives_back_what_was_written(tmp_path):
    path = tmp_path / "sealed.json"
    write_sealed_json(path, VALUE)
    assert read_sealed_json(path) == VALUE
    assert list(json.loads(path.read_text())) == [*VALUE, "sha256"]


def damaged_texts(content: bytes):
    """Every single bit flipped, every byte replaced by some that JSON gives a meaning, left out, and doubled."""
    for position, byte in enumerate(content):
        head, tail = content[:position], content[position + 1 :]
        yield head
        yield head + tail
        yield head + bytes([byte, byte]) + tail
        for other in {byte ^ (1 << bit) for bit in range(8)} | set(b'\0\n "{}[],:09-eE\\\xff') - {byte}:
            yield head + bytes([other]) + tail
    yield from (
        content + b" ",
        content + content,
        b"null",
        b"[]",
        b'"sha256"',
        b"{}",
        b'{"sha256": 1}',
        b"NaN",
        b"\xef\xbb\xbf",
    )


def test_every_changed_byte_of_sealed_json_is_found(tmp_path):
    path = tmp_path / "sealed.json"
    write_sealed_json(path, VALUE)
    content = path.read_bytes()
    for damaged in damaged_texts(content):
        if damaged == content:  # one of two equal neighbours left out or doubled is not the same text
            continue
        rewrite(path, damaged)
        with pytest.raises(DamagedFile, match=r"sealed.json: "):
            read_sealed_json(path)
    path.unlink()
    with pytest.raises(DamagedFile, match=r"FileNotFoundError"):
        read_sealed_json(path)


def test_exponent_that_overflows_is_damage_not_a_crash(tmp_path):
    path = tmp_path / "sealed.json"
    write_sealed_json(path, VALUE)
    path.write_text(path.read_text().replace("1e-05", "1e905"))
    with pytest.raises(DamagedFile):
        read_sealed_json(path)


def test_tensors_are_written_as_they_are_with_their_sha256(tmp_path):
    tensors = {
        "a": torch.randn(3, 4).T,
        "b": torch.zeros((), dtype=torch.int64),
        "c": torch.ones(2, dtype=torch.float16),
    }
    sha256 = write_tensors(tmp_path / "t.safetensors", tensors)
    assert sha256 == file_sha256(tmp_path / "t.safetensors")
    loaded = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items()) and loaded.keys() == tensors.keys()


def test_a_second_job_is_kept_out_of_a_folder(tmp_path):
    with FolderLock(tmp_path / "run") as lock:
        with pytest.raises(ValueError, match=r"run: another job is writing to it; expected to be the only one"):
            FolderLock(tmp_path / "run")
        lock.release()
        FolderLock(tmp_path / "run").release()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_cannot_be_locked_is_warned_of(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("not supported")

    monkeypatch.setattr("ard.storage.files.fcntl.flock", refuse)
    with pytest.warns(UserWarning, match=r"cannot be locked \(not supported\); start no second job"):
        FolderLock(tmp_path).release()


@contextmanager
def full_disk(free: int) -> Iterator[None]:
    """No file of this process may exceed ``free`` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "write, name",
    [
        (lambda path: write_tensors(path, {"a": torch.zeros(1 << 16)}), "t.safetensors"),
        (lambda path: write_npz(path, [np.zeros((64, 32, 32, 1), np.uint8)], 64), "t.npz"),
        (lambda path: write_json(path, ["text"] * (1 << 13)), "t.json"),
    ],
)
def test_a_full_disk_is_one_error_that_names_the_file(tmp_path, write, name):
    (tmp_path / name).write_bytes(b"old")
    with full_disk(1 << 13), pytest.raises(OSError, match=rf"{tmp_path}/{name}"):
        write(tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_json_of_an_attacker_is_damaged_json(tmp_path):
    path = tmp_path / "a.json"
    for content in (b"", b"\xff", b"[" * 100_000, b"[]", b"1" * 5000, b'{"sha256": [], "a": 1e999}'):
        path.write_bytes(content)
        with pytest.raises(DamagedFile, match=r"a\.json"):
            read_sealed_json(path)
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DamagedFile, match=r"a\.json"):
        read_sealed_json(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DamagedFile, match=r"a\.json"):
        read_sealed_json(path)


def test_a_folder_and_a_device_are_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # what is true of it is true of /dev/null, which root could replace
    with pytest.raises(ValueError, match=r"folder: is a folder; expected a file or a new name"):
        write_text(tmp_path / "folder", "")
    with pytest.raises(ValueError, match=r"pipe: is a device; expected a file or a new name"):
        write_text(tmp_path / "pipe", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
