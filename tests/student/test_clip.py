"""CLIP's features and score, against transformers used directly."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ard.evaluation.evaluate import evaluate
from ard.evaluation.features import CLIP_STD, Features, clip_pixels, load_features
from ard.storage.files import write_json, write_tensors
from ard.storage.images import from_uint8, to_uint8, write_npz
from PIL import Image
from safetensors.torch import load_file, save_file
from text_models import save_clip

transformers = pytest.importorskip("transformers")
SIDE = 16
TEXTS = ["three above seven", "nothing on the right", "one two three four five six seven nothing above", "two"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"), side=SIDE)


@pytest.fixture(scope="module")
def clip(folder):
    return load_features("clip", weights=folder)


def smooth(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Images (n, h, w, 3) uint8 without sharp edges, which resizers treat differently."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def processed(images_Nhwc: np.ndarray) -> torch.Tensor:
    """Pixels as transformers' own processor prepares them."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return processor([Image.fromarray(image) for image in images_Nhwc], return_tensors="pt").pixel_values


@torch.no_grad()
def theirs(folder: Path, pixels: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and text embeddings of norm 1 by CLIPModel and its tokenizer."""
    model = transformers.CLIPModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=8, return_tensors="pt")
    made = model(pixel_values=pixels, input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    return made.image_embeds, made.text_embeds


@pytest.mark.parametrize(
    "height, width, levels", [(SIDE, SIDE, 1e-3), (40, 40, 1), (33, 50, 1), (50, 33, 1), (50, 32, 1), (8, 8, 5)]
)
def test_pixels_are_those_of_the_processor_but_for_its_rounding(height, width, levels):
    """In levels of 8 bits. Enlarging, Pillow also cuts off what overshoots in one direction before the other."""
    images = smooth(3, height, width)
    got, expected = clip_pixels(from_uint8(images), SIDE), processed(images)
    assert got.shape == expected.shape
    assert (255 * min(CLIP_STD) * (got - expected).abs().max()) <= levels


@pytest.mark.parametrize("height, width", [(SIDE, SIDE), (40, 40), (33, 50)])
def test_image_embeddings(folder, clip, height, width):
    images = smooth(3, height, width)
    got = clip.extract(from_uint8(images))
    expected, _ = theirs(folder, clip_pixels(from_uint8(images), SIDE), TEXTS)
    torch.testing.assert_close(got / got.norm(dim=1, keepdim=True), expected, rtol=0, atol=1e-6)
    assert got.shape == (3, 12) and got.dtype == torch.float32 and not got.requires_grad
    assert (expected[0] - expected[1]).abs().max() > 0.1
    if (height, width) == (SIDE, SIDE):  # nothing to resize
        torch.testing.assert_close(theirs(folder, processed(images), TEXTS)[0], expected, rtol=0, atol=1e-6)


def test_text_embeddings(folder, clip):
    got, cut = clip.embed_texts(TEXTS)
    _, expected = theirs(folder, processed(smooth(1, SIDE, SIDE)), TEXTS)
    torch.testing.assert_close(got / got.norm(dim=1, keepdim=True), expected, rtol=0, atol=1e-6)
    assert cut == 1 and clip.embed_texts(TEXTS[:2])[1] == 0


NUMBERS = torch.tensor([2, 0, 0, 3, 2, 3])


def samples(folder: Path, suffix: str, numbers: torch.Tensor | None = NUMBERS, **content) -> Path:
    """Six samples in a folder as `ard sample` leaves it, with prompts."""
    folder.mkdir(exist_ok=True)
    images, path = smooth(6, 24, 24), folder / f"samples{suffix}"
    if suffix == ".npz":
        write_npz(path, [images], 6, labels=None if numbers is None else numbers.numpy())
    else:
        write_tensors(path, {"images": from_uint8(images), **({} if numbers is None else {"prompt": numbers})})
    write_json(folder / "sample.json", {"file": path.name, "prompts": TEXTS, **content})
    return path


@pytest.fixture
def reference(tmp_path) -> Path:
    path = tmp_path / "reference.npz"
    write_npz(path, [smooth(7, 24, 24, seed=1)], 7)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_clip_score(folder, clip, reference, tmp_path, suffix):
    path = samples(tmp_path / "samples", suffix)
    images_NF, texts_PF = theirs(folder, processed(smooth(6, 24, 24)), TEXTS)
    cosines = (images_NF * texts_PF[NUMBERS]).sum(dim=1)
    expected = (100 * cosines).clamp(min=0).mean()
    assert cosines.max() > 0 and cosines.min() < 0  # both sides of the clamp
    for batch_size in (4, 256):
        result = evaluate(path, reference, features=clip, batch_size=batch_size)
        assert result["metrics"]["clip_score"] == pytest.approx(float(expected), abs=1.0)  # of their pixels, see above
        assert result["settings"]["clip_truncated"] == 1 and result["features"] == "clip"
        assert result["metrics"]["frechet_distance"] > 0 and "class_consistency" not in result["metrics"]
    score = result["metrics"]["clip_score"]
    images_NF = clip.extract(from_uint8(smooth(6, 24, 24)))
    cosines = torch.cosine_similarity(images_NF.double(), clip.embed_texts(TEXTS)[0][NUMBERS].double())
    assert score == pytest.approx(float((100 * cosines).clamp(min=0).mean()), rel=1e-4)


def test_a_prompt_that_no_sample_has_is_not_counted(clip, reference, tmp_path):
    path = samples(tmp_path / "samples", ".npz", NUMBERS * 0 + 1)
    assert evaluate(path, reference, features=clip)["settings"]["clip_truncated"] == 0


def test_no_score_without_prompts(clip, reference, tmp_path):
    path = samples(tmp_path / "samples", ".npz")
    json_path = path.parent / "sample.json"
    for content in (None, {"file": path.name}, {"file": "other.npz", "prompts": TEXTS}):
        json_path.unlink()
        if content is not None:
            write_json(json_path, content)
        result = evaluate(path, reference, features=clip)
        assert "clip_score" not in result["metrics"] and "clip_truncated" not in result["settings"]
        write_json(json_path, {})
    samples(path.parent, ".npz")
    assert "clip_score" not in evaluate(path, reference, features=load_features("pooled"))["metrics"]


def test_numbers_of_prompts_are_no_classes(reference, tmp_path):
    images, pooled = to_uint8(torch.rand(6, 1, 8, 8)), load_features("pooled")
    features = Features("classes", pooled.extract, classify=lambda features_NF: features_NF[:, :4])
    for name in ("prompts", "classes"):
        (tmp_path / name).mkdir()
        write_npz(tmp_path / name / "samples.npz", [images], 6, labels=NUMBERS.numpy())
    write_json(tmp_path / "prompts" / "sample.json", {"file": "samples.npz", "prompts": TEXTS})
    scores = [
        evaluate(path / "samples.npz", path / "samples.npz", features=features)["metrics"]
        for path in (tmp_path / "prompts", tmp_path / "classes")
    ]
    assert ["class_consistency" in each for each in scores] == [False, True]


@pytest.mark.parametrize(
    "suffix, numbers, prompts, message",
    [
        (".npz", None, TEXTS, r"samples.npz: has no numbers of its prompts; expected arr_1"),
        (".safetensors", None, TEXTS, r"samples.safetensors: has no numbers of its prompts; expected .*prompt"),
        (".npz", NUMBERS + 1, TEXTS, r"samples.npz: numbers of prompts are 1 to 4; expected within \[0, 3\]"),
        (".npz", NUMBERS - 1, TEXTS, r"numbers of prompts are -1 to 2; expected within \[0, 3\]"),
        (".safetensors", NUMBERS.float(), TEXTS, r"prompt is torch.float32 \(6,\); expected int64 \(6,\)"),
        (".npz", NUMBERS, "three", r"sample.json: prompts are 'three'; expected a list of texts"),
        (".npz", NUMBERS, [1], r"prompts are \[1\]; expected a list of texts"),
        (".npz", NUMBERS, [], r"prompts are \[\]; expected a list of texts"),
    ],
)
def test_wrong_prompts(clip, reference, tmp_path, suffix, numbers, prompts, message):
    path = samples(tmp_path / "samples", suffix, numbers, prompts=prompts)
    with pytest.raises(ValueError, match=message):
        evaluate(path, reference, features=clip)


def test_only_colour_images(clip):
    with pytest.raises(ValueError, match=r"images are .*\(n, 4, 8, 8\); expected floating point \(n, 3, any, any\)"):
        clip.extract(torch.zeros(1, 4, 8, 8))


def test_folders_that_are_no_clip(folder, tmp_path, monkeypatch):
    for weights in (None, tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"expected a folder of transformers, of a CLIPModel"):
            load_features("clip", weights=weights)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
    with pytest.raises(ValueError, match=r"is of model_type 'siglip'; expected 'clip'"):
        load_features("clip", weights=tmp_path)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    name = "visual_projection.weight"
    save_file(
        {key: value for key, value in tensors.items() if key != name}, copy / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=rf"CLIPModel: .* do not fit its config: missing_keys: .*{name}"):
        load_features("clip", weights=copy)
    ids = torch.arange(8)[None]  # as old files have them
    save_file({**tensors, "text_model.embeddings.position_ids": ids}, copy / "model.safetensors", {"format": "pt"})
    assert load_features("clip", weights=copy).name == "clip"
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds .*pytorch_model.bin.*; expected model.safetensors"):
        load_features("clip", weights=copy)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"features 'clip' needs transformers .*pip install 'ard-kernels\[text\]'"):
        load_features("clip", weights=folder)
