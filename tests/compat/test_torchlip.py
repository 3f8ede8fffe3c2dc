"""deel-torchlip's documented examples by a changed import, its signs, and the page's table."""

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from orthonet import layers, losses
from orthonet.certify import certify
from orthonet.compat import torchlip
from orthonet.errors import UncertifiableError
from orthonet.testing import jacobian, singular_values
from tests.compat.test_orthogonium import check_table

PAGE = Path(__file__).parents[2] / "docs" / "coming-from-torchlip.md"


def test_the_network_of_the_readme_has_the_constant_that_is_asked_for():
    for k in (1.0, 4.0, 0.25):
        model = torchlip.Sequential(
            torchlip.SpectralConv2d(
                in_channels=3, out_channels=16, kernel_size=(3, 3), padding="same"
            ),
            torchlip.GroupSort2(),
            torch.nn.Flatten(),
            torchlip.SpectralLinear(576, 64),
            k_coef_lip=k,
        ).eval()
        x = torch.randn(2, 3, 6, 6)
        bound = certify(model, x[:1], lower=False).constant.value
        assert bound <= k * (1 + 1e-4)  # less, where the divided convolution is loose
        plain = model.vanilla_export()
        kinds = [type(m) for m in plain]
        assert kinds[0] is nn.Conv2d and kinds[3] is nn.Linear
        torch.testing.assert_close(plain(x), model(x))
        own = {p.data_ptr() for p in model.parameters()}
        assert not own & {p.data_ptr() for p in plain.parameters()}
    matrix = torchlip.Sequential(torchlip.SpectralLinear(6, 6), torchlip.FullSort(), k_coef_lip=4.0)
    slope = torch.linalg.matrix_norm(jacobian(matrix, torch.randn(6)), 2)
    assert float(slope) == pytest.approx(4.0, rel=1e-5)  # attained: the peer's measures 1
    nested = torchlip.Sequential(matrix, torchlip.SpectralLinear(6, 2), k_coef_lip=9.0)
    found = [part._coefficient_lip for part in (matrix, matrix[0], nested[1])]
    assert found == pytest.approx([3.0, math.sqrt(3.0), 3.0])
    with pytest.raises(ValueError, match="needs Lipschitz layers"):
        torchlip.Sequential(nn.ReLU(), k_coef_lip=2.0)


class Halved(nn.Linear, torchlip.LipschitzModule):
    """A layer of a user, made as deel-torchlip's own are."""

    def __init__(self, features, k_coef_lip=1.0):
        nn.Linear.__init__(self, features, features, bias=False)
        torchlip.LipschitzModule.__init__(self, k_coef_lip)
        nn.init.orthogonal_(self.weight)
        self.apply_lipschitz_factor()


def test_layers_of_a_user_take_their_share_of_the_constant():
    model = torchlip.Sequential(Halved(4, 3.0), torchlip.SpectralLinear(4, 4), k_coef_lip=4.0)
    assert isinstance(model, torchlip.LipschitzModule)
    slope = torch.linalg.matrix_norm(jacobian(model, torch.randn(4)), 2)
    assert float(slope) == pytest.approx(4.0, rel=1e-5)
    assert type(model.vanilla_export()[0].weight) is nn.Parameter
    with pytest.raises(ValueError, match="is not shared"):
        torchlip.LipschitzModule(1.0, torchlip.SharedLipFactory())


def test_the_wasserstein_tutorial_maximizes_the_distance():
    """Two clusters at distance 2: the dual of W1, with the peer's sign."""
    torch.manual_seed(0)
    model = torchlip.Sequential(
        torchlip.SpectralLinear(2, 16),
        torchlip.FullSort(),
        torchlip.SpectralLinear(16, 16),
        torchlip.FullSort(),
        torchlip.FrobeniusLinear(16, 1),
    )
    x = torch.cat([0.1 * torch.randn(64, 2), 0.1 * torch.randn(64, 2) + torch.tensor([2.0, 0.0])])
    y = torch.cat([torch.zeros(64, 1), torch.ones(64, 1)])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        torchlip.NegKRLoss()(model(x), y).backward()
        optimizer.step()
    distance = torchlip.functional.kr_loss(model(x), y).mean()
    assert 1.9 < distance.item() < 2.1  # observed 2.00


