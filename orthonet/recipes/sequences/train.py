"""Training recurrent networks side by side on the same sequences."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from orthonet import _checks
from orthonet.layers import OrthoRNN
from orthonet.recipes.data.digits import require_package
from orthonet.recipes.running.fitting import seeded
from orthonet.recipes.running.log import Log
from orthonet.recipes.running.options import training_fields
from orthonet.recipes.running.processes import part_of, rank_and_size, replica_of, totals
from orthonet.recipes.running.resume import Resumable
from orthonet.recipes.sequences.config import COPIED, SequenceConfig
from orthonet.recipes.sequences.data import Batch, Task

__all__ = [
    "SequenceModel",
    "assess",
    "build_sequence_model",
    "fit_sequences",
    "parameter_groups",
    "score",
]


class SequenceModel(nn.Module):
    """A recurrent layer and a linear map of its states, or of the last one.

    Args:
        rnn: The layer, time first.
        hidden: Features of its states.
        classes: Number of logits.
        every_step: Logits for every step, or for the last one only.
    """

    def __init__(self, rnn: nn.Module, hidden: int, classes: int, every_step: bool) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(hidden, classes)
        self.every_step = every_step

    def forward(self, x: Tensor) -> Tensor:
        """Logits (time, batch, classes) or (batch, classes), of (time, batch, features)."""
        states, last = self.rnn(x)
        if self.every_step:
            return self.head(states)
        last = last[0] if isinstance(last, tuple) else last
        return self.head(last[-1])


def build_sequence_model(config: SequenceConfig, name: str, task: Task) -> SequenceModel | None:
    """The untrained model of that name, or None where its library is missing.

    torch's global generators are left as they were.
    """
    with seeded(config.seed):
        rnn = _layer(config, name, task.features)
        if rnn is None:
            return None
        model = SequenceModel(rnn, config.hidden, task.classes, config.task == "copying")
    return model.to(config.device)


def _layer(config: SequenceConfig, name: str, features: int) -> nn.Module | None:
    hidden = config.hidden
    if name == "orthonet":
        layer = OrthoRNN(
            features, hidden, nonlinearity=config.nonlinearity, triv=config.triv, init=config.init
        )
        nn.init.kaiming_normal_(layer.weight_ih_l0, nonlinearity="relu")
        for bias in (layer.bias_ih_l0, layer.bias_hh_l0):
            nn.init.zeros_(bias)
        return layer
    if name == "lstm":
        return nn.LSTM(features, hidden)
    layer = nn.RNN(features, hidden)
    if name == "torch":
        return parametrizations.orthogonal(layer, "weight_hh_l0")
    try:
        geotorch: Any = importlib.import_module("geotorch")
    except ModuleNotFoundError:
        return None
    geotorch.orthogonal(layer, "weight_hh_l0")
    return layer


def parameter_groups(model: nn.Module, config: SequenceConfig) -> list[dict[str, Any]]:
    """The coordinates of orthogonal kernels with their learning rate, then all the rest."""
    named = dict(model.named_parameters())
    kernels = [
        p for name, p in named.items() if "recurrent." in name or "parametrizations." in name
    ]
    others = [p for p in named.values() if not any(p is kernel for kernel in kernels)]
    groups = [{"params": others, "lr": config.lr}]
    return [*groups, {"params": kernels, "lr": config.lr_orthogonal}] if kernels else groups


def fit_sequences(
    model: SequenceModel,
    config: SequenceConfig,
    task: Task,
    *,
    name: str,
    folder: Path,
    progress: bool = False,
    resume: bool = False,
    tensorboard: bool = False,
) -> list[dict[str, float]]:
    """Train one model.

    Where torch.distributed is initialized, all processes draw the same sequences, each takes its
    part, and the gradient is that of the whole batch.

    Args:
        model: The model, trained in place.
        config: How.
        task: Where the batches come from.
        name: Name of the model, for the bar, for errors and for the files.
        folder: Where `NAME.csv` and `NAME.state.pt` (all that the rest of the training depends on)
            are replaced with every row.
        progress: Whether to show a progress bar.
        resume: Whether to go on from `NAME.state.pt`, if there is one.
        tensorboard: Whether to write every row into `folder / "tensorboard"` too.

    Returns:
        A row every `log_every` steps, and for the last: the number of the step, the loss and the
        score of the batch (accuracy; in "copying" the share of symbols recalled), seconds so far.

    Raises:
        ValueError: The loss is not finite, or the state is that of another configuration.
    """
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.RMSprop(parameter_groups(model, config), lr=config.lr, alpha=0.9)
    rank, size = rank_and_size()
    state, path = Resumable(model, optimizer, None, generator), folder / f"{name}.state.pt"
    fields = {**training_fields(config), "models": name}  # other models may join in later
    history = state.load(path, fields, config.device) if resume else []
    done, before = (int(history[-1]["iteration"]), history[-1]["seconds"]) if history else (0, 0.0)
    bar = _progress_bar(config.iterations, done, name) if progress and rank == 0 else None
    start = time.perf_counter() - before
    model.train()
    replica = replica_of(model)
    writes = folder if rank == 0 else None
    with Log(writes, "iteration", history, name=name, tensorboard=tensorboard) as log:
        for iteration in range(done + 1, config.iterations + 1):
            batch = task.draw(generator)
            batch = Batch(part_of(batch.x, 1), part_of(batch.y, -1))
            logits = replica(batch.x)
            loss = F.cross_entropy(logits.flatten(0, -2), batch.y.flatten())
            optimizer.zero_grad()
            loss.backward()
            if config.clip:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            if config.rebase and iteration % config.rebase == 0 and isinstance(model.rnn, OrthoRNN):
                model.rnn.update_base()
            if iteration % config.log_every == 0 or iteration == config.iterations:
                summed = totals(
                    loss.item(), score(logits.detach(), batch, config), device=config.device
                )
                value, right = (total / size for total in summed)
                _checks.require(
                    math.isfinite(value),
                    "fit_sequences",
                    "the loss must stay finite",
                    "Lower the learning rates, or set clip",
                    model=name,
                    iteration=iteration,
                )
                row = {
                    "iteration": iteration,
                    "loss": value,
                    "score": right,
                    "seconds": time.perf_counter() - start,
                }
                history.append(row)
                if rank == 0:
                    state.save(path, fields, history)
                log.add(row)
                if bar is not None:
                    bar.set_postfix(loss=f"{value:.4f}", score=f"{row['score']:.1%}")
            if bar is not None:
                bar.update()
    if bar is not None:
        bar.close()
    return history


def score(logits: Tensor, batch: Batch, config: SequenceConfig) -> float:
    """Share of right classes; in "copying" among the symbols to be recalled."""
    right = logits.argmax(-1) == batch.y
    return (right[-COPIED:] if config.task == "copying" else right).float().mean().item()


@torch.no_grad()
def assess(model: SequenceModel, config: SequenceConfig, task: Task) -> Mapping[str, float]:
    """Loss and score on the test batches."""
    model.eval()
    total = loss = share = 0.0
    for batch in task.test:
        logits, number = model(batch.x), batch.y.shape[-1]
        loss += number * F.cross_entropy(logits.flatten(0, -2), batch.y.flatten()).item()
        share += number * score(logits, batch, config)
        total += number
    return {"loss": loss / total, "score": share / total}


def _progress_bar(total: int, done: int, name: str) -> Any:
    tqdm = require_package("tqdm", "tqdm").tqdm
    return tqdm(total=total, initial=done, unit="step", desc=name)
