"""`ard flops`, `doctor`, `demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ard.cli.base import app, refusals


@app.command()
def flops(
    model: Annotated[
        str,
        typer.Option(
            help="Preset: DiT-S, DiT-B, DiT-L or DiT-XL with patch /2, /4 or /8; PixArt-alpha or PixArt-sigma with "
            "-256, -512 or -1024 (sigma: -2K, too)."
        ),
    ] = "DiT-XL/2",
    input_size: Annotated[
        int | None,
        typer.Option(min=1, help="Latent height = width; 32 is a 256-pixel image. PixArt's preset says it; DiT's: 32."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampling steps S, one segment each.")] = 4,
    history_layers: Annotated[int, typer.Option(min=0, help="Blocks that read the history, N.")] = 6,
    window: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Segments a query sees, its own included; all if unset.")
    ] = None,
    sink: Annotated[
        int, typer.Option(min=0, max=1000, help="First segments that every query sees besides the window.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """FLOPs of teacher and student: analytic, and counted on shapes alone (no weights are allocated)."""
    from ard.models.dit import DiTConfig
    from ard.models.flops import flop_table
    from ard.models.pixart import PixArtConfig

    try:
        preset = PixArtConfig if model.startswith("PixArt") else DiTConfig
        config = preset.from_name(model, **({} if input_size is None else {"input_size": input_size}))
        table = flop_table(config, steps=steps, history_layers=history_layers, window=window, sink=sink)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        typer.echo(json.dumps(table, indent=2))
        return
    view = Table(title=f"{model}, {steps} steps, {history_layers} history layers (batch 1, 2 FLOPs per multiply-add)")
    view.add_column("")
    for heading in ("analytic", "counted"):
        view.add_column(heading, justify="right")
    for row, values in table.items():
        cells = [f"{value:.4%}" if row == "overhead" else f"{value:,}" for value in values.values()]
        view.add_row(row.replace("_", " "), *cells)
    Console().print(view)


@app.command()
def doctor(
    check: Annotated[bool, typer.Option("--check", help="Run every kernel and compare it, in about a minute.")] = False,
) -> None:
    """Versions, devices, and per op which backends are available, with the reason for each refusal."""
    from ard_kernels import doctor as kernels_doctor

    raise typer.Exit(kernels_doctor.main(["--check"] if check else []))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.json, report.md, grid.png and losses.png.")] = Path(
        "demo-report"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: checks that it runs, scores nothing.")] = False,
    family: Annotated[
        str | None, typer.Option(help="Of single digits: dit, the default, or sit, a flow-matching teacher.")
    ] = None,
    scenes: Annotated[bool, typer.Option("--scenes", help="Scenes of up to four digits, steered by prompts.")] = False,
) -> None:
    """The whole method on scikit-learn's handwritten digits: teacher, trajectories, students, samples, scores."""
    from ard.demo.run import run_demo

    with refusals():
        report = run_demo(out=out, quick=quick, family=family, scenes=scenes)
    typer.echo(f"Report: {report}")
