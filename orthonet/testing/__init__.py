"""What tests of orthogonal layers need: dense operators, hard inputs, laws, tolerances.

For users as much as for this library; nothing here imports a test framework.
"""

from orthonet.testing import cases, laws, tolerances
from orthonet.testing._asserts import assert_lipschitz, assert_orthogonal
from orthonet.testing._fuzz import FuzzReport, fuzz_certificates
from orthonet.testing._operator import (
    dense_operator,
    jacobian,
    orthogonality_error,
    singular_values,
)
from orthonet.testing.cases import MATRIX_CASES, MATRIX_SHAPES, hard_matrix
from orthonet.testing.laws import LAYER_LAWS
from orthonet.testing.tolerances import Tolerance

__all__ = [
    "FuzzReport",
    "LAYER_LAWS",
    "MATRIX_CASES",
    "MATRIX_SHAPES",
    "Tolerance",
    "assert_lipschitz",
    "assert_orthogonal",
    "cases",
    "dense_operator",
    "fuzz_certificates",
    "hard_matrix",
    "jacobian",
    "laws",
    "orthogonality_error",
    "singular_values",
    "tolerances",
]
