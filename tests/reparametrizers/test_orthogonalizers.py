import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import orthonet
from orthonet import linalg
from orthonet.errors import NotOnManifoldError
from orthonet.reparametrizers import (
    BatchedBjorckOrthogonalization,
    BatchedCholeskyOrthogonalization,
    BatchedExponentialOrthogonalization,
    BatchedIdentity,
    BatchedPolarOrthogonalization,
    BatchedPowerIteration,
    BatchedQROrthogonalization,
    ClassParam,
    OrthoParams,
    OrthoWeight,
)
from orthonet.testing import (
    MATRIX_CASES,
    MATRIX_SHAPES,
    hard_matrix,
    orthogonality_error,
    tolerances,
)
from tests.each import each
from tests.presets import DISTINCT, PRESETS

ORTHOGONALIZERS = [
    BatchedBjorckOrthogonalization,
    functools.partial(BatchedBjorckOrthogonalization, pass_through=True),
    BatchedCholeskyOrthogonalization,
    functools.partial(BatchedCholeskyOrthogonalization, stable=True),
    BatchedExponentialOrthogonalization,
    BatchedPolarOrthogonalization,
    BatchedQROrthogonalization,
]
# observed over all presets, cases and shapes: 9.2e-7 and 1.3e-15
RESIDUAL = tolerances.PROMISE


@pytest.fixture(params=DISTINCT.values(), ids=DISTINCT)
def preset(request) -> OrthoParams:
    return request.param


@pytest.fixture(params=ORTHOGONALIZERS, ids=str)
def orthogonalizer(request):
    return request.param


def set_original(weight: OrthoWeight, value: torch.Tensor) -> None:
    with torch.no_grad():
        weight.original.copy_(value)


def test_the_published_presets_are_there():
    published = {"DEFAULT", "DEFAULT_TEST", "BJORCK_PASS_THROUGH", "EXP", "QR", "CHOLESKY"}
    assert published | {"CHOLESKY_STABLE", "POLAR", "AUTO"} <= set(PRESETS)
    assert all(preset in DISTINCT.values() for preset in PRESETS.values())


@pytest.mark.parametrize("shape", MATRIX_SHAPES.values(), ids=MATRIX_SHAPES)
@each("case", MATRIX_CASES)
def test_every_preset_bears_every_parameter(preset, case, shape, dtype):
    weight = OrthoWeight(shape, preset, dtype=dtype)
    set_original(weight, hard_matrix(case, shape, dtype))
    for train in (True, False):
        w = weight.train(train)()
        assert orthogonality_error(w) <= RESIDUAL[dtype]
        (grad,) = torch.autograd.grad(w, weight.original, torch.randn_like(w))
        assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("shape", [(64, 64), (10, 96), (96, 10)], ids=str)
def test_orthogonal_at_init_and_after_training(preset, shape, dtype):
    weight = OrthoWeight(shape, preset, dtype=dtype)
    assert orthogonality_error(weight()) <= RESIDUAL[dtype]
    start, target = weight().detach(), linalg.haar(shape, dtype=dtype)
    optimizer = torch.optim.Adam(weight.parameters(), lr=1e-2)
    for step in range(100):
        optimizer.zero_grad()
        (weight() - target).square().sum().backward()
        optimizer.step()
        if step % 5 == 4:
            assert orthogonality_error(weight()) <= RESIDUAL[dtype]
    end = weight().detach()
    assert float((end - target).norm()) < 0.9 * float((start - target).norm())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(512, 512), (10, 512), (512, 10), (256, 1024)], ids=str)
