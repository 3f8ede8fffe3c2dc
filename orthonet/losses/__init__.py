"""Losses that reward a margin: what a 1-Lipschitz classifier is trained with.

A network of constant 1 cannot raise its logits at will, so the loss has to say how large a margin
is wanted: every loss here has a parameter in the units of the certified radius.
"""

from orthonet.losses._functional import (
    hinge_kr,
    hinge_kr_multiclass,
    kr,
    kr_labels,
    lse_hinge_kr_multiclass,
    offset_cross_entropy,
    soft_hinge_kr_multiclass,
    tau_bce_with_logits,
)
from orthonet.losses._modules import (
    CertificateRegularizationLoss,
    EMMALoss,
    HKRLoss,
    HKRMulticlassLoss,
    KRLoss,
    LogitAnnealingLoss,
    LseHKRMulticlassLoss,
    MultiMarginLoss,
    OffsetCrossEntropyLoss,
    SoftHKRMulticlassLoss,
    TauBCEWithLogitsLoss,
    TRADESLoss,
)
from orthonet.losses._regularized import (
    certificate_regularization,
    emma,
    logit_annealing,
    multi_margin,
    trades,
)

__all__ = [
    "CertificateRegularizationLoss",
    "EMMALoss",
    "HKRLoss",
    "HKRMulticlassLoss",
    "KRLoss",
    "LogitAnnealingLoss",
    "LseHKRMulticlassLoss",
    "MultiMarginLoss",
    "OffsetCrossEntropyLoss",
    "SoftHKRMulticlassLoss",
    "TRADESLoss",
    "TauBCEWithLogitsLoss",
    "certificate_regularization",
    "emma",
    "hinge_kr",
    "hinge_kr_multiclass",
    "kr",
    "kr_labels",
    "logit_annealing",
    "lse_hinge_kr_multiclass",
    "multi_margin",
    "offset_cross_entropy",
    "soft_hinge_kr_multiclass",
    "tau_bce_with_logits",
    "trades",
]
