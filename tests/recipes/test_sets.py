"""Data sets from the files in which they are given out: small ones, written here in their form."""

import dataclasses
import gzip
import pickle
import shutil

import numpy
import pytest
import torch

from orthonet import cli, recipes
from orthonet.recipes import ImageFolders, load, load_cifar100, load_series
from orthonet.recipes.data import idx, sets
from orthonet.recipes.data.series import read_ts
from orthonet.recipes.images import named
from orthonet.recipes.images.run import images_of
from tests.recipes.pictures import make_pictures


def idx_bytes(tensor: torch.Tensor) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    return bytes([0, 0, 8, tensor.ndim]) + sizes + tensor.numpy().tobytes()


def write_idx(folder, train=60, test=20, compressed=True):
    """Images whose first pixel is their class, as MNIST and Fashion-MNIST lie."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for part, number in (("train", train), ("t10k", test)):
        pixels = torch.randint(256, (number, 28, 28), generator=generator, dtype=torch.uint8)
        labels = (torch.arange(number) % 10).to(torch.uint8)
        pixels[:, 0, 0] = labels
        for name, content in (("images-idx3", pixels), ("labels-idx1", labels)):
            data, path = idx_bytes(content), folder / f"{part}-{name}-ubyte"
            if compressed:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(data, 1))
            else:
                path.write_bytes(data)
    return folder


@pytest.mark.parametrize(
    ("name", "inside", "compressed"),
    [("fashion", "", True), ("fashion", "FashionMNIST/raw", False), ("mnist", "MNIST/raw", True)],
)
def test_idx_files_are_found_and_read(tmp_path, name, inside, compressed):
    write_idx(tmp_path / "root" / inside, compressed=compressed)
    data = load(name, tmp_path / "root")
    for images, number in zip(data, (60, 20), strict=True):
        assert images.x.shape == (number, 1, 28, 28) and images.x.dtype == torch.float32
        assert 0.0 <= images.x.min() < 0.01 and 0.99 < images.x.max() <= 1.0
        assert torch.equal((images.x[:, 0, 0, 0] * 255).round().long(), images.y)


def test_the_place_of_the_package_is_looked_in_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = write_idx(tmp_path / "usr")
    monkeypatch.setitem(
        sets.IMAGE_SETS,
        "fashion",
        sets.IMAGE_SETS["fashion"]._replace(
            read=lambda root: idx.load_idx(idx.FASHION._replace(places=(str(place),)), root)
        ),
    )
    assert len(load("fashion").test.y) == 20
    # A folder that is named is not replaced by another one.
    with pytest.raises(FileNotFoundError, match=f"leave it out: the files are in {place}"):
        load("fashion", tmp_path / "nothing")
    write_idx(tmp_path / "data" / "FashionMNIST" / "raw", test=10)
    for root in ("data", tmp_path / "data"):
        assert len(load("fashion", root).test.y) == 10
    # The folders of Debian's package dataset-fashion-mnist, as `dpkg -L` lists them.
    assert idx.FASHION.places[0] == "/usr/share/datasets/fashion-mnist"


def test_a_missing_set_says_which_command_brings_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/apt-get")
    source = idx.FASHION._replace(places=())
    with pytest.raises(
        FileNotFoundError, match="or run: sudo apt-get install dataset-fashion-mnist"
    ):
        idx.load_idx(source, tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for each in (source, idx.MNIST):
        call = rf"torchvision.datasets.{each.torchvision}\('{tmp_path}', download=True\)"
        with pytest.raises(FileNotFoundError, match=call):
            idx.load_idx(each, tmp_path)
    assert cli.main(["train", "mnist", "--data", str(tmp_path), "--out", str(tmp_path / "o")]) == 1
    assert "Name their folder with --data" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="pip install --no-deps aeon"):
        load_series("GunPoint", tmp_path)


def test_damaged_idx_files_are_refused(tmp_path):
    folder = write_idx(tmp_path / "raw")
    images = folder / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    for content in (
        b"",
        b"hello",
        whole[:-50],
        gzip.compress(gzip.decompress(whole)[:-1]),
        gzip.compress(b"\0\0\x0d" + gzip.decompress(whole)[3:]),
    ):
        images.write_bytes(content)
        with pytest.raises(ValueError, match=r"must be whole.*train-images-idx3-ubyte\.gz"):
            load("fashion", tmp_path)
    images.write_bytes(whole)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(idx_bytes(torch.full((60,), 10, dtype=torch.uint8)))
    )
    with pytest.raises(ValueError, match="as many classes from 0 to 9"):
        load("fashion", tmp_path)
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"all four files.*missing=.'train-labels-idx1"):
        load("fashion", tmp_path)
    small = write_idx(tmp_path / "small")
    for part, number in (("train", 60), ("t10k", 20)):
        pixels = gzip.compress(idx_bytes(torch.zeros(number, 32, 32, dtype=torch.uint8)))
        (small / f"{part}-images-idx3-ubyte.gz").write_bytes(pixels)
    with pytest.raises(ValueError, match=r"fashion must have the shape \(1, 28, 28\).*\(1, 32, 32"):
        load("fashion", small)


def test_validation_images_are_part_of_the_training_images_and_always_the_same(tmp_path):
    write_idx(tmp_path / "raw", train=100)
    for name, root, held in (("digits", "data", 287), ("fashion", tmp_path, 20)):
        whole, split = load(name, root), load(name, root, validation=True)
        assert len(split.test.y) == held and len(split.train.y) + held == len(whole.train.y)
        both = torch.cat([split.train.x, split.test.x]).flatten(1)
        assert torch.equal(both.unique(dim=0), whole.train.x.flatten(1).unique(dim=0))
        assert torch.equal(split.test.x, load(name, root, validation=True).test.x)
        counts = split.test.y.bincount(minlength=10) / held
        shares = whole.train.y.bincount(minlength=10) / len(whole.train.y)
        # A class gets its share of the picks to within one of them.
        assert (counts - shares).abs().max() <= 1 / held
    # Published: another choice would be another data set.
    kept, chosen = recipes.stratified_split(torch.arange(100) % 10, 20)
    assert chosen.tolist() == CHOSEN and len(kept) == 80


CHOSEN = [9, 11, 17, 22, 24, 26, 35, 36, 40, 45, 60, 63, 73, 78, 81, 84, 88, 89, 92, 97]


@pytest.mark.parametrize("kind", ["python", "binary"])
def test_cifar100_has_its_fine_classes(tmp_path, kind):
    generator = numpy.random.default_rng(0)
    folder = tmp_path / f"cifar-100-{kind}"
    folder.mkdir()
    expected = {}
    for name, number in (("train", 6), ("test", 3)):
        pixels = generator.integers(0, 256, (number, 3072), dtype=numpy.uint8)
        fine, coarse = [(17 * i + 3) % 100 for i in range(number)], [i % 20 for i in range(number)]
        expected[name] = pixels, fine
        if kind == "python":
            content = {b"data": pixels, b"fine_labels": fine, b"coarse_labels": coarse}
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        else:
            labels = numpy.array([coarse, fine], dtype=numpy.uint8).T
            (folder / f"{name}.bin").write_bytes(numpy.hstack([labels, pixels]).tobytes())
    for root in (tmp_path, folder):
        data = load_cifar100(root)
        for images, (pixels, fine) in zip(data, expected.values(), strict=True):
            assert torch.equal(images.x, torch.as_tensor(pixels).view(-1, 3, 32, 32) / 255)
            assert images.y.tolist() == fine
    assert sets.set_in(tmp_path) == "cifar100" and load("cifar100", tmp_path).test.x.shape[0] == 3
    with pytest.raises(FileNotFoundError, match="cifar-100-python or cifar-100-binary"):
        load("cifar100", tmp_path / "nothing")


def test_tiny_imagenet_is_read_as_it_is_unpacked(tmp_path):
    pytest.importorskip("torchvision")
    root = make_pictures(tmp_path / "tiny-imagenet-200", 4)
    lines, number = [], 0
    images = root / "val" / "images"
    images.mkdir()
    for name in ("red", "green", "blue"):
        train = root / "train" / name
        (train / "images").mkdir()
        for path in list(train.glob("*.*")):
            path.rename(train / "images" / f"{name}_{path.name}")
        for path in sorted((root / "val" / name).iterdir()):
            path.rename(images / f"val_{number}{path.suffix}")
            lines.append(f"val_{number}{path.suffix}\t{name}\t0\t0\t62\t62\n")
            number += 1
        (root / "val" / name).rmdir()
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    config = recipes.folder(data_root=str(root), image_size=8, batch_size=12, workers=0)
    source = ImageFolders(config)
    assert source.classes == ["blue", "green", "red"] and source.number == 12
    (part,) = source.batches(1, torch.Generator(), 0, 1)
    assert part.x.shape == (12, 3, 8, 8) and part.y.bincount().tolist() == [4, 4, 4]
    test = source.evaluated().test
    assert test.y.bincount().tolist() == [2, 2, 2]
    brightest = test.x.mean((2, 3)).argmax(1)  # of red, green, blue
    assert torch.equal(brightest, 2 - test.y)
    (root / "val" / "val_annotations.txt").write_text("no table\n")
    with pytest.raises(ValueError, match="the name of a picture and its class"):
        ImageFolders(config)


TS = """#a comment
@problemName Waves
@timeStamps false
@missing false
@univariate false
@equalLength false
@classLabel true up down
@data
1.0,2.0,3.5:0,0,1:up
4,5:-1,1e-2:down
1,2,3,4:0,0,0,0:down
0,0:0,0:up
7,7:7,7:up
"""


def test_series_are_padded_and_labeled(tmp_path, monkeypatch):
    folder = tmp_path / "aeon" / "datasets" / "data" / "Waves"
    folder.mkdir(parents=True)
    (tmp_path / "aeon" / "__init__.py").write_text("raise ImportError('heavy')")  # never imported
    (folder / "Waves_TRAIN.ts").write_text(TS)
    (folder / "Waves_TEST.ts").write_text(TS.replace("7,7:7,7:up\n", ""))
    monkeypatch.syspath_prepend(str(tmp_path))
    for found in (
        load_series("Waves"),
        load_series("Waves", folder),
        load_series("Waves", folder.parent),
    ):
        train, test, classes = found
        assert classes == ("up", "down")
        assert train.x.shape == (5, 2, 4) and test.x.shape == (4, 2, 4)
        assert train.y.tolist() == [0, 1, 1, 0, 0] and train.lengths.tolist() == [3, 2, 4, 2, 2]
        assert train.x[1].tolist() == [[4, 5, 0, 0], [-1, pytest.approx(0.01), 0, 0]]
    held = load_series("Waves", validation=True)
    assert len(held.test.y) == 1 and len(held.train.y) == 4
    rows = torch.cat([held.train.x, held.test.x]).flatten(1).unique(dim=0)
    assert torch.equal(rows, train.x.flatten(1).unique(dim=0))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("4,5:-1", "4,x:-1", "must be a number.*line=10"),
        ("4,5:-1", "4,?:-1", "must be a number"),
        ("4,5:-1", "4,nan:-1", "without missing values"),
        ("4,5:-1", "4,5,6:-1", "of one length"),
        (":down", ":left", "known label"),
        ("4,5:-1,1e-2:down", "4,5:down", "as many channels"),
        ("@timeStamps false", "@timeStamps true", "without time stamps"),
        (TS[TS.index("1.0") :], "", "there must be series"),
    ],
)
def test_damaged_series_are_refused(tmp_path, old, new, words):
    path = tmp_path / "Waves_TRAIN.ts"
    path.write_text(TS.replace(old, new, 1))
    with pytest.raises(ValueError, match=f"read_ts: .*{words}"):
        read_ts(path)


def test_fashion_trains_and_is_certified_on_some_of_its_images(tmp_path):
    write_idx(tmp_path / "FashionMNIST" / "raw", train=64, test=20)
    assert recipes.fashion().evaluated == 1000
    config = recipes.fashion(
        model="mlp",
        model_arguments={"in_features": 784, "num_classes": 10, "hidden": (8,)},
        epochs=1,
        batch_size=32,
        attack_steps=1,
        evaluated=5,
        data_root=str(tmp_path),
    )
    report = recipes.train(config, tmp_path / "run")
    assert len(report.evaluation.radii) == 5
    again = recipes.certify_checkpoint(report.files[0], evaluated=0, radii=(0.5,), attack_steps=1)
    assert len(again.evaluation.radii) == 20
    held = images_of(dataclasses.replace(config, validation=True))
    assert (len(held.train.y), len(held.test.y)) == (52, 12)  # a fifth of 64 is held out


def test_the_demo_takes_fashion_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(named, "FASHION", idx.FASHION._replace(places=()))
    assert recipes.demo() == recipes.mnist5k()
    assert recipes.demo(epochs=3).epochs == 3
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-images-idx3-ubyte.gz").write_bytes(b"")
    assert recipes.demo() == recipes.fashion(cpu_seconds=200.0)
    # Who names a folder means Fashion-MNIST, and never gets another set in silence.
    asked = recipes.demo(data_root="nowhere")
    assert asked == recipes.fashion(data_root="nowhere", cpu_seconds=200.0)
