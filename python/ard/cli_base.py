"""What the commands of `ard` share: the app, common options, errors in one line."""

from __future__ import annotations

import platform
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="AutoRegressive Distillation of diffusion transformers.", no_args_is_help=True, pretty_exceptions_enable=False
)

Config = Annotated[
    str, typer.Option("--config", "-c", help="YAML file, or a shipped one: digits, imagenet256, imagenet256_gan.")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value, laid over the config.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; a GPU where there is one.")]


def _say_versions(asked: bool) -> None:
    """Versions, without the second or two that importing torch takes."""
    if asked:
        own = runpy.run_path(str(Path(find_spec("ard_kernels").origin).with_name("version.py")))["__version__"]
        typer.echo(f"ard-kernels {own}, torch {metadata.version('torch')}, Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_versions, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None:
    """AutoRegressive Distillation of diffusion transformers. Start a command on several GPUs with torchrun -m ard."""


@contextmanager
def refusals() -> Iterator[None]:
    """Errors of the user's input as one line and exit status 1, instead of a traceback."""
    from ard.train import NonFiniteError

    try:
        yield
    except (ValueError, OSError, ImportError, NonFiniteError) as error:
        typer.echo(f"ard: {error}", err=True)
        raise typer.Exit(1) from error
