"""The `ard` command. Heavy modules are imported inside the commands, so that `--help` is instant."""

from ard.cli import training, prompts, samples, tools  # noqa: F401, I001  (they add their commands, in the order of --help)
from ard.cli.base import app

__all__ = ["app"]
