"""The two transformers of characters: of a proved constant, and plain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from orthonet.layers import LipschitzTransformerBlock, OrthoLinear, Scale

__all__ = ["LipschitzCharacters", "PlainCharacters"]


class _Positions(nn.Module):
    """Add a learned vector to each token: a translation, of constant 1."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.1 * torch.randn(length, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions


class LipschitzCharacters(nn.Sequential):
    r"""A causal character transformer from one-hot vectors to logits, of constant at most K.

    Orthogonal matrices embed the characters and make the logits, each block has constant 1, and the
    logits are multiplied by K. One other character is a step of length \(\sqrt 2\).

    Args:
        characters: V, the number of characters.
        length: N, the characters that are read.
        width: Features of a token.
        heads: Heads of the attention.
        attention: "mixing", "distance" or "cosine" for each block.
        constant: K.

    Shape:
        (batch, N, V) to the same.

    Guarantee:
        l2 -> l2 constant of whole sequences at most K, to \(10^{-5}\).
    """

    def __init__(
        self,
        characters: int,
        length: int,
        width: int,
        heads: int,
        attention: Sequence[str],
        constant: float,
    ) -> None:
        super().__init__(
            OrthoLinear(characters, width, bias=False),
            _Positions(length, width),
            *(
                LipschitzTransformerBlock(
                    width, heads, max_length=length, attention=kind, causal=True
                )
                for kind in attention
            ),
            OrthoLinear(width, characters),
            Scale(constant),
        )


class PlainCharacters(nn.Module):
    """The usual causal character transformer of the same sizes: `nn.TransformerEncoderLayer`.

    Args:
        characters: V, the number of characters.
        length: N, the characters that are read.
        width: Features of a token.
        heads: Heads of the attention.
        blocks: Number of blocks.

    Shape:
        (batch, N, V) to the same.
    """

    def __init__(self, characters: int, length: int, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(characters, width, bias=False)
        nn.init.normal_(self.embedding.weight)
        self.positions = _Positions(length, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of what follows each character."""
        length = x.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        x = self.positions(self.embedding(x))
        for block in self.blocks:
            x = block(x, src_mask=hidden, is_causal=True)
        return self.head(self.norm(x))
