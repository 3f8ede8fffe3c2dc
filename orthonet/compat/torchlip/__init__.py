"""The names, argument orders, signs and conventions of deel-torchlip 1.0.5.

Write `from orthonet.compat import torchlip` instead of `from deel import torchlip`. The page
"Coming from deel-torchlip" lists every name and what differs.
"""

from orthonet.compat._missing import missing
from orthonet.compat._soft_hkr import SoftHKRMulticlassLoss
from orthonet.compat.torchlip import (
    activations,
    functional,
    init,
    layers,
    losses,
    module,
    normalization,
    normalizers,
    utils,
)
from orthonet.compat.torchlip.activations import *
from orthonet.compat.torchlip.functional import *
from orthonet.compat.torchlip.init import *
from orthonet.compat.torchlip.layers import *
from orthonet.compat.torchlip.losses import *
from orthonet.compat.torchlip.module import *
from orthonet.compat.torchlip.normalization import *
from orthonet.compat.torchlip.normalizers import *
from orthonet.compat.torchlip.utils import *

__all__ = ["SoftHKRMulticlassLoss"]
__all__ += activations.__all__
__all__ += functional.__all__
__all__ += init.__all__
__all__ += layers.__all__
__all__ += losses.__all__
__all__ += module.__all__
__all__ += normalization.__all__
__all__ += normalizers.__all__
__all__ += utils.__all__

_ABSENT = {
    "ScaledLipschitzModule": "use LipschitzModule, or BatchLipNorm(factory=...)",
    "PadConv1d": "use nn.Conv1d, with orthonet.layers.SymmetricPad for symmetric padding",
    "PadConv2d": "use nn.Conv2d, with orthonet.layers.SymmetricPad for symmetric padding",
    "SymmetricPad": "use orthonet.layers.SymmetricPad, whose pads have the order of F.pad",
    "lconv_norm": "use SpectralConv2d, or orthonet.convert.orthogonalize(model, method='rko')",
    "remove_lconv_norm": "use to_plain() of the layer",
    "compute_lconv_coef": "use SpectralConv2d, whose kernel is divided already",
    "compute_lconv_coef_1d": "use SpectralConv1d, whose kernel is divided already",
    "computePoolScalingFactor": "use orthonet.layers.ScaledAvgPool",
    "SqrtEpsGrad": "use sqrt_with_gradeps",
    "LipschitzPReLU": "use LPReLU",
    "ScaledL2NormPooling2D": "use ScaledL2NormPool2d",
    "evaluate_lip_const_jacobian_norm": "use evaluate_lip_const(evaluation_type='jacobian_norm')",
    "evaluate_lip_const_noise_norm": "use evaluate_lip_const(evaluation_type='noise_norm')",
    "evaluate_lip_const_attack": "use evaluate_lip_const(evaluation_type='attack')",
}
__getattr__ = missing(__name__, "deel-torchlip", _ABSENT)
