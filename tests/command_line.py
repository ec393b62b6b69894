"""`ard` in this process. Where a package that the command line needs is missing, what imports this is skipped."""

from __future__ import annotations

import pytest

for package in ("typer", "rich", "yaml", "PIL"):
    pytest.importorskip(package)

from ard.cli import app  # noqa: E402
from ard.cli.base import refusals  # noqa: E402
from typer import Exit  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

__all__ = ["Exit", "app", "ard", "refusals"]


def ard(*arguments: str):
    """typer's Result: exit_code, output, exception."""
    return CliRunner().invoke(app, list(arguments))
