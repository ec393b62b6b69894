"""Tiny text models of transformers with random weights, and a tokenizer of a few words, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = "one two three four five six seven nothing above below left right on the".split()  # noqa: SIM905
VOCABULARY = 32  # of the models; the tokenizer has fewer


def save_tokenizer(folder: Path, words: int = len(WORDS), **options: Any) -> Path:
    """A tokenizer of whole words, `</s>` after them, with so many words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["<pad>", "</s>", "<unk>", *WORDS, *(f"word{i}" for i in range(words - len(WORDS)))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **options}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def tiny_t5(kind: Any = None, channels: int = 16) -> Any:
    """A T5 of this class of transformers, T5EncoderModel by default."""
    import transformers

    torch.manual_seed(0)
    sizes = {"d_model": channels, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY}
    return (kind or transformers.T5EncoderModel)(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu"))


def save_t5(folder: Path, channels: int = 16) -> Path:
    """A tiny T5 encoder and its tokenizer in one folder."""
    tiny_t5(channels=channels).save_pretrained(folder)
    return save_tokenizer(folder)
