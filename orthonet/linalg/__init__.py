"""Pure functions on the last two dimensions of a tensor: the mathematics of the library."""

from orthonet.linalg.convolution import block_convolution
from orthonet.linalg.convolution_bounds import NormBound, convolution_norm_bound
from orthonet.linalg.enclosure import spectral_norm_bound
from orthonet.linalg.exponential import cayley, matrix_exponential, rotate_base, skew
from orthonet.linalg.factorization import cholesky_qr, qr
from orthonet.linalg.paraunitary import apply_projectors
from orthonet.linalg.polar import bjorck, polar, polar_svd
from orthonet.linalg.sampling import haar
from orthonet.linalg.spectral import gram_iteration, power_iteration

__all__ = [
    "NormBound",
    "apply_projectors",
    "bjorck",
    "block_convolution",
    "cayley",
    "cholesky_qr",
    "convolution_norm_bound",
    "gram_iteration",
    "haar",
    "matrix_exponential",
    "polar",
    "polar_svd",
    "power_iteration",
    "qr",
    "rotate_base",
    "skew",
    "spectral_norm_bound",
]
