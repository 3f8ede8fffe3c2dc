"""A model from the name of the function that makes it, and weights from a file."""

from __future__ import annotations

import importlib
import inspect
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orthonet import _checks
from orthonet.recipes.running.reading import (
    FOREIGN,
    Wanted,
    load_weights,
    read_tensors,
    reason_of,
)

__all__ = ["is_name", "load_named", "model_named", "whole_model"]


def is_name(source: str) -> bool:
    """Whether a text has the form package.module:function."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", source) is not None


def model_named(source: str, owner: str) -> nn.Module:
    """Make a model.

    Args:
        source: `"package.module:function"`, a function or class that needs no arguments, such as
            `"torchvision.models:resnet18"`; the present folder is searched too.
        owner: Who asks, for the errors.

    Raises:
        ValueError: There is no such function, it needs arguments, or it returns no module.
    """
    _checks.require(
        is_name(source),
        owner,
        "source must be package.module:function",
        "For example torchvision.models:resnet18",
        source=source,
    )
    module_name, _, attribute = source.partition(":")
    _search_here()
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        advice = "Install the package, or call from the folder that the file is in"
        if module_name.endswith(".py"):
            advice = f"Leave out .py: {module_name.removesuffix('.py')}:{attribute}"
        _checks.fail(
            owner,
            f"the module of source must be importable ({reason_of(error)})",
            advice,
            source=source,
        )
    make: Any = module
    for name in attribute.split("."):
        make = getattr(make, name, None)
    _checks.require(
        callable(make),
        owner,
        f"{module_name} must have a function of that name",
        "Name a function or class that takes no arguments",
        source=source,
        file=getattr(module, "__file__", None),
    )
    missing = _required(make)
    _checks.require(
        not missing,
        owner,
        "the function of source must need no arguments",
        "Write a function in a file of your own that passes them",
        source=source,
        missing=missing,
    )
    model = make()
    _checks.require(
        isinstance(model, nn.Module),
        owner,
        "source must return a torch.nn.Module",
        "Name a function that builds a model",
        source=source,
        returned=type(model),
    )
    return model


def whole_model(path: Path, owner: str) -> nn.Module:
    """Read a model that was saved whole, by `torch.save(model)`; to read it can run any code.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: The file is damaged, holds something else, or classes that cannot be imported.
    """
    wanted = Wanted(
        owner,
        "a model that torch.save wrote whole",
        "Write one with orthonet convert, or call from the folder of the file with its classes",
    )
    _checks.require(
        path.is_file(),
        owner,
        "with --trusted, source must be a file that exists",
        "Name the file that orthonet convert wrote, or leave --trusted out",
        FileNotFoundError,
        source=str(path),
    )
    _search_here()
    try:
        model = torch.load(path, map_location="cpu", weights_only=False)
    except (*FOREIGN, EOFError, ImportError, pickle.UnpicklingError) as error:
        wanted.fail(path, reason_of(error))
    if not isinstance(model, nn.Module):
        held = "a state_dict" if isinstance(model, dict) else f"a {type(model).__name__}"
        wanted.fail(path, f"it holds {held}")
    return model


def load_named(model: nn.Module, path: Path, owner: str) -> None:
    """Load the weights of a file: a `state_dict`, or a checkpoint that holds one.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: The file is damaged, a pickle that could run code, or of another model.
    """
    wanted = Wanted(
        owner, "a state_dict", "Save one with torch.save(model.state_dict(), path) or safetensors"
    )
    content, _ = read_tensors(path, wanted)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    load_weights(model, content, path, wanted)


def _search_here() -> None:
    """Let imports find the files of the present folder."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _required(make: Any) -> list[str]:
    """The arguments without a default."""
    try:
        parameters = inspect.signature(make).parameters.values()
    except ValueError:  # of a function in C
        return []
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in free]
