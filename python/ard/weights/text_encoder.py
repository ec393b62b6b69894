"""Prompts -> text with a `transformers.T5EncoderModel` from a local folder.

Shape suffixes: n prompts, N tokens of each, E channels.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ard.storage.files import file_sha256, shown, whole_tensors
from ard.weights.diffusers_format import model_folder, read_json
from ard.weights.names import listing

WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (  # the first three make a folder one of a tokenizer
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")  # one tensor under two names; either will do
_OF_DECODER = ("decoder.", "lm_head.")  # weights of a whole T5, which are not read
_MOST_LAYERS = 100  # of an encoder; that of T5-XXL has 24


class T5TextEncoder:
    """A frozen T5 encoder and its tokenizer; an `ard.conditions.prompts.TextEncoder`.

    folder: a saved `T5EncoderModel` (or a whole T5, whose decoder is left out) with its tokenizer's files; or a saved
        pipeline, whose `text_encoder` and `tokenizer` are taken; or the `text_encoder` of one. Nothing is fetched.
    tokens: N, to which prompts are padded and cut. They are taken as they are: nothing is cleaned or lower-cased.
    device, dtype: where the weights stand, and in what the text comes.
    Attributes: tokens, channels (E), and fingerprint, the sha256 hex digest over config.json, the weight files and the
    tokenizer's files.
    Raises ImportError without transformers; ValueError for another model, for a config that asks for more weights than
    the files hold, for files that do not give all weights, and for a tokenizer that is absent or of another model.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        tokens: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        if tokens < 1:
            raise ValueError(f"T5TextEncoder: tokens is {tokens}; expected at least 1")
        files = TextEncoderFiles.of(folder)
        self.fingerprint = files.fingerprint()
        self.tokenizer = files.load_tokenizer()
        encoder = require_transformers("T5TextEncoder").T5EncoderModel
        model = load_whole(encoder, files.model, dtype, ignored=_OF_DECODER)
        self.model = model.to(device).requires_grad_(False)
        self.device, self.dtype = torch.device(device), dtype
        self.tokens, self.channels = tokens, files.channels

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, before it is cut to N."""
        return token_counts(self.tokenizer, texts)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text (n, N, E) in `dtype` and its mask (n, N) bool, on `device`, cut to N tokens."""
        text_nNE, mask_nN = encode_texts(self.tokenizer, self.model, texts, self.tokens)
        return text_nNE.to(self.dtype), mask_nN


