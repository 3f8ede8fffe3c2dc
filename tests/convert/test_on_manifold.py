"""From trivialized layers to parameters on the manifold and back: equal weights, every layer."""

import copy
import io

import pytest
import torch
from torch import nn

import orthonet
from orthonet.certify import certify
from orthonet.convert import manifold_groups, on_manifold, to_plain, trivialize
from orthonet.errors import NotOnManifoldError
from orthonet.layers import (
    OrthoConv2d,
    OrthoConvTranspose2d,
    OrthoGRU,
    OrthoLinear,
    OrthoRNN,
)
from orthonet.optim import StiefelAdam, StiefelMuon, StiefelSGD
from orthonet.reparametrizers import Weight
from orthonet.testing import tolerances
from tests.presets import PRESETS

MODELS = {
    "linear": (lambda: nn.Sequential(OrthoLinear(6, 4), nn.ReLU(), OrthoLinear(4, 4)), (3, 6)),
    "scaled": (lambda: OrthoLinear(6, 4, lipschitz=2.0), (3, 6)),
    "conv": (lambda: OrthoConv2d(4, 8, 3, padding=1, groups=2), (2, 4, 6, 6)),
    "free conv": (lambda: OrthoConv2d(4, 4, 3, padding=1, ranks="free"), (2, 4, 6, 6)),
    "strided": (lambda: OrthoConv2d(4, 8, 2, stride=2), (2, 4, 6, 6)),
    "transposed": (lambda: OrthoConvTranspose2d(8, 4, 2, stride=2), (2, 8, 3, 3)),
    "rnn": (lambda: OrthoRNN(4, 6, batch_first=True), (2, 5, 4)),
    "gru": (lambda: OrthoGRU(4, 6, batch_first=True), (2, 5, 4)),
}
models = pytest.mark.parametrize("name", MODELS)


def out(model, x):
    y = model(x)
    return y[0] if isinstance(y, tuple) else y


@models
def test_weights_are_equal_there_and_back_and_after_steps(name):
    make, size = MODELS[name]
    model, x = make().double(), torch.randn(size, dtype=torch.float64)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    moved = on_manifold(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.allclose(out(moved, x), out(model, x), atol=1e-12)  # observed 8.9e-16
    optimizer = StiefelAdam(manifold_groups(moved, lr=1e-2), lr=1e-2)
    before = out(moved, x).square().mean().item()
    for _ in range(5):
        optimizer.zero_grad()
        (out(moved, x) - 1.0).square().mean().backward()
        optimizer.step()
    assert out(moved, x).square().mean().item() != before
    for group in optimizer.param_groups:
        for p in group["params"] if group["stiefel"] else ():
            error = (torch.linalg.svdvals(p.detach().double()) - 1).abs().max()
            assert error <= 1e-12  # observed 1.6e-15
    back = trivialize(moved)
    assert torch.allclose(out(back, x), out(moved, x), atol=1e-12)  # observed 2.2e-14
    assert [n for n, _ in back.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert back.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7)])
def test_every_preset_comes_back(preset, shape):
    params = getattr(orthonet, f"{preset}_ORTHO_PARAMS") if isinstance(preset, str) else preset
    layer = OrthoLinear(*shape, ortho_params=params)
    with torch.no_grad():
        layer.parametrization.original.add_(0.3 * torch.randn(shape[1], shape[0]))
    layer.train()
    weight = layer.weight.detach().clone()
    moved = on_manifold(layer)
    assert torch.allclose(moved.weight, weight, atol=2e-6)  # observed 0
    # to the parameter and back by some 20 products of 7 x 7; observed 7.7e-7 of 2.8e-6
    allowed = tolerances.rounding(torch.float32, 20 * 7)
    for back in (trivialize(moved), trivialize(moved, orthonet.QR_ORTHO_PARAMS)):
        assert torch.allclose(back.weight, weight, atol=allowed, rtol=0)
    back = trivialize(moved.eval())
    assert not any(m.training for m in back.modules())


def test_copies_pickles_and_plain_layers_go_on():
    model = nn.Sequential(OrthoLinear(6, 6), nn.ReLU(), OrthoLinear(6, 3))
    moved, x = on_manifold(model), torch.randn(4, 6)
    file = io.BytesIO()
    torch.save(moved, file)
    file.seek(0)
    others = [copy.deepcopy(moved), torch.load(file, weights_only=False), to_plain(moved)]
    assert all(torch.allclose(other(x), moved(x), atol=1e-6) for other in others)
    assert torch.allclose(trivialize(others[1])(x), model(x), atol=2e-6)  # observed 1.2e-7
    weights = [m for m in moved.modules() if isinstance(m, Weight)]
    assert [weight.map for weight in weights] == [None, None]  # nothing else moves them
    compiled = torch.compile(moved, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), moved(x), atol=1e-6)


def test_the_certificate_stays():
    model = nn.Sequential(OrthoLinear(6, 6), nn.ReLU(), OrthoLinear(6, 3)).eval()
    moved = on_manifold(model)
    optimizer = StiefelMuon(manifold_groups(moved), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        moved(torch.randn(8, 6)).sin().sum().backward()
        optimizer.step()
    constants = [certify(m.eval(), torch.randn(2, 6)).constant.value for m in (model, moved)]
    assert constants == pytest.approx([1.0, 1.0], abs=1e-5)  # observed 1.2e-6


def test_a_plain_linear_layer_needs_nothing_else():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    nn.init.orthogonal_(model[0].weight)
    rest = [model[0].bias, *model[2].parameters()]
    groups = [{"params": [model[0].weight]}, {"params": rest, "stiefel": False}]
    optimizer = StiefelSGD(groups, lr=0.05, momentum=0.9)
    x = torch.randn(64, 8)
    y = x[:, :1].abs()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert (torch.linalg.svdvals(model[0].weight.detach()) - 1).abs().max() <= 2e-6


def test_what_does_not_fit_is_refused():
    model = nn.Sequential(OrthoLinear(3, 3))
    for function in (on_manifold, trivialize, manifold_groups):
        with pytest.raises(ValueError, match="must be a torch"):
            function("model")
    with pytest.raises(ValueError, match="as they are"):
        on_manifold(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="half precision"):
        on_manifold(OrthoLinear(3, 3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="on_manifold"):
        manifold_groups(model)
    moved = on_manifold(model)
    with torch.no_grad():
        model[0].parametrization.original.mul_(3.0)
    with pytest.raises(RuntimeError, match="semi-orthogonal"):
        moved.load_state_dict(model.state_dict(), strict=False)
    moved = on_manifold(model)
    moved.load_state_dict(on_manifold(model).state_dict())
    with torch.no_grad():
        moved[0].parametrization.original.mul_(3.0)
    with pytest.raises(NotOnManifoldError):
        trivialize(moved)
    again = on_manifold(on_manifold(model))
    x = torch.randn(2, 3)
    assert torch.allclose(trivialize(again)(x), model(x), atol=2e-6)
