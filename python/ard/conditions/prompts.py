"""Stores of encoded prompts: each distinct text once, as a frozen text encoder gives it.

prompts.txt    the texts, one a line: first the prompts, in the order in which they were first given, then texts that
               no sample draws, such as negative prompts; the empty one is always there
shard-*        text (rows, N, E) bfloat16 and text_mask (rows, N) bool, in the format of `ard.storage.shards`
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ard.common.process import Process
from ard.common.settings import fingerprint
from ard.models.config import Condition
from ard.storage.files import DamagedFile, FolderLock, remove_folder, shown, write_text
from ard.storage.shards import MANIFEST_NAME, ShardedStore, ShardSpec, Tensors, write_shards

TEXTS_NAME = "prompts.txt"
LARGEST_FILE = 1 << 30  # bytes of texts
LONGEST_PROMPT = 8192  # characters
EMPTY = ""


class TextEncoder(Protocol):
    """Such as `ard.weights.text_encoder.T5TextEncoder`; its weights are what ``fingerprint`` says."""

    fingerprint: str
    tokens: int  # N
    channels: int  # E

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, before it is cut to N."""

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text (n, N, E) and its mask (n, N) bool, cut to N tokens."""


@dataclass(frozen=True)
class PromptSpec(ShardSpec):
    """What a store of prompts holds."""

    count: int  # texts
    shard_size: int
    prompts: int  # of the texts, those that samples draw: the first ones
    tokens: int  # N
    channels: int  # E
    texts_sha256: str
    encoder: str  # fingerprint

    def __post_init__(self) -> None:
        if not 1 <= self.prompts <= self.count:
            raise ValueError(f"PromptSpec: prompts={self.prompts}; expected 1 to count={self.count}")

    def fingerprint(self) -> str:
        return fingerprint(self)

    @property
    def conditions(self) -> tuple[Condition, Condition]:
        """What a model is given of it."""
        text = Condition("text", (self.tokens, self.channels), "float32")
        return text, Condition("text_mask", (self.tokens,), "bool")

    @property
    def row_bytes(self) -> int:
        return self.tokens * (self.channels * torch.bfloat16.itemsize + 1)

    def tensors(self, rows: int) -> Tensors:
        sizes = (rows, self.tokens)
        return {"text": (torch.bfloat16, (*sizes, self.channels)), "text_mask": (torch.bool, sizes)}

    def wrong_values(self, name: str, tensor: Tensor) -> str | None:
        if name == "text_mask" and tensor.view(torch.uint8).max() > 1:
            return "text_mask holds bytes that are no booleans"
        return None


class PromptStore(ShardedStore):
    """Texts, and their encodings by number."""

    KIND = "prompts"

    def __init__(self, folder: str | os.PathLike):
        super().__init__(Path(folder), self.KIND, PromptSpec)
        self.texts = _read_texts(self.folder / TEXTS_NAME)
        if len(self.texts) != self.spec.count or _sha256(self.texts) != self.spec.texts_sha256:
            raise DamagedFile(f"{self.folder / TEXTS_NAME}: differs from what was encoded; encode into a new folder")
        self._numbers = {text: number for number, text in enumerate(self.texts)}

    def text(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Text (n, N, E) bfloat16 and its mask (n, N) of texts by number, on the CPU."""
        return self.read("text", numbers.cpu()), self.read("text_mask", numbers.cpu())

    def number(self, text: str) -> int:
        """Of a text that was encoded. Raises ValueError for another."""
        if text not in self._numbers:
            raise ValueError(
                f"{self.folder} holds no text {shown(text)}; expected one that was encoded: a prompt, '' or one of "
                "--negative"
            )
        return self._numbers[text]


