"""orthogonium's documented examples by a changed import, its conventions, and the page's table."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from orthonet import layers
from orthonet.certify import certify
from orthonet.compat import orthogonium
from orthonet.compat.orthogonium import (
    DEFAULT_ORTHO_PARAMS,
    VRA,
    AdaptiveOrthoConv2d,
    AdaptiveOrthoConvTranspose2d,
    AdaptiveSOCConv2d,
    AdaptiveSOCConvTranspose2d,
    BatchCentering2D,
    ClassParam,
    CosineLoss,
    LossXent,
    MaxMin,
    OrthoLinear,
    PatchBasedExapandedCNN,
    get_conv_sv,
)
from orthonet.testing import jacobian, singular_values

PAGE = Path(__file__).parents[2] / "docs" / "coming-from-orthogonium.md"


def test_the_convolutions_of_the_readme():
    kernel_size = 3
    conv = AdaptiveOrthoConv2d(
        kernel_size=kernel_size,
        in_channels=32,
        out_channels=32,
        stride=2,
        groups=8,
        dilation=2,
        padding_mode="circular",
        ortho_params=DEFAULT_ORTHO_PARAMS,
    )
    plain = nn.Conv2d(32, 32, 3, stride=2, groups=8, dilation=2)
    plain.weight = nn.Parameter(conv.weight.detach())  # it can be assigned
    assert conv(torch.zeros(1, 32, 8, 8)).shape == (1, 32, 4, 4)
    sigma = singular_values(conv, (32, 4, 4))
    assert float((sigma - 1).abs().max()) < 1e-5  # observed 4e-7
    transposed = AdaptiveOrthoConvTranspose2d(
        in_channels=32,
        out_channels=32,
        kernel_size=kernel_size,
        stride=2,
        dilation=2,
        groups=8,
        ortho_params=DEFAULT_ORTHO_PARAMS,
    )
    assert transposed(torch.zeros(1, 32, 4, 4)).shape == (1, 32, 11, 11)
    assert float(singular_values(transposed, (32, 3, 3)).max()) < 1 + 1e-5


@pytest.mark.slow
def test_the_tutorial_trains_and_its_radii_are_certified():
    """The network, losses and VRA of the notebook on CIFAR-10, on random images of 8 x 8."""
    torch.manual_seed(0)
    deviation = (0.21938758, 0.1983, 0.19342837)
    settings = {
        "non_robust": CosineLoss,
        "robust": ClassParam(
            LossXent,
            n_classes=10,
            offset=(math.sqrt(2) / 0.1983) * (72 / 255),
            temperature=0.25,
        ),
    }
    x, y = torch.randn(20, 3, 8, 8), torch.arange(20) % 10
    for make_loss in settings.values():
        model = PatchBasedExapandedCNN(
            img_shape=(3, 8, 8),
            dim=8,
            depth=1,
            kernel_size=3,
            patch_size=2,
            expand_factor=2,
            groups=None,
            n_classes=10,
            skip=True,
            conv=ClassParam(AdaptiveOrthoConv2d, bias=False, padding="same", padding_mode="zeros"),
            act=ClassParam(MaxMin),
            pool=ClassParam(
                AdaptiveOrthoConv2d,
                in_channels=8,
                out_channels=8,
                groups=4,
                bias=False,
                padding=0,
                kernel_size=4,
                stride=4,
            ),
            lin=ClassParam(OrthoLinear, bias=False),
            norm=None,
        )
        criterion = make_loss()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]  # observed -0.14 to -0.69, and 2.40 to 2.05
    model.eval()
    constant = certify(model, x[:1], lower=False).constant.value
    assert constant <= 1 + 1e-4
    options = {"L": 1 / min(deviation), "eps": 36 / 255, "last_layer_type": "global"}
    radii = VRA(model(x), y, return_certs=True, **options)
    assert torch.equal(VRA(model(x), y, **options), (radii > 36 / 255).float())
    certified = VRA(model(x), y, "global", constant, 0.01).bool()
    worst = model(x + 0.01 * torch.nn.functional.normalize(torch.randn_like(x), dim=0))
    assert bool((worst.argmax(1) == y)[certified].all())


def test_radii_of_both_kinds_of_last_layers():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.5]])
    y = torch.tensor([0, 2])
    torch.testing.assert_close(
        VRA(logits, y, "classwise", 2.0, return_certs=True), torch.tensor([2 / 4, -0.5 / 4])
    )
    torch.testing.assert_close(
        VRA(logits, y, "global", return_certs=True), torch.tensor([2.0, -0.5]) / math.sqrt(2)
    )
    with pytest.raises(ValueError, match="last_layer_type must be one of"):
        VRA(logits, y, "unknown")
    kinds = [OrthoLinear(3, 3), orthogonium.UnitNormLinear(3, 3), nn.Linear(3, 3)]
    found = [orthogonium.check_last_linear_layer_type(nn.Sequential(k, MaxMin())) for k in kinds]
    assert found == ["global", "classwise", "unknown"]


def test_a_convolution_reports_its_norm_and_stable_rank():
    for layer, size in (
        (AdaptiveOrthoConv2d(4, 6, 3, groups=2), 5),
        (AdaptiveOrthoConv2d(4, 8, 3, 2), 6),
        (orthogonium.AOLConv2D(4, 6, 3, 2, 1, groups=2), 6),
        (orthogonium.RKOConv2d(4, 4, 3, padding_mode="zeros"), 6),
    ):
        sigma, rank = get_conv_sv(layer, 6, imsize=size)
        values = layer.singular_values(size)
        assert float(values.max()) <= float(sigma) * (1 + 1e-5)
        assert 0 < float(rank) <= 1 + 1e-5
        if layer.padding_mode == "circular":
            assert float(sigma) == pytest.approx(float(values.max()), rel=1e-5)
            share = values.square().mean() / values.max() ** 2
            assert float(rank) == pytest.approx(float(share), rel=1e-5)
        each = get_conv_sv(layer, 6, agg_groups=False, imsize=size)
        assert len(each) == layer.groups
        assert float(sigma) == pytest.approx(max(float(s) for s, _ in each))
    assert get_conv_sv(layer, 6, return_stab_rank=False, detach=False).requires_grad
    smallest, largest, rank = OrthoLinear(6, 4).singular_values()
    assert smallest == pytest.approx(1, abs=1e-5) == largest == pytest.approx(rank, abs=1e-5)
    smallest, largest, rank = orthogonium.UnitNormLinear(6, 4).singular_values()
    assert rank == pytest.approx(1 / largest**2, rel=1e-5)  # rows of norm 1: mean square 1


def test_adaptive_soc_divides_and_multiplies_sizes_by_the_stride():
    for kernel, stride in ((3, 1), (3, 2), (4, 2), (2, 2)):
        down = AdaptiveSOCConv2d(4, 6, kernel, stride)
        up = AdaptiveSOCConvTranspose2d(6, 4, kernel, stride)
        assert down(torch.zeros(1, 4, 8, 8)).shape == (1, 6, 8 // stride, 8 // stride)
        assert up(torch.zeros(1, 6, 4, 4)).shape == (1, 4, 4 * stride, 4 * stride)
        assert float(singular_values(down, (4, 4, 4)).max()) <= 1 + 1e-5
    with pytest.raises(ValueError, match="padding must be 'same'"):
        AdaptiveSOCConv2d(4, 4, 3, padding=0)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (orthogonium.SDPBasedLipschitzResBlock(4, 2), (4, 5, 5)),
        (orthogonium.SLLxAOCLipschitzResBlock(4, 8, 0.5), (4, 4, 4)),
        (orthogonium.AOCLipschitzResBlock(4, 2, 3), (4, 5, 5)),
        (orthogonium.SDPBasedLipschitzDense(5, 5, -1), (5,)),
        (orthogonium.AOLConvTranspose2D(4, 3, 3, 2, 1, 1), (4, 4, 4)),
        (orthogonium.HouseHolder(6), (6, 3, 3)),
        (orthogonium.HouseHolder_Order_2(6), (6, 3, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_blocks_and_activations_are_one_lipschitz_and_certified(layer, shape):
    x = torch.randn(shape)
    found = float(torch.linalg.matrix_norm(jacobian(layer, x), 2))
    assert found <= 1 + 1e-5
    if not hasattr(layer, "reduction"):  # tests/certify/test_zoo_rules.py has the residual blocks
        bound = certify(layer.eval(), x[None], lower=False).constant.value
        assert found - 1e-5 <= bound <= 1 + 1e-4


def test_conventions_of_the_peer():
    x = torch.randn(2, 4, 3, 3)
    a, b = x.chunk(2, 1)
    ascending = torch.cat([torch.minimum(a, b), torch.maximum(a, b)], 1)
    torch.testing.assert_close(orthogonium.HouseHolder(4)(x), ascending)
    torch.testing.assert_close(MaxMin(axis=1)(x), ascending.roll(2, 1))
    center = BatchCentering2D(4, momentum=0.25)
    y = center(x)  # train mode subtracts the running mean
    torch.testing.assert_close(y, x - 0.25 * x.mean((0, 2, 3), keepdim=True))
    again = BatchCentering2D(4)
    again.load_state_dict(center.state_dict())
    torch.testing.assert_close(again.eval()(x), center.eval()(x))
    shuffled = orthogonium.ChannelShuffle(2, 2)(x)
    torch.testing.assert_close(shuffled, x[:, [0, 2, 1, 3]])
    branch = orthogonium.AdditiveResidual(nn.Tanh(), 0.5)
    share = torch.sigmoid(torch.tensor(0.5))
    torch.testing.assert_close(branch(x), share * x + (1 - share) * x.tanh())
    with pytest.raises(ValueError, match="rescaling has one step"):
        orthogonium.AOLConv2D(4, 4, 3, niter=4)


def test_class_param_merges_positions_and_keywords():
    make = ClassParam(nn.Linear, 4, 3, bias=False)
    assert (make(8).in_features, make(8).out_features) == (8, 3)
    assert make(bias=True).bias is not None
    assert str(make) == "Linear(4,3,bias=False)"
    nested = ClassParam(nn.Sequential, make, act=ClassParam(nn.ReLU))
    assert nested.get_config()["kwargs"] == {"act": {"fct": "ReLU"}}
    flat = nested.get_config(flatten=True)
    assert flat["act/fct"] == "ReLU"
    assert flat["args_0/args_1"] == "3"
    assert ClassParam()(1)(2) == 2
    assert make == ClassParam(nn.Linear, 4, 3, bias=False)


# --- the table of the page -----------------------------------------------------------------------

ROW = re.compile(r"^\| `(\w+)` \| (same|renamed|no) \| (.+?) \|$", re.M)


def rows(page: Path) -> dict[str, tuple[str, str]]:
    found = ROW.findall(page.read_text())
    assert len({name for name, _, _ in found}) == len(found)  # each name once
    return {name: (kind, text) for name, kind, text in found}


def check_table(page: Path, module) -> None:
    """Every name of the table is what the table says, and every name of the module is in it."""
    table = rows(page)
    assert set(module.__all__) == {n for n, (kind, _) in table.items() if kind != "no"}
    assert set(module._ABSENT) == {n for n, (kind, _) in table.items() if kind == "no"}
    for name, (kind, text) in table.items():
        if kind == "no":
            with pytest.raises(AttributeError, match=f"{name} has no counterpart here: ") as error:
                getattr(module, name)
            assert str(error.value).count(".") <= 6  # one sentence
        else:
            assert callable(getattr(module, name)) or name.endswith("PARAMS")
        if kind == "renamed":
            target = re.findall(r"`(orthonet[\w.]+)", text)
            assert target, f"{name}: name what it is in the library"
            for path in target:
                parent, _, last = path.rpartition(".")
                assert hasattr(__import__(parent, fromlist=[last]), last), path
    with pytest.raises(AttributeError, match="has no attribute 'not_a_name'"):
        module.not_a_name  # noqa: B018


def test_the_table_of_the_page_is_true():
    check_table(PAGE, orthogonium)
    assert isinstance(OrthoLinear(2, 2), layers.OrthoLinear)
