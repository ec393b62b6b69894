"""`ard prompts encode`, `verify`: text into the store that a text-steered teacher and its student read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ard.cli.base import Device, app, refusals
from ard.common.progress import progress_bar

prompts = typer.Typer(help="Encode prompts once, for trajectories and samples.", no_args_is_help=True)
app.add_typer(prompts, name="prompts")

Encoder = Annotated[str, typer.Option(help="Folder of transformers' T5 encoder and its tokenizer, or of a pipeline.")]
Tokens = Annotated[int, typer.Option(min=1, max=4096, help="The model's: PixArt-alpha 120, Sigma 300.")]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut prompts of more tokens, instead of refusing them.")]


@prompts.command()
def encode(
    source: Annotated[Path, typer.Argument(help="UTF-8 text, a prompt a line; or a folder of .txt files, one each.")],
    encoder: Encoder,
    out: Annotated[Path, typer.Option(help="The store, for trajectories.prompts and `ard sample --prompts`.")],
    tokens: Tokens = 120,
    negative: Annotated[
        list[str] | None, typer.Option(help="Text for trajectories.negative_prompt; the empty one is always stored.")
    ] = None,
    truncate: Truncate = False,
    batch_size: Annotated[int, typer.Option(min=1, max=65_536)] = 32,
    device: Device = None,
) -> None:
    """Encode each distinct prompt once; run again after a kill to finish it."""
    from ard.common.process import PATIENT, started
    from ard.conditions.prompts import read_prompts, write_prompts

    with refusals(), started(device, PATIENT) as process:
        texts = read_prompts(source)
        from ard.weights.text_encoder import T5TextEncoder  # needs transformers

        text_encoder = T5TextEncoder(encoder, tokens=tokens, device=process.device)
        with progress_bar("prompts", len(set(texts)), process.is_main) as advance:
            store = write_prompts(
                out,
                texts,
                text_encoder,
                negative=negative or (),
                truncate=truncate,
                batch_size=batch_size,
                process=process,
                on_progress=advance,
            )
        if process.is_main:
            spec = store.spec
            typer.echo(
                f"{out}: {spec.prompts} prompts of {len(texts)} given, and {spec.count - spec.prompts} other texts, as "
                f"{spec.tokens} x {spec.channels}"
            )


@prompts.command()
def verify(folder: Annotated[Path, typer.Argument(help="A store of prompts.")]) -> None:
    """Hash every shard again; fails naming those that differ."""
    from ard.conditions.prompts import PromptStore

    with refusals():
        store = PromptStore(folder)
        with progress_bar("verify", len(store), is_main=True) as advance:
            store.verify(on_progress=advance)
    typer.echo(f"{folder}: {len(store)} texts in {len(store.shards)} shards, all as written")