def test_large_weights_at_init_and_after_training(preset, shape, dtype):
    weight = OrthoWeight(shape, preset, dtype=dtype)
    assert orthogonality_error(weight()) <= RESIDUAL[dtype]
    direction = torch.randn(shape, dtype=dtype)
    optimizer = torch.optim.Adam(weight.parameters(), lr=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        (weight() * direction).sum().backward()
        optimizer.step()
    assert orthogonality_error(weight()) <= RESIDUAL[dtype]


def test_any_point_can_be_assigned(preset):
    for shape in ((6, 6), (7, 3), (3, 7), (2, 5, 4), (1, 1)):
        weight = OrthoWeight(shape, preset, dtype=torch.float64)
        q = linalg.haar(shape, dtype=torch.float64)
        for target in (q, -q):  # both components of O(n) when n is odd
            weight.assign_(target)
            torch.testing.assert_close(weight(), target, atol=1e-12, rtol=0)  # observed 5e-16


def test_off_the_manifold_is_refused_and_nothing_changes(preset):
    weight = OrthoWeight((4, 4), preset)
    before = {key: value.clone() for key, value in weight.state_dict().items()}
    q = linalg.haar((4, 4))
    far = r"must be semi-orthogonal.*got distance="
    for bad, said in (
        (0.5 * q, far),
        (q + 1e-2, far),
        (torch.zeros(4, 4), far),
        (torch.full((4, 4), torch.nan), r"must have shape \(4, 4\) and be finite"),
    ):
        with pytest.raises(NotOnManifoldError, match=said):
            weight.assign_(bad)
    with pytest.raises(ValueError, match=r"must have shape \(4, 4\)"):
        weight.assign_(torch.eye(3))
    assert all(torch.equal(before[k], v) for k, v in weight.state_dict().items())


def test_projection_takes_the_nearest(preset):
    weight = OrthoWeight((5, 3), preset, dtype=torch.float64)
    m = torch.randn(5, 3, dtype=torch.float64)
    moved = weight.project_(m)
    torch.testing.assert_close(weight(), linalg.polar_svd(m), atol=1e-12, rtol=0)  # observed 6e-16
    assert moved == pytest.approx(float((weight().detach() - m).norm() / m.norm()))


def test_parametrize_protocol(orthogonalizer):
    layer = nn.Linear(5, 3, dtype=torch.float64)
    projected = linalg.polar_svd(layer.weight.detach())
    module = orthogonalizer((3, 5)).double()
    parametrize.register_parametrization(layer, "weight", module)
    assert orthogonality_error(layer.weight) <= 1e-12
    if any(name in str(module) for name in ("Bjorck", "Polar", "Exponential")):  # others: QR
        torch.testing.assert_close(layer.weight.detach(), projected, atol=1e-12, rtol=0)
    q = linalg.haar((3, 5), dtype=torch.float64)
    layer.weight = q
    torch.testing.assert_close(layer.weight.detach(), q, atol=1e-12, rtol=0)  # observed 2e-16
    with pytest.raises(NotOnManifoldError):
        layer.weight = 0.5 * q
    parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(layer.weight.detach(), q, atol=1e-12, rtol=0)


def test_chain_with_a_normalizer_as_parametrizations(orthogonalizer):
    layer = nn.Linear(5, 3)
    parametrize.register_parametrization(layer, "weight", BatchedPowerIteration((3, 5)))
    parametrize.register_parametrization(layer, "weight", orthogonalizer((3, 5)))
    layer(torch.randn(2, 5)).sum().backward()
    assert orthogonality_error(layer.weight) <= 2e-6  # observed 1.2e-7


def test_gradcheck(preset):
    for shape in ((4, 4), (5, 3), (3, 5)):
        weight = OrthoWeight(shape, preset, dtype=torch.float64)
        # away from the init, so that no map is at its special point
        set_original(weight, weight.original + 0.3 * torch.randn(shape, dtype=torch.float64))
        if getattr(weight.orthogonalizer, "pass_through", False):
            continue  # its gradient is that of the last step only, tested below
        for _ in range(200):  # the gradient of the spectral norm is exact for converged vectors
            weight.evaluate()
        weight.eval()

        def value(original, weight=weight):
            return torch.func.functional_call(weight, {"original": original}, ())

        x = weight.original.detach().requires_grad_()
        assert torch.autograd.gradcheck(value, (x,))


def test_pass_through_is_the_gradient_of_the_last_step():
    q = linalg.haar((6, 4), dtype=torch.float64)
    module = BatchedBjorckOrthogonalization((6, 4), pass_through=True)
    w = q.clone().requires_grad_()
    grad = torch.randn(6, 4, dtype=torch.float64)
    (ours,) = torch.autograd.grad(module(w), w, grad)
    inner = q.mT @ grad
    torch.testing.assert_close(ours, grad - 0.5 * q @ (inner + inner.mT))
    # at an orthogonal parameter that is the exact gradient, and it never vanishes in training
    (exact,) = torch.autograd.grad(linalg.polar(w), w, grad)
    torch.testing.assert_close(ours, exact)


def test_exponential_is_the_padded_exponential_of_the_skew_part():
    w = 0.4 * torch.randn(6, 3, dtype=torch.float64)
    square = torch.nn.functional.pad(w, (0, 3))
    expected = torch.matrix_exp(square - square.mT)[:, :3]
    module = BatchedExponentialOrthogonalization((6, 3), niters=12)
    torch.testing.assert_close(module.double()(w), expected)
    wide = BatchedExponentialOrthogonalization((3, 6), niters=12).double()
    torch.testing.assert_close(wide(w.mT), expected.mT)


def test_exponential_alone_bears_gaussian_input():
    module = BatchedExponentialOrthogonalization((64, 64))
    assert orthogonality_error(module(torch.randn(64, 64))) <= 2e-6  # observed 1.8e-7


def test_arguments_are_read():
    shape = (6, 4)
    w = 0.7 * torch.randn(shape, dtype=torch.float64)
    _u, s, _vh = torch.linalg.svd(w, full_matrices=False)
    few = BatchedPowerIteration(shape, power_it_niter=1).double().eval()
    many = BatchedPowerIteration(shape, power_it_niter=60).double().eval()
    assert float((many(w) - w / s[0]).abs().max()) < 1e-6 < float((few(w) - w / s[0]).abs().max())
    rough = BatchedPowerIteration(shape, 60, eps=0.5).double().eval()
    rms = float(w.norm()) / 2
    torch.testing.assert_close(rough(w), w / (s[0] + 0.5 * rms), atol=1e-6, rtol=0)
    assert BatchedCholeskyOrthogonalization(shape, stable=True).stable
    assert "stable=True" in repr(BatchedCholeskyOrthogonalization(shape, stable=True))


def test_factories():
    as_class = OrthoParams(BatchedIdentity, BatchedQROrthogonalization)
    as_partial = OrthoParams(
        functools.partial(BatchedPowerIteration, power_it_niter=2),
        functools.partial(BatchedBjorckOrthogonalization, niters=3),
    )
    as_param = OrthoParams(
        ClassParam(BatchedPowerIteration, power_it_niter=2),
        ClassParam(BatchedBjorckOrthogonalization, niters=3),
    )
    assert isinstance(OrthoWeight((3, 3), as_class).normalizer, BatchedIdentity)
    for params in (as_partial, as_param):
        weight = OrthoWeight((3, 3), params)
        assert weight.normalizer.power_it_niter == 2
        assert weight.orthogonalizer.niters == 3
    assert OrthoParams() == orthonet.DEFAULT_ORTHO_PARAMS
    assert hash(as_param) == hash(pickle.loads(pickle.dumps(as_param)))
    assert as_param == pickle.loads(pickle.dumps(as_param))
    assert repr(as_param.orthogonalizer) == "ClassParam(BatchedBjorckOrthogonalization, niters=3)"
    with pytest.raises(AttributeError, match="cannot assign to field"):
        as_param.orthogonalizer = None
    with pytest.raises(ValueError, match="OrthoParams: orthogonalizer must be callable"):
        OrthoParams(orthogonalizer=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchedBjorckOrthogonalization((3,)), r"weight_shape must be \(\*batch, m, n\)"),
        (lambda: BatchedBjorckOrthogonalization((3, 3), beta=0.0), "beta must be a number in"),
        (lambda: BatchedBjorckOrthogonalization((3, 3), niters=-1), "niters must be an integer"),
        (lambda: BatchedExponentialOrthogonalization((3, 3), niters=0), "niters must be an int"),
        (lambda: BatchedPowerIteration((3, 3), power_it_niter=0), "power_it_niter must be an int"),
        (lambda: BatchedPowerIteration((3, 3), eps=-1.0), "eps must be a number in"),
        (lambda: BatchedQROrthogonalization((3, 3))(torch.ones(2, 2)), "must have shape"),
    ],
)
def test_bad_arguments_name_class_and_value(make, message):
    with pytest.raises(ValueError, match=rf"^Batched\w+: .*{message}.*got"):
        make()


