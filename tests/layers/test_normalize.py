"""Normalization and centering: constants, state, the laws of a layer."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from orthonet.certify import certify
from orthonet.layers import BatchCentering, BatchScaling, LayerCentering, Normalize, SharedFactors
from orthonet.testing import LAYER_LAWS, assert_lipschitz, dense_operator, singular_values

FACTORIES = {
    "Normalize": partial(Normalize, (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)),
    "LayerCentering": LayerCentering,
    "BatchCentering": partial(BatchCentering, 3),
    "BatchScaling": partial(BatchScaling, 3, momentum=None),
}


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("law", LAYER_LAWS, ids=lambda law: law.__name__)
def test_laws(name, law):
    law(FACTORIES[name], (3, 4, 4))


def test_normalize_is_the_affine_map_and_knows_its_constant():
    layer = Normalize((0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    x = torch.rand(2, 3, 4, 4)
    mean = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    std = torch.tensor([0.5, 0.25, 2.0]).view(3, 1, 1)
    assert torch.equal(layer(x), (x - mean) / std)
    assert layer.lipschitz == 4.0
    assert_lipschitz(layer, (3, 2, 2), constant=4.0, attained=True)
    assert torch.equal(Normalize(layer.mean, layer.std, dim=-3)(x[0]), layer(x)[0])


def test_normalize_broadcasts_one_number():
    x = torch.rand(2, 5)
    assert torch.equal(Normalize(0.5, 0.25)(x), (x - 0.5) / 0.25)
    assert torch.equal(Normalize((0.0,) * 5, 0.25)(x), x / 0.25)


def test_normalize_reads_its_constant_from_the_buffers():
    source, target = Normalize(0.5, 0.125), Normalize(0.0, 1.0)
    target.load_state_dict(source.state_dict())
    assert target.lipschitz == 8.0
    assert Normalize(0.0, 0.3).bfloat16().lipschitz == 1 / torch.tensor(0.3).bfloat16().item()


@pytest.mark.parametrize("dim", [-1, (-2, -1), (-3, -2, -1)])
def test_layer_centering_is_an_orthogonal_projection(dim):
    layer, shape = LayerCentering(dim), (2, 3, 4)
    matrix = dense_operator(layer, shape, dtype=torch.float64)
    assert (matrix - matrix.T).abs().max() <= 1e-15  # observed 0
    assert (matrix @ matrix - matrix).abs().max() <= 1e-14  # observed 1.3e-15
    sigma = singular_values(layer, shape, dtype=torch.float64)
    assert sigma[0].item() == pytest.approx(1, abs=1e-14)
    assert layer(torch.randn(5, *shape)).mean(dim).abs().max() <= 1e-6  # observed 6.7e-8


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 5, 4), (6, 3, 5, 4, 2)])
def test_batch_centering_subtracts_the_right_mean(shape):
    layer = BatchCentering(3, momentum=1.0, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    dims = (0, *range(2, len(shape)))
    y = layer(x)
    mean = x.mean(dims)
    assert y.mean(dims).abs().max() <= 1e-15  # observed 7.4e-17
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.eval()(x), y)


def test_batch_centering_in_eval_is_a_shift_and_in_train_a_projection_of_the_batch():
    layer = BatchCentering(2, dtype=torch.float64)
    layer(torch.randn(8, 2, 3, 3, dtype=torch.float64))
    identity = dense_operator(layer, (2, 3, 3))
    assert (identity - torch.eye(18)).abs().max() <= 1e-15  # observed 0

    def whole_batch(flat):
        return torch.stack([layer(x.view(4, 2, 3, 3)).flatten() for x in flat])

    layer.train()
    sigma = singular_values(whole_batch, (72,), dtype=torch.float64)
    assert (sigma[:-2] - 1).abs().max() <= 1e-14  # observed 1.1e-15
    assert sigma[-2:].max() <= 1e-14  # one mean a channel is removed: observed 3.7e-16


def test_batch_centering_tracks_by_momentum_and_reloads_strictly():
    layer = BatchCentering(3, momentum=0.25)
    x = torch.randn(4, 3, 2, 2)
    layer(x)
    torch.testing.assert_close(layer.running_mean, 0.25 * x.mean((0, 2, 3)))
    other = BatchCentering(3)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other.eval()(x), layer.eval()(x))
    assert "bias" not in BatchCentering(3, bias=False).state_dict()


@pytest.mark.parametrize("cls", [BatchCentering, BatchScaling])
def test_without_momentum_an_epoch_is_averaged_and_counts_as_one_batch_of_the_next(cls):
    layer = cls(3, momentum=None, dtype=torch.float64)
    for start in (torch.zeros(0, 3).double(), None):
        before = layer.running_mean.clone()
        batches = torch.randn(4, 8, 3, 5, dtype=torch.float64) + 2.0
        for batch in batches:
            layer(batch)
        total = batches.mean((1, 3)).sum(0) + (0 if start is not None else before)
        count = 4 + (start is None)
        # 5 additions of numbers near 2: 1e-15 each; observed 4.4e-16
        torch.testing.assert_close(layer.running_mean, total / count, rtol=0, atol=1e-14)
        layer.eval()
        kept = layer.running_mean.clone()
        layer(batches[0])
        assert torch.equal(kept, layer.running_mean)  # eval writes nothing
        layer.train()
    other = cls(3, momentum=None, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    assert int(other.num_batches_tracked) == 1


def test_scaled_batches_have_largest_variance_one_and_the_end_undoes_the_factors():
    torch.manual_seed(0)
    end = SharedFactors()
    model = nn.Sequential(
        BatchScaling(3, factors=end, momentum=None),
        nn.ReLU(),
        BatchScaling(3, factors=end, momentum=None, centering=False),
        end,
    ).double()
    x = torch.randn(64, 3, 5, dtype=torch.float64) * torch.tensor([0.1, 0.5, 0.2])[:, None] + 1.0
    first = model[0](x)
    assert first.transpose(0, 1).flatten(1).var(1).max().item() == pytest.approx(1.0, rel=1e-4)
    for model_ in (model, pickle.loads(pickle.dumps(copy.deepcopy(model)))):
        y = model_.train()(x)
        factors = [m.factor() for m in model_ if isinstance(m, BatchScaling)]
        torch.testing.assert_close(model_[-1].product(), factors[0] * factors[1])
        torch.testing.assert_close(y * model_[-1].product(), model_[:3](x))
        y.sum().backward()
        model_.eval()
        certificate = certify(model_, x[:1])
        assert certificate.constant.value == pytest.approx(1.0, rel=1e-12)
        scale = singular_values(model_[0], (3, 5), dtype=torch.float64)
        torch.testing.assert_close(scale, model_[0].factor().detach().expand(15))
        alone = certify(model_[0], x[:1]).constant
        assert alone.kind == "exact"
        assert alone.value == pytest.approx(float(scale.max()), rel=1e-12)
    dead = BatchScaling(2)
    assert bool(dead(torch.ones(4, 2)).isfinite().all())


def test_batch_centering_learns_a_bias():
    layer = BatchCentering(3)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    y = layer(torch.randn(4, 3, 2, 2))
    torch.testing.assert_close(y.mean((0, 2, 3)), layer.bias.detach())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Normalize((0.0, 0.0), (1.0, 1.0, 1.0)), "Normalize: mean and std must have one"),
        (lambda: Normalize(0.0, 0.0), "std must be positive and finite"),
        (lambda: Normalize(0.0, float("nan")), "std must be positive and finite"),
        (lambda: Normalize((0.0,) * 3, 1.0)(torch.ones(1, 4)), "must have 3 channels"),
        (lambda: LayerCentering(()), "dim must not be empty"),
        (lambda: LayerCentering()(torch.ones(3)), "every dim must be a dimension"),
        (lambda: BatchCentering(0), "num_features must be an integer >= 1"),
        (lambda: BatchCentering(3, momentum=2.0), r"momentum must be a number in \[0, 1\]"),
        (lambda: BatchCentering(3)(torch.ones(3, 4, 4)), "a batch dimension, then 3 channels"),
        (lambda: BatchCentering(3)(torch.ones(1, 4, 4, 4)), "then 3 channels"),
    ],
)
def test_errors_say_what_is_required(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_representations_are_one_line():
    assert repr(Normalize(0.5, 0.25)) == "Normalize(mean=[0.5], std=[0.25], dim=1)"
    assert repr(LayerCentering(-1)) == "LayerCentering(dim=(-1,))"
    assert repr(BatchCentering(3)) == "BatchCentering(3, momentum=0.1, bias=True)"
