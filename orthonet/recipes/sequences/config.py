"""What a run on sequences is made of: one frozen dataclass, and a function for every recipe."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from orthonet import _checks
from orthonet.functional.recurrence import NONLINEARITIES
from orthonet.layers.recurrent.kernels import INITIALIZATIONS

__all__ = [
    "ALPHABET",
    "COPIED",
    "MODELS",
    "SEQUENCE_RECIPES",
    "SequenceConfig",
    "TASKS",
    "copying",
    "seq_mnist",
]

TASKS = ("copying", "mnist5k", "mnist")
MODELS = ("orthonet", "lstm", "torch", "geotorch")
COPIED = 10  # symbols to be copied
ALPHABET = 8  # different symbols


@dataclasses.dataclass(frozen=True)
class SequenceConfig:
    """Everything that decides the outcome of a run on sequences; plain values.

    Attributes:
        task: "copying"; "mnist5k" or "mnist", the pixels of an image one by one ("mnist" by
            torchvision's loader, from `data_root`, downloaded if it is not there).
        models: Which models are trained on the same batches: "orthonet" (`OrthoRNN`), "lstm"
            (`nn.LSTM`), "torch" (`nn.RNN` with torch's own parametrization), "geotorch" (the same
            with geotorch's; left out where it is not installed).
        delay: Blanks between the symbols and their recall, in "copying".
        permuted: Whether the pixels come in a fixed random order, in "mnist5k" and "mnist".
        hidden: Features of the state.
        batch_size: Sequences in a step.
        iterations: Optimizer steps.
        lr: Learning rate of RMSprop.
        lr_orthogonal: Its learning rate for the coordinates of orthogonal kernels.
        nonlinearity: That of the `OrthoRNN`.
        triv: "exponential" or "cayley", the trivialization of its kernel.
        init: Where the orthogonal kernel of the `OrthoRNN` starts.
        rebase: Optimizer steps after which the base of the trivialization moves; 0 for never.
        clip: Largest norm of the gradient of all parameters; 0 for any.
        log_every: Optimizer steps between two rows of the history.
        seed: Seed of weights and sequences.
        device: Where the run takes place.
        data_root: Folder of torchvision's data.

    Raises:
        ValueError: A value out of range.
    """

    task: str
    models: tuple[str, ...] = ("orthonet", "lstm", "torch", "geotorch")
    delay: int = 1000
    permuted: bool = False
    hidden: int = 190
    batch_size: int = 128
    iterations: int = 1000
    lr: float = 1e-3
    lr_orthogonal: float = 1e-4
    nonlinearity: str = "modrelu"
    triv: str = "exponential"
    init: str = "henaff"
    rebase: int = 100
    clip: float = 0.0
    log_every: int = 10
    seed: int = 0
    device: str = "cpu"
    data_root: str = "data"

    def __post_init__(self) -> None:
        _checks.one_of(self, TASKS, task=self.task)
        object.__setattr__(self, "models", tuple(self.models))
        for model in self.models:
            _checks.one_of(self, MODELS, models=model)
        _checks.require(
            len(set(self.models)) == len(self.models) > 0, self,
            "models must name at least one model, each once", "Choose some", models=self.models,
        )  # fmt: skip
        _checks.positive_int(
            self, delay=self.delay, hidden=self.hidden, batch_size=self.batch_size,
            iterations=self.iterations, log_every=self.log_every,
        )  # fmt: skip
        _checks.non_negative_int(self, seed=self.seed, rebase=self.rebase)
        _checks.in_range(self, 1e-8, 10.0, lr=self.lr, lr_orthogonal=self.lr_orthogonal)
        _checks.in_range(self, 0.0, 1e6, clip=self.clip)
        _checks.one_of(self, NONLINEARITIES, nonlinearity=self.nonlinearity)
        _checks.one_of(self, ("exponential", "cayley"), triv=self.triv)
        _checks.one_of(self, INITIALIZATIONS, init=self.init)

    @property
    def baseline(self) -> float:
        """The loss of the best predictor that remembers nothing of the sequence."""
        if self.task == "copying":
            return COPIED * math.log(ALPHABET) / (self.delay + 2 * COPIED)
        return math.log(10)

    @property
    def title(self) -> str:
        """The task in a few words."""
        if self.task == "copying":
            return f"copying, delay {self.delay}"
        return f"{'permuted ' if self.permuted else ''}sequential {self.task}"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain Python values."""
        return dataclasses.asdict(self)


def copying(**changes: Any) -> SequenceConfig:
    r"""The copying problem: recall ten symbols after a delay, by default 1000 steps.

    The input is ten random symbols of eight, `delay` blanks, the last of them a marker, and ten
    blanks; the output wanted is blank until the marker, then the ten symbols. Without memory the
    mean cross-entropy is at least \(10 \log 8 / (T + 20)\) for the delay T.

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
    """Digits of MNIST, read pixel by pixel: 784 steps, then the class.

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
        "task": "mnist5k", "hidden": 170, "iterations": 320, "init": "cayley", "clip": 1.0,
    }  # fmt: skip
    return SequenceConfig(**{**values, **changes})


SEQUENCE_RECIPES = {"copying": copying, "seq-mnist": seq_mnist}
