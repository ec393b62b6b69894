"""The committed tables of `make aot` and `make cuda-build`: what compilers made of each kernel, a CSV file per chip.

A row is a dataclass; a table's first line names the compiler whose numbers it holds, and may name the sources.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, fields
from pathlib import Path

from benchmarks.markdown import table

REGISTERS, BLOCKS = 65536, 32  # of a multiprocessor, compute capabilities 8.0 to 10.0


def blocks_per_sm(registers: int, threads: int, most_threads: int) -> int:
    """Thread blocks that fit on a multiprocessor of `most_threads` by registers and threads."""
    return min(REGISTERS // (-(-registers // 8) * 8 * threads), most_threads // threads, BLOCKS)


def show(title: str, row_type: type, rows: list) -> None:
    print(f"\n{title}\n{table([field.name for field in fields(row_type)], map(astuple, rows))}")


def write(path: Path, compiler: str, row_type: type, rows: list, sources: str = "") -> None:
    """sources: their `digest`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# {compiler}{f', sources {sources}' if sources else ''}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(row_type)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def compiler_of(path: Path) -> str | None:
    """The compiler whose numbers a table holds; None without a table."""
    return _first_line(path).split(", sources ")[0] or None


def sources_of(path: Path) -> str | None:
    """The digest of the sources that a table's numbers are of; None without one."""
    return _first_line(path).partition(", sources ")[2] or None


def _first_line(path: Path) -> str:
    return path.read_text().split("\n", 1)[0][2:] if path.is_file() else ""


def digest(root: Path, files: Iterable[Path]) -> str:
    """Of names and contents: the same sources have the same."""
    entries = [(path.relative_to(root).as_posix(), path.read_bytes()) for path in sorted(files)]
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:16]


def lines_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()[1:])) if path.is_file() else []


def differences(
    path: Path, rows: list, identity: tuple[str, ...], wanted: Callable[[dict], bool] = lambda line: True
) -> list[str]:
    """Rows that are not what the table says, and `wanted` lines without a row. `identity`: the fields that name one."""
    committed = {tuple(line[name] for name in identity): line for line in lines_of(path) if wanted(line)}
    found = []
    for row in rows:
        now = {name: str(value) for name, value in asdict(row).items()}
        name = tuple(now[field] for field in identity)
        then = committed.pop(name, None)
        if then is None:
            found.append(f"{path.stem} {' '.join(name)} is not in the table; see --update")
        elif then != now:
            changes = {field: (then.get(field), now[field]) for field in now if then.get(field) != now[field]}
            found.append(f"{path.stem} {' '.join(name)}: (table, now) {changes}")
    return found + [f"{path.stem} {' '.join(name)} is in the table only" for name in committed]
