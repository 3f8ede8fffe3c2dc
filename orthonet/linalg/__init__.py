"""Pure functions on the last two dimensions of a tensor: the mathematics of the library."""

from orthonet.linalg.bounds.convolutions import NormBound, convolution_norm_bound
from orthonet.linalg.bounds.enclosure import gram_norm_bound, spectral_norm_bound
from orthonet.linalg.exponential import cayley, matrix_exponential, rotate_base, skew
from orthonet.linalg.factorization import cholesky_qr, qr
from orthonet.linalg.kernels.convolution import block_convolution
from orthonet.linalg.kernels.fourier import apply_symbol, kernel_symbol
from orthonet.linalg.kernels.paraunitary import apply_projectors
from orthonet.linalg.logarithm import rotation_logarithm
from orthonet.linalg.polar import bjorck, polar, polar_svd
from orthonet.linalg.rescaling import (
    almost_orthogonal,
    convolution_norm_upper,
    gershgorin_scale,
    normalized_frobenius,
    normalized_spectral,
)
from orthonet.linalg.sampling import haar
from orthonet.linalg.spectral import gram_iteration, power_iteration
from orthonet.linalg.unitary import (
    block_reflector,
    cayley_parameter,
    cayley_rectangular,
    cholesky_contraction,
    polish,
    unitary_polar,
)

__all__ = [
    "NormBound",
    "almost_orthogonal",
    "apply_projectors",
    "apply_symbol",
    "bjorck",
    "block_convolution",
    "block_reflector",
    "cayley",
    "cayley_parameter",
    "cayley_rectangular",
    "cholesky_contraction",
    "cholesky_qr",
    "convolution_norm_bound",
    "convolution_norm_upper",
    "gershgorin_scale",
    "gram_iteration",
    "gram_norm_bound",
    "haar",
    "kernel_symbol",
    "matrix_exponential",
    "normalized_frobenius",
    "normalized_spectral",
    "polar",
    "polar_svd",
    "polish",
    "power_iteration",
    "qr",
    "rotate_base",
    "rotation_logarithm",
    "skew",
    "spectral_norm_bound",
    "unitary_polar",
]
