"""What text to image could take or give wrongly in silence: prompts, runs of before, files of the user's, captions."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from ard import ARDStudent
from ard.common.settings import LATER, fingerprint
from ard.common.streams import shuffled
from ard.conditions.prompts import TEXTS_NAME, PromptStore, write_prompts
from ard.conditions.sources import Classes, Prompts, encoder_of, require_encoder
from ard.config.recipe import read_recipe
from ard.data.latents import LatentSpec
from ard.data.trajectories import StoreSpec
from ard.diffusion import generate
from ard.diffusion.sampling import SamplingConfig, write_samples
from ard.models.config import Condition
from ard.models.pixart import PixArtConfig
from ard.training import stages
from ard.weights.export import export_pipeline
from ard.weights.opened import open_student, random_teacher
from ard.weights.text_encoder import T5TextEncoder
from command_line import ard
from student.test_prompts import RedCodec
from student.text_stand_ins import PROMPTS, TINY, TOKENS, WordEncoder, tiny_prompts, tiny_recipe

LONG = "one two three four five six seven"


@pytest.mark.parametrize(
    "negative, message",
    [
        ("blurred\nugly", r"negative prompt 0 has more than one line: .*; expected one"),
        ("blurred\n", r"negative prompt 0 has more than one line"),
        ("b" * 9000, r"negative prompt 0 has 9000 characters; expected at most 8192"),
        (LONG, r"prompt 'one two .*' has 8 tokens; expected at most 6, .* or --truncate"),
    ],
)
def test_negative_prompts_are_checked_as_prompts_are(tmp_path, negative, message):
    with pytest.raises(ValueError, match=message):
        tiny_prompts(tmp_path / "store", negative=["ugly", negative][1:])
    assert not (tmp_path / "store").exists()


def test_a_negative_prompt_may_be_empty_or_cut(tmp_path):
    store = tiny_prompts(tmp_path / "store", negative=["", LONG], truncate=True)
    assert store.texts == [*PROMPTS, "", LONG] and store.text(torch.tensor([6]))[1].all()


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\u2028", "\x0b", "\x85"])
def test_a_prompt_with_a_line_break_at_its_end_is_refused(tmp_path, end):
    with pytest.raises(ValueError, match=r"prompt 1 has more than one line"):
        write_prompts(tmp_path / "store", ["a cube", f"a sphere{end}"], WordEncoder())
    assert not (tmp_path / "store").exists()


def test_a_file_of_the_users_in_the_stores_place_is_refused_before_anything_is_encoded(tmp_path):
    """`ard prompts encode runs/prompts.txt --out runs`."""
    (tmp_path / TEXTS_NAME).write_text("\n".join(PROMPTS) + "\n")
    encoder = WordEncoder()
    with pytest.raises(ValueError, match=r"prompts\.txt holds other texts; expected a new folder"):
        write_prompts(tmp_path, PROMPTS, encoder)
    assert encoder.encoded == [] and [path.name for path in tmp_path.iterdir()] == [TEXTS_NAME]


def test_pictures_of_the_users_stay(tmp_path, pillow):
    recipe = tiny_recipe(tmp_path)
    teacher, _ = random_teacher(recipe.model)
    student = ARDStudent.from_teacher(teacher, steps=2, history_layers=2)
    pictures = tmp_path / "samples" / "images"
    pictures.mkdir(parents=True)
    for name in ("holiday.png", "00009-000009.png", "00009-000009.jpg"):
        (pictures / name).write_bytes(b"earlier")
    how = {"prompts": stages.source_of(recipe), "codec": RedCodec()}
    write_samples(student, tmp_path / "samples", SamplingConfig(2, batch_size=2), **how)
    found = {path.name for path in pictures.iterdir()}
    assert found == {"00000-000000.png", "00001-000001.png", "holiday.png", "00009-000009.jpg"}


def test_stores_of_before_prompts_keep_their_names():
    """A run holds the fingerprint of its trajectories, and goes on only with those: as before these fields were."""
    labels = (Condition("labels", classes=10),)
    spec = StoreSpec(12, 8, 0, (1, 8, 8), labels, sampling_steps=5, keep=(3, 2, 1, 0), cfg_scale=1.5, cfg_channels=1)
    assert spec.fingerprint() == "94a18f67ebae"
    assert LatentSpec(10, 4, (1, 8, 8), labels, "test", "none").fingerprint() == "ef1ad0668935"


def test_a_later_field_counts_once_it_is_set():
    @dataclass(frozen=True)
    class Early:
        count: int = 1

    @dataclass(frozen=True)
    class Late(Early):
        prompts: str | None = field(default=None, metadata=LATER)

    assert fingerprint(Late()) == fingerprint(Early()) != fingerprint(Late(prompts="a")) != fingerprint(Late(2))


class OtherEncoder(WordEncoder):
    fingerprint = "other words"


def test_a_fresh_store_replaces_other_texts_unless_the_new_ones_are_refused(tmp_path):
    old = write_prompts(tmp_path, ["a caption"], WordEncoder())
    for how, message in (({}, "holds prompts with"), ({"fresh": True}, "is empty")):
        with pytest.raises(ValueError, match=message):
            write_prompts(tmp_path, ["two", "texts"] if not how else ["two", ""], WordEncoder(), **how)
        assert PromptStore(tmp_path).spec == old.spec
    assert write_prompts(tmp_path, ["two", "texts"], WordEncoder(), fresh=True).texts[:2] == ["two", "texts"]


def test_text_of_another_encoder_is_refused(tmp_path):
    """Of the same sizes: samples, and captions of real images, would be of no meaning."""
    recipe = tiny_recipe(tmp_path)
    source = stages.source_of(recipe)
    same = Prompts(tiny_prompts(tmp_path / "same", ["a caption"]))
    other = Prompts(write_prompts(tmp_path / "other", ["a caption"], OtherEncoder()))
    assert encoder_of(source) == "words" and encoder_of(Classes((Condition("labels", classes=2),))) is None
    require_encoder(same, encoder_of(source), "the student")
    require_encoder(other, None, "a bare file")
    with pytest.raises(
        ValueError, match=r"other was encoded by 'other words'; expected 'words', the text encoder of t"
    ):
        require_encoder(other, encoder_of(source), "the student")

    teacher, sha256 = random_teacher(recipe.model)
    store = stages.make_trajectories(recipe, teacher, sha256, tmp_path / "trajectories")
    stages.distill(recipe, teacher, sha256, store, tmp_path / "student")
    assert open_student(tmp_path / "student", recipe)[1].text_encoder == "words"
    sample = ("sample", str(tmp_path / "student"), "--out", str(tmp_path / "samples"), "--prompts")
    result = ard(*sample, str(tmp_path / "other"))
    assert result.exit_code == 1 and "expected 'words', the text encoder of" in " ".join(result.output.split())
    assert not (tmp_path / "samples").exists()
    result = ard(*sample, str(tmp_path / "same"), "--encoder", "t5")
    assert result.exit_code == 1 and "without a text to encode" in " ".join(result.output.split())
    assert ard(*sample, str(tmp_path / "same")).exit_code == 0


def test_a_pipeline_takes_the_encoder_of_the_students_run(tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from text_models import save_t5, tiny_t5

    encoder = T5TextEncoder(save_t5(tmp_path / "t5"), tokens=TOKENS)
    other = save_t5(tmp_path / "other")
    tiny_t5().bfloat16().save_pretrained(other)
    write_prompts(tmp_path / "prompts", ["one two", "three"], encoder)
    where = [f"trajectories.prompts={tmp_path / 'prompts'}", f"model.caption_channels={encoder.channels}"]
    recipe = read_recipe("pixart1024", [*TINY, *where])
    teacher, sha256 = random_teacher(recipe.model)
    store = stages.make_trajectories(recipe, teacher, sha256, tmp_path / "trajectories")
    stages.distill(recipe, teacher, sha256, store, tmp_path / "student")
    with pytest.raises(ValueError, match=r"other is the text encoder .*; expected '.*', that of .*student"):
        export_pipeline(tmp_path / "student", tmp_path / "pipe", encoder=str(other))
    assert not (tmp_path / "pipe").exists()
    export_pipeline(tmp_path / "student", tmp_path / "pipe", encoder=str(tmp_path / "t5"))


@pytest.mark.parametrize("negative", [False, True])
def test_a_guided_trajectory_by_hand(negative):
    """DDIM with guidance in float64, a sample and a branch at a time; prompts of several lengths in one batch."""
    torch.manual_seed(0)
    config = PixArtConfig(input_size=4, hidden_size=24, depth=2, num_heads=1, caption_channels=5, caption_tokens=4)
    teacher = random_teacher(config)[0].double()
    noise, text = torch.randn(3, 4, 4, 4, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([[4], [1], [2]])
    null = (torch.randn(1, 4, 5, dtype=torch.float64), torch.arange(4)[None] < 3) if negative else None
    how = {"sampling_steps": 4, "keep": (2, 0), "cfg_scale": 4.5, "cfg_channels": 4}
    made = generate(teacher, noise, text, mask, null=null, **how)

    signals = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    times = [int(time) for time in config.CONVENTION.grid(4, 0.0)[:4]]
    for row in range(3):
        x, kept = noise[row : row + 1], []
        own = (text[row : row + 1], mask[row : row + 1])
        other = null or (teacher.y_embedder.y_embedding[None], own[1])
        for place, time in enumerate(times):
            a, b = signals[time], signals[times[place + 1]] if place < 3 else torch.tensor(1.0).double()
            outputs = [teacher(x, torch.tensor([time]), *each)[:, :4] for each in (own, other)]
            epsilon = outputs[1] + 4.5 * (outputs[0] - outputs[1])
            x0 = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
            x = b.sqrt() * x0 + (1 - b).sqrt() * epsilon
            kept.append((x0, x))
        for segment, place in enumerate((1, 3)):
            torch.testing.assert_close(made.x0[row : row + 1, segment], kept[place][0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(made.ode[row : row + 1, segment], kept[place][1], rtol=1e-9, atol=1e-9)
    assert (made.x0[0] - made.x0[1]).abs().max() > 1e-3


def test_samples_train_against_the_text_of_their_own_prompts(tmp_path):
    """Stored and online, through the objective: the text is that of the prompt whose number is drawn for the sample."""
    recipe = tiny_recipe(tmp_path)
    teacher, sha256 = random_teacher(recipe.model)
    stored = stages.make_trajectories(recipe, teacher, sha256, tmp_path / "trajectories")
    online = stages.online_trajectories(recipe, teacher, sha256, torch.device("cpu"))
    indices = torch.tensor([11, 0, 7, 7, 3])
    source = stages.source_of(recipe)
    numbers = shuffled(recipe.trajectories.seed, indices.tolist(), len(PROMPTS), "prompts")
    expected, expected_mask = WordEncoder().encode([PROMPTS[n] for n in numbers])
    assert torch.equal(stored.read("prompt", indices), numbers) and source.texts == list(PROMPTS)
    for trajectories in (stored, online):
        for text, mask in (trajectories.conditions(indices), trajectories.pairs(indices)[2]):
            assert torch.equal(text, expected.bfloat16()) and torch.equal(mask, expected_mask)
