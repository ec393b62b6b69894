"""`python -m benchmarks.compare OLD NEW`: which comparisons got slower between two results (folders or files).

Machines are shared, so what counts is not seconds but the ratio of a peer's time to ours in the same run: the peer that
was fastest in OLD. A row has regressed when its ratio fell by more than 5 % and the noise of both runs, each run's that
of its ratio to its own fastest peer (`Row.noise`). The exit status is 1 if a row regressed; rows that only one of the
two has are counted below the table.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from benchmarks.markdown import markdown
from benchmarks.results import Row, load_rooms
from benchmarks.tables import work

ALLOWED = 0.05


def load(path: Path) -> dict[tuple, Row]:
    """Rows by what they measure."""
    rooms = load_rooms(path) if path.exists() else {}
    if not rooms:
        sys.exit(f"benchmarks.compare: {path} has no results; expected a folder of result files, or one")
    return {row.key: row for room in rooms.values() for row in room["rows"]}


def change(old: Row, new: Row) -> tuple[float, float, float, float] | None:
    """Ratio before and after, their relative change, the relative noise of both; None without a peer in common."""
    peer = old.best_peer
    if peer is None or peer not in new.milliseconds or new.best_peer is None:
        return None
    before, after = (row.time(peer) / row.time(row.ours) for row in (old, new))
    return before, after, after / before - 1, math.hypot(old.noise, new.noise)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    old, new = load(options.old), load(options.new)
    changes = [(found, new[key]) for key in old if key in new and (found := change(old[key], new[key]))]
    if not changes:
        sys.exit(f"benchmarks.compare: {options.old} and {options.new} have no comparison in common")
    cells, regressed = [], 0
    for (before, after, relative, noise), row in sorted(changes, key=lambda entry: entry[0][2]):
        slower = relative < -ALLOWED - noise
        regressed += slower
        cells.append(
            [work(row), f"{before:.2f}x", f"{after:.2f}x", f"{relative:+.1%}", f"{noise:.1%}", "SLOWER" * slower]
        )
    print(markdown(["work", "old ratio", "new ratio", "change", "noise", ""], cells))
    for name, one, other in (("only in OLD", old, new), ("only in NEW", new, old)):
        if missing := [key for key in one if key not in other]:
            print(f"{name}: {len(missing)} rows, first {' '.join(missing[0])}")
    print(f"{len(changes)} comparisons, {regressed} slower by more than {ALLOWED:.0%} and the noise")
    return 1 if regressed else 0


if __name__ == "__main__":
    sys.exit(main())
