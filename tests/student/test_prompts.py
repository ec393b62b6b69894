"""Stores of prompts, what draws from them, and the stages of a model that is steered by text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from ard import ARDStudent
from ard.conditions.prompts import TEXTS_NAME, PromptStore, read_prompts, write_prompts
from ard.conditions.sources import Classes, Prompts, condition_source
from ard.config.recipe import read_recipe
from ard.data.latents import LatentSpec, LatentStore, StoredLatents, encode_folder, open_real, write_latents
from ard.data.trajectories import TrajectoryStore
from ard.diffusion import generate
from ard.diffusion.sampling import SamplingConfig, write_samples
from ard.evaluation.evaluate import open_images
from ard.models.pixart import PixArtConfig
from ard.storage.files import DamagedFile, parse_json
from ard.training import stages
from ard.training.plan import plan
from ard.weights.opened import open_student, random_teacher
from command_line import ard
from student.text_stand_ins import CHANNELS, PROMPTS, TINY, TOKENS, WordEncoder, tiny_prompts, tiny_recipe


def test_each_distinct_text_is_encoded_once(tmp_path):
    encoder = WordEncoder()
    given = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[2], PROMPTS[1]]
    store = write_prompts(tmp_path / "store", given, encoder, negative=["blurred", PROMPTS[2]], shard_size=2)
    assert store.texts == [*PROMPTS[:3], "", "blurred"] == encoder.encoded
    assert store.spec.prompts == 3 and store.spec.count == 5
    text, mask = store.text(torch.tensor([4, 0, 1, 0]))
    expected, expected_mask = encoder.encode(["blurred", PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert text.dtype == torch.bfloat16 and torch.equal(text, expected.bfloat16()) and torch.equal(mask, expected_mask)
    assert store.number("blurred") == 4 and store.number(PROMPTS[2]) == 2
    with pytest.raises(ValueError, match=r"holds no text 'sharp'; expected one that was encoded"):
        store.number("sharp")
    store.verify()


def test_a_killed_encoding_goes_on(tmp_path):
    whole = tiny_prompts(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        write_prompts(tmp_path / "killed", PROMPTS, WordEncoder(fail_after=4), shard_size=3)
    with pytest.raises(ValueError, match=r"unfinished: 1 of 2 shards of prompts are missing"):
        PromptStore(tmp_path / "killed")
    encoder = WordEncoder()
    store = write_prompts(tmp_path / "killed", PROMPTS, encoder, shard_size=3)
    assert encoder.encoded == [*PROMPTS[3:], ""] and store.spec == whole.spec
    for name in ("shard-00000.safetensors", "shard-00001.safetensors", TEXTS_NAME):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(ValueError, match=r"holds prompts with count=6; expected 3"):
        write_prompts(tmp_path / "killed", PROMPTS[:2], WordEncoder(), shard_size=3)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a cube\n\na sphere\n", r"p\.txt: line 2 is empty; expected text"),
        (b"a cube\n   \na sphere\n", r"line 2 is empty"),
        (b"\n\n", r"line 1 is empty"),
        (b"", r"line 1 is empty"),
        (b"a cube\n" + b"a" * 10_000 + b"\n", r"line 2 has 10000 characters; expected at most 8192"),
        (b"a cube\n\xff\xfe\n", r"line 2 is not UTF-8 \(byte 7\); expected UTF-8 text"),
        ("a cube\na\u2028b\n".encode(), r"line 2 has more than one line"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "p.txt")
    result = ard("prompts", "encode", str(tmp_path / "p.txt"), "--encoder", "none", "--out", str(tmp_path / "out"))
    assert result.exit_code == 1 and "p.txt: line" in result.output and not (tmp_path / "out").exists()


def test_files_of_prompts(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa cube\r\n  Zürich, 夜 \r\n\r\n".encode())
    assert read_prompts(tmp_path / "p.txt") == ["a cube", "Zürich, 夜"]
    captions = tmp_path / "images" / "b"
    captions.mkdir(parents=True)
    (captions / "1.txt").write_text("a caption\nof two lines\n")
    (tmp_path / "images" / "0.txt").write_text("first")
    assert read_prompts(tmp_path / "images") == ["first", "a caption of two lines"]
    with pytest.raises(ValueError, match=r"absent: is not there"):
        read_prompts(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.txt file"):
        read_prompts(tmp_path / "empty")


def test_prompts_of_too_many_tokens_are_refused_or_cut(tmp_path):
    long = "one two three four five six seven"
    with pytest.raises(ValueError, match=r"prompt 'one two .*' has 8 tokens; expected at most 6, .* or --truncate"):
        tiny_prompts(tmp_path / "store", [*PROMPTS, long])
    assert not (tmp_path / "store").exists()
    store = tiny_prompts(tmp_path / "store", [*PROMPTS, long], truncate=True)
    assert store.text(torch.tensor([5]))[1].all()


def test_damage_is_found(tmp_path):
    store = tiny_prompts(tmp_path / "store")
    shard = tmp_path / "store" / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-TOKENS * CHANNELS] ^= 4
    shard.write_bytes(content)
    with pytest.raises(DamagedFile, match=r"sha256 differs from the manifest for shard-00001"):
        PromptStore(store.folder).verify()
    result = ard("prompts", "verify", str(store.folder))
    assert result.exit_code == 1 and "shard-00001.safetensors" in result.output
    shard.write_bytes(content[:-8])
    with pytest.raises(DamagedFile, match=r"shard-00001\.safetensors"):
        PromptStore(store.folder)
    other = tiny_prompts(tmp_path / "other")
    (other.folder / TEXTS_NAME).write_text("\n".join(reversed(other.texts)) + "\n")
    with pytest.raises(DamagedFile, match=r"prompts\.txt: differs from what was encoded"):
        PromptStore(other.folder)


def test_text_that_is_not_finite_is_refused(tmp_path, monkeypatch):
    encode = WordEncoder.encode
    monkeypatch.setattr(WordEncoder, "encode", lambda self, texts: (encode(self, texts)[0] / 0, encode(self, texts)[1]))
    with pytest.raises(ValueError, match=r"prompts 0 to 2: the encoder's text is not finite"):
        tiny_prompts(tmp_path / "store")


def test_a_samples_prompt_is_a_function_of_seed_and_index(tmp_path):
    source = Prompts(tiny_prompts(tmp_path))
    (numbers,) = source.drawn(3, range(50))
    assert sorted(numbers.tolist()) == sorted(list(range(5)) * 10)
    assert torch.equal(torch.cat([source.drawn(3, [i])[0] for i in range(50)]), numbers)
    assert not torch.equal(source.drawn(4, range(50))[0], numbers)
    assert source.in_turn(range(4), (3, 1))[0].tolist() == [3, 1, 3, 1]
    with pytest.raises(ValueError, match=r"prompts: got \(5,\); expected within \[0, 4\]"):
        source.in_turn(range(1), (5,))  # a text that is there, for guidance only
    assert source.texts == list(PROMPTS)


def test_prompts_must_be_the_models(tmp_path):
    model = read_recipe("pixart1024", TINY).model
    tiny_prompts(tmp_path / "store")
    assert isinstance(condition_source(model, str(tmp_path / "store")), Prompts)
    wide = replace(model, caption_channels=4096)
    with pytest.raises(ValueError, match=r"text \(6, 10\) float32.*; expected the model's text \(6, 4096\) float32"):
        condition_source(wide, str(tmp_path / "store"))
    with pytest.raises(
        ValueError, match=r"prompts: got None for model\.family='pixart'; expected a folder of `ard prompts"
    ):
        condition_source(model, None)
    digits = read_recipe("digits").model
    with pytest.raises(ValueError, match=r"model\.family='dit'; expected none, its conditions are classes"):
        condition_source(digits, str(tmp_path / "store"))
    with pytest.raises(ValueError, match=r"text \(6, 10\) float32, text_mask .* cannot be taken in turn"):
        Classes(model.conditions)


@pytest.mark.parametrize("negative", [None, "", "blurred"])
def test_guidance_from_null_text_or_a_negative_prompt(tmp_path, negative):
    """A trajectory's first x0-prediction by hand, from the teacher's two outputs."""
    recipe = tiny_recipe(tmp_path, *([] if negative is None else [f"trajectories.negative_prompt={negative}"]))
    teacher, sha256 = random_teacher(recipe.model)
    store = stages.make_trajectories(recipe, teacher, sha256, tmp_path / "trajectories")
    assert store.spec.conditions == (Prompts(PromptStore(tmp_path / "prompts")).stored)
    assert store.spec.row_bytes == 5 * 4 * 8 * 8 * 4 + 8  # a prompt's number, not its text
    one = generate(teacher, *store_inputs(recipe, store), **how(recipe, store, negative))
    _, targets, (text, mask) = store.pairs(torch.arange(4))
    assert torch.equal(targets, one.x0) and text.shape == (4, TOKENS, CHANNELS) and mask.dtype == torch.bool
    if negative == "blurred":
        with pytest.raises(ValueError, match=r"holds trajectories with negative_prompt='blurred'; expected ''"):
            other = replace(recipe, trajectories=replace(recipe.trajectories, negative_prompt=""))
            stages.distill(other, teacher, sha256, store, tmp_path / "student")
        unknown = replace(recipe, trajectories=replace(recipe.trajectories, negative_prompt="sharp"))
        with pytest.raises(ValueError, match=r"holds no text 'sharp'"):
            stages.make_trajectories(unknown, teacher, sha256, tmp_path / "unknown")


def store_inputs(recipe, store):
    indices = range(4)
    return store.spec.noise(indices), *store.conditions(torch.arange(4))


def how(recipe, store, negative):
    config, prompts = recipe.trajectories, PromptStore(recipe.trajectories.prompts)
    null = None if negative is None else prompts.text(torch.tensor([prompts.number(negative)]))
    return {"sampling_steps": 5, "keep": config.keep, "cfg_scale": 4.5, "cfg_channels": 4, "null": null}


def test_a_teacher_without_null_text_asks_for_a_negative_prompt(tmp_path):
    recipe = tiny_recipe(tmp_path, "model.learned_null=false")
    teacher, sha256 = random_teacher(recipe.model)
    with pytest.raises(ValueError, match=r"has no null text .* trajectories\.negative_prompt=''"):
        stages.make_trajectories(recipe, teacher, sha256, tmp_path / "trajectories")


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit; to rounding where a product's row depends on how many rows there are (MKL on some chips)."""
    x, weight = torch.randn(64, 256), torch.randn(64, 256)
    if all(torch.equal(F.linear(x[:n], weight), F.linear(x, weight)[:n]) for n in range(1, 64)):
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=1e-4, atol=1e-3)


