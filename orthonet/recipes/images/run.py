"""A whole run: data, training, certificate, attack, files."""

from __future__ import annotations

import os
import time
from pathlib import Path

from orthonet.recipes.data.digits import Split, spaced
from orthonet.recipes.data.folder import ImageFolders
from orthonet.recipes.data.sets import load
from orthonet.recipes.images.checkpoint import save_checkpoint
from orthonet.recipes.images.config import FolderConfig, TrainConfig
from orthonet.recipes.images.report import Report, certified, written
from orthonet.recipes.images.train import fit
from orthonet.recipes.running.folder import guarded
from orthonet.recipes.running.processes import joined

__all__ = ["images_of", "train"]


@guarded
def train(
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    progress: bool = False,
    resume: bool = False,
    tensorboard: bool = False,
) -> Report | None:
    """Train, certify and attack a model, and write what came out.

    Into the folder `out` go `checkpoint.pt` (right after training), `metrics.json` and the pictures
    `training.png`, `certified_accuracy.png` and `singular_values.png`. While it trains, `state.pt`
    and `log.csv` are replaced after every epoch, each in one step, so that a process that is killed
    loses one epoch at most.

    Started by `torchrun`, the processes train together, see [`fit`][orthonet.recipes.fit]; the
    first one does the rest.

    Args:
        config: What to run: `digits()`, `mnist5k()`, `cifar10_xs()` or `folder()`, changed as you
            like.
        out: A folder, made if it is missing.
        progress: Whether to show progress bars on the standard error stream.
        resume: Whether to go on from `state.pt` in `out`, if there is one.
        tensorboard: Whether to write every row of the training into `tensorboard` in `out` too.

    Returns:
        The report; None in all processes of `torchrun` but the first.

    Raises:
        ModuleNotFoundError: A package of the extras `demo`, `vision` (for folders) or `tensorboard`
            is missing.
        ValueError: A value of `config` that training cannot work with.
        OSError: `out` cannot be written.
    """
    folder = Path(out)
    source: Split | ImageFolders
    if isinstance(config, FolderConfig):
        source = ImageFolders(config)
        config = source.completed()
    else:
        source = images_of(config)
    start = time.perf_counter()
    with joined(config.device) as rank:
        progress = progress and rank == 0
        model, history = fit(
            config, source, progress=progress, folder=folder, resume=resume, tensorboard=tensorboard
        )
    if rank != 0:
        return None
    data = source if isinstance(source, Split) else source.evaluated()
    seconds = {"training": time.perf_counter() - start}
    checkpoint = save_checkpoint(folder / "checkpoint.pt", model, config)
    test = spaced(data.test, config.evaluated)
    report = certified(model, config, test, history=history, seconds=seconds, progress=progress)
    return written(report, model, test, folder, (checkpoint,))


def images_of(config: TrainConfig) -> Split:
    """Return the images of a configuration; of folders only those that are certified."""
    if isinstance(config, FolderConfig):
        return ImageFolders(config).evaluated()
    return load(config.dataset, config.data_root, validation=config.validation)
