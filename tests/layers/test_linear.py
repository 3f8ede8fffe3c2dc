import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import orthonet
from orthonet import linalg
from orthonet.errors import NotOnManifoldError, ProjectionWarning
from orthonet.layers import OrthoLinear, UnitNormLinear
from orthonet.testing import (
    LAYER_LAWS,
    MATRIX_CASES,
    assert_orthogonal,
    hard_matrix,
    orthogonality_error,
    tolerances,
)
from tests.each import each
from tests.presets import PRESETS
from tests.references import polar_gradient_reference, polar_reference

FACTORIES = {
    "ortho": functools.partial(OrthoLinear, 6, 5),
    "ortho_wide": functools.partial(OrthoLinear, 6, 9, bias=False),
    "ortho_exp": functools.partial(OrthoLinear, 6, 6, ortho_params=orthonet.EXP_ORTHO_PARAMS),
    "ortho_qr": functools.partial(OrthoLinear, 6, 4, ortho_params=orthonet.QR_ORTHO_PARAMS),
    "ortho_cholesky": functools.partial(
        OrthoLinear, 6, 4, ortho_params=orthonet.CHOLESKY_ORTHO_PARAMS
    ),
    "unit_norm": functools.partial(UnitNormLinear, 6, 5),
}
# observed: 4.6e-7 and 9e-16
RESIDUAL = tolerances.PROMISE


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
@pytest.mark.parametrize("law", LAYER_LAWS, ids=lambda law: law.__name__)
def test_laws(law, factory):
    law(factory, (6,))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("sizes", [(6, 6), (9, 4), (4, 9), (1, 7), (7, 1)], ids=str)
def test_dense_operator_is_orthogonal(name, sizes, dtype):
    layer = OrthoLinear(*sizes, dtype=dtype, ortho_params=PRESETS[name])
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        layer(torch.randn(8, sizes[0], dtype=dtype)).square().sum().backward()
        optimizer.step()
        assert orthogonality_error(layer.weight) <= RESIDUAL[dtype]
        assert_orthogonal(layer, sizes[:1], RESIDUAL[dtype])  # in eval mode


@each("case", MATRIX_CASES)
def test_orthogonal_for_hard_parameters(case, dtype):
    layer = OrthoLinear(8, 12, dtype=dtype)
    with torch.no_grad():
        layer.parametrization.original.copy_(hard_matrix(case, (12, 8), dtype))
    assert_orthogonal(layer, (8,), RESIDUAL[dtype])


@each("case", MATRIX_CASES)
def test_rows_have_unit_norm(case, dtype):
    layer = UnitNormLinear(8, 12, dtype=dtype)
    with torch.no_grad():
        layer.parametrization.original.copy_(hard_matrix(case, (12, 8), dtype))
    norms = layer.weight.double().norm(dim=1)
    torch.testing.assert_close(
        norms, torch.ones_like(norms), atol=RESIDUAL[dtype], rtol=0
    )  # observed 9.2e-8 and 2e-16
    (grad,) = torch.autograd.grad(layer.weight.sum(), layer.parametrization.original)
    assert bool(torch.isfinite(grad).all())


def test_is_the_plain_layer_with_its_weight():
    layer = OrthoLinear(5, 3)
    x = torch.randn(2, 7, 5)
    assert isinstance(layer, nn.Linear)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert repr(layer) == "OrthoLinear(in_features=5, out_features=3, bias=True)"
    assert OrthoLinear(5, 3, False).bias is None
    assert OrthoLinear(5, 3, True, "cpu", torch.float64).weight.dtype == torch.float64