def test_stages_with_text(tmp_path, pillow):
    """Trajectories stored and online, distillation and its continuation, samples: from prompts to PNGs."""
    recipe = tiny_recipe(tmp_path)
    teacher, sha256 = random_teacher(recipe.model)
    store = stages.make_trajectories(recipe, teacher, sha256, tmp_path / "trajectories")
    online = stages.online_trajectories(recipe, teacher, sha256, torch.device("cpu"))
    for one, other in zip(store.pairs(torch.arange(4)), online.pairs(torch.arange(4)), strict=True):
        assert all(map(same, one, other)) if isinstance(one, tuple) else same(one, other)
    with pytest.raises(ValueError, match=r"numbers of prompts; expected their store"):
        TrajectoryStore(store.folder).pairs(torch.arange(2))
    other = Prompts(tiny_prompts(tmp_path / "others", PROMPTS[::-1]))
    with pytest.raises(ValueError, match=r"was made with prompts=.*; got prompts="):
        TrajectoryStore(store.folder, other).pairs(torch.arange(2))

    whole, _ = stages.distill(recipe, teacher, sha256, store, tmp_path / "whole")
    short = replace(recipe, distill=replace(recipe.distill, steps=2))
    stages.distill(short, teacher, sha256, store, tmp_path / "student")
    continued, _ = stages.distill(recipe, teacher, sha256, store, tmp_path / "student")
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), continued.state_dict().values(), strict=True)
    )

    student, _ = open_student(tmp_path / "student", recipe)
    prompts = stages.source_of(recipe)
    result = write_samples(student, tmp_path / "samples", SamplingConfig(7, batch_size=3), prompts=prompts)
    assert (
        result["prompts"] == list(PROMPTS) and parse_json((tmp_path / "samples" / "sample.json").read_text()) == result
    )
    file = open_images(tmp_path / "samples" / "samples.safetensors")
    assert file.count == 7
    assert plan(recipe)["history"]["M4, N = 3 of 3"] > plan(recipe)["history"]["M4, N = 2 of 3"]


