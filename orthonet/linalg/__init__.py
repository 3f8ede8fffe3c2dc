"""Pure functions on the last two dimensions of a tensor: the mathematics of the library."""

from orthonet.linalg.bounds.convolutions import NormBound, convolution_norm_bound
from orthonet.linalg.bounds.enclosure import spectral_norm_bound
from orthonet.linalg.exponential import cayley, matrix_exponential, rotate_base, skew
from orthonet.linalg.factorization import cholesky_qr, qr
from orthonet.linalg.kernels.convolution import block_convolution
from orthonet.linalg.kernels.paraunitary import apply_projectors
from orthonet.linalg.polar import bjorck, polar, polar_svd
from orthonet.linalg.rescaling import (
    almost_orthogonal,
    convolution_norm_upper,
    gershgorin_scale,
    normalized_frobenius,
)
from orthonet.linalg.sampling import haar
from orthonet.linalg.spectral import gram_iteration, power_iteration
from orthonet.linalg.unitary import (
    block_reflector,
    cayley_rectangular,
    cholesky_contraction,
    unitary_polar,
)

__all__ = [
    "NormBound",
    "almost_orthogonal",
    "apply_projectors",
    "bjorck",
    "block_convolution",
    "block_reflector",
    "cayley",
    "cayley_rectangular",
    "cholesky_contraction",
    "cholesky_qr",
    "convolution_norm_bound",
    "convolution_norm_upper",
    "gershgorin_scale",
    "gram_iteration",
    "haar",
    "matrix_exponential",
    "normalized_frobenius",
    "polar",
    "polar_svd",
    "power_iteration",
    "qr",
    "rotate_base",
    "skew",
    "spectral_norm_bound",
    "unitary_polar",
]
