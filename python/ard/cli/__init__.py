"""The `ard` command. Heavy modules are imported inside the commands, so that `--help` is instant."""

from ard.cli import prompts, samples, tools, training  # noqa: F401  (they add their commands)
from ard.cli.base import app

__all__ = ["app"]
