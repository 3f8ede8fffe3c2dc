"""A folder of small pictures in three colors, as ImageNet's lie."""

from pathlib import Path

import pytest
import torch


def make_pictures(root: Path, number: int = 16) -> Path:
    """`number` pictures of each class to train on, half as many to validate on."""
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    colors = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}
    for part, many in (("train", number), ("val", number // 2)):
        for name, color in colors.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(many):
                shape = (20 + i % 5, 24 - i % 3, 3)
                noise = 20 * torch.randn(shape, generator=generator)
                pixels = (torch.tensor(color) + noise).clamp(0, 255).byte().numpy()
                image.fromarray(pixels).save(folder / f"{i:02}.{('png', 'jpg')[i % 2]}")
    return root
