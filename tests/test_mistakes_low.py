"""Mistakes with low-level functions, layers and the copies of peers, as in `test_mistakes`."""

import numpy as np
import pytest
import torch
from torch import nn

from orthonet import certify, layers, models, reparametrizers
from orthonet import functional as F
from orthonet import linalg as L
from orthonet import manifolds as M
from orthonet.compat import geoopt, geotorch
from tests.test_mistakes import EYE, X, Y, answered_badly

INTS, HALF, VECTOR, EMPTY = torch.ones(3, 3).long(), EYE.half(), torch.ones(3), torch.zeros(0, 3)
COMPLEX, IMAGE = torch.eye(3, dtype=torch.complex64), torch.ones(2, 4, 8, 8)


def each(function, owner, argument, *values):
    """One mistake a value, which is the first argument."""
    return [(owner, argument, lambda value=value: function(value)) for value in values]


FUNCTIONS = [
    *each(L.almost_orthogonal, "almost_orthogonal", "kernel", None, EMPTY, VECTOR, INTS, nn.Linear),
    ("almost_orthogonal", "groups", lambda: L.almost_orthogonal(EYE, groups=3)),
    ("almost_orthogonal", "groups", lambda: L.almost_orthogonal(EYE, groups=0)),
    *each(L.normalized_frobenius, "normalized_frobenius", "kernel", "w", EMPTY, VECTOR, COMPLEX),
    *each(L.gershgorin_scale, "gershgorin_scale", "kernel", [[1.0]], VECTOR, torch.tensor(1.0)),
    *each(L.convolution_norm_upper, "convolution_norm_upper", "kernel", EMPTY, VECTOR),
    *each(L.cayley_rectangular, "cayley_rectangular", "w", None, 3, INTS, HALF, VECTOR),
    *each(L.block_reflector, "block_reflector", "v", None, INTS, HALF, VECTOR),
    *each(L.cholesky_contraction, "cholesky_contraction", "w", None, INTS, HALF, VECTOR, COMPLEX),
    *each(L.unitary_polar, "unitary_polar", "w", None, np.eye(3), INTS, HALF, VECTOR),
    *each(L.gram_iteration, "gram_iteration", "w", EMPTY, VECTOR),
    *each(lambda w: L.power_iteration(w, VECTOR), "power_iteration", "w", EMPTY, VECTOR),
    ("power_iteration", "u", lambda: L.power_iteration(EYE, torch.ones(7))),
    ("rotate_base", "w", lambda: L.rotate_base(None, EYE)),
    ("rotate_base", "base", lambda: L.rotate_base(EYE, VECTOR)),
    ("convolution_norm_bound", "kernel", lambda: L.convolution_norm_bound(None, (8, 8))),
    ("spectral_norm_bound", "shape", lambda: L.spectral_norm_bound(EYE.to("meta"))),
    *each(F.spatial_shift, "spatial_shift", "x", None, IMAGE.numpy(), IMAGE.int()),
    ("frechet_mean", "space", lambda: M.frechet_mean(EYE, EYE)),
    *each(lambda s: models.convnet_series(s, 3), "convnet_series", "in_shape", None, 3, VECTOR),
    *each(reparametrizers.adopt, "adopt", "module", None, nn.Linear, EYE),
    *each(certify.mlp_bound, "mlp_bound", "layers", "abc", 3, EYE, {}, [1.0], ["relu"]),
    *each(certify.exact_constant, "exact_constant", "layers", "abc", EYE),
    ("local_bound", "layers", lambda: certify.local_bound("abc", X, 0.1)),
    ("local_radius", "layers", lambda: certify.local_radius("abc", X, Y)),
    *each(geotorch.orthogonal, r"\w+", "module", None, nn.Linear, EYE),
    *each(geotorch.symmetric, "Symmetric", "module", None, nn.Linear),
    ("Symmetric", "tensor_name", lambda: geotorch.symmetric(nn.Linear(3, 3), "kernel")),
    (r"\w+", "tensor_name", lambda: geotorch.sphere(nn.Linear(3, 3), None)),
    *each(geoopt.Manifold, "Manifold", "space", None, M.Sphere, EYE),
]

CELLS = (layers.OrthoRNNCell(4, 4), layers.OrthoGRUCell(4, 4), layers.OrthoLSTMCell(4, 4))
LAYERS = [
    # Channels were padded or dropped, and integers rounded, without a word.
    *each(layers.CPLLinear(4, 4), "CPLLinear", "input", None, torch.ones(2, 7), X.long(), X > 0),
    *each(layers.SLLLinear(4, 4), "SLLLinear", "input", X[:, :3], X.cfloat(), torch.tensor(1.0)),
    *each(
        layers.CayleyConv2d(4, 4, 3), "CayleyConv2d", "input", None, 3, IMAGE.long(), IMAGE[0, 0]
    ),
    *each(layers.AOLConvTranspose2d(4, 4, 3), "AOLConvTranspose2d", "input", None, X, IMAGE[:, :3]),
    *each(layers.AdaptiveL2NormPool(1, dims=2), "AdaptiveL2NormPool", "x", None, IMAGE.int()),
    *each(layers.ConvexResidual(nn.Identity()), "ConvexResidual", "x", None, X.int()),
    *each(layers.PrescaledResidual(nn.Identity()), "PrescaledResidual", "x", 3, X.int()),
    *each(layers.ConcatResidual(nn.Identity()), "ConcatResidual", "x", None, X.numpy()),
    *each(layers.FirstChannels(2), "FirstChannels", "x", None, X.numpy()),
    *each(layers.FullSort(), "FullSort", "x", None, X.int()),
    *[row for cell in CELLS for row in each(cell, type(cell).__name__, "input", None, X.int())],
    ("ConvexResidual", "init", lambda: layers.ConvexResidual(nn.Identity(), init=None)),
    ("PrescaledResidual", "init", lambda: layers.PrescaledResidual(nn.Identity(), init="1")),
    ("LayerCentering", "dim", lambda: layers.LayerCentering(dim=None)),
    ("BatchScaling", "factors", lambda: layers.BatchScaling(4, factors="shared")),
    ("CayleyConv2d", "image_size", lambda: layers.CayleyConv2d(4, 4, 3, image_size=2.5)),
    *[
        (name, argument, lambda make=make, argument=argument: make(**{argument: "abc"}))
        for argument in ("device", "dtype")
        for name, make in (
            ("BROLinear", lambda **k: layers.BROLinear(4, 4, **k)),
            ("AOLConvTranspose2d", lambda **k: layers.AOLConvTranspose2d(4, 4, 3, **k)),
            ("SpectralConvTranspose2d", lambda **k: layers.SpectralConvTranspose2d(4, 4, 3, **k)),
            ("BatchCentering", lambda **k: layers.BatchCentering(4, **k)),
            ("BatchLipNorm", lambda **k: layers.BatchLipNorm(4, **k)),
            ("BatchScaling", lambda **k: layers.BatchScaling(4, **k)),
            ("ConvexResidual", lambda **k: layers.ConvexResidual(nn.Identity(), **k)),
            ("PrescaledResidual", lambda **k: layers.PrescaledResidual(nn.Identity(), **k)),
            ("NActivation", lambda **k: layers.NActivation(4, **k)),
        )
    ],
]


@pytest.mark.parametrize("table", [FUNCTIONS, LAYERS], ids=["functions", "layers"])
def test_a_mistake_is_answered_by_one_sentence(table, caplog, capfd):
    assert answered_badly(table, caplog, capfd) == []


def test_there_are_as_many_mistakes_as_were_asked_for():
    assert len(FUNCTIONS) + len(LAYERS) >= 120
