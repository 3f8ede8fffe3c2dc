"""The command `orthonet`: parses its arguments and calls the recipes."""

from __future__ import annotations

import argparse
import difflib
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from orthonet import __version__, _checks, convert, recipes
from orthonet.recipes.named.model import is_name
from orthonet.recipes.running.options import Parsed, parsed_arguments, parsed_options
from orthonet.recipes.running.registry import Recipe

__all__ = ["main"]

_SWITCHES = {
    "resume": "Go on after the last epoch, or row of the log, in the folder of the results",
    "tensorboard": "Write every row of the training for TensorBoard too",
}
_METAVARS: dict[Any, str] = {int: "N", float: "X"}


class _Parser(argparse.ArgumentParser):
    """A parser that refuses foreign options itself: the one at the top would show its own usage."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            options = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(rest[0].partition("=")[0], options, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            self.error(f"unknown: {' '.join(rest)}.{hint} {self.prog} --help lists the options")
        return found, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the name of the program; those of the process if None.

    Returns:
        The exit status: 0, 1 after an error, 130 after Ctrl-C, or 2 for an argument that cannot be
        parsed (this one by `SystemExit`).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = vars(_parsed(argv))
    command, resumes = arguments.pop("command"), arguments.pop("resumes")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            command(**arguments)
    except KeyboardInterrupt:
        again = shlex.join(["orthonet", *argv])
        again += " --resume" if resumes == "resume" and "--resume" not in argv else ""
        _write(f"\northonet: stopped{f'; go on with: {again}' if resumes else ''}", sys.stderr)
        return 130
    except (ImportError, OSError, ValueError, MemoryError, torch.OutOfMemoryError) as error:
        _write(f"orthonet: error: {error or type(error).__name__}", sys.stderr)
        return 1
    return 0


def _run(
    name: str, recipe: Recipe, *, quiet: bool, out: Path | None = None, **arguments: Any
) -> None:
    switches = {switch: arguments.pop(switch) for switch in _SWITCHES if switch in arguments}
    config = recipe.configured(arguments)
    folder = out or recipe.default_folder(name, config)
    report = recipe.run(config, folder, progress=not quiet, **switches)
    if report is not None:  # the first process of torchrun has it
        _write(report.summary())


def _show_warning(message: Any, category: Any, filename: str, *_: Any) -> None:
    """Show a warning as the errors are shown: its place in the library helps nobody here."""
    _write(f"orthonet: warning: {message}", sys.stderr)


def _certify(source: str, *, quiet: bool, **arguments: Any) -> None:
    files = {name: arguments.pop(name) for name in ("out", "report") if name in arguments}
    common: dict[str, Any] = {**files, "progress": not quiet, "tell": _write}
    if arguments.get("trusted") or (is_name(source) and not Path(source).exists()):
        config = recipes.CertifyConfig(source, **arguments)
        report = recipes.certify_named(config, **common)
    else:
        _checks.require(
            Path(source).exists(),
            "orthonet certify",
            "source must be a checkpoint of orthonet train or package.module:function",
            "Name a file that exists, or a function such as torchvision.models:resnet18",
            source=source,
        )
        _checks.require(
            "checkpoint" not in arguments,
            "orthonet certify",
            "--checkpoint is for a model that package.module:function makes",
            "Leave it out: a checkpoint of orthonet train knows its model and its data",
            source=source,
        )
        if "data" in arguments:
            arguments["data_root"] = arguments.pop("data")
        arguments.pop("trusted", None)
        report = recipes.certify_checkpoint(source, **common, **arguments)
    _write(report.summary(certificate=False))


def _convert(source: str, *, out: Path, **options: Any) -> None:
    _write(recipes.convert_file(source, out, **options).summary())
    _write(f"written:\n  {out}")
    shape = " ".join(map(str, options.get("input_shape", ("C", "H", "W"))))
    _write(f"certify it: orthonet certify {shlex.quote(str(out))} --trusted --input-shape {shape}")


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="orthonet",
        description="Train and certify 1-Lipschitz networks.",
        epilog="Begin with: orthonet train digits",
    )
    parser.add_argument("--version", action="version", version=f"orthonet {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_recipes(commands, "train", "train, certify and attack a network", "recipe")
    _add_certify(commands)
    _add_convert(commands)
    _add_recipes(commands, "bench", "compare the methods of the zoo on one network", "subject")
    return parser.parse_args(argv)


def _add_recipes(commands: Any, command: str, text: str, what: str) -> None:
    """A sub-command with a sub-command for each recipe, whose options are its configuration's."""
    parser = _added(commands, command, f"{text.capitalize()}.", text)
    subcommands = parser.add_subparsers(title=f"{what}s", required=True, metavar=what.upper())
    for name, recipe in recipes.registered(command).items():
        one = _added(subcommands, name, recipe.summary, recipe.summary)
        switches = [switch for switch in _SWITCHES if recipe.takes(switch)]
        resumes = "resume" if "resume" in switches else "again"
        one.set_defaults(command=_run, name=name, recipe=recipe, resumes=resumes)
        for parsed in recipe.parsed():
            _add_option(one, parsed)
        running = one.add_argument_group("the run")
        for switch in switches:
            running.add_argument(
                f"--{switch}",
                action="store_true",
                default=argparse.SUPPRESS,
                help=_SWITCHES[switch],
            )
        folder = recipe.default_folder(name, recipe.build())
        running.add_argument(
            "--out",
            type=Path,
            default=argparse.SUPPRESS,
            metavar="DIR",
            help=f"Folder of the results ({folder})",
        )
        _add_quiet(running)


