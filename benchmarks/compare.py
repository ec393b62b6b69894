"""`python -m benchmarks.compare OLD NEW`: which comparisons got slower between two results (folders or files).

Machines are shared, so what counts is not seconds but the ratio of a peer's time to ours in the same run: the peer that
was fastest in OLD. A row has regressed when its ratio fell by more than 5 % and the noise of both runs, each run's that
of its ratio to its own fastest peer (`rows.relative_noise`). The exit status is 1 if a row regressed; rows that
only one of the two has are counted below the table.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.markdown import markdown
from benchmarks.rows import is_comparison, load_rooms, relative_noise, row_key
from benchmarks.tables import work

ALLOWED = 0.05


class Change(NamedTuple):
    """Of one row: ratio before and after, their relative change, the relative noise of both."""

    work: str
    old: float
    new: float
    noise: float

    @property
    def relative(self) -> float:
        return self.new / self.old - 1

    @property
    def regressed(self) -> bool:
        return self.relative < -ALLOWED - self.noise


def load(path: Path) -> dict[tuple, dict]:
    """Rows by what they measure."""
    rooms = load_rooms(path) if path.exists() else {}
    if not rooms:
        sys.exit(f"benchmarks.compare: {path} has no results; expected a folder of result files, or one")
    rows = [row for room in rooms.values() for row in room["rows"] if is_comparison(row)]
    return {row_key(row): row for row in rows}


def change(old: dict, new: dict) -> Change | None:
    """None where the two have no peer in common."""
    peer = old["best_peer"]
    if peer is None or peer not in new["milliseconds"] or new["best_peer"] is None:
        return None
    ratios = [row["milliseconds"][peer]["median"] / row["milliseconds"][row["ours"]]["median"] for row in (old, new)]
    return Change(work(new), *ratios, math.hypot(relative_noise(old), relative_noise(new)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    old, new = load(options.old), load(options.new)
    changes = [found for key in old if key in new and (found := change(old[key], new[key]))]
    if not changes:
        sys.exit(f"benchmarks.compare: {options.old} and {options.new} have no comparison in common")
    cells = [
        [c.work, f"{c.old:.2f}x", f"{c.new:.2f}x", f"{c.relative:+.1%}", f"{c.noise:.1%}", "SLOWER" * c.regressed]
        for c in sorted(changes, key=lambda c: c.relative)
    ]
    print(markdown(["work", "old ratio", "new ratio", "change", "noise", ""], cells))
    for name, one, other in (("only in OLD", old, new), ("only in NEW", new, old)):
        if missing := [key for key in one if key not in other]:
            print(f"{name}: {len(missing)} rows, first {' '.join(missing[0])}")
    regressed = sum(c.regressed for c in changes)
    print(f"{len(changes)} comparisons, {regressed} slower by more than {ALLOWED:.0%} and the noise")
    return 1 if regressed else 0


if __name__ == "__main__":
    sys.exit(main())
