"""`ard export`: weights of any source under public names, or as a diffusers model."""

from __future__ import annotations

from pathlib import Path

from ard.config.recipe import Recipe
from ard.models.pixart import PixArtConfig
from ard.storage.files import shown, write_tensors
from ard.weights.diffusers_format import class_of, save_diffusers, segment_teacher_state
from ard.weights.names import infer_config, unseen_of, with_positions
from ard.weights.opened import model_config, open_source, open_student, require_config
from ard.weights.text_encoder import TextEncoderFiles

TARGETS = ("public", "diffusers")


def export_pipeline(
    source: str | Path,
    out: Path,
    *,
    vae: str | None = None,
    encoder: str | None = None,
    link: bool = False,
    weights: str = "ema",
    unfinished: bool = False,
    recipe: Recipe | None = None,
) -> str:
    """Writes a student as a folder for `ard.pipeline.ARDPipeline` and says so; see `write_pipeline`.

    Raises ValueError for another text encoder than the one that a run's student was trained with, too.
    """
    from ard.weights.pipeline import write_pipeline  # needs diffusers

    student, opened = open_student(source, recipe, weights, unfinished=unfinished)
    if encoder is not None and opened.text_encoder is not None:
        found = TextEncoderFiles.of(encoder).fingerprint()
        if found != opened.text_encoder:
            raise ValueError(
                f"{encoder} is the text encoder {found}; expected {shown(opened.text_encoder)}, that of {source}"
            )
    write_pipeline(out, student, vae=vae, text_encoder=encoder, link=link)
    parts = [name for name, part in (("VAE", vae), ("text encoder", encoder)) if part is not None]
    return f"{out}: ARDPipeline of {student.steps} steps, with {' and '.join(parts) or 'no other part'}"


def export_weights(
    source: str | Path,
    out: Path,
    *,
    to: str,
    weights: str = "ema",
    unfinished: bool = False,
    recipe: Recipe | None = None,
    segment: int | None = None,
) -> str:
    """Writes the weights of ``source`` to ``out`` and says what was written.

    to: "public" writes a .safetensors file with the released checkpoints' names, teacher or student as they are;
    "diffusers" a folder for DiTTransformer2DModel or PixArtTransformer2DModel, of a teacher or of one ``segment`` of a
    student (its blocks with that segment's final layer: what the student computes there without history).
    recipe: gives what a bare file of weights does not show. unfinished: takes a run that has steps to go, too.
    """
    if to not in TARGETS:
        raise ValueError(f"to: got {to!r}; expected one of {TARGETS}")
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; expected a new path")
    opened = open_source(source, weights, unfinished=unfinished)
    if recipe and opened.facts:
        require_config(opened, model_config(opened, recipe.model), recipe.model)
    if to == "public":
        if out.suffix != ".safetensors":
            raise ValueError(f"out: got {out.name!r}; expected a .safetensors file")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(out, opened.state)
        return f"{out}: {len(opened.state)} tensors"
    student = any(name.startswith("final_layer2.") for name in opened.state)
    if student != (segment is not None):
        raise ValueError(
            f"segment: got {segment}; expected "
            + ("--segment of the student's steps, from 0 on" if student else "none for a teacher")
        )
    state = dict(opened.state) if segment is None else segment_teacher_state(opened.state, segment)
    if not opened.facts and not recipe:
        raise ValueError(f"{source} is a bare file of weights; expected --config beside it, for the number of heads")
    said = model_config(opened) if opened.facts or not recipe else recipe.model
    their_class = class_of(said)
    # A bare DiT shows its grid; a PixArt may have none.
    input_size = said.input_size if opened.facts or isinstance(said, PixArtConfig) else None
    sizes = {"num_heads": said.num_heads, "family": said.family, "input_size": input_size, **unseen_of(said)}
    config = infer_config(state, **sizes)
    if opened.facts:
        require_config(opened, config, said)
    state = with_positions(state, config)
    save_diffusers(out, state, config)
    dropped = isinstance(config, PixArtConfig) and config.learned_null
    without = ", without its null text, which that class has no place for" if dropped else ""
    return f"{out}: {their_class.name}, {len(state) - dropped} tensors of {source}{without}"