class RedCodec:
    """Decodes to images, red as far as the latent's mean says."""

    fingerprint, downsampling = "red", 2

    def decode(self, latents):
        red = latents.mean((1, 2, 3), keepdim=True).tanh().expand(-1, 3, 16, 16).clone()
        red[:, 1:] = -1.0
        return red


def test_images_by_prompt(tmp_path, pillow):
    recipe = tiny_recipe(tmp_path)
    teacher, _ = random_teacher(recipe.model)
    student = ARDStudent.from_teacher(teacher, steps=4, history_layers=2)
    how = {"prompts": stages.source_of(recipe), "codec": RedCodec()}
    (tmp_path / "samples" / "images").mkdir(parents=True)
    (tmp_path / "samples" / "images" / "00009-000009.png").write_bytes(b"of an earlier call")
    write_samples(student, tmp_path / "samples", SamplingConfig(5, batch_size=2, classes=(3, 0)), **how)
    names = sorted(path.name for path in (tmp_path / "samples" / "images").iterdir())
    assert names == [f"{3 * (1 - i % 2):05d}-{i:06d}.png" for i in (1, 3, 0, 2, 4)]
    images = open_images(tmp_path / "samples" / "samples.npz")
    assert images.labels_N.tolist() == [3, 0, 3, 0, 3]
    again = tmp_path / "again"
    write_samples(student, again, SamplingConfig(5, batch_size=5, classes=(3, 0)), **how)
    assert (again / "samples.npz").read_bytes() == (tmp_path / "samples" / "samples.npz").read_bytes()


