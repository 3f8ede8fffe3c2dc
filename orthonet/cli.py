"""The command `orthonet`: parses its arguments and calls the recipes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from orthonet import __version__, recipes

__all__ = ["main"]

# Options of `train` that change a field of the configuration: (name, type, help).
_FIELDS = (
    ("epochs", int, "passes over the training images"),
    ("batch_size", int, "images in a step"),
    ("lr", float, "highest learning rate"),
    ("radius", float, "radius that the loss asks for"),
    ("temperature", float, "temperature of the loss"),
    ("seed", int, "seed of weights, order and augmentation"),
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
    _write(report.summary())
    return 0


def _train(recipe: str, *, progress: bool, out: Path | None = None, **changes) -> recipes.Report:
    config = recipes.RECIPES[recipe](**changes)
    return recipes.train(config, out or Path("runs") / recipe, progress=progress)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="orthonet", description="Train and certify 1-Lipschitz networks."
    )
    parser.add_argument("--version", action="version", version=f"orthonet {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)

    train = commands.add_parser("train", help="train, certify and attack a network on real digits")
    train.set_defaults(command=_train)
    train.add_argument("recipe", choices=sorted(recipes.RECIPES), help="what to train on")
    for name, kind, text in _FIELDS:
        flag = f"--{name.replace('_', '-')}"
        train.add_argument(flag, type=kind, help=text, metavar="N")
    train.add_argument(
        "--ortho-params",
        choices=sorted(recipes.ORTHO_PARAMS),
        help="preset that makes the weights orthogonal",
    )
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

    for command in (train, certify):
        command.add_argument("--attack-steps", type=int, metavar="N", help="steps of the attack")
        command.add_argument("--device", help="where to compute, e.g. cpu or cuda")
        command.add_argument("--quiet", action="store_true", help="show no progress bar")
    return parser


def _write(text: str, stream=None) -> None:
    (stream or sys.stdout).write(f"{text}\n")


if __name__ == "__main__":
    raise SystemExit(main())
