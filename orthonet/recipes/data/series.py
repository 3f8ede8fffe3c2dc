"""Labeled time series in the .ts format of the UCR and UEA archives."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.recipes.data.digits import stratified_split

__all__ = ["SERIES", "Series", "SeriesSplit", "load_series", "read_ts"]

SERIES = ("JapaneseVowels", "BasicMotions", "ItalyPowerDemand", "GunPoint")


class Series(NamedTuple):
    """Labeled time series.

    Attributes:
        x: Values, (number, channels, longest length), float32; 0 after the end of a series.
        y: Index of the class, (number,).
        lengths: Length of each series, (number,).
    """

    x: Tensor
    y: Tensor
    lengths: Tensor


class SeriesSplit(NamedTuple):
    """Series to train on, series to test on, and the names of their classes."""

    train: Series
    test: Series
    classes: tuple[str, ...]


def load_series(
    name: str, root: str | Path | None = None, *, validation: bool = False
) -> SeriesSplit:
    """Read a data set of the UCR or UEA archive; nothing is downloaded.

    The package aeon holds JapaneseVowels, BasicMotions, ItalyPowerDemand and GunPoint. It is not
    imported: `pip install --no-deps aeon` is enough.

    Args:
        name: Its name.
        root: A folder that holds `NAME_TRAIN.ts` and `NAME_TEST.ts`, or the folder NAME with them.
            It comes before the package aeon.
        validation: Whether to return a validation set in place of the test set: a fifth of the
            training series, always the same, with equal class frequencies.

    Returns:
        The series in their order, the shorter ones filled with zeros.

    Raises:
        FileNotFoundError: The files are nowhere; the message names the command that brings them.
        ValueError: A file is damaged, or has values missing.
    """
    _checks.require(
        isinstance(name, str) and bool(name),
        "load_series",
        "name must be that of a set of series",
        "Pass e.g. 'GunPoint'",
        name=name,
    )
    folders = [] if root is None else [Path(root), Path(root) / name]
    package = importlib.util.find_spec("aeon")
    if package is not None and package.submodule_search_locations:
        folders.append(Path(package.submodule_search_locations[0]) / "datasets" / "data" / name)
    for folder in folders:
        paths = [folder / f"{name}_{part}.ts" for part in ("TRAIN", "TEST")]
        if paths[0].is_file():
            return _split(paths, validation)
    return _checks.fail(
        "load_series",
        "the files NAME_TRAIN.ts and NAME_TEST.ts must be there",
        "Name the folder of the archive as root, or run: pip install --no-deps aeon"
        if name in SERIES
        else "Unpack https://timeseriesclassification.com's archive and name its folder as root",
        FileNotFoundError,
        name=name,
        looked_in=", ".join(map(str, folders)) or "nowhere",
    )


def read_ts(path: Path) -> tuple[list[list[list[float]]], list[str], tuple[str, ...]]:
    """Read a file: the channels of each series, its label, and all labels in their order.

    Raises:
        ValueError: The file is damaged, has time stamps, or values missing.
    """
    series, labels, classes, header = [], [], (), {}
    for number, line in _lines(path):
        if line.startswith("@"):
            key, *words = line[1:].split()
            header[key.lower()] = words
            if key.lower() == "classlabel":
                classes = tuple(words[1:])
            continue
        *channels, label = line.split(":")
        try:
            values = [[float(value) for value in channel.split(",")] for channel in channels]
        except ValueError:
            _fail(path, number, "every value must be a number")
        whole = bool(values) and all(len(v) == len(values[0]) for v in values)
        if not whole or not all(math.isfinite(v) for channel in values for v in channel):
            _fail(path, number, "channels must be of one length and without missing values")
        if label not in classes or (series and len(values) != len(series[0])):
            _fail(path, number, "every series must have a known label and as many channels")
        series.append(values)
        labels.append(label)
    if not series or header.get("timestamps", ["false"])[0].lower() != "false":
        _fail(path, 0, "there must be series, without time stamps")
    return series, labels, classes


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            line = line.strip()
            if line and not line.startswith("#"):
                yield number, line


def _fail(path: Path, line: int, requirement: str) -> NoReturn:
    _checks.fail("read_ts", requirement, "Unpack the archive again", file=str(path), line=line)


def _split(paths: list[Path], validation: bool) -> SeriesSplit:
    parts = [read_ts(path) for path in paths[: 1 if validation else 2]]
    classes = parts[0][2]
    longest = max(len(values[0]) for part in parts for values in part[0])
    found = [_series(part[0], part[1], classes, longest, paths[0]) for part in parts]
    if validation:
        kept, held = stratified_split(found[0].y, round(len(found[0].y) / 5))
        found = [Series(*(t[index] for t in found[0])) for index in (kept, held)]
    return SeriesSplit(found[0], found[1], classes)


def _series(
    values: list[list[list[float]]],
    labels: list[str],
    classes: tuple[str, ...],
    longest: int,
    path: Path,
) -> Series:
    if not set(labels) <= set(classes):
        _fail(path, 0, "both parts must have the same labels")
    x = torch.zeros(len(values), len(values[0]), longest)
    for row, channels in zip(x, values, strict=True):
        row[:, : len(channels[0])] = torch.tensor(channels)
    lengths = torch.tensor([len(channels[0]) for channels in values])
    return Series(x, torch.tensor([classes.index(label) for label in labels]), lengths)
