"""Where results lie, and how a file is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def write_json(path: Path, content: object) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"{path.name}.new")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
