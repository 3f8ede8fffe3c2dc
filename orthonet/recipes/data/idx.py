"""MNIST and Fashion-MNIST from the files in which they are given out; nothing is downloaded."""

from __future__ import annotations

import gzip
import math
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.recipes.data.digits import Images, Split

__all__ = ["FASHION", "MNIST", "IdxSet", "find_idx", "load_idx", "read_idx"]

_PARTS = ("train", "t10k")
_UNNAMED = Path("data")  # the folder of whoever names none


class IdxSet(NamedTuple):
    """Where the four files of a data set may lie.

    Attributes:
        name: Its name.
        inside: Folders that are looked for inside of a root.
        places: Folders where packages of the system put it.
        package: The package of Debian and Ubuntu; empty if there is none.
        torchvision: The class that downloads it.
    """

    name: str
    inside: tuple[str, ...]
    places: tuple[str, ...]
    package: str
    torchvision: str

    def command(self, root: Path) -> str:
        """The command that brings the data to this machine."""
        if self.package and shutil.which("apt-get"):
            return f"sudo apt-get install {self.package}"
        call = f"torchvision.datasets.{self.torchvision}({str(root)!r}, download=True)"
        return f'python -c "import torchvision; {call}"'


FASHION = IdxSet(
    "fashion",
    ("FashionMNIST/raw", "fashion-mnist", "raw"),
    ("/usr/share/datasets/fashion-mnist", "/usr/share/dataset-fashion-mnist"),
    "dataset-fashion-mnist",
    "FashionMNIST",
)
MNIST = IdxSet("mnist", ("MNIST/raw", "mnist", "raw"), (), "", "MNIST")


def load_idx(source: IdxSet, root: Path) -> Split:
    """Read a data set.

    Args:
        source: Which one.
        root: The folder of the files, plain or compressed by gzip, or a folder that holds it, such
            as torchvision's `root`. After the default, `data`, come the places of the system's
            packages; a folder that the user names must hold the files itself.

    Returns:
        Training and test images, float32 in [0, 1], (number, 1, height, width).

    Raises:
        FileNotFoundError: The files are nowhere; the message names the command that brings them.
        ValueError: A file is damaged.
    """
    folder = find_idx(source, root)
    if folder is not None:
        return Split(*(_part(folder, part) for part in _PARTS))
    packaged = find_idx(source, _UNNAMED)
    other = f"run: {source.command(root)}"
    if packaged is not None:
        other = f"leave it out: the files are in {packaged}"
    return _checks.fail(
        f"load({source.name!r})",
        "the files train-images-idx3-ubyte.gz and so on must be there",
        f"Name their folder with --data, or {other}",
        FileNotFoundError,
        looked_in=", ".join(map(str, _folders(source, root))),
    )


def find_idx(source: IdxSet, root: Path) -> Path | None:
    """Return the folder that holds the files of a data set, None if there is none.

    Args:
        source: Which one.
        root: Where to look first, see `load_idx`.
    """
    found = (f for f in _folders(source, root) if _file(f, "train-images-idx3-ubyte") is not None)
    return next(found, None)


def read_idx(path: Path) -> Tensor:
    """Read one file of unsigned bytes in the IDX format, plain or compressed by gzip.

    Raises:
        ValueError: It is not whole, or of another format.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error):
        data = b""
    dims = data[3] if len(data) > 3 else 0
    header = 4 + 4 * dims
    shape: Sequence[int] = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    good = data[:3] == b"\0\0\x08" and len(data) - header == math.prod(shape) > 0
    _checks.require(
        good,
        "read_idx",
        "the file must be whole and hold bytes in the IDX format",
        "Fetch it again",
        file=str(path),
    )
    return torch.frombuffer(bytearray(data[header:]), dtype=torch.uint8).view(*shape)


def _folders(source: IdxSet, root: Path) -> list[Path]:
    places = source.places if root == _UNNAMED else ()
    return [root, *(root / name for name in source.inside), *map(Path, places)]


def _file(folder: Path, name: str) -> Path | None:
    found = (folder / f"{name}{suffix}" for suffix in ("", ".gz"))
    return next((path for path in found if path.is_file()), None)


def _part(folder: Path, part: str) -> Images:
    names = (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte")
    paths = [_file(folder, name) or folder / f"{name}.gz" for name in names]
    absent = [path.name for path in paths if not path.is_file()]
    _checks.require(
        not absent,
        "read_idx",
        "the folder must hold all four files of the data set",
        "Fetch the missing files too",
        FileNotFoundError,
        folder=str(folder),
        missing=absent,
    )
    pixels, labels = map(read_idx, paths)
    good = pixels.ndim == 3 and labels.shape == pixels.shape[:1] and bool((labels < 10).all())
    _checks.require(
        good,
        "read_idx",
        "a part must hold images and as many classes from 0 to 9",
        "Fetch the files again",
        file=str(paths[0]),
        shape=tuple(pixels.shape),
    )
    return Images(pixels.float().div(255)[:, None], labels.long())
