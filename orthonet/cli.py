"""The command `orthonet`: parses its arguments and calls the recipes."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orthonet import __version__, _checks, convert, recipes
from orthonet.functional.recurrence import NONLINEARITIES
from orthonet.layers import available
from orthonet.layers.recurrent.kernels import INITIALIZATIONS

__all__ = ["main"]

# Options of `train` that change a field of the configuration: (name, type, help).
_FIELDS = (
    ("epochs", int, "passes over the training images"),
    ("batch_size", int, "images in a step"),
    ("lr", float, "highest learning rate"),
    ("radius", float, "radius that the loss asks for"),
    ("temperature", float, "temperature of the loss"),
    ("seed", int, "seed of weights, order and augmentation"),
    ("image_size", int, "folder: side of the images that the network sees"),
    ("min_scale", float, "folder: smallest share of a picture that a random crop keeps"),
    ("workers", int, "folder: processes that read pictures, for each that trains"),
    ("evaluated", int, "folder: pictures that are certified and attacked, 0 for all"),
    ("delay", int, "copying: blanks between the symbols and their recall"),
    ("hidden", int, "sequences: features of the state; w1, sdf, flow: width of the hidden layers"),
    ("iterations", int, "sequences, w1, sdf, flow: optimizer steps"),
    ("dimension", int, "w1: dimension of the space"),
    ("gap", float, "w1: distance of the shells"),
    ("lr_orthogonal", float, "sequences: learning rate of the orthogonal kernels"),
    ("clip", float, "sequences: largest norm of the gradient, 0 for any"),
    ("rebase", int, "sequences: steps between two moves of the base"),
)
# The same with a choice: (name, choices, help).
_CHOICES = (
    ("triv", ("exponential", "cayley"), "sequences: trivialization of the orthogonal kernel"),
    ("init", INITIALIZATIONS, "sequences: where the orthogonal kernel starts"),
    ("nonlinearity", NONLINEARITIES, "sequences: nonlinearity of the OrthoRNN"),
    ("shape", ("star", "torus"), "sdf: in the plane, or in space"),
    ("density", ("moons", "rings"), "flow: what is learned"),
    ("layer", tuple(available("conv")), "cifar10-xs: the convolution"),
    ("task", ("mnist5k", "mnist"), "seq-mnist: 5000 images, or all by torchvision"),
)
# Options of `bench zoo`.
_SETS = ("digits", "mnist5k")
_BENCH_FIELDS = (
    ("seeds", int, "seeds of each method"),
    ("parameters", int, "numbers of each network, with the budget parameters"),
    ("cpu_seconds", float, "process time of a training, with the budget cpu"),
    ("width", int, "channels, with the budget cpu"),
    ("epochs", int, "passes over the training images"),
    ("batch_size", int, "images in a step"),
    ("lr", float, "highest learning rate, instead of that of each method"),
    ("radius", float, "radius that the loss asks for"),
    ("temperature", float, "temperature of the loss"),
)


# Options of `convert`: (name, choices, help).
_CONVERSION = (
    ("weights", ("project", "reset"), "nearest orthogonal weights (default), or random ones"),
    ("downsample", ("space_to_depth", "average"), "for kernels smaller than their stride"),
    ("fallback", None, "method of the zoo for layers without an orthogonal twin, e.g. aol"),
    ("norm", ("centering", "lip"), "in place of batch norm and layer norm"),
    ("activation", ("max_min", "abs"), "in place of activation modules"),
    ("pool", ("l2", "average"), "in place of pooling modules"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the name of the program; those of the process if None.

    Returns:
        The exit status: 0, 1 after an error, or 2 for an argument that cannot be parsed (this one
        by `SystemExit`).
    """
    arguments = vars(_parser().parse_args(argv))
    command, quiet = arguments.pop("command"), arguments.pop("quiet")
    changes = {name: value for name, value in arguments.items() if value is not None}
    try:
        report = command(progress=not quiet, **changes)
    except (ImportError, OSError, ValueError) as error:
        _write(f"orthonet: error: {error}", sys.stderr)
        return 1
    if report is not None:  # the first process of torchrun has it
        _write(report.summary())
    return 0


def _train(
    recipe: str,
    *,
    progress: bool,
    out: Path | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    **changes: Any,
) -> Any:
    folder = out or Path("runs") / recipe
    kind, build, run = _plan(recipe)
    images = issubclass(kind, recipes.TrainConfig)
    if "layer" in changes and images:
        changes["model_arguments"] = {"layer": changes.pop("layer")}
    known = {field.name for field in dataclasses.fields(kind)}
    foreign = [f"--{name.replace('_', '-')}" for name in changes if name not in known]
    _checks.require(
        not foreign, "orthonet train", f"an option must be one of the recipe {recipe!r}",
        "Leave it out, or choose another recipe", options=", ".join(foreign),
    )  # fmt: skip
    options = {name: True for name, on in (("resume", resume), ("tensorboard", tensorboard)) if on}
    return run(build(**changes), folder, progress=progress, **options)