def test_gan_with_text(tmp_path):
    """Real latents with the numbers of their captions; the heads project on time and mean text."""
    train = "train: {steps: 2, batch_size: 4, log_every: 1}"
    gan = f"gan={{{train}, start: 1, virtual_batch: 2, kernel_size: 3, projection: 8}}"
    recipe = tiny_recipe(tmp_path, gan)
    teacher, sha256 = random_teacher(recipe.model)
    source, generator = stages.source_of(recipe), torch.Generator().manual_seed(0)
    latents = torch.randn(10, 4, 8, 8, generator=generator)
    spec = LatentSpec(10, 4, recipe.model.image_shape, source.stored, "test", "none", prompts=source.fingerprint)

    def encode(indices):
        return latents[list(indices)], *source.in_turn(indices)

    write_latents(tmp_path / "latents", spec, encode, batch_size=4)
    real = open_real(str(tmp_path / "latents"), recipe.model, source)
    assert real.rows(torch.tensor([7]))[1][0].shape == (1, TOKENS, CHANNELS)
    with pytest.raises(ValueError, match=r"expected their store"):
        StoredLatents(LatentStore(tmp_path / "latents"))
    store = stages.make_trajectories(recipe, teacher, sha256, tmp_path / "trajectories")
    student = ARDStudent.from_teacher(teacher, steps=4, history_layers=2)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    inputs = (recipe, student, "0" * 64, teacher, sha256, store, real, tmp_path / "gan")
    tuned, fitted = stages.finetune(*inputs)
    assert fitted.step == 2 and {"generator_loss", "discriminator_loss"} <= fitted.log[-1].keys()
    assert any(not torch.equal(before[name], tensor) for name, tensor in tuned.state_dict().items())
    c_BC, context = torch.zeros(2, 48), teacher.context(*store.conditions(torch.arange(2)))
    shown = [y[mask].mean(0) for y, mask in zip(*context, strict=True)]
    torch.testing.assert_close(teacher.summary(c_BC, context), torch.stack(shown))


