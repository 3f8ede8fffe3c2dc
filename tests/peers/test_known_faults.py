"""Faults 1 to 6 and 12 that were measured in orthogonium 0.0.4: weights and presets.

A docstring says first what the other library does, then what is promised here. The other faults
are in `test_known_faults_layers.py`.
"""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from orthonet.errors import NotOnManifoldError
from orthonet.layers import OrthoConv2d, OrthoLinear
from orthonet.linalg import haar
from orthonet.reparametrizers import (
    BJORCK_PASS_THROUGH_ORTHO_PARAMS,
    DEFAULT_ORTHO_PARAMS,
    BatchedExponentialOrthogonalization,
    BatchedPowerIteration,
    BatchedQROrthogonalization,
    ClassParam,
    OrthoParams,
)
from orthonet.testing import hard_matrix, laws, orthogonality_error, tolerances
from tests.peers.common import PRESETS, distance, every_layer, every_preset, excess, train

# 1


def test_power_it_niter_is_read():
    """There `power_it_niter` is stored and never read; here it is the number of rounds."""
    w = hard_matrix("gaussian", (48, 48), torch.float64)
    errors = []
    for niters in (1, 3, 10, 200):  # all begin at the same vector
        normalizer = BatchedPowerIteration(w.shape, power_it_niter=niters, eps=0.0).double()
        norm = torch.linalg.matrix_norm(normalizer(w), 2)  # truth / estimate
        errors.append(norm.item() - 1)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.05  # observed 0.24 after one round
    assert abs(errors[-1]) <= 1e-3  # observed 3.7e-6 after 200

    params = OrthoParams(spectral_normalizer=ClassParam(BatchedPowerIteration, power_it_niter=7))
    assert "power_it_niter=7" in repr(OrthoLinear(4, 4, ortho_params=params))


# 2


@every_preset
@every_layer
def test_eval_reads_are_pure(factory, shape, preset):
    """There each read of the weight rewrites u and v, in eval too; here eval writes nothing."""
    laws.assert_eval_is_pure(partial(factory, ortho_params=preset), shape)


@every_layer
def test_compile_takes_one_graph(factory, shape):
    """There `torch.compile(fullgraph=True)` refuses; here train and eval are one graph each."""
    laws.assert_compiles(factory, shape)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(10, 4), (5, 5), (3, 7, 2)])