def test_binary_and_multiclass_tutorials_train_by_their_losses():
    torch.manual_seed(0)
    x, y = torch.randn(64, 1, 6, 6), torch.arange(64) % 4
    x = x + 2.0 * F.one_hot(y, 36).view(64, 1, 6, 6)
    model = torchlip.Sequential(
        torchlip.SpectralConv2d(1, 8, 3, padding="same"),
        torchlip.ScaledL2NormPool2d((2, 2)),
        torchlip.GroupSort2(),
        nn.Flatten(),
        torchlip.SpectralLinear(72, 16),
        torchlip.GroupSort2(),
        torchlip.FrobeniusLinear(16, 4, disjoint_neurons=True),
    )
    criterion = torchlip.HKRMulticlassLoss(alpha=0.9, min_margin=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    target = F.one_hot(y, 4)
    first = criterion(model(x), target).item()
    for _ in range(30):
        optimizer.zero_grad()
        criterion(model(x), target).backward()
        optimizer.step()
    assert criterion(model(x), target).item() < first
    exported = torchlip.vanilla_model(model, in_place=False)
    torch.testing.assert_close(exported(x), model(x), atol=1e-5, rtol=1e-5)
    assert type(exported[0]) is nn.Conv2d
    assert type(model[0]) is torchlip.SpectralConv2d  # the argument is as it was
    assert torchlip.vanilla_model(model) is model
    assert type(model[0]) is nn.Conv2d


def test_losses_have_the_signs_and_margins_of_the_peer():
    x, y = torch.randn(12, 5).double(), torch.arange(12) % 5
    one_hot = F.one_hot(y, 5)
    score, label = torch.randn(12, 1).double(), (torch.arange(12) % 3 > 0).double()[:, None]
    near = {"rtol": 1e-12, "atol": 1e-12}
    distance = score[label > 0].mean() - score[label <= 0].mean()
    for signed in (label, 2 * label - 1):
        torch.testing.assert_close(torchlip.KRLoss()(score, signed), distance, **near)
        torch.testing.assert_close(torchlip.NegKRLoss()(score, signed), -distance, **near)
        ours = losses.hinge_kr(score, signed, alpha=0.3, margin=0.35)
        theirs = torchlip.HKRLoss(alpha=0.3, min_margin=0.7)(score, signed)
        torch.testing.assert_close(theirs, ours, **near)
        hinge = F.relu(0.35 - score * (2 * label - 1)).mean()
        torch.testing.assert_close(torchlip.HingeMarginLoss(0.7)(score, signed), hinge, **near)
    rows = []
    for row, k in zip(x, y.tolist(), strict=True):
        others = [max(0.0, 0.35 + float(row[j])) for j in range(5) if j != k]
        rows.append((4 * max(0.0, 0.35 - float(row[k])) + sum(others)) / 5)
    multi = torchlip.HingeMulticlassLoss(0.7, "none")(x, one_hot)
    torch.testing.assert_close(multi, torch.tensor(rows).double(), rtol=1e-6, atol=1e-6)
    distance = torchlip.KRMulticlassLoss()(x, one_hot)
    torch.testing.assert_close(distance, -losses.kr(x, one_hot), **near)
    mixed = torchlip.HKRMulticlassLoss(0.3, 0.7)(x, one_hot)
    torch.testing.assert_close(mixed, 0.3 * multi.mean() - 0.7 * distance, **near)
    ratio = torchlip.HKRMulticlassLoss(alpha=4.0, min_margin=0.7)
    assert ratio.alpha == pytest.approx(0.8)
    shared = torchlip.functional.process_labels_for_multi_gpu(one_hot.double())
    torch.testing.assert_close(
        torchlip.KRMulticlassLoss(multi_gpu=True)(x, shared), distance, **near
    )
    margin = losses.multi_margin(x, y, margin=0.7)
    torch.testing.assert_close(torchlip.CategoricalHingeLoss(0.7)(x, one_hot), margin, **near)
    tempered = F.cross_entropy(3 * x, y) / 3
    torch.testing.assert_close(torchlip.TauCrossEntropyLoss(3.0)(x, y), tempered, **near)
    torch.testing.assert_close(torchlip.TauCrossEntropyLoss(3.0)(x, one_hot), tempered, **near)
    ours = losses.tau_bce_with_logits(score, label, tau=3.0)
    torch.testing.assert_close(torchlip.TauBCEWithLogitsLoss(3.0)(score, label), ours, **near)
    lse = torchlip.LseHKRMulticlassLoss(0.3, penalty=0.5, min_margin=0.7)(x, one_hot)
    temperature = 0.7 * 0.5 / 2 / math.log(4)
    options = {"alpha": 0.3, "margin": 0.35, "temperature": temperature}
    torch.testing.assert_close(lse, losses.lse_hinge_kr_multiclass(x, y, **options), **near)
    soft = torchlip.SoftHKRMulticlassLoss(alpha=0.3, min_margin=0.7)
    before = soft.current_mean.clone()
    assert soft(x, one_hot).isfinite()
    expected = 0.99 * before + 0.01 * x.abs().mean().float()
    torch.testing.assert_close(soft.current_mean, expected)
    for name in ("KRLoss", "NegKRLoss"):
        each = getattr(torchlip, name)(reduction="none")(score, label)
        assert each.shape == (12,)
        assert torchlip.apply_reduction(each, "auto") == each.mean()
        assert torchlip.apply_reduction(each, "sum") == each.sum()
    with pytest.raises(ValueError, match="target > 0"):
        torchlip.HKRLoss(0.5, true_values=(1, -1))


ACTIVATIONS = {
    "MaxMin": (torchlip.MaxMin, 12),
    "GroupSort": (lambda **k: torchlip.GroupSort(3, **k), 6),
    "GroupSort2": (torchlip.GroupSort2, 6),
    "FullSort": (torchlip.FullSort, 6),
    "HouseHolder": (lambda **k: torchlip.HouseHolder(6, **k), 6),
    "LPReLU": (lambda **k: torchlip.LPReLU(init=-3.0, **k), 6),
    "ScaledAvgPool2d": (lambda **k: torchlip.ScaledAvgPool2d((2, 2), **k), 6),
    "ScaledL2NormPool2d": (lambda **k: torchlip.ScaledL2NormPool2d(2, **k), 6),
    "ScaledAdaptiveAvgPool2d": (lambda **k: torchlip.ScaledAdaptiveAvgPool2d((1, 1), **k), 6),
    "ScaledAdaptativeL2NormPool2d": (torchlip.ScaledAdaptativeL2NormPool2d, 6),
    "InvertibleDownSampling": (lambda **k: torchlip.InvertibleDownSampling(2, **k), 24),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_pools_have_the_constant_that_is_asked_for(name):
    make, channels = ACTIVATIONS[name]
    x = torch.randn(6, 4, 4)
    for k in (1.0, 2.0):
        layer = make(k_coef_lip=k).eval()
        assert layer(x[None]).shape[1] == channels
        found = float(torch.linalg.matrix_norm(jacobian(layer, x), 2))
        assert found == pytest.approx(k, rel=1e-4)
        torch.testing.assert_close(layer.vanilla_export()(x[None]), layer(x[None]))
    if name not in ("MaxMin", "GroupSort", "HouseHolder", "LPReLU", "ScaledAdaptiveAvgPool2d"):
        return  # a layer of the library in the same wrapping
    bound = certify(layer, x[None], lower=False).constant.value
    assert found * (1 - 1e-5) <= bound
    assert bound == pytest.approx(k, rel=1e-4)


def test_layers_are_those_of_the_library_with_a_factor():
    x = torch.randn(2, 3, 8, 8)
    for padding, mode in ((1, "zeros"), (1, "circular"), (1, "reflect"), (2, "symmetric")):
        layer = torchlip.SpectralConv2d(3, 4, 3, padding=padding, padding_mode=mode, k_coef_lip=2.0)
        assert float(singular_values(layer, (3, 8, 8)).max()) <= 2 * (1 + 1e-5)
        torch.testing.assert_close(layer.vanilla_export()(x), layer(x))
    up = torchlip.SpectralConvTranspose2d(4, 3, 2, 2, k_coef_lip=2.0)
    assert float((singular_values(up, (4, 3, 3)) - 2).abs().max()) < 1e-5
    assert float(singular_values(torchlip.SpectralConv1d(3, 4, 3), (3, 8)).max()) <= 1 + 1e-5
    assert float(singular_values(torchlip.FrobeniusConv2d(3, 4, 3), (3, 6, 6)).max()) <= 1 + 1e-5
    rows = torchlip.FrobeniusLinear(6, 3, k_coef_lip=2.0)
    torch.testing.assert_close(rows.weight.norm(dim=1), torch.full((3,), 2.0))
    whole = torchlip.FrobeniusLinear(6, 3, True, False, 2.0)
    assert whole.weight.norm().item() == pytest.approx(2.0, rel=1e-6)
    for layer in (rows, whole):
        twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
        assert torch.equal(twin.weight, layer.weight)
        assert type(layer.vanilla_export()) is nn.Linear
    with pytest.raises(ValueError, match="eps_bjorck must be a number"):
        torchlip.SpectralLinear(4, 4, eps_bjorck=None)
    with pytest.raises(ValueError, match="windows must tile the image"):
        torchlip.ScaledAvgPool2d(2, 1)
    with pytest.raises(ValueError, match=r"output_size must be \(1, 1\)"):
        torchlip.ScaledAdaptiveAvgPool2d((2, 2))
    with pytest.raises(UncertifiableError, match="dim 0 must stay the batch"):
        certify(torchlip.MaxMin(dim=0).eval(), x[:1])
    assert torchlip.LayerCentering(3)(x).mean((2, 3)).abs().max() < 1e-6
    mixed = torchlip.LipResidual()(x, 2 * x)
    torch.testing.assert_close(mixed, 1.5 * x)


def test_statistics_are_averaged_over_an_epoch_and_factors_are_shared():
    torch.manual_seed(0)
    factory = torchlip.SharedLipFactory()
    norms = [torchlip.BatchLipNorm(4, factory=factory), torchlip.BatchLipNorm(4, factory=factory)]
    center = torchlip.BatchCentering(4)
    batches = 3.0 * torch.randn(5, 8, 4, 3, 3) + 1.0
    for batch in batches:
        y = norms[0](batch)
        norms[1](y)
        center(batch)
        largest = batch.transpose(0, 1).flatten(1).var(1).max()
        torch.testing.assert_close(norms[0].get_scaling_factor(training=True), largest.rsqrt())
    product = factory.get_current_product_value(training=True)
    torch.testing.assert_close(product, norms[0].factor() * norms[1].factor())
    mean = batches.mean((0, 1, 3, 4))
    torch.testing.assert_close(center.running_mean, mean)
    torch.testing.assert_close(center.running_sum_bmean, 5 * mean)
    assert center.running_num_batches.tolist() == [5]
    x = batches[0]
    for layer in (*norms, center):
        layer.eval()
        torch.testing.assert_close(layer.vanilla_export()(x), layer(x))
    model = nn.Sequential(norms[0], nn.ReLU(), norms[1], factory).eval()
    assert certify(model, x[:1], lower=False).constant.value == pytest.approx(1.0, rel=1e-6)
    center.reset_states()
    assert center.running_num_batches.tolist() == [0]
    assert not center.running_mean.any()
    with pytest.raises(ValueError, match="Use BatchCentering"):
        torchlip.BatchLipNorm(4, normalize=False)
    with pytest.raises(ValueError, match="Leave dim out"):
        torchlip.BatchCentering(4, dim=(1,))


def test_estimates_from_below_agree_with_the_constant():
    layer = torchlip.SpectralLinear(5, 3, k_coef_lip=2.0)
    x = torch.randn(2, 5)
    exact = torchlip.evaluate_lip_const(layer, x)
    assert exact == pytest.approx(2.0, rel=1e-5)
    for kind in ("noise_norm", "attack", "all", ["noise_norm", "jacobian_norm"]):
        assert 0.5 < torchlip.evaluate_lip_const(layer, x, kind) <= 2.0 * (1 + 1e-4)
    rows = torchlip.FrobeniusLinear(5, 3)
    alone = torchlip.evaluate_lip_const(rows, x, disjoint_neurons=True)
    assert alone == pytest.approx(1.0, rel=1e-5)
    assert torchlip.utils.evaluate_lip_const(rows, input_shape=(3, 5)) > 1.0
    with pytest.raises(ValueError, match="must not be above expected_value"):
        torchlip.evaluate_lip_const(layer, x, expected_value=1.0)
    with pytest.raises(ValueError, match="x or input_shape"):
        torchlip.evaluate_lip_const(layer)


def test_normalizers_initializers_and_hooks():
    w = torch.randn(4, 3, 2, 2)
    unit, right, sigma = torchlip.normalizers.spectral_normalization(w)
    flat = w.flatten(1)
    assert float(torch.linalg.matrix_norm(unit.flatten(1), 2)) == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close((flat @ right.T).norm(), sigma)
    polar = torchlip.normalizers.bjorck_normalization(w).flatten(1)
    torch.testing.assert_close(polar @ polar.T, torch.eye(4), atol=1e-5, rtol=0)
    torchlip.init.bjorck_(w)
    torch.testing.assert_close(w.flatten(1), polar)
    conv = torchlip.bjorck_norm(nn.Conv2d(3, 4, 2))
    rows = conv.weight.flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(4), atol=1e-5, rtol=0)
    assert type(torchlip.remove_bjorck_norm(conv).weight) is nn.Parameter
    linear = torchlip.frobenius_norm(nn.Linear(5, 3), disjoint_neurons=False)
    assert linear.weight.norm().item() == pytest.approx(1.0, rel=1e-6)
    torchlip.remove_frobenius_norm(linear)
    linear = torchlip.frobenius_norm(linear)
    torch.testing.assert_close(linear.weight.norm(dim=1), torch.ones(3))
    x = torch.tensor([0.0, 4.0], requires_grad=True)
    torchlip.sqrt_with_gradeps(x, 0.5).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([2.0, 1 / 4.5]))


def test_the_table_of_the_page_is_true():
    check_table(PAGE, torchlip)
    assert isinstance(torchlip.SpectralLinear(2, 2), layers.OrthoLinear)