def write_prompts(
    folder: str | os.PathLike,
    prompts: Iterable[str],
    encoder: TextEncoder,
    *,
    negative: Iterable[str] = (),
    truncate: bool = False,
    shard_size: int = 1024,
    batch_size: int = 32,
    fresh: bool = False,
    process: Process | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> PromptStore:
    """Encodes each distinct prompt once, and '' and ``negative`` beside them; goes on where an equal call was killed.

    prompts: one line of text each, at least one. truncate: cut what has more tokens than the encoder keeps, instead of
    refusing it. fresh: a store of other texts is replaced.
    Raises ValueError, before anything is written, for a prompt that is empty, too long or has a line break in it, as
    one of ``negative`` may not be either, unless empty; and for a folder that holds other texts.
    """
    process, folder = process or Process(), Path(folder)
    given = list(dict.fromkeys(prompts))
    for number, text in enumerate(given):
        check_prompt(text, f"prompt {number}")
    if not given:
        raise ValueError("prompts: got none; expected one at least")
    others = [text for text in dict.fromkeys(negative) if text != EMPTY]
    for number, text in enumerate(others):
        check_prompt(text, f"negative prompt {number}")
    texts = list(dict.fromkeys([*given, EMPTY, *others]))
    if not truncate:
        _require_short([*given, *others], encoder)
    if (folder / TEXTS_NAME).exists() and not (folder / MANIFEST_NAME).exists():
        raise ValueError(f"{folder / TEXTS_NAME} holds other texts; expected a new folder, or a store")
    spec = PromptSpec(
        count=len(texts),
        shard_size=shard_size,
        prompts=len(given),
        tokens=encoder.tokens,
        channels=encoder.channels,
        texts_sha256=_sha256(texts),
        encoder=encoder.fingerprint,
    )

    def make_rows(indices: range) -> dict[str, Tensor]:
        text, mask = encoder.encode([texts[index] for index in indices])
        text = text.to("cpu", torch.bfloat16)
        if not text.isfinite().all():
            raise ValueError(f"prompts {indices.start} to {indices.stop - 1}: the encoder's text is not finite")
        return {"text": text, "text_mask": mask.cpu()}

    if fresh and process.is_main and (folder / MANIFEST_NAME).exists():
        with FolderLock(folder):
            remove_folder(folder)
    process.barrier()
    sizes = {"batch_size": batch_size, "row_bytes": spec.row_bytes}
    write_shards(folder, PromptStore.KIND, spec, make_rows, **sizes, process=process, on_progress=on_progress)
    if process.is_main and not (folder / TEXTS_NAME).is_file():
        write_text(folder / TEXTS_NAME, "".join(f"{text}\n" for text in texts))
    process.barrier()
    return PromptStore(folder)


def check_prompt(text: str, where: str) -> None:
    """Raises ValueError for a text that is no prompt."""
    if not text.strip():
        raise ValueError(f"{where} is empty; expected text")
    if len(text) > LONGEST_PROMPT:
        raise ValueError(f"{where} has {len(text)} characters; expected at most {LONGEST_PROMPT}")
    if text.splitlines() != [text]:
        raise ValueError(f"{where} has more than one line: {shown(text)}; expected one")


def _require_short(prompts: Sequence[str], encoder: TextEncoder) -> None:
    for text, tokens in zip(prompts, encoder.lengths(prompts), strict=True):
        if tokens > encoder.tokens:
            raise ValueError(
                f"prompt {shown(text)} has {tokens} tokens; expected at most {encoder.tokens}, which the model reads, "
                "or --truncate"
            )


def read_prompts(path: str | os.PathLike) -> list[str]:
    """The lines of a UTF-8 file, a prompt each; or of a folder's .txt files, such as captions beside images, one each.

    Raises ValueError naming the line, or the file, that is no prompt; blank lines at the end do not count.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise ValueError(f"{path} holds no .txt file; expected a prompt in each, or a file of prompts")
        return [read_caption(file) for file in files]
    lines = _read_text(path).rstrip().split("\n")
    prompts = [line.strip() for line in lines]
    for number, prompt in enumerate(prompts, start=1):
        check_prompt(prompt, f"{path}: line {number}")
    return prompts


def read_caption(path: Path) -> str:
    """The text of a file as one line."""
    caption = " ".join(_read_text(path).split())
    check_prompt(caption, str(path))
    return caption


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: is {'no file' if path.exists() else 'not there'}; expected UTF-8 text")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path}: has {path.stat().st_size} bytes; expected at most {LARGEST_FILE}")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}: line {line} is not UTF-8 (byte {error.start}); expected UTF-8 text") from error


def _read_texts(path: Path) -> list[str]:
    try:
        return _read_text(path).split("\n")[:-1]
    except ValueError as error:
        raise DamagedFile(str(error)) from error


def _sha256(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
