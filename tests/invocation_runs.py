"""`ard` invocations, each in a process forked from one that has imported all and computed nothing.

As a script: reads one JSON list of arguments a line, and answers each with a line of what came of it. A child may take
SECONDS of processor time and grow by ADDRESS_SPACE bytes, so that no mistake takes the machine with it.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

SECONDS = 20
ADDRESS_SPACE = 2 * 2**30
CHANGES = ("os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod")
OUTSIDE = 97  # status of a child that was about to change something outside its folder


@dataclass(frozen=True)
class Answer:
    code: int  # exit status; negative: of the signal that ended it
    stdout: str
    stderr: str
    resident: int  # largest resident set, bytes
    seconds: float  # of the processor


class Ard:
    """Runs `ard` in ``folder``."""

    def __init__(self, folder: Path):
        environment = {**os.environ, "HOME": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
        command = [sys.executable, str(Path(__file__).resolve())]
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, *arguments: str) -> Answer:
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        return Answer(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def invoke(arguments: list[str]) -> Answer:
    from ard.__main__ import main

    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            for stream, descriptor in ((sys.stdin, 0), (stdout, 1), (stderr, 2)):
                os.dup2(os.open(os.devnull, os.O_RDONLY) if descriptor == 0 else stream.fileno(), descriptor)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * os.sysconf("SC_PAGE_SIZE") + ADDRESS_SPACE
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            signal.alarm(3 * SECONDS)
            sys.dont_write_bytecode = True
            sys.addaudithook(_guard)
            os._exit(_exit_status(main, arguments))
        _, status, usage = os.wait4(child, 0)
        texts = []
        for stream in (stdout, stderr):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    code, seconds = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
    return Answer(code, *texts, usage.ru_maxrss * 1024, seconds)


def _guard(event: str, values: tuple) -> None:
    """Ends the process before it changes anything outside its folder, which would harm the machine it runs on."""
    if event == "open":
        writes = isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        paths = values[:1] if writes and values[0] != os.devnull else ()
    else:
        paths = values[:2] if event in CHANGES else ()
    for path in paths:
        if isinstance(path, (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(path))
            if os.path.commonpath([path, os.environ["HOME"]]) != os.environ["HOME"]:
                os.write(2, f"{event} of {path}\n".encode())
                os._exit(OUTSIDE)


def _exit_status(main, arguments: list[str]) -> int:
    sys.argv = ["ard", *arguments]
    try:
        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _serve() -> None:
    for module in ("cli", "demo.run", "evaluation.evaluate", "data.latents", "training.plan", "diffusion.sampling"):
        importlib.import_module(f"ard.{module}")
    for module in ("sklearn.datasets", "torch._dynamo", "diffusers.models.autoencoders.autoencoder_kl"):
        with suppress(ImportError):
            importlib.import_module(module)
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(vars(invoke(json.loads(line)))), flush=True)


if __name__ == "__main__":
    _serve()
