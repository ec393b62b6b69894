"""Files and folders that are whole or absent, and JSON in which no changed byte goes unseen."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from ard.files import (
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
    (tmp_path / ".tmpAb3dE6").write_text("half")  # so safetensors names its own
    remove_temporary(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "kept.json"]


def test_safetensors_names_its_temporary_files_as_expected(tmp_path, monkeypatch):
    """`remove_temporary` relies on it."""
    seen = []
    monkeypatch.setattr("ard.files.file_sha256", lambda path: seen.append(path) or "")
    write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    assert seen[0].name.startswith(".tmp") and os.listdir(tmp_path) == ["a.safetensors"]


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

    monkeypatch.setattr("ard.files.fcntl.flock", refuse)
    with pytest.warns(UserWarning, match=r"cannot be locked \(not supported\); start no second job"):
        FolderLock(tmp_path).release()


def test_a_folder_and_a_device_are_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # what is true of it is true of /dev/null, which root could replace
    with pytest.raises(ValueError, match=r"folder: is a folder; expected a file or a new name"):
        write_text(tmp_path / "folder", "")
    with pytest.raises(ValueError, match=r"pipe: is a device; expected a file or a new name"):
        write_text(tmp_path / "pipe", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