@pytest.mark.parametrize("sizes", [(6, 6), (9, 4), (4, 9)], ids=str)
def test_assignment(sizes):
    layer = OrthoLinear(*sizes)
    original = layer.parametrization.original
    q = linalg.haar(sizes[::-1])
    allowed = tolerances.rounding(torch.float32, 4 * 9)  # four products; observed 2e-7 of 1.4e-6
    for value in (q, nn.Parameter(q)):
        layer.weight = value
        torch.testing.assert_close(layer.weight, q, atol=allowed, rtol=0)
    assert layer.parametrization.original is original  # optimizers and DDP keep their parameter
    with pytest.raises(NotOnManifoldError, match=r"^OrthoLinear: the weight must be semi-orth"):
        layer.weight = 0.5 * q
    with pytest.raises(ValueError, match="OrthoLinear: weight must be a tensor"):
        layer.weight = [1.0]
    torch.testing.assert_close(layer.weight, q, atol=allowed, rtol=0)


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_plain_checkpoint_is_projected_with_a_message(factory):
    layer = factory()
    layer.double()
    plain = nn.Linear(6, layer.out_features, bias=layer.bias is not None, dtype=torch.float64)
    state = plain.state_dict()
    model = nn.Sequential(nn.Identity(), layer)
    with pytest.warns(ProjectionWarning, match=r"projected .* relative_distance=[01]\.\d+"):
        model.load_state_dict({f"1.{key}": value for key, value in state.items()})
    expected = linalg.polar_svd(plain.weight.detach())
    if isinstance(layer, UnitNormLinear):
        expected = nn.functional.normalize(plain.weight.detach(), dim=1)
    torch.testing.assert_close(layer.weight.detach(), expected, atol=1e-10, rtol=0)
    if layer.bias is not None:
        assert torch.equal(layer.bias, plain.bias)
    assert list(state) == list(plain.state_dict())  # the user's dictionary is as it was


def test_loading_what_was_exported_is_silent_and_exact():
    layer, other = OrthoLinear(6, 5), OrthoLinear(6, 5)
    other.load_state_dict(layer.to_plain().state_dict())  # a warning would be an error
    torch.testing.assert_close(other.weight, layer.weight, atol=1e-6, rtol=0)  # observed 6e-8


def test_a_plain_checkpoint_of_another_shape_changes_nothing():
    layer = OrthoLinear(6, 5)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"weight: OrthoLinear: the weight must have shape"):
        layer.load_state_dict({"weight": torch.eye(3), "bias": torch.zeros(5)})
    assert torch.equal(before["parametrization.original"], layer.parametrization.original)


def test_plain_checkpoint_into_a_meta_layer():
    layer = OrthoLinear(6, 5, device="meta")
    state = nn.Linear(6, 5).state_dict()
    with pytest.warns(ProjectionWarning):
        layer.load_state_dict(state, assign=True)
    assert orthogonality_error(layer.weight) <= 2e-6  # observed 7e-8


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_export_of_a_copy_leaves_the_original_whole(factory):
    layer = factory().eval()
    x = torch.randn(4, 6)
    y = layer(x)
    duplicate = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    plain = duplicate.to_plain()
    assert type(plain) is nn.Linear
    assert not plain.training
    torch.testing.assert_close(plain(x), y, atol=1e-6, rtol=0)  # observed 0
    with torch.no_grad():
        plain.weight.zero_()
        next(duplicate.parameters()).zero_()
    assert torch.equal(layer(x), y)
    assert plain.state_dict().keys() <= {"weight", "bias"}


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_adjoint_and_inverse(factor):
    layer = OrthoLinear(6, 6, dtype=torch.float64, lipschitz=factor)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(layer.inverse(layer(x)), x, rtol=0, atol=1e-13)  # observed 3e-15
    for wide in (layer, OrthoLinear(6, 4, dtype=torch.float64, lipschitz=factor)):
        y = torch.randn(2, 5, wide.out_features, dtype=torch.float64)
        dot = (wide.adjoint(y) * x).sum()
        torch.testing.assert_close(dot, (y * (wide(x) - wide.bias)).sum(), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="OrthoLinear: only a square layer"):
        OrthoLinear(6, 4).inverse(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="y must have 6 features"):
        layer.inverse(torch.zeros(2, 4, dtype=torch.float64))


def test_a_complex_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype must be a real floating-point dtype"):
        OrthoLinear(3, 3, dtype=torch.complex64)


