"""The presets, normalizers and orthogonalizers of orthogonium: the names of this library."""

from __future__ import annotations

from orthonet.reparametrizers import (
    BJORCK_PASS_THROUGH_ORTHO_PARAMS,
    CHOLESKY_ORTHO_PARAMS,
    CHOLESKY_STABLE_ORTHO_PARAMS,
    DEFAULT_ORTHO_PARAMS,
    DEFAULT_TEST_ORTHO_PARAMS,
    EXP_ORTHO_PARAMS,
    QR_ORTHO_PARAMS,
    BatchedBjorckOrthogonalization,
    BatchedCholeskyOrthogonalization,
    BatchedExponentialOrthogonalization,
    BatchedIdentity,
    BatchedPowerIteration,
    BatchedQROrthogonalization,
    L2Normalize,
    OrthoParams,
)

__all__ = [
    "BJORCK_PASS_THROUGH_ORTHO_PARAMS",
    "BatchedBjorckOrthogonalization",
    "BatchedCholeskyOrthogonalization",
    "BatchedExponentialOrthogonalization",
    "BatchedIdentity",
    "BatchedPowerIteration",
    "BatchedQROrthogonalization",
    "CHOLESKY_ORTHO_PARAMS",
    "CHOLESKY_STABLE_ORTHO_PARAMS",
    "DEFAULT_ORTHO_PARAMS",
    "DEFAULT_TEST_ORTHO_PARAMS",
    "EXP_ORTHO_PARAMS",
    "L2Normalize",
    "OrthoParams",
    "QR_ORTHO_PARAMS",
]
