"""CIFAR-10 from a folder, in either of the two formats in which it is given out."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from orthonet import _checks
from orthonet.recipes.data.digits import Images, Split, require_package

__all__ = ["load_cifar10"]

_PYTHON, _BINARY = "cifar-10-batches-py", "cifar-10-batches-bin"
_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_PIXELS = 3 * 32 * 32
_NUMPY = ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer")


def load_cifar10(root: str | Path) -> Split:
    """Read CIFAR-10; nothing is downloaded.

    Args:
        root: The folder that holds `cifar-10-batches-py` or `cifar-10-batches-bin`, or that folder
            itself. Of a pickle only NumPy arrays and plain values are read; other objects, which
            could run code, are refused.

    Returns:
        Training and test images, float32 in [0, 1], (number, 3, 32, 32).

    Raises:
        FileNotFoundError: There is no such folder, or a file of it is missing.
        ValueError: A file is not of that format.
    """
    root = Path(root)
    for folder in (root / _PYTHON, root / _BINARY, root):
        for suffix, read in (("", _read_pickle), (".bin", _read_binary)):
            if (folder / f"{_TRAIN[0]}{suffix}").exists():
                return _split(folder, suffix, read)
    return _checks.fail(
        "load_cifar10", f"the folder must hold {_PYTHON} or {_BINARY}",
        "Get one from https://www.cs.toronto.edu/~kriz/cifar.html, unpack it, and name its folder "
        "with --data-root", FileNotFoundError, root=str(root),
    )  # fmt: skip


def _split(folder: Path, suffix: str, read: Any) -> Split:
    parts = [read(folder / f"{name}{suffix}") for name in _TRAIN]
    train = Images(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    return Split(train, read(folder / f"test_batch{suffix}"))


def _read_binary(path: Path) -> Images:
    """Records of one byte for the class and 3072 for the pixels."""
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    good = len(data) > 0 and len(data) % (1 + _PIXELS) == 0
    _checks.require(good, "load_cifar10", "the size must be a multiple of 3073 bytes",
                    "Unpack the archive again", file=str(path), bytes=len(data))  # fmt: skip
    records = data.view(-1, 1 + _PIXELS)
    return _images(records[:, 1:], records[:, 0], path)


def _read_pickle(path: Path) -> Images:
    require_package("numpy", "numpy")
    try:
        content = _Plain(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels, labels = content[b"data"], content[b"labels"]
        pixels, labels = torch.as_tensor(pixels), torch.as_tensor(labels)
    except (pickle.UnpicklingError, LookupError, TypeError, ValueError, EOFError) as error:
        _checks.fail(
            "load_cifar10", "the file must be a batch of CIFAR-10 in Python's format",
            "Unpack the archive again", file=str(path), reason=str(error),
        )  # fmt: skip
    return _images(pixels, labels, path)


def _images(pixels: torch.Tensor, labels: torch.Tensor, path: Path) -> Images:
    good = pixels.ndim == 2 and pixels.shape == (len(labels), _PIXELS)
    good = good and pixels.dtype == torch.uint8 and bool(((labels >= 0) & (labels < 10)).all())
    _checks.require(
        good, "load_cifar10", "a batch must hold bytes (number, 3072) and classes from 0 to 9",
        "Unpack the archive again", file=str(path), shape=tuple(pixels.shape),
    )  # fmt: skip
    return Images(pixels.float().div(255).view(-1, 3, 32, 32), labels.long())


class _Plain(pickle.Unpickler):
    """Reads arrays and plain values, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        array = module.split(".")[0] == "numpy" and name in _NUMPY
        if array or (module, name) == ("_codecs", "encode"):  # of bytes that Python 3 has written
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not read")
