"""Text without a text encoder: a function of the words; and a tiny recipe of a PixArt that is steered by it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from ard.conditions.prompts import PromptStore, write_prompts
from ard.config.recipe import Recipe, read_recipe
from torch import Tensor

PROMPTS = ("a red cube", "two green spheres on grass", "a small boat", "an old map of seas", "rain")
TOKENS, CHANNELS = 6, 10
TINY = [
    "model.input_size=8", "model.hidden_size=48", "model.depth=3", "model.num_heads=2",
    f"model.caption_channels={CHANNELS}", f"model.caption_tokens={TOKENS}", "student.history_layers=2",
    "trajectories.count=12", "trajectories.shard_size=8", "trajectories.batch_size=4", "trajectories.sampling_steps=5",
    "trajectories.keep=[3,2,1,0]", "trajectories.precision=fp32", "trajectories.dtype=float32",
    "distill.steps=3", "distill.batch_size=4", "distill.log_every=1", "execution.save_every=2",
    "execution.strategy=ddp", "execution.precision=fp32", "execution.tensorboard=false", "preview.every=0",
]  # fmt: skip


class WordEncoder:
    """A word is a token; its channels follow from its letters and its place. fail_after: texts, then it is killed."""

    fingerprint, tokens, channels = "words", TOKENS, CHANNELS

    def __init__(self, fail_after: int | None = None):
        self.fail_after, self.encoded = fail_after, []

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) + 1 for text in texts]  # with an end

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        text, mask = torch.zeros(len(texts), TOKENS, CHANNELS), torch.zeros(len(texts), TOKENS, dtype=torch.bool)
        for row, words in enumerate(texts):
            if self.fail_after is not None and len(self.encoded) >= self.fail_after:
                raise KeyboardInterrupt
            self.encoded.append(words)
            for place, word in enumerate([*words.split(), "</s>"][:TOKENS]):
                digest = hashlib.sha256(f"{place} {word}".encode()).digest()
                text[row, place] = torch.tensor(list(digest[:CHANNELS])) / 64.0 - 2.0
                mask[row, place] = True
        return text, mask


def tiny_prompts(folder: Path, prompts: Sequence[str] = PROMPTS, **options) -> PromptStore:
    return write_prompts(folder, prompts, WordEncoder(), shard_size=3, **options)


def tiny_recipe(folder: Path, *overrides: str) -> Recipe:
    """pixart1024, made small, whose prompts are encoded in ``folder``."""
    where = [f"trajectories.prompts={folder / 'prompts'}", f"trajectories.folder={folder / 'trajectories'}"]
    tiny_prompts(folder / "prompts", negative=["blurred"])
    return read_recipe("pixart1024", [*TINY, *where, *overrides])
