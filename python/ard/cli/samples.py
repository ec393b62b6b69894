"""`ard latents`, `sample`, `evaluate`, `export`: the commands that use weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ard.cli.base import LARGEST_SEED, Device, Unfinished, app, refusals
from ard.cli.prompts import Truncate
from ard.common.progress import progress_bar

if TYPE_CHECKING:
    from ard.common.process import Process
    from ard.conditions.sources import Prompts
    from ard.models.student import ARDStudent

Weights = Annotated[str, typer.Option(help="Of a run, or a file that has both: ema (averaged) or model.")]
Recipe = Annotated[
    str | None, typer.Option("--config", "-c", help="For a bare file of weights: heads, history layers.")
]
Vae = Annotated[str | None, typer.Option(help="Folder of a diffusers AutoencoderKL.")]


@app.command()
def latents(
    images: Annotated[Path, typer.Argument(help="<class folder>/<image>; classes in sorted order.")],
    vae: Annotated[str, typer.Option(help="Folder of a diffusers AutoencoderKL.")],
    out: Annotated[Path, typer.Option(help="The store, for gan.real.")],
    size: Annotated[int, typer.Option(min=8, max=8192, help="Pixels; images are scaled and cropped to it.")] = 256,
    num_classes: Annotated[int, typer.Option(min=1, max=1_000_000)] = 1000,
    captions: Annotated[
        Path | None,
        typer.Option(help="Store of prompts: the one in the .txt file beside each image takes the label's place."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=65_536)] = 64,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of the posterior's noise.")] = 0,
    dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
    skip_damaged: Annotated[
        bool,
        typer.Option(
            "--skip-damaged",
            help="Try every image first and leave out those that cannot be read, listed in skipped.json in the store.",
        ),
    ] = False,
    device: Device = None,
) -> None:
    """Encode an image folder (PNG, JPEG, WEBP, BMP) once through a VAE; run again after a kill to finish it."""
    from ard.common.process import PATIENT, started
    from ard.conditions.prompts import PromptStore
    from ard.conditions.sources import Prompts
    from ard.data.latents import SKIPPED_NAME, damaged_images, encode_folder
    from ard.data.real_images import image_files
    from ard.weights.vae import LatentCodec

    with refusals(), started(device, PATIENT) as process:
        prompts = None if captions is None else Prompts(PromptStore(captions))
        codec, files, skip = LatentCodec(vae, device=process.device), image_files(images), None
        if skip_damaged:
            with progress_bar("images", len(files), process.is_main) as advance:
                skip = damaged_images(images, size, process, advance)
        with progress_bar("latents", len(files) - len(skip or ()), process.is_main) as advance:
            store = encode_folder(
                images,
                codec,
                out,
                size=size,
                num_classes=num_classes,
                captions=prompts,
                seed=seed,
                dtype=dtype,
                batch_size=batch_size,
                skip=skip,
                process=process,
                on_progress=advance,
            )
        if process.is_main:
            skipped = f"; {len(skip)} images skipped, see {out / SKIPPED_NAME}" if skip else ""
            typer.echo(f"{out}: {len(store)} latents of shape {tuple(store.spec.image_shape)}{skipped}")


@app.command()
def sample(
    source: Annotated[Path, typer.Argument(help="Run, checkpoint folder, or file of a student's weights.")],
    out: Annotated[Path, typer.Option(help="Folder for samples.npz (or .safetensors), grid.png, sample.json.")],
    count: Annotated[int | None, typer.Option(min=1, help="100 if unset; with prompts, one of each.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of one process.")] = 64,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Of the noise; sample i is a function of (seed, i).")
    ] = 0,
    classes: Annotated[
        str, typer.Option(help="Such as 0,5,10-12, in turn; all if unset. Of a store of prompts, their numbers.")
    ] = "",
    prompts: Annotated[
        Path | None, typer.Option(help="For a student of text: a store of `ard prompts encode`, or a file of prompts.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="One prompt, or several; instead of --prompts.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Folder of the T5 encoder, for what is not a store; texts go to OUT/prompts.")
    ] = None,
    truncate: Truncate = False,
    vae: Vae = None,
    weights: Weights = "ema",
    unfinished: Unfinished = False,
    config: Recipe = None,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    cuda_graph: Annotated[bool, typer.Option(help="On a GPU: one graph launch per batch.")] = True,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace other samples in the folder.")] = False,
    device: Device = None,
) -> None:
    """Sample a student: images as ADM-format .npz through a VAE or of a pixel model, else latents."""
    from ard.common.process import started
    from ard.conditions.sources import require_encoder
    from ard.config.recipe import read_recipe
    from ard.diffusion.sampling import SamplingConfig, parse_classes, write_samples
    from ard.weights.opened import open_student
    from ard.weights.vae import LatentCodec

    with refusals(), started(device) as process:
        recipe = read_recipe(config) if config is not None else None
        student, opened = open_student(source, recipe, weights, unfinished=unfinished)
        chosen = parse_classes(classes)
        texts = given_prompts(student, prompts, prompt, encoder, truncate, out, fresh, process)
        if texts is not None:
            require_encoder(texts, opened.text_encoder, str(source))
        count = count or (len(chosen or texts.texts) if texts else 100)
        settings = SamplingConfig(count, batch_size, seed, chosen, precision, cuda_graph)
        codec = LatentCodec(vae, device=process.device) if vae is not None else None
        facts = {"weights": weights, "weights_sha256": opened.sha256, "weights_step": opened.step}
        with progress_bar("sample", count, process.is_main) as advance:
            result = write_samples(
                student.to(process.device),
                out,
                settings,
                prompts=texts,
                codec=codec,
                facts=facts,
                fresh=fresh,
                process=process,
                on_progress=advance,
            )
        if process.is_main:
            rate = result["images_per_second"]
            speed = f", {rate:.4g} per second" if rate else ""
            typer.echo(f"{out / result['file']}: {count} samples in {student.steps} steps{speed}")


@app.command()
def evaluate(
    samples: Annotated[
        Path, typer.Argument(help=".npz of images (arr_0), .safetensors (images), or `ard sample`'s folder.")
    ],
    reference: Annotated[str, typer.Option(help=".npz of images or of statistics, .safetensors, or: digits.")],
    out: Annotated[Path | None, typer.Option(help="JSON; evaluate.json beside the samples if unset.")] = None,
    features: Annotated[
        str, typer.Option(help="pooled, digits, inception, dinov2, clip, package.module:function.")
    ] = "pooled",
    feature_weights: Annotated[
        Path | None, typer.Option(help="Inception's file, if not torch-fidelity's own; of DINOv2, CLIP: a folder.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=65_536)] = 256,
    neighbours: Annotated[int, typer.Option(min=1, max=65_536, help="k of precision and recall.")] = 3,
    device: Device = None,
) -> None:
    """Frechet distance, precision and recall of samples; called FID-50k only where it is."""
    from ard.common.process import started
    from ard.evaluation.evaluate import evaluate as score
    from ard.evaluation.evaluate import samples_file
    from ard.evaluation.features import load_features
    from ard.storage.files import write_json

    with refusals(), started(device) as process:
        if not process.is_main:
            return
        if samples.is_dir():
            samples = samples_file(samples)
        extractor = load_features(features, device=process.device, weights=feature_weights)
        with reference_file(reference) as against:
            result = score(samples, against, features=extractor, batch_size=batch_size, neighbours=neighbours)
        path = out or samples.parent / "evaluate.json"
        write_json(path, result)
    for name, value in result["metrics"].items():
        typer.echo(f"{name}: {value if value is None else format(value, '.4f')}")
    typer.echo(f"{path}: {result['samples']['count']} samples, features {result['features']}")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="Run, checkpoint folder, file of weights, or diffusers folder.")],
    out: Annotated[Path, typer.Argument(help="A .safetensors file (public), or a new folder (diffusers, pipeline).")],
    to: Annotated[
        str,
        typer.Option(
            help="public: the released checkpoints' names; diffusers: the class it has for the family; pipeline: a "
            "student as ard.pipeline.ARDPipeline."
        ),
    ],
    weights: Weights = "ema",
    unfinished: Unfinished = False,
    config: Recipe = None,
    segment: Annotated[
        int | None, typer.Option(min=0, help="Of a student, for diffusers: the step whose final layer is taken.")
    ] = None,
    vae: Vae = None,
    encoder: Annotated[str | None, typer.Option(help="Folder of the T5 encoder and its tokenizer.")] = None,
    link: Annotated[bool, typer.Option("--link", help="In a pipeline, links to VAE and encoder, not copies.")] = False,
) -> None:
    """Weights to public names or to diffusers, where nothing changes but the names; a student as a whole pipeline."""
    from ard.config.recipe import read_recipe
    from ard.weights.export import export_pipeline, export_weights

    with refusals():
        if to != "pipeline" and (vae is not None or encoder is not None or link):
            raise ValueError(f"--vae, --encoder and --link are of --to pipeline; got --to {to}")
        if to == "pipeline":
            if segment is not None:
                raise ValueError(
                    f"--segment is {segment}; expected none for --to pipeline, which takes all of a student"
                )
            recipe = read_recipe(config) if config is not None else None
            how: dict[str, Any] = {"weights": weights, "unfinished": unfinished, "recipe": recipe}
            return typer.echo(export_pipeline(source, out, vae=vae, encoder=encoder, link=link, **how))
        if segment is not None and to == "public":
            raise ValueError(f"--segment is {segment}; expected none for --to public, which takes all of a student")
        recipe = read_recipe(config) if config is not None else None
        written = export_weights(
            source, out, to=to, weights=weights, unfinished=unfinished, recipe=recipe, segment=segment
        )
        typer.echo(written)


def given_prompts(
    student: ARDStudent,
    store: Path | None,
    prompt: list[str] | None,
    encoder: str | None,
    truncate: bool,
    out: Path,
    fresh: bool,
    process: Process,
) -> Prompts | None:
    """The prompts of `ard sample`'s options, encoded if they are not yet; None for a student of classes."""
    from ard.conditions.prompts import check_prompt, read_prompts, write_prompts
    from ard.conditions.sources import Prompts, condition_source
    from ard.models.pixart import PixArtConfig
    from ard.storage.shards import MANIFEST_NAME

    if store is not None and prompt:
        raise ValueError("--prompts and --prompt are both given; expected one of them")
    where = None if store is None else str(store)
    if store is not None and not (store / MANIFEST_NAME).is_file():
        prompt = read_prompts(store)
    if prompt:
        from ard.weights.text_encoder import T5TextEncoder  # needs transformers

        model = student.config
        if not isinstance(model, PixArtConfig):
            raise ValueError(f"--prompt is given for a student of the family {model.family!r}; expected none")
        for text in prompt:
            check_prompt(text, "--prompt")
        if encoder is None:
            raise ValueError("--encoder is not given; expected the folder of the text encoder, or a store as --prompts")
        with progress_bar("prompts", len(set(prompt)), process.is_main) as advance:
            text_encoder = T5TextEncoder(encoder, tokens=model.caption_tokens, device=process.device)
            if text_encoder.channels != model.caption_channels:
                raise ValueError(
                    f"{encoder} gives text of {text_encoder.channels} channels; expected {model.caption_channels}, the "
                    "student's"
                )
            sizes: dict[str, Any] = {"truncate": truncate, "fresh": fresh, "process": process, "on_progress": advance}
            where = str(write_prompts(out / "prompts", prompt, text_encoder, **sizes).folder)
    elif encoder is not None or truncate:
        raise ValueError(
            "--encoder or --truncate is given without a text to encode; expected --prompt, or a file of prompts"
        )
    source = condition_source(student.config, where)
    return source if isinstance(source, Prompts) else None


@contextmanager
def reference_file(reference: str) -> Iterator[Path]:
    """The file of this path; for "digits", a temporary one, which does not stay."""
    if reference != "digits":
        yield Path(reference)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield write_digits(Path(folder) / "digits.npz")


def write_digits(path: Path) -> Path:
    """All of scikit-learn's digits as ADM-format .npz."""
    import torch

    from ard.data import digits
    from ard.storage.images import to_uint8, write_npz

    data = digits.load()
    images = to_uint8(torch.cat([data.train_images, data.held_out_images]))
    labels = torch.cat([data.train_labels, data.held_out_labels]).numpy()
    write_npz(path, iter([images]), len(images), labels=labels)
    return path
