"""A whole run on sequences: every model, its test, its flow of gradients, files."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from orthonet.recipes.running.files import write_atomically, write_json
from orthonet.recipes.running.folder import guarded
from orthonet.recipes.running.processes import joined
from orthonet.recipes.sequences.config import SequenceConfig
from orthonet.recipes.sequences.data import Batch, Task, task_of
from orthonet.recipes.sequences.figures import gradient_figure, learning_figure
from orthonet.recipes.sequences.gradient_flow import gradient_norms
from orthonet.recipes.sequences.report import SequenceReport, SequenceResult
from orthonet.recipes.sequences.train import (
    SequenceModel,
    assess,
    build_sequence_model,
    fit_sequences,
)

__all__ = ["train_sequences"]


@guarded
def train_sequences(
    config: SequenceConfig,
    out: str | os.PathLike[str],
    *,
    progress: bool = False,
    resume: bool = False,
    tensorboard: bool = False,
) -> SequenceReport | None:
    """Train every model of `config` on the same sequences and write what came out.

    Into the folder `out` go `metrics.json`, the weights of each model as `MODEL.pt` (a state_dict),
    its history as `MODEL.csv`, and the pictures `training.png` and `gradient_norms.png`.

    Started by `torchrun`, the processes train together; the first one does the rest.

    The arguments are those of [`train`][orthonet.recipes.train], and so are the errors that are not
    named here.

    Returns:
        The report; None in all processes of `torchrun` but the first.

    Raises:
        ModuleNotFoundError: A package of the extra `demo`, torchvision, or tensorboard is missing.
        ValueError: The loss is not finite, or a state is that of another configuration.
    """
    folder = Path(out)
    trained, skipped = [], []
    with joined(config.device) as rank:
        task = task_of(config)
        for name in config.models:
            model = build_sequence_model(config, name, task)
            if model is None:
                skipped.append(name)
                continue
            history = fit_sequences(
                model,
                config,
                task,
                name=name,
                folder=folder,
                progress=progress,
                resume=resume,
                tensorboard=tensorboard,
            )
            trained.append((name, model, history))
    if rank != 0:
        return None
    results, files = [], []
    for name, model, history in trained:
        results.append(_result(name, model, config, task, history))
        state = {key: value.cpu() for key, value in model.state_dict().items()}
        files.append(
            write_atomically(
                folder / f"{name}.pt", lambda file, state=state: torch.save(state, file)
            )
        )
    report = SequenceReport(config, tuple(results), tuple(skipped))
    files.append(write_json(folder / "metrics.json", report.to_dict()))
    files.append(learning_figure(folder / "training.png", report))
    files.append(gradient_figure(folder / "gradient_norms.png", report))
    return dataclasses.replace(report, files=tuple(files))


def _result(
    name: str,
    model: SequenceModel,
    config: SequenceConfig,
    task: Task,
    history: list[dict[str, float]],
) -> SequenceResult:
    found = assess(model, config, task)
    batch = Batch(task.test[0].x[:, :32], task.test[0].y[..., :32])
    wanted = batch.y[-1:] if model.every_step else batch.y

    def loss(states: torch.Tensor) -> torch.Tensor:
        """Of the last step alone, so that what flows back comes from one place."""
        logits = model.head(states[-1:] if model.every_step else states[-1])
        return F.cross_entropy(logits.flatten(0, -2), wanted.flatten())

    rnn: Any = model.rnn
    kernel: torch.Tensor = rnn.weight_hh_l0
    sigma = torch.linalg.svdvals(kernel.detach().double().unflatten(0, (-1, config.hidden)))
    return SequenceResult(
        model=name,
        parameters=sum(p.numel() for p in model.parameters()),
        loss=found["loss"],
        score=found["score"],
        seconds=history[-1]["seconds"],
        history=history,
        flow=gradient_norms(model.rnn, batch.x, loss).tolist(),
        orthogonality=(sigma - 1.0).abs().max().item(),
    )
