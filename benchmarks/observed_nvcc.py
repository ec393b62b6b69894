"""Stands before nvcc as CMake's compiler launcher: notes seconds, memory and messages beside each object. Standard
library only: it is run by path, once per object."""

import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path


def observe(command: list[str]) -> int:
    """Run a compiler; write what it took and said to <object>.json, and to stderr what is no report of resources."""
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    if "-o" in command:
        note = {"seconds": round(time.perf_counter() - start, 1), "peak_bytes": peak, "report": done.stdout}
        Path(command[command.index("-o") + 1] + ".json").write_text(json.dumps(note))
    said = [line for line in done.stdout.splitlines(True) if not re.match(r"ptxas info +:|    \d+ bytes stack", line)]
    sys.stderr.writelines(said)
    return done.returncode


if __name__ == "__main__":
    sys.exit(observe(sys.argv[1:]))
