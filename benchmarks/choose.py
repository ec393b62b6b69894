"""Rebuild the shipped configurations (ard_kernels/tuned/sm*.json) from the candidates, without a GPU.

python -m benchmarks.choose [PREFIX] [--arch 80 90]     keys that start with PREFIX, but for those measured on a GPU
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor

from ard_kernels.common import tuning
from ard_kernels.tune.candidates import candidates, keys
from benchmarks import aot


def choose(arch: int, key: str) -> tuple[int, str, dict[str, int] | None]:
    """The first candidate without a problem: they fall from large tiles and deep pipelines to what fits in registers.

    A guess made from the resource report, until a GPU's measurement replaces it.
    """
    for candidate in candidates(key):
        if not aot.compile_key(arch, key, candidate)[2]:
            return arch, key, candidate
    print(f"no candidate for sm{arch} {key} compiles without a problem; see ard_kernels/tune/candidates.py", flush=True)
    return arch, key, None


def write_shipped(arch: int, chosen: dict[str, dict[str, int]]) -> None:
    """Put into ard_kernels/tuned/sm<arch>.json; entries named in its `measured` list stay as they are."""
    path = tuning.SHIPPED / f"sm{arch}.json"
    table = json.loads(path.read_text()) if path.is_file() else {"measured": [], "configs": {}}
    merged = table["configs"] | chosen | {key: table["configs"][key] for key in table["measured"]}
    configs = ",\n".join(f"    {json.dumps(key)}: {json.dumps(merged[key])}" for key in keys() if key in merged)
    path.write_text(f'{{\n  "measured": {json.dumps(table["measured"])},\n  "configs": {{\n{configs}\n  }}\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", nargs="?", default="")
    parser.add_argument("--arch", type=int, nargs="*", default=list(tuning.ARCHITECTURES), choices=tuning.ARCHITECTURES)
    options = parser.parse_args()
    work = [(arch, key) for arch in options.arch for key in keys() if key.startswith(options.prefix)]
    with ProcessPoolExecutor() as pool:
        chosen = list(pool.map(choose, *zip(*work, strict=True)))
    if any(constants is None for _, _, constants in chosen):
        sys.exit(1)
    for arch in options.arch:
        write_shipped(arch, {key: constants for at, key, constants in chosen if at == arch})


if __name__ == "__main__":
    main()
