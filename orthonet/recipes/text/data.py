"""Text that is there without a download, as numbers of characters."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from collections import Counter

import torch
from torch import Tensor

from orthonet import _checks

__all__ = ["Text", "python_topics", "read_text"]


def python_topics() -> str:
    """Return what `help()` says of the topics of the Python language: module `pydoc_data.topics`.

    It is part of the standard library, some 400 thousand characters of English and code, another
    text in each minor version of Python.

    Raises:
        ModuleNotFoundError: The Python of this machine was installed without it.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n".join(topics[name] for name in sorted(topics))


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as numbers, the last tenth for validation.

    Attributes:
        train: The numbers of the first nine tenths, (n,).
        validation: The numbers of the rest.
        characters: The characters by number; the last stands for all rare ones.
        digest: The first digits of the SHA-256 of the text.
    """

    train: Tensor
    validation: Tensor
    characters: str
    digest: str

    def batch(self, size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw pieces of the training text and what follows each character, (size, length)."""
        first = torch.randint(len(self.train) - length, (size, 1), generator=generator)
        places = first + torch.arange(length + 1)
        piece = self.train[places]
        return piece[:, :-1], piece[:, 1:]

    def pieces(self, length: int, most: int) -> tuple[Tensor, Tensor]:
        """Return pieces that are spread over the validation text, and what follows."""
        count = min(most, (len(self.validation) - 1) // length)
        step = (len(self.validation) - 1 - length) // max(1, count - 1)
        piece = self.validation[torch.arange(count)[:, None] * step + torch.arange(length + 1)]
        return piece[:, :-1], piece[:, 1:]


def read_text(text: str, characters: int) -> Text:
    """Number the most frequent characters of a text, and take the rest for one.

    Args:
        text: The text.
        characters: How many numbers there are.

    Raises:
        ValueError: Less than 2 characters, or a text of less than 1000.
    """
    _checks.positive_int("read_text", characters=characters)
    _checks.require(
        characters >= 2 and len(text) >= 1000,
        "read_text",
        "there must be 2 characters or more, and a text of 1000 or more",
        "Pass a longer text",
        characters=characters,
        length=len(text),
    )
    counted = sorted(Counter(text).items(), key=lambda pair: (-pair[1], pair[0]))
    known = "".join(c for c, _ in counted[: characters - 1])
    number = {c: i for i, c in enumerate(known)}
    numbers = torch.tensor([number.get(c, characters - 1) for c in text])
    split = len(numbers) * 9 // 10
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Text(numbers[:split], numbers[split:], known + "\N{REPLACEMENT CHARACTER}", digest)
