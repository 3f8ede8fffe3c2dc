"""The recipes on sequences by name."""

from __future__ import annotations

from typing import Any

from orthonet.recipes.running.options import Option
from orthonet.recipes.running.registry import Recipe, register
from orthonet.recipes.sequences.config import SequenceConfig
from orthonet.recipes.sequences.run import train_sequences

__all__ = ["copying", "seq_mnist"]


def copying(**changes: Any) -> SequenceConfig:
    r"""Recall ten symbols after a delay: the copying problem.

    The delay is 1000 steps by default. The input is ten random symbols of eight, `delay` blanks,
    the last of them a marker, and ten blanks; the output wanted is blank until the marker, then
    the ten symbols. Without memory the mean cross-entropy is at least
    \(10 \log 8 / (T + 20)\) for the delay T.

    Args:
        changes: Fields of [`SequenceConfig`][orthonet.recipes.SequenceConfig] to set differently.

    Raises:
        ValueError: A value out of range.

    References:
        Hochreiter & Schmidhuber (1997); Arjovsky, Shah & Bengio, ICML 2016; Lezcano-Casado &
        Martínez-Rubio, ICML 2019, whose sizes these are.
    """
    return SequenceConfig(**{"task": "copying", **changes})


def seq_mnist(**changes: Any) -> SequenceConfig:
    """Classify digits of MNIST that are read pixel by pixel, in 784 steps.

    Args:
        changes: Fields of [`SequenceConfig`][orthonet.recipes.SequenceConfig] to set differently;
            `task="mnist"` takes all 60 000 images, `permuted=True` a fixed order of the pixels.

    Raises:
        ValueError: A value out of range.

    References:
        Le, Jaitly & Hinton, *A simple way to initialize recurrent networks of rectified linear
        units*, 2015.
    """
    values: dict[str, Any] = {
        "task": "mnist5k",
        "hidden": 170,
        "iterations": 320,
        "init": "cayley",
        "clip": 1.0,
    }
    return SequenceConfig(**{**values, **changes})


_COPYING: dict[str, Option | None] = {"task": None, "permuted": None, "data_root": None}
_PIXELS: dict[str, Option | None] = {"task": Option(("mnist5k", "mnist", "fashion")), "delay": None}
register("copying", Recipe(SequenceConfig, copying, train_sequences, _COPYING))
register("seq-mnist", Recipe(SequenceConfig, seq_mnist, train_sequences, _PIXELS))
