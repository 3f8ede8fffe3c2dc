"""CIFAR-10 and CIFAR-100 from a folder, in either of the formats in which they are given out."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch

from orthonet import _checks
from orthonet.recipes.data.digits import Images, Split, require_package
from orthonet.recipes.running.reading import FOREIGN, reason_of

__all__ = ["load_cifar10", "load_cifar100"]


class _Format(NamedTuple):
    """How a data set lies in its folders.

    Attributes:
        owner: The loader.
        folders: Of Python's format, of the binary one.
        train: Names of the files to train on.
        test: Name of the file to test on.
        key: The classes in Python's format.
        labels: Bytes before the pixels in the binary format; the last one is the class.
        classes: Number of classes.
    """

    owner: str
    folders: tuple[str, str]
    train: tuple[str, ...]
    test: str
    key: bytes
    labels: int
    classes: int


_CIFAR10 = _Format(
    "load_cifar10",
    ("cifar-10-batches-py", "cifar-10-batches-bin"),
    tuple(f"data_batch_{i}" for i in range(1, 6)),
    "test_batch",
    b"labels",
    1,
    10,
)
_CIFAR100 = _Format(
    "load_cifar100",
    ("cifar-100-python", "cifar-100-binary"),
    ("train",),
    "test",
    b"fine_labels",
    2,
    100,
)
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
    return _load(_CIFAR10, Path(root))


def load_cifar100(root: str | Path) -> Split:
    """Read CIFAR-100 with its 100 fine classes; nothing is downloaded.

    Args:
        root: The folder that holds `cifar-100-python` or `cifar-100-binary`, or that folder itself;
            pickles are read as in [`load_cifar10`][orthonet.recipes.load_cifar10].

    Returns:
        Training and test images, float32 in [0, 1], (number, 3, 32, 32).

    Raises:
        FileNotFoundError: There is no such folder, or a file of it is missing.
        ValueError: A file is not of that format.
    """
    return _load(_CIFAR100, Path(root))


def _load(form: _Format, root: Path) -> Split:
    for folder in (*(root / name for name in form.folders), root):
        for suffix, read in ((".bin", _read_binary), ("", _read_pickle)):
            if (folder / f"{form.train[0]}{suffix}").is_file():
                names = [f"{name}{suffix}" for name in (*form.train, form.test)]
                absent = [name for name in names if not (folder / name).is_file()]
                _checks.require(
                    not absent,
                    form.owner,
                    "the folder must hold all batches",
                    "Unpack the archive again",
                    FileNotFoundError,
                    folder=str(folder),
                    missing=absent,
                )
                parts = [read(form, folder / f"{name}{suffix}") for name in form.train]
                train = Images(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
                return Split(train, read(form, folder / f"{form.test}{suffix}"))
    return _checks.fail(
        form.owner,
        f"the folder must hold {' or '.join(form.folders)}",
        "Get one from https://www.cs.toronto.edu/~kriz/cifar.html, unpack it, and name its folder "
        "with --data",
        FileNotFoundError,
        root=str(root),
    )


def _read_binary(form: _Format, path: Path) -> Images:
    """Records of one byte for each class and 3072 for the pixels."""
    size = form.labels + _PIXELS
    content = bytearray(path.read_bytes())
    _checks.require(
        len(content) > 0 and len(content) % size == 0,
        form.owner,
        f"the size must be a multiple of {size} bytes",
        "Unpack the archive again",
        file=str(path),
        bytes=len(content),
    )
    records = torch.frombuffer(content, dtype=torch.uint8).view(-1, size)
    return _images(form, records[:, form.labels :], records[:, form.labels - 1], path)


def _read_pickle(form: _Format, path: Path) -> Images:
    require_package("numpy", "numpy")
    try:
        content = _Plain(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels, labels = content[b"data"], content[form.key]
        pixels, labels = torch.as_tensor(pixels), torch.as_tensor(labels)
    except (pickle.UnpicklingError, EOFError, *FOREIGN) as error:
        _checks.fail(
            form.owner,
            "the file must be a batch of CIFAR in Python's format",
            "Unpack the archive again",
            file=str(path),
            reason=reason_of(error),
        )
    return _images(form, pixels, labels, path)


def _images(form: _Format, pixels: torch.Tensor, labels: torch.Tensor, path: Path) -> Images:
    good = pixels.ndim == 2 and pixels.shape == (len(labels), _PIXELS)
    good = good and pixels.dtype == torch.uint8
    good = good and bool(((labels >= 0) & (labels < form.classes)).all())
    last = form.classes - 1
    _checks.require(
        good,
        form.owner,
        f"a batch must hold bytes (number, 3072) and classes from 0 to {last}",
        "Unpack the archive again",
        file=str(path),
        shape=tuple(pixels.shape),
    )
    return Images(pixels.float().div(255).view(-1, 3, 32, 32), labels.long())


class _Plain(pickle.Unpickler):
    """Reads arrays and plain values, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        array = module.split(".")[0] == "numpy" and name in _NUMPY
        if array or (module, name) == ("_codecs", "encode"):  # of bytes that Python 3 has written
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not read")