@dataclass(frozen=True)
class TextEncoderFiles:
    """Folders and files of a T5 encoder and its tokenizer, looked at but not loaded."""

    model: Path
    tokenizer: Path
    of_model: list[Path]  # config.json, weights and their index
    of_tokenizer: list[Path]
    channels: int  # E
    vocabulary: int

    @classmethod
    def of(cls, folder: str | os.PathLike) -> TextEncoderFiles:
        """Those that `T5TextEncoder` takes. Raises as it does, but for what only loading shows."""
        transformers = require_transformers("T5TextEncoder")
        model, tokenizer = text_encoder_folders(folder)
        weights = model_weight_files(model)
        config = _sized_config(transformers, model, weights)
        index = [model / INDEX_NAME] if (model / INDEX_NAME).is_file() else []
        texts = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
        return cls(
            model, tokenizer, [model / "config.json", *weights, *index], texts, config.d_model, config.vocab_size
        )

    def fingerprint(self) -> str:
        files = [path for path in self.of_model if path.name != INDEX_NAME] + self.of_tokenizer
        lines = [f"{path.name} {file_sha256(path)}\n" for path in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def load_tokenizer(self) -> Any:
        return load_tokenizer(self.tokenizer, self.vocabulary)


def require_transformers(caller: str) -> ModuleType:
    """The library. Raises ImportError, with the line that installs it."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(f"{caller} needs transformers ({error}): pip install 'ard-kernels[text]'") from error


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, uncut and without padding."""
    if not texts:
        return []
    return [len(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]


@torch.no_grad()
def encode_texts(
    tokenizer: Any, model: Any, texts: Sequence[str], tokens: int, *, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Text (n, N, E) in the model's dtype and its mask (n, N) bool, padded and cut to N = ``tokens``.

    device: where the model computes; None is where its weights stand.
    """
    if not texts:
        raise ValueError("texts: got none; expected one at least")
    padding = {"padding": "max_length", "truncation": True, "max_length": tokens}
    made = tokenizer(list(texts), **padding, return_attention_mask=True, return_tensors="pt")
    device = model.device if device is None else device
    ids_nN, mask_nN = made["input_ids"].to(device), made["attention_mask"].to(device)
    text_nNE = model(input_ids=ids_nN, attention_mask=mask_nN).last_hidden_state
    return text_nNE, mask_nN.bool()


def text_encoder_folders(folder: str | os.PathLike) -> tuple[Path, Path]:
    """Folders of the model and of its tokenizer, as `T5TextEncoder` finds them. Raises ValueError without either."""
    model = model_folder(folder, "text_encoder")
    for candidate in (model, model.parent / "tokenizer"):
        if any((candidate / name).is_file() for name in TOKENIZER_FILES[:3]):
            return model, candidate
    raise ValueError(
        f"{folder}: has no tokenizer; expected {', '.join(TOKENIZER_FILES[:3])}, some of them, in {model} or in the "
        "folder tokenizer beside it"
    )


def model_weight_files(folder: Path) -> list[Path]:
    """Weight files of a saved model of transformers. Raises ValueError unless they are safetensors and all there."""
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    if not (folder / INDEX_NAME).is_file():
        found = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))
        raise ValueError(
            f"{folder} holds {listing(found) if found else 'no weights'}; expected {WEIGHTS_NAME} or {INDEX_NAME} "
            "(a .bin file is a pickle and is not read: save_pretrained writes safetensors)"
        )
    weight_map = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX_NAME} has no weight_map; expected tensor names and their files")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise ValueError(f"{folder / INDEX_NAME} names {shown(name)}; expected a .safetensors file beside it")
    return [folder / name for name in names]


def load_whole(model: Any, folder: Path, dtype: torch.dtype, *, ignored: tuple[str, ...] = ()) -> Any:
    """A model of this class of transformers with exactly the weights in its folder, in eval mode.

    ignored: beginnings of names that may be there besides. Raises ValueError for weights that are missing, unexpected
    or of other shapes, of which transformers only warns and leaves random values in their place.
    """
    try:
        loaded, loading = model.from_pretrained(
            str(folder),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
        )
    except Exception as error:  # of many kinds, from transformers and safetensors
        reason = " ".join(str(error).split())[:500]
        raise ValueError(f"{model.__name__}: the weights in {folder} do not load ({reason})") from error
    wrong = {kind: sorted(map(str, names)) for kind, names in loading.items() if names}
    others = [name for name in wrong.pop("unexpected_keys", []) if not name.startswith(ignored)]
    if others:
        wrong["unexpected_keys"] = others
    if wrong:
        said = "; ".join(f"{kind}: {listing(names)}" for kind, names in wrong.items())
        raise ValueError(f"{model.__name__}: the weights in {folder} do not fit its config: {said}")
    return loaded.eval()


def load_tokenizer(folder: Path, vocabulary: int) -> Any:
    """The tokenizer in a folder. Raises ValueError unless it loads, pads, and has at most ``vocabulary`` tokens."""
    try:
        # False, not unset: else transformers asks on the terminal whether to run a tokenizer's own code.
        tokenizer = require_transformers("tokenizer").AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of many kinds, according to the file that is wrong
        reason = " ".join(str(error).split())[:500]
        raise ValueError(f"tokenizer: {folder} does not load ({reason})") from error
    if tokenizer.pad_token_id is None:
        raise ValueError(f"tokenizer: {folder} has no padding token; expected one")
    if len(tokenizer) > vocabulary:
        raise ValueError(f"tokenizer: {folder} has {len(tokenizer)} tokens; expected at most the model's {vocabulary}")
    return tokenizer


def _sized_config(transformers: ModuleType, folder: Path, files: list[Path]) -> Any:
    """The config of a T5. Raises ValueError for another and for one that asks for weights that the files lack."""
    path = folder / "config.json"
    content = read_json(path)
    if content.get("model_type") != "t5":
        raise ValueError(f"T5TextEncoder: {path} is of model_type {shown(content.get('model_type'))}; expected 't5'")
    layers = content.get("num_layers", 6)
    if type(layers) is not int or not 1 <= layers <= _MOST_LAYERS:
        raise ValueError(f"T5TextEncoder: {path}: num_layers is {shown(layers)}; expected 1 to {_MOST_LAYERS}")
    held = {name: shape for file in files for name, shape in _shapes(file).items()}
    try:
        config = transformers.T5Config.from_dict(dict(content))
        with torch.device("meta"):
            state = transformers.T5EncoderModel(config).state_dict()
    except Exception as error:  # of many kinds, according to the entry that is wrong
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"T5TextEncoder: {path} makes no T5EncoderModel ({reason})") from error
    given = {_EMBEDDINGS[0] if name in _EMBEDDINGS else name: shape for name, shape in held.items()}
    shapes = {name: list(tensor.shape) for name, tensor in state.items() if name not in _EMBEDDINGS[1:]}
    if missing := [name for name in shapes if name not in given]:
        raise ValueError(f"T5TextEncoder: the weights in {folder} do not fit its config: missing {listing(missing)}")
    if wrong := [f"{name} {given[name]}, not {shape}" for name, shape in shapes.items() if given[name] != shape]:
        raise ValueError(f"T5TextEncoder: the weights in {folder} do not fit its config: {listing(wrong)}")
    return config


def _shapes(path: Path) -> Mapping[str, list[int]]:
    with whole_tensors(path), safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