class SquareOnly(nn.Module):
    """An orthogonalizer of a user that takes one shape only."""

    def __init__(self, weight_shape):
        super().__init__()
        assert weight_shape == (6, 6)
        self.register_buffer("shift", torch.zeros(6, 6))

    def forward(self, w):
        return torch.linalg.qr(w + self.shift).Q


class Doubling(SquareOnly):
    def forward(self, w):
        return 2 * super().forward(w)


@pytest.mark.parametrize(
    ("params", "shape"),
    [
        (OrthoParams(BatchedIdentity, BatchedPowerIteration), (4, 4)),
        (OrthoParams(BatchedIdentity, BatchedPowerIteration), (4, 1)),  # one singular value
        (OrthoParams(BatchedQROrthogonalization, BatchedPowerIteration), (2, 5, 3)),  # swapped
        (OrthoParams(BatchedBjorckOrthogonalization, BatchedIdentity), (3, 5)),
        (OrthoParams(BatchedIdentity, lambda shape: nn.ReLU()), (3, 3)),
        (OrthoParams(BatchedIdentity, lambda shape: nn.Flatten(0)), (3, 3)),
        (OrthoParams(BatchedIdentity, Doubling), (6, 6)),
    ],
)
def test_what_does_not_orthogonalize_is_refused_when_it_is_built(params, shape):
    for _ in range(2):
        with pytest.raises(ValueError, match="OrthoParams: orthogonalizer must turn matrices"):
            OrthoWeight(shape, params)


def test_own_orthogonalizers_are_tried_once_and_leave_no_trace():
    calls = []

    def make(shape):
        calls.append(tuple(shape))
        torch.randn(3)
        return SquareOnly(shape)

    params = OrthoParams(BatchedIdentity, make)
    params.build((6, 6))
    tried = len(calls)
    state = torch.get_rng_state()
    with torch.device("meta"):
        OrthoWeight((6, 6), params)
    params.build((6, 6))
    torch.set_rng_state(state)
    assert len(calls) == tried + 2
    fresh = OrthoParams(BatchedIdentity, SquareOnly)
    fresh.build((6, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert fresh == OrthoParams(BatchedIdentity, SquareOnly)
    assert pickle.loads(pickle.dumps(fresh)) == fresh


def test_factories_that_make_no_modules_are_refused():
    with pytest.raises(ValueError, match=r"orthogonalizer must return a torch\.nn\.Module"):
        OrthoParams(BatchedIdentity, lambda shape: None).build((3, 3))
    for wrong in ("newton", None, BatchedQROrthogonalization, OrthoParams):
        with pytest.raises(ValueError, match="ortho_params must be an OrthoParams"):
            OrthoWeight((3, 3), wrong)
