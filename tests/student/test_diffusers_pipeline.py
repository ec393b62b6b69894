"""`ARDPipeline` by diffusers' conventions, with tiny models made at random."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import ard
import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL")

from ard.models.dit import DiTConfig  # noqa: E402
from ard.models.pixart import PixArtConfig  # noqa: E402
from ard.models.sit import SiTConfig  # noqa: E402
from ard.models.student import ARDStudent  # noqa: E402
from ard.pipeline import ARDPipeline, ARDTransformer, write_pipeline  # noqa: E402
from ard.weights.text_encoder import T5TextEncoder  # noqa: E402
from ard.weights.vae import LatentCodec  # noqa: E402
from text_models import save_t5, save_tokenizer  # noqa: E402

SIZES = {"patch_size": 2, "hidden_size": 48, "depth": 3, "num_heads": 2, "frequency_embedding_size": 16}
TEXT = PixArtConfig(input_size=8, in_channels=4, caption_channels=16, caption_tokens=6, **SIZES)
CLASSES = DiTConfig(input_size=8, in_channels=4, num_classes=5, **SIZES)
PIXELS = SiTConfig(input_size=8, in_channels=1, num_classes=5, **SIZES)
STEPS, CHW = 3, (4, 8, 8)
PROMPTS = ["three above seven", "nothing on the right"]


def make_student(config, **settings) -> ARDStudent:
    torch.manual_seed(1)
    student = ARDStudent(config, **{"steps": STEPS, "history_layers": 2, **settings})
    with torch.no_grad():
        for parameter in student.parameters():  # zeros, with which training starts, would hide what is computed
            if not parameter.any():
                parameter.normal_(std=0.05)
    return student.eval()


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "scaling_factor": 0.5}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.AutoencoderKL(**sizes, **blocks).save_pretrained(folder / "vae")
    save_t5(folder / "t5")
    return {"vae": folder / "vae", "text_encoder": folder / "t5"}


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pipeline") / "text"
    write_pipeline(path, make_student(TEXT), **parts)
    return path


def loaded(folder, **options) -> ARDPipeline:
    pipe = ARDPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(folder) -> ARDPipeline:
    return loaded(folder)


def of(config, **components) -> ARDPipeline:
    pipe = ARDPipeline(ARDTransformer.of(make_student(config)), **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same_states(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_images_are_those_of_student_encoder_and_vae(pipe, parts):
    """What the parts give, called one by one."""
    noise = torch.randn(2, *CHW, generator=seeded(0))
    text, mask = T5TextEncoder(parts["text_encoder"], tokens=6).encode(PROMPTS)
    states = make_student(TEXT).sample(noise, text, mask)[:, -1]
    assert torch.equal(pipe(PROMPTS, generator=seeded(0), output_type="latent").images, states)
    images = LatentCodec(parts["vae"]).decode(states) / 2 + 0.5
    torch.testing.assert_close(pipe(PROMPTS, latents=noise, output_type="pt").images, images)
    assert (states[0] - states[1]).abs().max() > 1e-3  # prompts and noise matter


def test_round_trip(pipe, folder, tmp_path):
    pipe.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again")
    for name in ("transformer", "vae", "text_encoder"):
        assert same_states(getattr(pipe, name), getattr(again, name)), name
    assert again.student.config == TEXT and again.student.settings == pipe.student.settings
    kinds = [json.loads((path / "model_index.json").read_text()) for path in (folder, tmp_path / "again")]
    assert kinds[0] == {name: value for name, value in kinds[1].items() if name != "_name_or_path"}
    images = [each(PROMPTS[0], generator=seeded(3), output_type="np").images for each in (pipe, again)]
    assert np.array_equal(*images)


@pytest.mark.parametrize(
    "config, settings",
    [
        (CLASSES, {"window": 2, "sink": 0}),
        (replace(PIXELS, input_size=(4, 8)), {"window": 1, "sink": 1, "timesteps": (0.0, 0.25, 0.5)}),
    ],
)
def test_a_student_comes_back_as_it_was(config, settings, tmp_path):
    student = make_student(config, **settings)
    write_pipeline(tmp_path / "pipe", student)
    pipe = loaded(tmp_path / "pipe")
    assert type(pipe.student) is type(student) and pipe.student.config == config
    assert pipe.student.settings == student.settings and same_states(pipe.student, student)
    assert (pipe.vae, pipe.text_encoder, pipe.tokenizer) == (None, None, None)
    assert not pipe.student.training


def test_generator(pipe):
    first, second, other = (pipe(PROMPTS[0], generator=seeded(seed), output_type="np").images for seed in (0, 0, 1))
    assert np.array_equal(first, second) and np.abs(first - other).max() > 1e-3


def test_a_list_of_generators_is_the_images_one_by_one(pipe):
    options = {"output_type": "latent", "num_images_per_prompt": 2}
    together = pipe(PROMPTS, generator=[seeded(i) for i in range(4)], **options).images
    for i in range(4):
        alone = pipe(PROMPTS[i // 2], generator=seeded(i), output_type="latent").images
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"generator: got a list of 2; expected one for each of 4 images"):
        pipe(PROMPTS, generator=[seeded(0), seeded(1)], **options)


def test_output_types(pipe):
    made = {kind: pipe(PROMPTS, generator=seeded(0), output_type=kind).images for kind in ("np", "pt", "pil")}
    assert made["np"].shape == (2, 16, 16, 3) and made["np"].dtype == np.float32
    assert made["np"].min() >= 0 and made["np"].max() <= 1
    assert np.array_equal(made["pt"].permute(0, 2, 3, 1).numpy(), made["np"])
    assert [image.size for image in made["pil"]] == [(16, 16)] * 2 and made["pil"][0].mode == "RGB"
    assert np.array_equal(np.stack([np.asarray(image) for image in made["pil"]]), (made["np"] * 255).round())
    (images,) = pipe(PROMPTS, generator=seeded(0), return_dict=False)
    assert images == made["pil"]
    with pytest.raises(ValueError, match=r"output_type: got 'jpeg'; expected one of"):
        pipe(PROMPTS, output_type="jpeg")


def test_prompt_embeds(pipe):
    text, mask = pipe.encode_prompt(PROMPTS)
    expected = pipe(PROMPTS, generator=seeded(0), output_type="latent").images
    for kind in (torch.bool, torch.int64):
        given = {"prompt_embeds": text, "prompt_attention_mask": mask.to(kind)}
        assert torch.equal(pipe(**given, generator=seeded(0), output_type="latent").images, expected)
    alone = of(TEXT)
    assert torch.equal(alone(**given, generator=seeded(0), output_type="latent").images, expected)
    with pytest.raises(ValueError, match=r"prompt: got one without a text_encoder and a tokenizer"):
        alone(PROMPTS, output_type="latent")


def test_a_long_prompt_is_cut_with_a_warning(pipe, caplog, monkeypatch):
    monkeypatch.setattr(diffusers.utils.logging.get_logger("diffusers"), "propagate", True)
    long = "one two three four five six seven"
    with caplog.at_level("WARNING", logger="ard.weights.pipeline"):
        images = pipe([long, "one"], generator=seeded(0), output_type="latent").images
    assert "truncated because the student reads sequences up to 6 tokens: ['six seven']" in caplog.text
    caplog.clear()
    cut = pipe([long.removesuffix(" six seven"), "one"], generator=seeded(0), output_type="latent").images
    assert torch.equal(images, cut) and not caplog.records


def test_callback(pipe):
    seen = []

    def look(called, step, timestep, kwargs):
        seen.append((called, step, float(timestep), kwargs["latents"].clone()))
        return kwargs

    noise = torch.randn(1, *CHW, generator=seeded(0))
    states = pipe(PROMPTS[0], latents=noise, output_type="latent", callback_on_step_end=look).images
    assert [(called is pipe, step) for called, step, *_ in seen] == [(True, 0), (True, 1), (True, 2)]
    assert [time for _, _, time, _ in seen] == pytest.approx([999.0, 666.0, 333.0]) and pipe.num_timesteps == 3
    assert torch.equal(seen[-1][-1], states)
    expected = make_student(TEXT).sample(noise, *pipe.encode_prompt(PROMPTS[0]))[0]
    assert torch.equal(torch.cat([latents for *_, latents in seen]), expected)
    silent = pipe(
        PROMPTS[0],
        latents=noise,
        output_type="latent",
        callback_on_step_end=lambda *given: seen.append(given),
        callback_on_step_end_tensor_inputs=[],
    )
    assert torch.equal(silent.images, states) and seen[-1][-1] == {}


def test_a_callback_may_replace_the_latents(pipe):
    options = {"output_type": "latent", "generator": None, "latents": torch.randn(1, *CHW, generator=seeded(0))}

    def last(_, step, __, kwargs):
        return {"latents": torch.full_like(kwargs["latents"], 7.0, dtype=torch.float64)} if step == 2 else {}

    def first(_, step, __, kwargs):
        return {"latents": -kwargs["latents"]} if step == 0 else {}

    assert (pipe(PROMPTS[0], callback_on_step_end=last, **options).images == 7).all()
    changed = pipe(PROMPTS[0], callback_on_step_end=first, **options).images
    assert (changed - pipe(PROMPTS[0], **options).images).abs().max() > 1e-3  # the next steps have read it
    with pytest.raises(
        ValueError, match=r"callback_on_step_end: latents are \(1, 4\) torch.float32; expected \(1, 4, 8, 8\)"
    ):
        pipe(PROMPTS[0], callback_on_step_end=lambda *_: {"latents": torch.zeros(1, 4)}, **options)


@pytest.mark.parametrize(
    "outputs, message",
    [
        ([1], r"gave a list; expected a dict or None"),
        (True, r"gave a bool"),
        (torch.zeros(1, *CHW), r"gave a Tensor"),
        ({"latents": 3}, r"latents are int; expected \(1, 4, 8, 8\) floating point"),
        ({"latents": np.zeros((1, *CHW))}, r"latents are ndarray"),
        ({"latents": torch.zeros(1, *CHW, dtype=torch.int64)}, r"latents are \(1, 4, 8, 8\) torch.int64"),
    ],
)
def test_what_a_callback_gives_is_checked(pipe, outputs, message):
    with pytest.raises(ValueError, match="callback_on_step_end: " + message):
        pipe(PROMPTS[0], callback_on_step_end=lambda *_: outputs, output_type="latent")


def test_a_mask_is_one_and_zero(pipe):
    """One that is added to logits, 0 for what is read, would be read the other way round."""
    text, mask = pipe.encode_prompt("three")
    for wrong in ((1 - mask.float()) * -1e4, 0.5 * mask.float(), mask.float() / 0):
        with pytest.raises(ValueError, match=r"expected floating point, and 1 for the tokens to read, 0 for the"):
            pipe(prompt_embeds=text, prompt_attention_mask=wrong)
    with pytest.raises(ValueError, match=r"got torch.int64, and a mask from False to True; expected floating point"):
        pipe(prompt_embeds=text.long(), prompt_attention_mask=mask)


@pytest.mark.parametrize(
    "mappings, message",
    [
        ({"model": None, "settings": {}}, r"settings are nothing"),
        ({"model": {}, "settings": None}, r"settings are NoneType; expected \('steps', "),
        ({"model": None, "settings": make_student(TEXT).settings}, r"model is a NoneType; expected a mapping"),
    ],
)
def test_a_config_that_was_edited_is_refused(mappings, message):
    with pytest.raises(ValueError, match=message):
        ARDTransformer(**mappings)


def test_progress_bar(pipe, capsys):
    pipe.set_progress_bar_config(desc="steps")
    try:
        pipe(PROMPTS[0], output_type="latent")
    finally:
        pipe.set_progress_bar_config(disable=True)
    assert "steps: 100%" in capsys.readouterr().err


def test_class_labels(parts):
    pipe = of(CLASSES, vae=diffusers.AutoencoderKL.from_pretrained(parts["vae"]))
    noise = torch.randn(4, *CHW, generator=seeded(0))
    expected = pipe.student.sample(noise, torch.tensor([4, 4, 0, 0]))[:, -1]
    for labels in ([4, 0], torch.tensor([4, 0])):
        given = {"class_labels": labels, "num_images_per_prompt": 2, "generator": seeded(0)}
        assert torch.equal(pipe(**given, output_type="latent").images, expected)
    assert len(pipe(class_labels=3).images) == 1
    for labels, message in (
        ([5], r"labels span \[5, 5\]; expected within \[0, 4\]"),
        ([0.5], r"class_labels: got \(1,\) torch.float32; expected integers"),
        ([], r"class_labels: got \(0,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(class_labels=labels)


def test_pixels_need_no_vae():
    pipe = of(PIXELS)
    noise = torch.randn(2, 1, 8, 8, generator=seeded(0))
    states = pipe.student.sample(noise, torch.tensor([1, 2]))[:, -1]
    images = pipe(class_labels=[1, 2], latents=noise, output_type="np").images
    np.testing.assert_allclose(images, (states / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), atol=1e-6)
    assert [image.mode for image in pipe(class_labels=[1, 2], latents=noise).images] == ["L", "L"]


def test_dtype_and_device(folder):
    pipe = loaded(folder, torch_dtype=torch.bfloat16)
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    half = pipe(PROMPTS, generator=seeded(0), output_type="np").images
    moved = loaded(folder).to("cpu", torch.bfloat16)
    assert np.array_equal(moved(PROMPTS, generator=seeded(0), output_type="np").images, half)
    full = loaded(folder)(PROMPTS, generator=seeded(0), output_type="np").images
    assert 0 < np.abs(half - full).max() < 0.05  # times and noise are the same
    assert moved.student.timesteps(3, torch.device("cpu")).dtype == torch.float32


def test_wrong_calls(pipe):
    text, mask = pipe.encode_prompt(PROMPTS)
    classes = of(CLASSES)
    for call, message in (
        (lambda: pipe(), r"got nothing; expected exactly one of prompt, class_labels, prompt_embeds"),
        (lambda: pipe("one", class_labels=[1]), r"got prompt and class_labels; expected exactly one"),
        (lambda: pipe(class_labels=[1]), r"class_labels: got labels for a student that takes text"),
        (lambda: pipe(3), r"prompt: got int 3; expected text or a list of texts"),
        (lambda: pipe([]), r"prompt: got list \[\]"),
        (lambda: pipe(prompt_embeds=text), r"prompt_embeds and prompt_attention_mask together"),
        (
            lambda: pipe(prompt_embeds=text[:, :5], prompt_attention_mask=mask),
            r"got \(2, 5, 16\), \(2, 6\); expected \(n, 6, 16\), \(n, 6\)",
        ),
        (lambda: pipe("one", latents=torch.zeros(2, *CHW)), r"latents: got \(2, 4, 8, 8\) .*; expected \(1, 4, 8, 8\)"),
        (lambda: pipe("one", num_images_per_prompt=0), r"num_images_per_prompt: got 0; expected at least 1"),
        (lambda: pipe("one", guidance_scale=4.5), r"guidance_scale: got 4.5; expected none: guidance is distilled"),
        (lambda: pipe("one", negative_prompt=""), r"negative_prompt: got one; expected none: guidance is distilled"),
        (lambda: pipe("one", num_inference_steps=20), r"num_inference_steps: got 20; expected 3, for which"),
        (
            lambda: pipe("one", callback_on_step_end_tensor_inputs=["noise_pred"]),
            r"callback_on_step_end_tensor_inputs: got \['noise_pred'\]; expected some of \['latents'\]",
        ),
        (lambda: classes("one"), r"vae: got none for states of 4 channels; expected one, or output_type='latent'"),
        (lambda: classes("one", output_type="latent"), r"takes labels of 5 classes; expected class_labels"),
        (
            lambda: classes(prompt_embeds=text, prompt_attention_mask=mask, output_type="latent"),
            r"prompt_embeds: got text for a student that takes labels of 5 classes",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    pipe("one", num_inference_steps=3, guidance_scale=1.0, output_type="latent")


def test_components_must_fit(pipe, parts, tmp_path):
    vae, encoder, tokenizer = pipe.vae, pipe.text_encoder, pipe.tokenizer
    shifted = diffusers.AutoencoderKL(latent_channels=4, latents_mean=[0.5] * 4)
    for call, message in (
        (lambda: of(TEXT, vae=shifted), r"vae has latents_mean=.*; expected a scale only"),
        (lambda: of(PIXELS, vae=vae), r"vae: has latents of 4 channels; expected the student's 1"),
        (lambda: of(TEXT, text_encoder=encoder), r"got one of text_encoder and tokenizer; expected both"),
        (
            lambda: of(CLASSES, text_encoder=encoder, tokenizer=tokenizer),
            r"text_encoder: got one for a student that takes labels of 5 classes; expected none",
        ),
        (
            lambda: of(replace(TEXT, caption_channels=8), text_encoder=encoder, tokenizer=tokenizer),
            r"text_encoder: gives 16 channels; expected the student's 8",
        ),
        (
            lambda: write_pipeline(tmp_path / "new", make_student(CLASSES), text_encoder=parts["text_encoder"]),
            r"text_encoder: got one for a student that takes labels",
        ),
        (
            lambda: write_pipeline(tmp_path / "new", make_student(PIXELS), vae=parts["vae"]),
            r"vae: has latents of 4 channels",
        ),
        (
            lambda: write_pipeline(tmp_path / "new", make_student(TEXT), vae=parts["text_encoder"]),
            r"holds a None; expected an AutoencoderKL",
        ),
        (
            lambda: ARDTransformer(model={"family": "dit"}, settings={"steps": 3}),
            r"settings are \[?steps\]?; expected",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert list(tmp_path.iterdir()) == []


def test_links_and_copies(parts, folder, tmp_path):
    write_pipeline(tmp_path / "linked", make_student(TEXT), **parts, link=True)
    assert (tmp_path / "linked" / "text_encoder").resolve() == parts["text_encoder"].resolve()
    images = [
        loaded(path)("one", generator=seeded(0), output_type="np").images for path in (folder, tmp_path / "linked")
    ]
    assert np.array_equal(*images)
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert not list((folder / "text_encoder").glob("tokenizer*")) and not list((folder / "tokenizer").glob("model*"))
    write_pipeline(tmp_path / "from it", make_student(TEXT), vae=folder, text_encoder=folder)
    assert same_states(loaded(tmp_path / "from it").text_encoder, loaded(folder).text_encoder)
    with pytest.raises(FileExistsError, match=r"linked exists; expected a new folder"):
        write_pipeline(tmp_path / "linked", make_student(TEXT))


def test_weights_are_whole_or_refused(folder, tmp_path):
    transformer = ARDTransformer.from_pretrained(folder / "transformer")
    del transformer.student.blocks[0].mlp.fc1.bias
    transformer.student.blocks[0].mlp.fc1.register_parameter("bias", None)
    transformer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit its config: .*missing_keys.*blocks.0.mlp.fc1.bias"):
        ARDTransformer.from_pretrained(tmp_path)


def test_nothing_is_left_where_writing_fails(parts, tmp_path, monkeypatch):
    monkeypatch.setattr("ard.weights.pipeline._copy", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_pipeline(tmp_path / "pipe", make_student(CLASSES), vae=parts["vae"])
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_without_text_model_is_refused(parts, tmp_path):
    save_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"no config.json and no text_encoder/config.json"):
        write_pipeline(tmp_path / "new", make_student(TEXT), text_encoder=tmp_path)


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for name in ("ard.pipeline", "ard.weights.pipeline"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        ImportError, match=r"ard\.pipeline needs diffusers.*pip install 'ard-kernels\[diffusers,text\]'"
    ):
        importlib.import_module("ard.pipeline")


def test_nothing_else_needs_diffusers_or_transformers_to_be_imported():
    found, optional = set(), {"diffusers", "transformers", "tokenizers", "sentencepiece"}
    for path in Path(ard.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if optional & {name.partition(".")[0] for name in names}:
                found.add(path.name)
    assert not found  # weights/pipeline.py has them in a try statement
