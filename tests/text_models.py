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


def save_clip(folder: Path, side: int = 16, longest: int = 8) -> Path:
    """A tiny CLIP of images of this side and texts of so many tokens, and its tokenizer, in one folder."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": VOCABULARY, "max_position_embeddings": longest, "eos_token_id": 1, "pad_token_id": 0}
    vision = {**sizes, "image_size": side, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    model = transformers.CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # far apart, so that cosines of either sign come out
                parameter.normal_(std=0.4)
    model.save_pretrained(folder)
    return save_tokenizer(folder)