def _plan(recipe: str) -> tuple[Any, Callable[..., Any], Callable[..., Any]]:
    """The dataclass of a recipe's configuration, what builds one, and what carries it out."""
    if recipe in recipes.BEYOND_RECIPES:
        config, run = recipes.BEYOND_RECIPES[recipe]
        return config, config, run
    if recipe in recipes.SEQUENCE_RECIPES:
        return (
            recipes.SequenceConfig, recipes.SEQUENCE_RECIPES[recipe], recipes.train_sequences
        )  # fmt: skip
    kind = recipes.FolderConfig if recipe == "folder" else recipes.TrainConfig
    return kind, recipes.RECIPES[recipe], recipes.train


def _convert(source: str, *, progress: bool, out: Path, **options: Any) -> convert.ConversionReport:
    return convert.convert_file(source, out, **options)


def _bench(
    subject: str, *, progress: bool, out: Path | None = None, **changes: Any
) -> recipes.ZooReport:
    _checks.require(
        int(os.environ.get("WORLD_SIZE", "1")) == 1, "orthonet bench",
        "a comparison must run in one process", "Start it without torchrun", subject=subject,
    )  # fmt: skip
    config = recipes.ZooConfig(**changes)
    folder = out or Path("runs") / f"{subject}-{config.dataset}-{config.budget}"
    return recipes.bench_zoo(config, folder, progress=progress)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="orthonet", description="Train and certify 1-Lipschitz networks."
    )
    parser.add_argument("--version", action="version", version=f"orthonet {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)

    train = commands.add_parser(
        "train", help="train, certify and attack on images, or train on sequences and distances"
    )
    train.set_defaults(command=_train)
    names = sorted((*recipes.RECIPES, *recipes.SEQUENCE_RECIPES, *recipes.BEYOND_RECIPES))
    train.add_argument("recipe", choices=names, help="what to train on")
    for name, kind, text in _FIELDS:
        flag = f"--{name.replace('_', '-')}"
        train.add_argument(flag, type=kind, help=text, metavar="N")
    train.add_argument(
        "--ortho-params",
        choices=sorted(recipes.ORTHO_PARAMS),
        help="preset that makes the weights orthogonal",
    )
    for name, choices, text in _CHOICES:
        train.add_argument(f"--{name}", choices=choices, help=text)
    train.add_argument(
        "--permuted", action="store_true", default=None, help="seq-mnist: pixels in random order"
    )
    train.add_argument(
        "--models", nargs="+", metavar="M", help="sequences: orthonet, lstm, torch, geotorch"
    )
    train.add_argument(
        "--resume", action="store_true", default=None,
        help="go on after the last epoch, or row of the log, in the folder of the results",
    )  # fmt: skip
    train.add_argument(
        "--tensorboard", action="store_true", default=None,
        help="write every row of the training for TensorBoard too",
    )  # fmt: skip
    train.add_argument(
        "--data", "--data-root", dest="data_root", metavar="DIR",
        help="folder, cifar10-xs, seq-mnist: folder of the data",
    )  # fmt: skip
    train.add_argument("--out", type=Path, help="folder of the results (runs/RECIPE)")

    certify = commands.add_parser("certify", help="certify and attack a trained network again")
    certify.set_defaults(command=recipes.certify_checkpoint)
    certify.add_argument(
        "checkpoint", type=Path, help="checkpoint of orthonet train, .pt or .safetensors"
    )
    certify.add_argument("--radii", type=float, nargs="+", metavar="R", help="l2 radii")
    certify.add_argument(
        "--input-shape", type=int, nargs="+", metavar="N",
        help="shape of one sample: certify for it, without data",
    )  # fmt: skip
    certify.add_argument("--report", type=Path, help="file for the report, one HTML page")
    certify.add_argument("--out", type=Path, help="folder for metrics and pictures")

    converter = commands.add_parser("convert", help="make the layers of a model orthogonal")
    converter.set_defaults(command=_convert, quiet=True)
    converter.add_argument(
        "source", help="package.module:function that makes it, e.g. torchvision.models:resnet18"
    )
    converter.add_argument("--out", type=Path, required=True, help="file of the new model, .pt")
    converter.add_argument("--checkpoint", type=Path, help="state_dict that the model loads first")
    for name, choices, text in _CONVERSION:
        converter.add_argument(f"--{name}", choices=choices, help=text)

    bench = commands.add_parser("bench", help="compare the methods of the zoo on one network")
    bench.set_defaults(command=_bench)
    bench.add_argument("subject", choices=("zoo",), help="what to compare")
    bench.add_argument("--dataset", choices=sorted(_SETS), help="images (digits)")
    bench.add_argument("--methods", nargs="+", metavar="M", help="names of layers (all)")
    bench.add_argument("--budget", choices=("parameters", "cpu"), help="what is equal for all")
    for name, kind, text in _BENCH_FIELDS:
        bench.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text, metavar="N")
    bench.add_argument("--out", type=Path, help="folder of the results; goes on where it was")

    for command in (train, certify, bench):
        command.add_argument("--attack-steps", type=int, metavar="N", help="steps of the attack")
        command.add_argument("--device", help="where to compute, e.g. cpu or cuda")
        command.add_argument("--quiet", action="store_true", help="show no progress bar")
    return parser


def _write(text: str, stream=None) -> None:
    (stream or sys.stdout).write(f"{text}\n")


if __name__ == "__main__":
    raise SystemExit(main())
