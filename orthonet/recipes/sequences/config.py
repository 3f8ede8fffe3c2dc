"""The configuration of a run on sequences: a frozen dataclass of plain values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from orthonet import _checks
from orthonet.functional.recurrence import NONLINEARITIES
from orthonet.layers.recurrent.kernels import INITIALIZATIONS
from orthonet.recipes.running.options import check_choices, option

__all__ = ["ALPHABET", "COPIED", "MODELS", "SequenceConfig", "TASKS"]

TASKS = ("copying", "mnist5k", "mnist", "fashion")
MODELS = ("orthonet", "lstm", "torch", "geotorch")
COPIED = 10  # symbols to be copied
ALPHABET = 8  # different symbols


@dataclasses.dataclass(frozen=True)
class SequenceConfig:
    """Everything that decides the outcome of a run on sequences; plain values.

    Attributes:
        task: What to learn; "copying", or the pixels of an image one by one: "mnist5k", "mnist"
            or "fashion"; the last two lie in `data_root`.
        models: Models to train on the same batches; "orthonet" (`OrthoRNN`), "lstm" (`nn.LSTM`),
            "torch" (`nn.RNN` with torch's own parametrization), "geotorch" (the same with
            geotorch's; left out where it is not installed).
        delay: Blanks between the symbols and their recall.
        permuted: Whether the pixels come in a fixed random order.
        hidden: Features of the state.
        batch_size: Sequences in a step.
        iterations: Optimizer steps.
        lr: Learning rate of RMSprop.
        lr_orthogonal: Learning rate for the coordinates of orthogonal kernels.
        nonlinearity: Nonlinearity of the `OrthoRNN`.
        triv: Trivialization of its orthogonal kernel.
        init: Where the orthogonal kernel of the `OrthoRNN` starts.
        rebase: Optimizer steps after which the base of the trivialization moves; 0 for never.
        clip: Largest norm of the gradient of all parameters; 0 for any.
        log_every: Optimizer steps between two rows of the history.
        seed: Seed of weights and sequences.
        device: Device of the run, such as cpu or cuda.
        data_root: Folder of the images.

    Raises:
        ValueError: A value out of range.
    """

    task: str = option(choices=TASKS)
    models: tuple[str, ...] = option(MODELS, choices=MODELS)
    delay: int = 1000
    permuted: bool = False
    hidden: int = 190
    batch_size: int = 128
    iterations: int = 1000
    lr: float = 1e-3
    lr_orthogonal: float = 1e-4
    nonlinearity: str = option("modrelu", choices=tuple(NONLINEARITIES))
    triv: str = option("exponential", choices=("exponential", "cayley"))
    init: str = option("henaff", choices=tuple(INITIALIZATIONS))
    rebase: int = 100
    clip: float = 0.0
    log_every: int = option(10, trains=False)
    seed: int = 0
    device: str = option("cpu", trains=False)
    data_root: str = option("data", flags=("--data",), trains=False)

    def __post_init__(self) -> None:
        check_choices(self)
        object.__setattr__(self, "models", tuple(self.models))
        _checks.require(
            len(set(self.models)) == len(self.models) > 0,
            self,
            "models must name at least one model, each once",
            "Choose some",
            models=self.models,
        )
        _checks.positive_int(
            self,
            delay=self.delay,
            hidden=self.hidden,
            batch_size=self.batch_size,
            iterations=self.iterations,
            log_every=self.log_every,
        )
        _checks.non_negative_int(self, seed=self.seed, rebase=self.rebase)
        _checks.in_range(self, 1e-8, 10.0, lr=self.lr, lr_orthogonal=self.lr_orthogonal)
        _checks.in_range(self, 0.0, 1e6, clip=self.clip)

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