def _add_certify(commands: Any) -> None:
    certify = _added(
        commands,
        "certify",
        "Print the certificate of a trained network, attack it on images, and compare. "
        "The certificate comes first, the report is written before the attacks.",
        "certify and attack a trained network",
    )
    certify.set_defaults(command=_certify, resumes="")
    certify.add_argument(
        "source",
        metavar="CHECKPOINT or package.module:function",
        help="A checkpoint of orthonet train, .pt or .safetensors, or the function that makes the "
        "model, without arguments, or with --trusted a model of orthonet convert",
    )
    example = recipes.CertifyConfig("module:function")
    for parsed in parsed_options(recipes.CertifyConfig, example, {"source": None}):
        _add_option(certify, parsed)
    files = certify.add_argument_group("the run")
    for name, metavar, text in (
        ("report", "FILE", "File for the report, one HTML page"),
        ("out", "DIR", "Folder for metrics and pictures"),
    ):
        files.add_argument(
            f"--{name}", type=Path, default=argparse.SUPPRESS, metavar=metavar, help=text
        )
    _add_quiet(files)


def _add_convert(commands: Any) -> None:
    text = "make the layers of a model orthogonal"
    converter = _added(commands, "convert", f"{text.capitalize()} and save it whole.", text)
    converter.set_defaults(command=_convert, resumes="")
    converter.add_argument(
        "source",
        metavar="package.module:function",
        help="The function that makes it, without arguments, e.g. torchvision.models:resnet18",
    )
    converter.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="File of the new model, .pt"
    )
    converter.add_argument(
        "--checkpoint",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="File of the weights that the model loads first, .pt or .safetensors",
    )
    converter.add_argument(
        "--input-shape",
        type=int,
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="N",
        help="Shape of one input; with it the report ends with the constant that is proved",
    )
    for parsed in parsed_arguments(convert.orthogonalize):
        _add_option(converter, parsed)


def _added(commands: Any, name: str, description: str, text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=_escaped(text), description=_escaped(description))


def _add_option(parser: Any, parsed: Parsed) -> None:
    flags = [f"--{parsed.name.replace('_', '-')}", *parsed.option.flags]
    choices = parsed.option.allowed()
    text = parsed.help
    values: dict[str, Any] = {"dest": parsed.name, "default": argparse.SUPPRESS}
    if parsed.kind is bool:
        values["action"] = argparse.BooleanOptionalAction
    else:
        values |= {"type": parsed.kind, "metavar": _METAVARS.get(parsed.kind, "TEXT")}
        if parsed.many:
            values["nargs"] = "+"
        if choices:
            values |= {"choices": choices, "metavar": "NAME"}
            text += f": {', '.join(choices)}"
    shown = _shown(parsed.default)
    parser.add_argument(*flags, help=_escaped(f"{text} ({shown})" if shown else text), **values)


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, (tuple, list)):
        return " ".join(map(_shown, default))
    return (
        f"{default:.4g}" if isinstance(default, float) else "" if default is None else str(default)
    )


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def _add_quiet(parser: Any) -> None:
    parser.add_argument("--quiet", action="store_true", help="Show no progress bar")


def _write(text: str, stream: Any = None) -> None:
    (stream or sys.stdout).write(f"{text}\n")
    (stream or sys.stdout).flush()


if __name__ == "__main__":
    raise SystemExit(main())
