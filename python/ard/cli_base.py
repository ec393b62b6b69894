"""What the commands of `ard` share: the app, common options, errors in one line, progress bars."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

app = typer.Typer(
    help="AutoRegressive Distillation of diffusion transformers.", no_args_is_help=True, pretty_exceptions_enable=False
)

LARGEST_SEED = 2**63 - 1  # as in `ard.config.SEED`
LONGEST_LINE = 1000
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")  # of PyTorch's RuntimeErrors, on CPUs and on GPUs

Config = Annotated[
    str, typer.Option("--config", "-c", help="YAML file, or a shipped one: digits, imagenet256, imagenet256_gan.")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value, laid over the config.")]
Unfinished = Annotated[bool, typer.Option("--unfinished", help="Take weights of a run that has steps to go.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; a GPU where there is one.")]


@app.callback()
def _commands() -> None:
    """AutoRegressive Distillation of diffusion transformers. Start a command on several GPUs with torchrun -m ard."""


@contextmanager
def refusals() -> Iterator[None]:
    """One line for what ends a command early: status 1 for errors of the user's input, 128 + n for the signal n."""
    from ard.train import NonFiniteError, Stopped

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


@contextmanager
def progress_bar(name: str, total: int, is_main: bool, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yields advance(n) of a progress bar with the time left, on the main process."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not is_main) as progress:
        task = progress.add_task(name, total=total, completed=done)
        yield lambda n: progress.advance(task, n)
