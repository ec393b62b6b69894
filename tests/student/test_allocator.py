"""Memory that the commands keep for the next tensors."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
from ard.__main__ import main
from ard.common import allocator
from ard.demo.workers import Workers

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc than glibc's")


@pytest.fixture(autouse=True)
def without_settings_of_a_user(monkeypatch):
    for name in allocator.USERS:
        monkeypatch.delenv(name, raising=False)


COUNT_FAULTS = """
import resource, torch

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(10 << 20)  # 40 MiB, of which glibc by itself keeps nothing
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

"""


def faults_in_process(code: str, **environment: str) -> list[str]:
    run = [sys.executable, "-c", COUNT_FAULTS + code]
    return subprocess.run(run, env=os.environ | environment, check=True, capture_output=True, text=True).stdout.split()


def faults_of_worker(job: int) -> int:
    names: dict = {}
    exec(COUNT_FAULTS, names)
    return [names["faults"]() for _ in range(10)][-1]


def test_freed_memory_is_kept():
    code = "from ard.common.allocator import keep_freed_memory; faults(); print(faults(), keep_freed_memory())\n"
    before, kept, after = faults_in_process(code + "print([faults() for _ in range(10)][-1])")
    assert kept == "True"
    assert int(before) > 256, "glibc keeps it by itself: keep_freed_memory can go"
    assert int(after) < 256


def test_environment_of_user_decides():
    code = "from ard.common.allocator import keep_freed_memory; print(keep_freed_memory())"
    assert faults_in_process(code, MALLOC_TRIM_THRESHOLD_="131072") == ["False"]


def test_commands_and_workers_keep_it(monkeypatch):
    calls = []
    monkeypatch.setattr("ard.common.allocator.keep_freed_memory", lambda: calls.append("kept"))
    monkeypatch.setattr("ard.cli.app", lambda: calls.append("command"))
    main()
    assert calls == ["kept", "command"]
    with Workers(1) as workers:
        assert workers.run(faults_of_worker, [0])[0] < 256
