"""Certificates of Lipschitz constants and of robustness: proofs, and attacks that try them."""

from orthonet.certify import _zoo_rules  # noqa: F401 (registers them)
from orthonet.certify._bound import Bound
from orthonet.certify._certificate import LipschitzCertificate, certified_accuracy, certify
from orthonet.certify._empirical import (
    AttackReport,
    attack_certificate,
    lipschitz_estimate,
    pgd_l2,
)
from orthonet.certify._propagate import Row
from orthonet.certify._rules import Call, Operand, Step, register_rule

__all__ = [
    "certify",
    "LipschitzCertificate",
    "Row",
    "Bound",
    "register_rule",
    "Call",
    "Operand",
    "Step",
    "certified_accuracy",
    "pgd_l2",
    "attack_certificate",
    "AttackReport",
    "lipschitz_estimate",
]
