"""Digit scenes, the encoder of their prompts, and `ard demo --scenes` at a tiny size."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from ard.conditions.prompts import PromptStore
from ard.data import digits, scenes
from ard.demo.byte_encoder import ByteEncoder
from ard.models.pixart import PixArt
from ard.weights.opened import open_student, open_teacher

pytest.importorskip("yaml")
pictures = pytest.importorskip("matplotlib.image")

from ard.demo.digit_scenes import FrozenEncoder, Reader  # noqa: E402
from ard.demo.run import load_config, run_demo, summarize  # noqa: E402

TINY = {
    "model": {"hidden_size": 16, "depth": 2, "num_heads": 2, "caption_channels": 16},
    "teacher": {"train": {"steps": 10, "batch_size": 16}},
    "trajectories": {"count": 60, "shard_size": 40, "batch_size": 20, "sampling_steps": 6, "keep": [3, 0]},
    "student": {"history_layers": 1},
    "distill": {"steps": 6, "batch_size": 8, "log_every": 3},
    "gan": {"start": 1, "train": {"steps": 3, "batch_size": 8, "log_every": 2}},
    "demo": {
        "teacher_threads": 1,
        "classifier": {"steps": 40},
        "history_layers": [0, 1],
        "seeds": [0, 1],
        "scenes": {"count": 100, "encoder_heads": 2},
        "evaluation": {"count": 41, "batch_size": 25, "timing_batch_size": 50, "timing_repeats": 2},
    },
}
EVERY = [(a, b, c, d) for a in range(11) for b in range(11) for c in range(11) for d in range(11)][:-1]
SEVEN_WORDS = "three above seven, nothing above two"


def test_each_scene_has_a_prompt_of_its_own():
    assert scenes.prompt_of((3, scenes.EMPTY, 7, 2)) == SEVEN_WORDS
    assert len({scenes.prompt_of(scene) for scene in EVERY}) == len(EVERY)


def test_a_fifth_is_held_out_in_combination_only():
    held_out = [scene for scene in EVERY if scenes.is_held_out(scene)]
    assert 0.19 < len(held_out) / len(EVERY) < 0.21
    for place in range(scenes.CELLS):
        assert {scene[place] for scene in EVERY if not scenes.is_held_out(scene)} == set(range(11))


@pytest.mark.parametrize("held_out", [False, True])
def test_drawn_scenes_stay_on_their_side_and_depend_on_their_index_alone(held_out):
    drawn = scenes.draw_scenes(300, 5, held_out=held_out)
    assert all(scenes.is_held_out(scene) == held_out and set(scene) != {scenes.EMPTY} for scene in drawn)
    assert scenes.draw_scenes(20, 5, held_out=held_out) == drawn[:20] != scenes.draw_scenes(20, 6, held_out=held_out)
    share = sum(scene.count(scenes.EMPTY) for scene in drawn) / (4 * len(drawn))
    assert abs(share - scenes.EMPTY_SHARE) < 0.06


def test_scenes_are_rendered_from_scans_of_their_digits():
    data, drawn = digits.load(), scenes.draw_scenes(20, 5, held_out=False)
    images = scenes.render(drawn, data.train_images, data.train_labels, 1)
    assert images.shape == (20, *scenes.SCENE_SHAPE)
    assert torch.equal(images[:7], scenes.render(drawn[:7], data.train_images, data.train_labels, 1))
    assert not torch.equal(images, scenes.render(drawn, data.train_images, data.train_labels, 2))
    for scene, cells in zip(drawn, scenes.cells_of(images), strict=True):
        for digit, cell in zip(scene, cells, strict=True):
            known = data.train_images[data.train_labels == digit] if digit != scenes.EMPTY else -torch.ones(1, 1, 8, 8)
            assert (known == cell).flatten(1).all(dim=1).any()
    assert torch.equal(images[3, :, 8:, :8], scenes.cells_of(images)[3, 2])  # bottom left


class Nearest:
    """In place of a trained classifier: the label of the nearest known scan."""

    def __init__(self, data):
        self.images, self.labels = data.train_images.flatten(1), data.train_labels

    def __call__(self, images):
        nearest = torch.cdist(images.flatten(1), self.images).argmin(dim=1)
        return torch.nn.functional.one_hot(self.labels[nearest], 10).float()


def test_reader_reads_what_real_scenes_show():
    data, drawn = digits.load(), scenes.draw_scenes(200, 5, held_out=True)
    reader = Reader(Nearest(data), data.train_images)
    images = scenes.render(drawn, data.train_images, data.train_labels, 1)
    assert torch.equal(reader(images), torch.tensor(drawn))
    empty = reader(images + 0.02)[torch.tensor(drawn) == scenes.EMPTY]
    assert (empty == scenes.EMPTY).all()  # a little noise is no ink
    assert not torch.equal(reader(images.flip(3)), torch.tensor(drawn))


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return ByteEncoder(48, 8, 16, layers=1, heads=2).eval().requires_grad_(False)


def test_encoder_shows_a_token_for_each_word_and_the_end(encoder):
    texts = [SEVEN_WORDS, "three above", ""]
    text, mask = FrozenEncoder(encoder, 16).encode(texts)
    assert text.shape == (3, 8, 16) and mask.sum(dim=1).tolist() == [7, 3, 1]
    assert mask.long().diff(dim=1).max() <= 0  # shown first
    assert not text[~mask].any() and text[mask].abs().sum(dim=1).min() > 0
    for number, each in enumerate(texts):  # as alone
        torch.testing.assert_close(FrozenEncoder(encoder, 16).encode([each])[0][0], text[number])
    assert FrozenEncoder(encoder, 16).lengths(["a b", "a"]) == [3, 2]


def test_encoder_tells_words_and_their_places_apart():
    plain = ByteEncoder(48, 8, 16, layers=0)
    text, _ = plain(plain.bytes_of(["one two", "two one", "one owt", "one two"]))
    assert torch.equal(text[0], text[3]) and torch.equal(text[0, 0], text[2, 0])  # equal words in equal places
    assert not torch.equal(text[0, 1], text[2, 1])  # the order of letters
    assert not torch.equal(text[0, 0], text[1, 1]) and not torch.equal(text[0, 0], text[1, 0])


def test_encoder_is_trained_by_what_it_shows_alone(encoder):
    encoder.requires_grad_(True)
    bytes_nM = encoder.bytes_of(["one"])
    encoder(bytes_nM)[0].square().sum().backward()
    used = encoder.embedding.weight.grad.abs().sum(dim=1).nonzero().flatten().tolist()
    assert used == sorted([0, *(ord(letter) * 8 + place for place, letter in enumerate("one"))])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x" * 9, "9 bytes in a word; expected at most 8"),
        ("a b c d e f g h", "8 words; expected at most 7"),
        ("é" * 5, "10 bytes in a word"),
        ("seven77 " * 6, "48 bytes; expected at most 47"),
    ],
)
def test_encoder_refuses_texts_that_it_would_cut(encoder, text, said):
    with pytest.raises(ValueError, match=said):
        encoder.bytes_of([text])


def test_fingerprint_of_the_encoder_is_of_its_weights(encoder):
    before = FrozenEncoder(encoder, 16).fingerprint
    assert before == FrozenEncoder(encoder, 16).fingerprint
    with torch.no_grad():
        encoder.position[0, 0] += 1
    assert FrozenEncoder(encoder, 16).fingerprint != before


def test_shipped_settings_of_scenes():
    for quick in (False, True):
        config = load_config(quick, scenes=True)
        model, settings = config.recipe.model, config.demo.scenes
        assert config.demo.history_layers[0] == 0 and config.recipe.student.history_layers in config.demo.history_layers
        assert config.recipe.trajectories.keep[-1] == 0 and model.image_shape == scenes.SCENE_SHAPE
        encoder = ByteEncoder(
            settings.longest_prompt, model.caption_tokens, model.caption_channels, heads=settings.encoder_heads
        )
        prompts = [scenes.prompt_of(scene) for scene in EVERY[::211]] + ["seven above three, seven above seven"]
        text = encoder(encoder.bytes_of([*prompts, ""]))
        image, time = torch.zeros(len(text[0]), *model.image_shape), torch.zeros(len(text[0]), dtype=torch.int64)
        assert PixArt(model)(image, time, *text).shape == image.shape
    assert len(load_config(scenes=True).demo.seeds) >= 3


def test_settings_of_scenes_refuse():
    def changed(**changes):
        return load_config(scenes=True, changes=changes)

    with pytest.raises(ValueError, match=r"family: got 'sit'; expected none with scenes"):
        load_config(family="sit", scenes=True)
    with pytest.raises(ValueError, match=r"demo.scenes.count is 3999; expected at least trajectories.count=4000"):
        changed(demo={"scenes": {"count": 3999}}, trajectories={"count": 4000})
    with pytest.raises(ValueError, match=r"encoder_heads is 5; expected a divisor of model.caption_channels=64"):
        changed(demo={"scenes": {"encoder_heads": 5}})
    with pytest.raises(ValueError, match=r"\(1, 8, 8\); expected 'pixart' and \(1, 16, 16\), for scenes"):
        changed(model={"input_size": 8})
    with pytest.raises(ValueError, match=r"negative_prompt is missing; expected ''"):
        changed(trajectories={"negative_prompt": None})
    with pytest.raises(ValueError, match=r"demo.evaluation.count is 1; expected at least 2"):
        changed(demo={"evaluation": {"count": 1}})


def test_summary_says_how_much_larger_shares_are_seed_by_seed():
    def row(name, seed, share):
        distances = {"frechet_to_teacher": 1.0, "endpoint_mse": 1.0, "frechet_to_real": 1.0}
        return {"sampler": name, "history_layers": 0, "seed": seed, **distances, "scenes_seen": share}

    rows = [row("N=0", 0, 0.5), row("N=2", 0, 0.75), row("N=2 + GAN", 0, 0.5)]
    rows += [row("N=0", 1, 0.25), row("N=2", 1, 0.25), row("N=2 + GAN", 1, 1.0)]
    larger = summarize(rows)["larger_by"]
    assert larger["N=2"] == {"over": "N=0", "scenes_seen": {"mean": 0.125, "min": 0.0, "max": 0.25}}
    assert larger["N=2 + GAN"] == {"over": "N=2", "scenes_seen": {"mean": 0.25, "min": -0.25, "max": 0.75}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    return out, run_demo(out, quick=True, config=load_config(scenes=True, changes=TINY))


@pytest.mark.slow
def test_demo_of_scenes_writes_its_report(finished):
    out, path = finished
    text = path.read_text()
    for part in (
        "held-out prompts",
        "Quick run",
        "N=1 + GAN less N=1",
        "41 images",
        "pixart",
        "real scenes |",
        "not FID",
    ):
        assert part in text
    for image in ("grid.png", "losses.png"):
        assert pictures.imread(out / image).std() > 0
    result = json.loads((out / "report.json").read_text())
    names = ["N=0", "N=1", "N=1 + GAN"]
    assert [(row["sampler"], row["seed"]) for row in result["students"]] == [(n, s) for s in (0, 1) for n in names]
    for row in [*result["students"], result["teacher"], result["real"]]:
        for side in ("seen", "held_out"):
            assert 0 <= row[f"scenes_{side}"] <= row[f"cells_{side}"] <= 1
    assert result["real"]["cells_held_out"] > 0.5 > result["students"][0]["scenes_seen"]


@pytest.mark.slow
def test_held_out_prompts_are_in_no_training(finished):
    (seen,) = (finished[0] / "prompts" / "seen").iterdir()
    (held_out,) = (finished[0] / "prompts" / "held-out").iterdir()
    prompts = [set(store.texts[: store.spec.prompts]) for store in map(PromptStore, (seen, held_out))]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]
    sides = {scenes.prompt_of(scene): scenes.is_held_out(scene) for scene in EVERY}
    assert not any(sides[prompt] for prompt in prompts[0]) and all(sides[prompt] for prompt in prompts[1])


@pytest.mark.slow
def test_runs_of_scenes_open_as_sources(finished):
    out, recipe = finished[0], load_config(scenes=True, changes=TINY).recipe
    teacher, _ = open_teacher(out / "teacher", recipe.model)
    for run, layers in (("student-n0-seed1", 0), ("student-n1-gan-seed0", 1)):
        student, _ = open_student(out / run, None)
        assert student.config == teacher.config and student.routing.history_layers == layers


@pytest.mark.slow
def test_demo_of_scenes_is_reproducible(finished):
    out, _ = finished
    before = json.loads((out / "report.json").read_text())
    shards = {path: path.stat().st_mtime_ns for path in out.rglob("shard-*")}
    config = load_config(scenes=True, changes=TINY)
    run_demo(out, config=replace(config, demo=replace(config.demo, seeds=(0,), workers=1)))
    after = json.loads((out / "report.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in out.rglob("shard-*")} == shards
    assert after["students"] == before["students"][:3] and after["teacher"] == before["teacher"]
