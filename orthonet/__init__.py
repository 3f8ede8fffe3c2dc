"""Orthogonal and 1-Lipschitz layers for PyTorch, with constants that are proved.

The names below are the ones most programs need; the rest lives in the sub-packages `layers`,
`functional`, `reparametrizers`, `linalg`, `losses`, `certify`, `convert`, `models`, `recipes` and
`testing`.
"""

from importlib.metadata import version

from torch.nn.utils.parametrize import cached

from orthonet import (
    certify,
    constraints,
    convert,
    functional,
    layers,
    linalg,
    losses,
    manifolds,
    reparametrizers,
)
from orthonet.certify import LipschitzCertificate
from orthonet.constraints import orthogonal, rebase_every, skew, sphere, symmetric, update_base
from orthonet.convert import to_plain
from orthonet.errors import (
    NotOnManifoldError,
    OrthonetError,
    ProjectionWarning,
    UncertifiableError,
)
from orthonet.layers import (
    Abs,
    AdaptiveOrthoConv2d,
    GroupSort,
    MaxMin,
    OrthoConv1d,
    OrthoConv2d,
    OrthoConv3d,
    OrthoLinear,
    UnitNormLinear,
)
from orthonet.reparametrizers import (
    AUTO_ORTHO_PARAMS,
    BJORCK_PASS_THROUGH_ORTHO_PARAMS,
    CHOLESKY_ORTHO_PARAMS,
    CHOLESKY_STABLE_ORTHO_PARAMS,
    DEFAULT_ORTHO_PARAMS,
    DEFAULT_TEST_ORTHO_PARAMS,
    EXP_ORTHO_PARAMS,
    POLAR_ORTHO_PARAMS,
    POLAR_WARM_ORTHO_PARAMS,
    QR_ORTHO_PARAMS,
    ClassParam,
    OrthoParams,
    caching,
    defer_pullback,
    fuse,
    invalidate,
    unfuse,
)

__version__ = version("orthonet")

__all__ = [
    "AUTO_ORTHO_PARAMS",
    "BJORCK_PASS_THROUGH_ORTHO_PARAMS",
    "CHOLESKY_ORTHO_PARAMS",
    "CHOLESKY_STABLE_ORTHO_PARAMS",
    "DEFAULT_ORTHO_PARAMS",
    "DEFAULT_TEST_ORTHO_PARAMS",
    "EXP_ORTHO_PARAMS",
    "POLAR_ORTHO_PARAMS",
    "POLAR_WARM_ORTHO_PARAMS",
    "QR_ORTHO_PARAMS",
    "Abs",
    "AdaptiveOrthoConv2d",
    "ClassParam",
    "GroupSort",
    "LipschitzCertificate",
    "MaxMin",
    "NotOnManifoldError",
    "OrthoConv1d",
    "OrthoConv2d",
    "OrthoConv3d",
    "OrthoLinear",
    "OrthoParams",
    "OrthonetError",
    "ProjectionWarning",
    "UncertifiableError",
    "UnitNormLinear",
    "cached",
    "caching",
    "certify",
    "constraints",
    "convert",
    "defer_pullback",
    "functional",
    "fuse",
    "invalidate",
    "layers",
    "linalg",
    "losses",
    "manifolds",
    "orthogonal",
    "rebase_every",
    "reparametrizers",
    "skew",
    "sphere",
    "symmetric",
    "to_plain",
    "update_base",
    "unfuse",
]