def test_captions_beside_images(tmp_path, pillow):
    from PIL import Image

    class Codec:
        fingerprint = "mean"

        def latent_shape(self, images):
            return (len(images), 4, 8, 8)

        def encode(self, images, noise):
            return images.mean((1, 2, 3))[:, None, None, None].expand(-1, 4, 8, 8)

    images = tmp_path / "images"
    images.mkdir()
    for index, caption in enumerate((PROMPTS[2], PROMPTS[0], PROMPTS[2])):
        Image.new("RGB", (16, 16), (80 * index, 0, 0)).save(images / f"{index}.png")
        (images / f"{index}.txt").write_text(caption + "\n")
    prompts = Prompts(tiny_prompts(tmp_path / "store", read_prompts(images)))
    assert prompts.texts == [PROMPTS[2], PROMPTS[0]]
    store = encode_folder(images, Codec(), tmp_path / "latents", size=16, captions=prompts)
    assert store.read("prompt", torch.arange(3)).tolist() == [0, 1, 0] and store.spec.prompts == prompts.fingerprint
    (images / "1.txt").write_text("not encoded")
    with pytest.raises(ValueError, match=r"holds no text 'not encoded'"):
        encode_folder(images, Codec(), tmp_path / "other", size=16, captions=prompts)
    (images / "1.txt").unlink()
    with pytest.raises(ValueError, match=r"1\.txt: is not there; expected UTF-8 text"):
        encode_folder(images, Codec(), tmp_path / "other", size=16, captions=prompts)


@pytest.mark.slow
def test_the_recipe_at_1024_pixels_runs_with_all_its_tokens(tmp_path):
    """Width and depth made small, 4096 tokens a segment left: trajectories, a step, and samples cached as trained."""
    full = read_recipe("pixart1024", []).model
    assert full == PixArtConfig.from_name("PixArt-alpha-1024") and full.tokens == 4096
    sizes = ["model.input_size=128", "model.depth=2", "student.history_layers=1", "trajectories.count=2",
             "trajectories.shard_size=2", "trajectories.batch_size=2", "trajectories.sampling_steps=4",
             "distill.steps=1", "distill.batch_size=2", "execution.activation_checkpointing=true"]  # fmt: skip
    recipe = tiny_recipe(tmp_path, *sizes)
    teacher, sha256 = random_teacher(recipe.model)
    store = stages.make_trajectories(recipe, teacher, sha256, tmp_path / "trajectories")
    student, fitted = stages.distill(recipe, teacher, sha256, store, tmp_path / "student")
    assert fitted.step == 1 and fitted.log[0]["grad_norm"] > 0
    states, _, conditions = store.pairs(torch.arange(1))
    with torch.no_grad():
        samples = student.sample(states[:, 0], *conditions)
        own = torch.cat([states[:, :1], samples[:, :-1]], dim=1)
        torch.testing.assert_close(student(own, *conditions), samples, rtol=1e-3, atol=1e-3)
    assert samples.shape == (1, 4, 4, 128, 128)
