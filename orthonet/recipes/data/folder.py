"""Images in the folders of their classes, as those of ImageNet lie."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from orthonet import _checks
from orthonet.models import arguments_for
from orthonet.recipes.data.augment import random_affine, random_crop, random_noise
from orthonet.recipes.data.digits import Images, Split, require_package
from orthonet.recipes.data.sources import Part
from orthonet.recipes.images.config import FolderConfig

__all__ = ["ImageFolders", "load_pictures"]

_OWNER = "orthonet train folder"
_ANNOTATIONS = "val_annotations.txt"


class ImageFolders:
    r"""Pictures of DIR/train/CLASS and DIR/val/CLASS, read by the workers of `DataLoader`.

    The folder of Tiny-ImageNet is read as it is unpacked: DIR/val/val_annotations.txt names the
    classes of DIR/val/images.

    The order is that of torch's `DistributedSampler`; how a picture is cropped, moved and mirrored
    depends on the seed, the epoch and the picture alone. So one process and several, with few
    workers or many, train on the same batches, and a resumed training on those that it would have
    had. Where the number of processes does not divide that of the pictures, the sampler repeats
    some.

    Args:
        config: The folder, the size of the images, and how they are changed at random.

    Raises:
        FileNotFoundError: There is no such folder, or no picture in it.
        ValueError: Training and validation have other classes.
        ModuleNotFoundError: torchvision is missing.
    """

    def __init__(self, config: FolderConfig) -> None:
        module = require_package("torchvision.transforms", "torchvision")
        size = config.image_size
        flat: Any = module.ToTensor()
        crop = module.RandomResizedCrop(size, scale=(config.min_scale, 1.0))
        center = [module.Resize(round(size * 256 / 224)), module.CenterCrop(size)]
        self.config = config
        self.train = _Pictures(_listed(config, "train"), module.Compose([crop, flat]), config)
        self.val = _Pictures(_listed(config, "val"), module.Compose([*center, flat]), None)
        self.number, self.classes = len(self.train), self.train.files.classes
        self.shape = (3, size, size)
        _checks.require(
            self.val.files.classes == self.classes,
            _OWNER,
            "train and val must hold the same classes",
            "Name their folders alike",
            only_in_one=sorted(set(self.val.files.classes) ^ set(self.classes)),
        )

    def completed(self) -> FolderConfig:
        """The configuration with the shape of the images and the number of their classes."""
        found = arguments_for(self.config.model, self.shape, len(self.classes))
        arguments = {**found, **self.config.model_arguments}
        return dataclasses.replace(self.config, model_arguments=arguments)

    def batches(
        self, epoch: int, generator: torch.Generator, rank: int, size: int
    ) -> Iterator[Part]:
        """The training pictures of this process."""
        del generator  # the randomness is that of seed, epoch and picture
        batch = self.config.batch_size
        _checks.require(
            batch % size == 0,
            _OWNER,
            "batch_size must be a multiple of the number of processes",
            "Choose such a one",
            batch_size=batch,
            processes=size,
        )
        sampler = _Order(self.train, size, rank, seed=self.config.seed)
        sampler.set_epoch(epoch)
        for x, y in self._loader(self.train, batch // size, sampler):
            yield Part(x, y, 1.0, len(y))

    def tests(self, rank: int, size: int) -> Iterator[Images]:
        """The validation pictures of this process, none of them twice."""
        part = Subset(self.val, range(rank, len(self.val), size))
        for x, y in self._loader(part, max(1, self.config.batch_size // size)):
            yield Images(x, y)

    def evaluated(self) -> Split:
        """The validation pictures that are certified and attacked; there are none to train on."""
        number = len(self.val)
        wanted = min(number, self.config.evaluated or number)
        chosen = [i * number // wanted for i in range(wanted)]
        parts = list(self._loader(Subset(self.val, chosen), self.config.batch_size))
        x, y = (torch.cat([part[i].cpu() for part in parts]) for i in (0, 1))
        return Split(Images(x[:0], y[:0]), Images(x, y))

    def _loader(self, data: Any, batch: int, sampler: Any = None) -> Iterator[tuple[Tensor, ...]]:
        device = torch.device(self.config.device)
        loader = DataLoader(
            data,
            batch,
            sampler=sampler,
            num_workers=min(self.config.workers, _cores()),
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),
        )
        try:
            for x, y in loader:
                yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        except ValueError as error:
            # A worker wraps its error in the text of a traceback, whose last line is the error.
            *_, last = str(error).strip().splitlines() or [""]
            raise ValueError(last.removeprefix("ValueError: ")) from None


class _Order(DistributedSampler):
    """Pairs of epoch and index, so that a worker knows which epoch it is."""

    def __init__(self, data: Dataset, size: int, rank: int, *, seed: int) -> None:
        super().__init__(data, size, rank, seed=seed)

    def __iter__(self) -> Iterator[Any]:
        for index in super().__iter__():
            yield self.epoch, index


class _Pictures(Dataset):
    """Tensors (3, size, size) in [0, 1] and their classes; changed at random where `config` is."""

    def __init__(self, files: Any, transform: Any, config: FolderConfig | None) -> None:
        self.files, self.transform, self.config = files, transform, config

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: Any) -> tuple[Tensor, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        path, label = self.files.samples[index]
        try:
            picture = self.files.loader(path)
        except (OSError, SyntaxError) as error:  # what Pillow raises for broken files
            _checks.fail(
                _OWNER,
                "every file must be a whole picture",
                "Replace it or remove it",
                file=path,
                reason=str(error),
            )
        config = self.config
        if config is None:
            return self.transform(picture), label
        seed = random.Random(f"{config.seed} {epoch} {index}").getrandbits(62)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            x = self.transform(picture)[None]
        generator = torch.Generator().manual_seed(seed)
        x = random_affine(
            x,
            generator,
            shift=config.shift,
            rotation=config.rotation,
            zoom=config.zoom,
            shear=config.shear,
        )
        x = random_crop(x, generator, crop=config.crop, flip=config.flip)
        return random_noise(x, generator, deviation=config.noise)[0], label


def load_pictures(root: Path, shape: tuple[int, ...], number: int) -> Images:
    """Read pictures in the folders of their classes: CLASS/*, or `val` or `test` with these.

    Args:
        root: The folder, or that of Tiny-ImageNet.
        shape: (channels, height, width) that each picture is resized and cropped to, with 1 or 3
            channels.
        number: How many to read, evenly spaced; 0 for all.

    Raises:
        FileNotFoundError: There is no picture in the folder.
        ValueError: Another shape, or a file that is no picture.
        ModuleNotFoundError: torchvision is missing.
    """
    _checks.require(
        len(shape) == 3 and shape[0] in (1, 3),
        "load_pictures",
        "the shape must be (channels, height, width) with 1 or 3 channels",
        "Name it with --input-shape, such as --input-shape 3 224 224",
        shape=shape,
    )
    module = require_package("torchvision.transforms", "torchvision")
    folder = next((root / part for part in ("val", "test") if (root / part).is_dir()), root)
    steps = [module.Resize(max(shape[1:])), module.CenterCrop(shape[1:]), module.ToTensor()]
    gray = [module.Grayscale()] if shape[0] == 1 else []
    pictures = _Pictures(_folder(folder), module.Compose([*gray, *steps]), None)
    wanted = min(len(pictures), number or len(pictures))
    found = [pictures[i * len(pictures) // wanted] for i in range(wanted)]
    return Images(torch.stack([x for x, _ in found]), torch.tensor([y for _, y in found]))


def _listed(config: FolderConfig, part: str) -> Any:
    return _folder(Path(config.data_root) / part)


def _folder(folder: Path) -> Any:
    """The pictures of a folder, as torchvision lists them."""
    module = require_package("torchvision.datasets.folder", "torchvision")
    if (folder / _ANNOTATIONS).is_file():
        return _Annotated(folder, module.default_loader)
    try:
        return module.ImageFolder(str(folder))
    except FileNotFoundError as error:
        reason = "there is no such folder" if not folder.is_dir() else str(error).splitlines()[0]
    return _checks.fail(
        _OWNER,
        "the folder must hold pictures as train/CLASS/* and val/CLASS/*",
        "Name their folder with --data",
        FileNotFoundError,
        folder=str(folder),
        reason=reason,
    )


class _Annotated:
    """The validation pictures of Tiny-ImageNet: one folder, and the classes in a text file."""

    def __init__(self, folder: Path, loader: Any) -> None:
        rows = [line.split("\t") for line in (folder / _ANNOTATIONS).read_text().splitlines()]
        _checks.require(
            bool(rows) and all(len(row) >= 2 for row in rows),
            _OWNER,
            "each line must hold the name of a picture and its class",
            "Unpack the archive again",
            file=str(folder / _ANNOTATIONS),
        )
        self.loader = loader
        self.classes = sorted({row[1] for row in rows})
        index = {name: i for i, name in enumerate(self.classes)}
        self.samples = [(str(folder / "images" / row[0]), index[row[1]]) for row in rows]

    def __len__(self) -> int:
        return len(self.samples)


def _cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
