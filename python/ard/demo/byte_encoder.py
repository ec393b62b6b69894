"""The demo's text encoder: bytes to a token for each word, small enough to be trained with the teacher in a minute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

END = 0  # the byte after a text's last one, and behind it
SPACE = ord(" ")


class ByteEncoder(nn.Module):
    """Bytes (n, M) -> text (n, N, E) and its mask (n, N) bool: a token for each word and one for the end, at most N.

    A word is the sum of embeddings of its bytes, each at its place in the word; transformer layers then mix the words.
    """

    def __init__(self, length: int, tokens: int, width: int, layers: int = 2, heads: int = 4, longest_word: int = 8):
        super().__init__()
        self.length, self.tokens, self.longest_word = length, tokens, longest_word
        self.embedding = nn.Embedding(256 * longest_word, width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def bytes_of(self, texts: Sequence[str]) -> Tensor:
        """Byte values as int64 (n, M), each text followed by END. Raises ValueError for a text that is too long."""
        rows = torch.full((len(texts), self.length), END, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            encoded = text.encode()
            words = text.split(" ")
            longest = max(len(word.encode()) for word in words)
            for got, most, what in (
                (len(encoded), self.length - 1, "bytes"),
                (len(words), self.tokens - 1, "words"),
                (longest, self.longest_word, "bytes in a word"),
            ):
                if got > most:
                    raise ValueError(f"ByteEncoder: {text!r} has {got} {what}; expected at most {most}")
            row[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.int64)
        return rows

    def forward(self, bytes_nM: Tensor) -> tuple[Tensor, Tensor]:
        place, is_space, inside = torch.arange(self.length, device=bytes_nM.device), bytes_nM == SPACE, bytes_nM != END
        used = inside.sum(dim=1, keepdim=True)
        # The word that a byte belongs to; the first END is a word of its own, and what is behind it of none.
        word = is_space.cumsum(dim=1) + (~inside & (used > 0))
        start = torch.where(is_space, place + 1, torch.where(inside, 0, place)).cummax(dim=1).values
        code = bytes_nM * self.longest_word + (place - start).clamp(min=0)
        counted = (inside & ~is_space) | (place == used)
        belongs = (word[:, None] == torch.arange(self.tokens, device=place.device)[:, None]) & counted[:, None]
        x = belongs.float() @ self.embedding(code) + self.position
        mask = belongs.any(dim=2)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~mask)
        return self.norm(x) * mask[..., None], mask
