"""Certificates of Lipschitz constants and of robustness: proofs, and attacks that try them.

The package can be called: `orthonet.certify(model, x)` is `orthonet.certify.certify(model, x)`.
"""

from orthonet.certify import _package  # noqa: F401 (makes the package callable)
from orthonet.certify._bound import Bound, Row
from orthonet.certify._certificate import LipschitzCertificate
from orthonet.certify._certify import certify
from orthonet.certify._local_radius import local_radius
from orthonet.certify._radius import RadiusCurve
from orthonet.certify._sequence import recurrent_bound, sequence_bound
from orthonet.certify.attacks.accuracy import empirical_accuracy
from orthonet.certify.attacks.apgd import apgd, apgd_ensemble_l2, apgd_l2
from orthonet.certify.attacks.pgd import (
    AttackReport,
    attack_certificate,
    lipschitz_estimate,
    pgd,
    pgd_l2,
)
from orthonet.certify.local.certificate import LocalBound, LocalCertificate
from orthonet.certify.mlp.chain import Affine
from orthonet.certify.mlp.exact import ExactConstant, exact_constant
from orthonet.certify.mlp.local import local_bound
from orthonet.certify.mlp.perceptron import MLPBound, mlp_bound
from orthonet.certify.mlp.slopes import Activation
from orthonet.certify.ops import (  # noqa: F401 (each registers its records)
    activations,
    arithmetic,
    contraction,
    convolution,
    fourier,
    modules,
    normalization,
    pooling,
    reductions,
    sampling,
    selection,
    shapes,
    sorting,
)
from orthonet.certify.report.accuracy import certified_accuracy, certified_curve
from orthonet.certify.report.evaluation import Evaluation, evaluate
from orthonet.certify.report.figures import Plot
from orthonet.certify.report.page import report_html
from orthonet.certify.report.summary import LayerRow, Summary, summary
from orthonet.certify.rules import Call, Operand, Step, register_rule
from orthonet.certify.walk.monotone import prove_monotone

__all__ = [
    "certify",
    "evaluate",
    "Evaluation",
    "Plot",
    "summary",
    "Summary",
    "LayerRow",
    "LipschitzCertificate",
    "LocalBound",
    "LocalCertificate",
    "Row",
    "Bound",
    "prove_monotone",
    "register_rule",
    "Call",
    "Operand",
    "Step",
    "mlp_bound",
    "local_bound",
    "local_radius",
    "MLPBound",
    "exact_constant",
    "ExactConstant",
    "Affine",
    "Activation",
    "certified_accuracy",
    "certified_curve",
    "RadiusCurve",
    "empirical_accuracy",
    "report_html",
    "sequence_bound",
    "recurrent_bound",
    "pgd",
    "pgd_l2",
    "apgd",
    "apgd_l2",
    "apgd_ensemble_l2",
    "attack_certificate",
    "AttackReport",
    "lipschitz_estimate",
]
