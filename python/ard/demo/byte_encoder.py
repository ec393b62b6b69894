"""The demo's text encoder: bytes to a few tokens, small enough to be trained with the teacher in a minute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

END = 0  # the byte after a text's last one, and behind it


class ByteEncoder(nn.Module):
    """Bytes (n, M) -> text (n, N, E) and its mask (n, N), N = M / 2: embedded, halved by a convolution, two transformer
    layers."""

    STRIDE = 2

    def __init__(self, length: int, width: int, layers: int = 2, heads: int = 4):
        super().__init__()
        if length % self.STRIDE:
            raise ValueError(f"ByteEncoder: length is {length}; expected a multiple of {self.STRIDE}")
        self.length, self.tokens = length, length // self.STRIDE
        self.embedding = nn.Embedding(256, width)
        self.merge = nn.Conv1d(width, width, 5, stride=self.STRIDE, padding=2)
        self.position = nn.Parameter(0.02 * torch.randn(self.tokens, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def bytes_of(self, texts: Sequence[str]) -> Tensor:
        """uint8 values as int64 (n, M), each text followed by END. Raises ValueError for a text that is too long."""
        rows = torch.full((len(texts), self.length), END, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            encoded = text.encode()
            if len(encoded) >= self.length:
                raise ValueError(f"ByteEncoder: {text!r} has {len(encoded)} bytes; expected at most {self.length - 1}")
            row[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.int64)
        return rows

    def forward(self, bytes_nM: Tensor) -> tuple[Tensor, Tensor]:
        x = F.gelu(self.merge(self.embedding(bytes_nM).transpose(1, 2))).transpose(1, 2) + self.position
        used = (bytes_nM != END).sum(dim=1) + 1  # with one END
        mask = torch.arange(self.tokens, device=x.device) < -(-used // self.STRIDE)[:, None]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~mask)
        return self.norm(x) * mask[..., None], mask
