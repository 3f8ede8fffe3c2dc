"""CIFAR-10 in both of its formats, from small folders written in them."""

import dataclasses
import math
import pickle

import numpy
import pytest
import torch

from orthonet import cli, recipes
from orthonet.certify import certify
from orthonet.models import convnet_xs
from orthonet.recipes import cifar10_xs, load_cifar10
from orthonet.recipes.data.augment import random_crop
from orthonet.recipes.running import registry
from tests.references import jacobian_reference

NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def content(index: int, number: int = 4):
    generator = numpy.random.default_rng(index)
    pixels = generator.integers(0, 256, (number, 3072), dtype=numpy.uint8)
    return pixels, [(index + i) % 10 for i in range(number)]


def write(root, kind: str):
    folder = root / f"cifar-10-batches-{kind}"
    folder.mkdir(parents=True)
    for i, name in enumerate(NAMES):
        pixels, labels = content(i)
        if kind == "bin":
            rows = (bytes([y]) + p.tobytes() for p, y in zip(pixels, labels, strict=True))
            (folder / f"{name}.bin").write_bytes(b"".join(rows))
        else:
            batch = {b"batch_label": b"a batch", b"data": pixels, b"labels": labels}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


@pytest.mark.parametrize("kind", ["py", "bin"])
@pytest.mark.parametrize("inside", [False, True])
def test_images_are_read_in_the_order_of_the_batches(tmp_path, kind, inside):
    folder = write(tmp_path, kind)
    data = load_cifar10(folder if inside else tmp_path)
    assert data.train.x.shape == (20, 3, 32, 32)
    assert data.test.x.shape == (4, 3, 32, 32)
    pixels, labels = content(2)
    expected = torch.as_tensor(pixels).view(4, 3, 32, 32) / 255
    torch.testing.assert_close(data.train.x[8:12], expected, rtol=0, atol=0)
    assert data.train.y[8:12].tolist() == labels


def test_what_is_missing_or_broken_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data"):
        load_cifar10(tmp_path)
    folder = write(tmp_path, "bin")
    (folder / "data_batch_3.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"3073.*data_batch_3"):
        load_cifar10(tmp_path)
    folder = write(tmp_path, "py")
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": print}))
    with pytest.raises(ValueError, match=r"builtins\.print is not read"):
        load_cifar10(tmp_path)
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": content(0)[0], b"labels": [77]}))
    with pytest.raises(ValueError, match="classes from 0 to 9"):
        load_cifar10(tmp_path)
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": content(0)[0], b"labels": None}))
    with pytest.raises(ValueError, match=r"must be a batch of CIFAR.*data_batch_1"):
        load_cifar10(tmp_path)
    (folder / "data_batch_4").unlink()
    (folder / "test_batch").unlink()
    with pytest.raises(FileNotFoundError, match=r"all batches.*'data_batch_4', 'test_batch'"):
        load_cifar10(folder)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="bytes=0"):
        load_cifar10(tmp_path / "cifar-10-batches-bin")


def test_crops_are_windows_of_the_padded_image_and_flips_mirror():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 2, 5, 6, generator=generator)
    found = random_crop(x, generator, crop=2, flip=True)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    windows = torch.stack(
        [padded[:, :, i : i + 5, j : j + 6] for i in range(5) for j in range(5)], 1
    )
    windows = torch.cat([windows, windows.flip(-1)], 1)
    same = (windows == found[:, None]).flatten(2).all(2)
    assert same.any(1).all()
    used = same.float().argmax(1)
    assert len(used.unique()) > 15  # observed 29 of 50 with 40 images
    assert 8 < (used >= 25).sum() < 32  # observed 22
    assert torch.equal(random_crop(x, generator, crop=0, flip=False), x)


@pytest.mark.parametrize("layer", ["ortho", "aol", "bro", "cpl", "lipnext", "cholesky"])
def test_the_network_has_its_constant(layer):
    torch.manual_seed(0)
    model = convnet_xs((3, 4, 4), 3, layer=layer, width=4, depth=1, lipschitz=0.5).double().eval()
    x = torch.rand(3, 4, 4, dtype=torch.float64)
    largest = torch.linalg.matrix_norm(jacobian_reference(model, x), ord=2).item()
    constant = certify(model, x[None], lower=False).constant.value
    assert 0 < largest <= constant <= 0.5 * (1 + 1e-6)  # observed 0.5 (1 + 3.6e-10) at most


def test_the_network_has_the_size_of_the_comparison():
    model = convnet_xs(layer="aol")
    weights = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    # 1x1; 5 of 3x3 at 16, 32, 64, 128 channels; 5 of 1x1 at 256; 512 x 512
    expected = 16**2 + 5 * 9 * sum(c * c for c in (16, 32, 64, 128)) + 5 * 256**2 + 512**2
    assert sum(p.numel() for p in weights) == expected == 1_569_280
    with pytest.raises(ValueError, match="power of 2"):
        convnet_xs((3, 24, 24))


def test_the_recipe_is_that_of_the_paper_and_runs(tmp_path, monkeypatch, capsys):
    config = cifar10_xs()
    assert config.offset == pytest.approx(2 * math.sqrt(2) * 36 / 255)
    assert (config.optimizer, config.batch_size, config.temperature) == ("sgd", 256, 0.25)
    write(tmp_path / "data", "bin")
    small = {"width": 4, "depth": 1}

    def build(model_arguments=(), **changes):
        return cifar10_xs(**changes, model_arguments={**small, **dict(model_arguments)})

    recipe = dataclasses.replace(recipes.registered()["cifar10-xs"], build=build)
    monkeypatch.setitem(registry._RECIPES, ("train", "cifar10-xs"), recipe)
    command = f"train cifar10-xs --data {tmp_path / 'data'} --epochs 1 --attack-steps 1 --layer aol"
    assert cli.main([*command.split(), "--quiet", "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "none changed class" in text
    names = {path.name for path in (tmp_path / "run").iterdir()}
    pictures = {"certified_accuracy.png", "training.png"}
    assert names == {"checkpoint.pt", "state.pt", "log.csv", "metrics.json", *pictures}
    missing = ["train", "cifar10-xs", "--data", str(tmp_path / "nothing"), "--quiet"]
    assert cli.main(missing) == 1
    assert "--data" in capsys.readouterr().err
