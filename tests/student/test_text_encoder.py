"""T5 text encoders from folders of transformers: values, masks, fingerprints, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ard.conditions.prompts import write_prompts
from ard.weights.text_encoder import T5TextEncoder
from safetensors.torch import load_file, save_file
from text_models import VOCABULARY, save_t5, save_tokenizer, tiny_t5

transformers = pytest.importorskip("transformers")
TEXTS = ["three above seven", "", "one two three four five six seven nothing above below"]
N = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5"))


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def test_text_is_what_transformers_gives(folder):
    encoder = T5TextEncoder(folder, tokens=N)
    text, mask = encoder.encode(TEXTS)
    model = transformers.T5EncoderModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    made = tokenizer(TEXTS, padding="max_length", max_length=N, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**made).last_hidden_state
    assert torch.equal(text, expected) and text.shape == (3, N, encoder.channels) and not text.requires_grad
    assert mask.dtype == torch.bool and mask.sum(dim=1).tolist() == [4, 1, N]  # words and </s>
    assert encoder.lengths(TEXTS) == [4, 1, 11] and encoder.lengths([]) == []
    assert not encoder.model.training
    with pytest.raises(ValueError, match="texts: got none"):
        encoder.encode([])


def test_a_text_does_not_depend_on_its_batch(folder):
    encoder = T5TextEncoder(folder, tokens=N)
    together, masks = encoder.encode(TEXTS)
    for text, mask, prompt in zip(together, masks, TEXTS, strict=True):
        alone, its_mask = encoder.encode([prompt])
        assert torch.equal(its_mask[0], mask)
        torch.testing.assert_close(alone[0], text, rtol=1e-5, atol=1e-5)


def test_dtype_and_the_store_of_prompts(folder, tmp_path):
    encoder = T5TextEncoder(folder, tokens=N, dtype=torch.bfloat16)
    text, _ = encoder.encode(TEXTS[:1])
    assert text.dtype == torch.bfloat16
    store = write_prompts(tmp_path / "store", TEXTS[:1], encoder)
    stored, mask = store.text(torch.tensor([0, store.number("")]))
    assert torch.equal(stored[0], text[0]) and mask.sum(dim=1).tolist() == [4, 1]
    with pytest.raises(ValueError, match=r"has 11 tokens; expected at most 8"):
        write_prompts(tmp_path / "other", TEXTS[2:], encoder)


def test_folders_of_a_pipeline(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "text_encoder" / name).rename(tmp_path / "tokenizer" / name)
    expected = T5TextEncoder(folder, tokens=N)
    for path in (tmp_path, tmp_path / "text_encoder"):
        encoder = T5TextEncoder(path, tokens=N)
        assert encoder.fingerprint == expected.fingerprint
        assert torch.equal(encoder.encode(TEXTS)[0], expected.encode(TEXTS)[0])
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"has no tokenizer; expected tokenizer\.json"):
        T5TextEncoder(tmp_path, tokens=N)


def test_sharded_weights_and_those_of_a_whole_t5(folder, tmp_path):
    expected = T5TextEncoder(folder, tokens=N).encode(TEXTS)[0]
    model = transformers.T5EncoderModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    whole = tiny_t5(transformers.T5ForConditionalGeneration)
    whole.shared.load_state_dict(model.shared.state_dict())
    whole.encoder.load_state_dict(model.encoder.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    assert any(name.startswith("decoder.") for name in load_file(tmp_path / "whole" / "model.safetensors"))
    for name in ("sharded", "whole"):
        save_tokenizer(tmp_path / name)
        assert torch.equal(T5TextEncoder(tmp_path / name, tokens=N).encode(TEXTS)[0], expected)
    (shard, *_) = sorted((tmp_path / "sharded").glob("*-of-*"))
    shard.unlink()
    with pytest.raises(ValueError, match=r"index.json names 'model-00001.*expected a .safetensors file beside it"):
        T5TextEncoder(tmp_path / "sharded", tokens=N)


def test_a_sentencepiece_tokenizer(folder, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = copied(folder, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    lines = iter(["three above seven", "nothing on the right", "one below two"] * 20)
    options = {"vocab_size": 30, "hard_vocab_limit": False, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    prefix = str(tmp_path / "spiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=prefix, minloglevel=2, num_threads=1, **options
    )
    shutil.move(f"{prefix}.model", model / "spiece.model")
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    encoder = T5TextEncoder(model, tokens=32)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model / "spiece.model"))
    assert encoder.lengths(TEXTS[:1]) == [len(processor.encode(TEXTS[0])) + 1]
    assert encoder.encode(TEXTS[:1])[1].sum() == encoder.lengths(TEXTS[:1])[0]


def test_fingerprint_is_of_config_weights_and_tokenizer(folder, tmp_path):
    seen = {T5TextEncoder(folder, tokens=N).fingerprint}
    assert T5TextEncoder(copied(folder, tmp_path / "same"), tokens=2 * N).fingerprint in seen
    weights = copied(folder, tmp_path / "weights") / "model.safetensors"
    tensors = load_file(weights)
    tensors["shared.weight"][0, 0] += 1.0
    save_file(tensors, weights, {"format": "pt"})
    config = copied(folder, tmp_path / "config") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dropout_rate": 0.25}))
    tokenizer = copied(folder, tmp_path / "tokenizer") / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    for name in ("weights", "config", "tokenizer"):
        seen.add(T5TextEncoder(tmp_path / name / "copy", tokens=N).fingerprint)
    assert len(seen) == 4


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


NORM = "encoder.final_layer_norm.weight"
DAMAGES = {
    "missing": (lambda f: change_weights(f, lambda t: t.pop(NORM)), rf"do not fit its config: missing {NORM}"),
    "unexpected": (
        lambda f: change_weights(f, lambda t: t.update(extra=torch.ones(2))),
        r"do not fit its config: unexpected_keys.*extra",
    ),
    "misshapen": (lambda f: change_weights(f, lambda t: t.update({NORM: torch.ones(3)})), rf"{NORM} \[3\], not \[16\]"),
    "damaged": (lambda f: (f / "model.safetensors").write_bytes(b"no tensors"), r"is not a whole safetensors file"),
    "pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"holds .*pytorch_model.bin.*; expected model.safetensors .*pickle",
    ),
    "another model": (lambda f: change_config(f, model_type="bert"), r"of model_type 'bert'; expected 't5'"),
    "layers": (lambda f: change_config(f, num_layers=1 << 30), r"num_layers is 1073741824; expected 1 to 100"),
    "sizes": (
        lambda f: change_config(f, d_ff=1 << 20),
        r"config: .*wi_0.weight \[24, 16\], not \[1048576, 16\]",
    ),
    "no numbers": (lambda f: change_config(f, d_model="wide"), r"makes no T5EncoderModel"),
    "vocabulary": (
        lambda f: save_tokenizer(f, words=VOCABULARY),
        rf"has {VOCABULARY + 3} tokens; expected at most the model's {VOCABULARY}",
    ),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), r"tokenizer: .* does not load"),
    "padding": (lambda f: save_tokenizer(f, pad_token=None), r"has no padding token; expected one"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refusals(folder, tmp_path, damage):
    path = copied(folder, tmp_path)
    change, message = DAMAGES[damage]
    change(path)
    with pytest.raises(ValueError, match=message):
        T5TextEncoder(path, tokens=N)


def test_names_tokens_and_the_library(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no config.json and no text_encoder/config.json; expected a saved model"):
        T5TextEncoder("google/t5-v1_1-xxl", tokens=N)
    with pytest.raises(ValueError, match=r"tokens is 0; expected at least 1"):
        T5TextEncoder(folder, tokens=0)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'ard-kernels\[text\]'"):
        T5TextEncoder(folder, tokens=N)
