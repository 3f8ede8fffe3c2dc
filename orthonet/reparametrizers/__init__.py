"""Modules that constrain one weight, by the protocol of `torch.nn.utils.parametrize`."""

from orthonet.reparametrizers._kernel import OrthoKernel
from orthonet.reparametrizers._kernel_methods import KERNEL_METHODS, ReshapedKernel
from orthonet.reparametrizers._mapped import FourierWeight, MappedWeight
from orthonet.reparametrizers._normalizers import (
    BatchedIdentity,
    BatchedPowerIteration,
    L2Normalize,
)
from orthonet.reparametrizers._parameter_groups import fuse, parameter_groups, unfuse
from orthonet.reparametrizers.orthogonal import OrthoWeight
from orthonet.reparametrizers.orthogonalizers import (
    BatchedBjorckOrthogonalization,
    BatchedCholeskyOrthogonalization,
    BatchedExponentialOrthogonalization,
    BatchedPolarOrthogonalization,
    BatchedQROrthogonalization,
    Orthogonalizer,
)
from orthonet.reparametrizers.params import (
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
    Presets,
    presets,
)
from orthonet.reparametrizers.providers import (
    REEVALUATING_OPTIMIZERS,
    defer_pullback,
    invalidate,
    share_among_ranks,
)
from orthonet.reparametrizers.registration import (
    CachedParametrizationList,
    adopt,
    register,
    remove,
)
from orthonet.reparametrizers.weight import Weight, caching

__all__ = [
    "AUTO_ORTHO_PARAMS",
    "BJORCK_PASS_THROUGH_ORTHO_PARAMS",
    "CHOLESKY_ORTHO_PARAMS",
    "CHOLESKY_STABLE_ORTHO_PARAMS",
    "DEFAULT_ORTHO_PARAMS",
    "DEFAULT_TEST_ORTHO_PARAMS",
    "EXP_ORTHO_PARAMS",
    "KERNEL_METHODS",
    "POLAR_ORTHO_PARAMS",
    "POLAR_WARM_ORTHO_PARAMS",
    "QR_ORTHO_PARAMS",
    "BatchedBjorckOrthogonalization",
    "BatchedCholeskyOrthogonalization",
    "BatchedExponentialOrthogonalization",
    "BatchedIdentity",
    "BatchedPolarOrthogonalization",
    "BatchedPowerIteration",
    "BatchedQROrthogonalization",
    "CachedParametrizationList",
    "ClassParam",
    "FourierWeight",
    "L2Normalize",
    "MappedWeight",
    "OrthoKernel",
    "OrthoParams",
    "OrthoWeight",
    "Orthogonalizer",
    "Presets",
    "REEVALUATING_OPTIMIZERS",
    "ReshapedKernel",
    "Weight",
    "adopt",
    "caching",
    "defer_pullback",
    "fuse",
    "parameter_groups",
    "invalidate",
    "register",
    "remove",
    "presets",
    "share_among_ranks",
    "unfuse",
]
