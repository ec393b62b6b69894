"""What the commands of `ard` share: the app, common options, errors in one line."""

from __future__ import annotations

import platform
import runpy
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    help="AutoRegressive Distillation of diffusion transformers.", no_args_is_help=True, pretty_exceptions_enable=False
)

LARGEST_SEED = 2**63 - 1  # as in `ard.common.settings.SEED`
LONGEST_LINE = 1000
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")  # of PyTorch's RuntimeErrors, on CPUs and on GPUs

Config = Annotated[
    str, typer.Option("--config", "-c", help="YAML file, or a shipped one: digits, imagenet256, sit256, ...")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value, laid over the config.")]
Unfinished = Annotated[bool, typer.Option("--unfinished", help="Take weights of a run that has steps to go.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; a GPU where there is one.")]


def _say_versions(asked: bool) -> None:
    """Versions, without the second or two that importing torch takes."""
    if asked:
        package = find_spec("ard_kernels")
        assert package is not None and package.origin is not None  # ard comes with it
        own = runpy.run_path(str(Path(package.origin).with_name("version.py")))["__version__"]
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
    """One line for what ends a command early: status 1 for errors of the user's input, 128 + n for the signal n."""
    from ard.training.trainer import NonFiniteError, Stopped

    try:
        yield
    except Stopped as stopped:
        typer.echo(f"ard: {stopped}", err=True)
        raise
    except KeyboardInterrupt as error:
        typer.echo("ard: stopped; every file on disk is whole, give the command again to continue", err=True)
        raise typer.Exit(128 + signal.SIGINT) from error
    except (ValueError, OSError, ImportError, NonFiniteError) as error:
        _refuse(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
        _refuse(error, "out of memory: ")


def _refuse(error: Exception, prefix: str = "") -> NoReturn:
    line = " ".join(line.strip() for line in str(error).splitlines()) or "Python's own objects"
    if len(line) > LONGEST_LINE:  # the system's own errors repeat names of any length
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 4 :]}"
    typer.echo(f"ard: {prefix}{line}", err=True)
    raise typer.Exit(1) from error