def test_operators_tell_the_compiler_their_true_layout(shape, transposed):
    """A wrong stride is silent in eager mode and stops the default backend of torch.compile."""
    *batch, m, n = shape
    w = torch.randn(*batch, n, m).mT if transposed else torch.randn(shape)
    h = w.mT @ w
    c = torch.randn(h.shape).triu(1)
    c = (c - c.mT).mT if transposed else c - c.mT
    operators = torch.ops.orthonet
    calls = [(operators.polar, (w, 0.5, 12)), (operators.polar_adjoint, (h, c, w))]
    calls += [(operators.orthogonal_factor, (w, method)) for method in range(3)]
    for operator, arguments in calls:
        torch.library.opcheck(
            operator.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


# 3


@every_preset
@pytest.mark.parametrize(
    "case", ["gaussian", "kappa_1e3", "kappa_1e8", "rank_deficient", "zero", "tiny", "huge"]
)
def test_non_convergence_is_not_silent(preset, case):
    """There such parameters give |sigma - 1| up to 1 without a word; here they all converge."""
    for shape in ((48, 48), (6, 40), (40, 6)):
        layer = OrthoLinear(shape[1], shape[0], ortho_params=preset)
        with torch.no_grad():
            layer.parametrization.original.copy_(hard_matrix(case, shape))
        # observed 9.3e-7 (Cholesky at kappa 1e3)
        assert orthogonality_error(layer.train().weight) <= 2e-6
        assert orthogonality_error(layer.eval().weight) <= 2e-6


@every_preset
def test_a_scaled_orthogonal_parameter_is_no_harder(preset):
    """There 1e-4 times an orthogonal matrix gives |sigma - 1| = 0.97 with Cholesky (its shift is
    absolute); here scale does not matter."""
    layer = OrthoLinear(32, 32, ortho_params=preset)
    with torch.no_grad():
        layer.parametrization.original.copy_(1e-4 * hard_matrix("orthogonal", (32, 32)))
    assert orthogonality_error(layer.weight) <= 2e-6  # observed 3.8e-7


@every_preset
@every_layer
def test_a_zero_weight_does_not_poison_the_state(factory, shape, preset):
    """There u and v become 0 for good and all later weights are not finite; here they recover."""
    layer = factory(ortho_params=preset).train()
    parameters = [p for name, p in layer.named_parameters() if name != "bias"]
    with torch.no_grad():
        values = [torch.randn_like(p) for p in parameters]
        for parameter in parameters:
            parameter.zero_()
        x = torch.randn(2, *shape)
        for _ in range(2):
            assert torch.isfinite(layer(x)).all()
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
        layer(x)
    assert all(torch.isfinite(buffer).all() for buffer in layer.buffers())
    assert excess(layer, shape) <= 1e-5  # observed 8.8e-7
    if isinstance(layer, nn.Linear):
        assert orthogonality_error(layer.weight) <= 2e-6  # observed 1.3e-7


@every_preset
def test_a_weight_that_is_not_finite_is_an_error(preset):
    """There NaN passes through; here the read of the weight says so."""
    layer = OrthoLinear(4, 4, ortho_params=preset)
    with torch.no_grad():
        layer.parametrization.original[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        layer(torch.ones(1, 4))


# 4


def test_exponential_alone_bears_any_parameter(dtype):
    """There the truncated series has sigma_max 2075 on N(0, 1) 64 x 64; here scaling and squaring
    keep it orthogonal."""
    for shape in ((64, 64), (64, 16), (16, 64)):
        module = BatchedExponentialOrthogonalization(shape, niters=12).to(dtype)
        error = orthogonality_error(module(hard_matrix("gaussian", shape, dtype)))
        # 16 products of 64 x 64, squarings included; observed 2.0e-7 and 8.9e-16
        assert error <= tolerances.orthogonality_rounding(dtype, 16 * 64)


@pytest.mark.parametrize("determinant", [1, -1])
def test_exponential_reaches_all_orthogonal_matrices(determinant):
    """There the exponential of a normalized parameter cannot reach most of SO(n); here any
    orthogonal matrix can be assigned, and training starts from it."""
    layer = OrthoLinear(12, 12, dtype=torch.float64, ortho_params=PRESETS["EXP"])
    for _ in range(5):
        q = haar((12, 12), dtype=torch.float64)
        if torch.linalg.det(q) * determinant < 0:
            q[0] *= -1
        layer.weight = q
        assert distance(layer.weight, q) <= 1e-13  # observed 2.8e-16
    history = train(layer, torch.randn(32, 12, dtype=torch.float64), 20)
    assert history[-1] < history[0]
    assert orthogonality_error(layer.weight) <= 1e-13  # observed 4.5e-16


# 5


@pytest.mark.parametrize("case", ["zero", "rank_deficient", "identity", "repeated"])
@pytest.mark.parametrize("shape", [(8, 8), (4, 10), (10, 4)])
def test_qr_keeps_the_rank_and_a_finite_gradient(case, shape):
    """There sign(0) drops rank, and the gradient at a zero weight is NaN; here neither."""
    module = BatchedQROrthogonalization(shape)
    w = hard_matrix(case, shape).requires_grad_()
    if case == "rank_deficient":
        with torch.no_grad():
            w[:, -1] = 0  # a zero on the diagonal of R
            w[-1] = 0
    q = module(w)
    assert orthogonality_error(q) <= 2e-6  # observed 3.1e-7
    (q * hard_matrix("gaussian", shape)).sum().backward()
    assert torch.isfinite(w.grad).all()


# 6


@every_preset
def test_assignment_accepts_the_manifold_and_nothing_else(preset):
    """There assigning 0.5 Q silently gives Q; here it is an error that changes nothing."""
    layer = OrthoLinear(10, 6, ortho_params=preset)
    q = haar((6, 10))
    layer.weight = q
    assert distance(layer.weight, q) <= 2e-6  # observed 1.2e-7
    state = copy.deepcopy(layer.state_dict())
    for wrong in (0.5 * q, torch.zeros(6, 10), q + 0.1, torch.full((6, 10), float("nan"))):
        with pytest.raises(NotOnManifoldError, match=r"must be (semi-orthogonal|finite)"):
            layer.weight = wrong
    with pytest.raises(ValueError, match="shape"):
        layer.weight = q.T
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("stride", [1, 2])
def test_kernel_of_an_orthogonal_convolution_can_be_assigned(stride):
    """There the kernel cannot be assigned at all; here that of another such layer can be."""
    make = partial(OrthoConv2d, 4, 8, 3, stride=stride, padding=1, dtype=torch.float64)
    source, target = make(), make()
    target.weight = source.weight
    assert distance(target.weight, source.weight) <= 1e-13  # observed 7.0e-16
    with pytest.raises(NotOnManifoldError):
        target.weight = 0.5 * source.weight
    assert distance(target.weight, source.weight) <= 1e-13  # observed 7.7e-16


# 12


@every_layer
def test_bjorck_pass_through_trains(factory, shape):
    """There its weights get no gradient and never train; here every parameter gets one."""
    layer = factory(ortho_params=BJORCK_PASS_THROUGH_ORTHO_PARAMS)
    before = layer.weight.detach().clone()
    x = torch.randn(16, *shape)
    layer(x).mul(torch.randn_like(layer(x))).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 0, name
    layer.zero_grad()
    history = train(layer, x, 30)
    assert history[-1] < history[0] - 1e-3
    assert (layer.weight - before).norm() > 0.05 * before.norm()


def test_default_preset_of_every_layer_is_the_documented_one():
    """The arguments that are shown are the ones that are used."""
    layer = OrthoLinear(4, 4)
    normalizer, orthogonalizer = (
        layer.parametrization.normalizer,
        layer.parametrization.orthogonalizer,
    )
    assert isinstance(normalizer, BatchedPowerIteration)
    assert normalizer.power_it_niter == 3
    assert (orthogonalizer.beta, orthogonalizer.niters) == (0.5, 12)
    assert OrthoParams() == DEFAULT_ORTHO_PARAMS