def test_reset_parameters_draws_anew():
    layer = OrthoLinear(6, 5)
    before = layer.weight.detach()
    layer.bias.data.fill_(3.0)
    layer.reset_parameters()
    assert float((layer.weight.detach() - before).norm()) > 0.1
    assert torch.equal(layer.bias, torch.zeros(5))


@pytest.mark.parametrize("layer", [OrthoLinear, UnitNormLinear])
@pytest.mark.parametrize(("sizes", "name"), [((0, 3), "in_features"), ((3, -1), "out_features")])
def test_bad_sizes(layer, sizes, name):
    with pytest.raises(ValueError, match=rf"^{layer.__name__}: {name} must be an integer >= 1"):
        layer(*sizes)


def stepped(layer, size=0.1):
    """The layer after a step of an optimizer, which has left its parameter at the center."""
    raw = layer.parametrization.original
    raw.grad = size * torch.randn_like(raw)
    torch.optim.SGD([raw], lr=1.0).step()
    raw.grad = None
    return layer


@pytest.mark.parametrize("preset", ["DEFAULT", "POLAR_WARM"])
@pytest.mark.parametrize("compiled", [False, True])
def test_turned_layer_is_the_plain_one(compiled, preset):
    torch.compiler.reset()
    params = getattr(orthonet, f"{preset}_ORTHO_PARAMS")
    layer = stepped(OrthoLinear(6, 6, dtype=torch.float64, ortho_params=params))
    raw = layer.parametrization.original
    before = raw.detach().clone()
    forward = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    y = forward(x)
    assert compiled or type(y.grad_fn).__name__ == "_TurnedLinearBackward"
    direction = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, raw, layer.bias), direction)
    assert torch.equal(raw, before)  # nothing is written by a forward or a backward pass
    u = polar_reference(before)
    outer = direction.flatten(0, 1).T @ x.detach().flatten(0, 1)
    expected = direction @ u, polar_gradient_reference(before, outer), direction.sum((0, 1))
    torch.testing.assert_close(y, x @ u.T + layer.bias, atol=1e-12, rtol=0)  # observed 2e-15
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)  # observed 9e-15


@pytest.mark.parametrize("centered", [False, True])
def test_every_use_of_the_weight_in_a_step_counts(centered):
    layer = OrthoLinear(6, 6, dtype=torch.float64)
    raw = layer.parametrization.original
    if centered:
        stepped(layer)
    else:  # moved by another hand: computed by the cold map
        with torch.no_grad():
            raw.add_(0.1 * torch.randn(6, 6))
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert (type(layer(x).grad_fn).__name__ == "_TurnedLinearBackward") is centered
    for _ in range(2):  # accumulated
        hidden = layer(x)
        loss = layer(hidden.sin()).square().sum() + layer.weight[0, 1] + hidden.sum()
        loss.backward()
    w = raw.detach().clone().requires_grad_()
    u = linalg.polar(w)
    hidden = x.detach() @ u.T + layer.bias.detach()
    again = hidden.sin() @ u.T + layer.bias.detach()
    (again.square().sum() + u[0, 1] + hidden.sum()).backward()
    torch.testing.assert_close(raw.grad, 2.0 * w.grad, atol=1e-11, rtol=1e-11)


def test_turned_layer_is_differentiable_twice_and_left_where_it_does_not_apply():
    layer = stepped(OrthoLinear(5, 5, dtype=torch.float64))
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    turned = "_TurnedLinearBackward"
    assert type(layer(x).grad_fn).__name__ == turned
    assert torch.autograd.gradgradcheck(layer, (x,))
    assert type(layer(x.detach()).grad_fn).__name__ != turned
    with torch.no_grad():
        assert layer(x).grad_fn is None
    wide = stepped(OrthoLinear(5, 3))
    assert type(wide(torch.randn(2, 5, requires_grad=True)).grad_fn).__name__ != turned
    with torch.no_grad():
        layer.parametrization.original.mul_(1.5)[0].add_(0.1)  # by another hand
    assert type(layer(x).grad_fn).__name__ != turned
