"""Drop-in layers: what `torch.nn` has, under an l2 -> l2 constraint that holds exactly."""

from orthonet.layers._activations import Abs, GroupSort, HouseholderActivation, MaxMin
from orthonet.layers._conv import AdaptiveOrthoConv2d, OrthoConv1d, OrthoConv2d, OrthoConv3d
from orthonet.layers._conv_transpose import (
    OrthoConvTranspose1d,
    OrthoConvTranspose2d,
    OrthoConvTranspose3d,
)
from orthonet.layers._downsampling import SpaceToDepth1d, SpaceToDepth2d, SpaceToDepth3d
from orthonet.layers._linear import OrthoLinear, UnitNormLinear
from orthonet.layers._normalize import (
    BatchCentering1d,
    BatchCentering2d,
    BatchCentering3d,
    LayerCentering,
    Normalize,
)
from orthonet.layers._pooling import (
    AdaptiveL2NormPool1d,
    AdaptiveL2NormPool2d,
    AdaptiveL2NormPool3d,
    AdaptiveScaledAvgPool1d,
    AdaptiveScaledAvgPool2d,
    AdaptiveScaledAvgPool3d,
    GlobalL2NormPool1d,
    GlobalL2NormPool2d,
    GlobalL2NormPool3d,
    GlobalScaledAvgPool1d,
    GlobalScaledAvgPool2d,
    GlobalScaledAvgPool3d,
    L2NormPool1d,
    L2NormPool2d,
    L2NormPool3d,
    ScaledAvgPool1d,
    ScaledAvgPool2d,
    ScaledAvgPool3d,
)
from orthonet.layers._residual import (
    AdditiveResidual,
    ConcatResidual,
    ConvexResidual,
    L2NormResidual,
)
from orthonet.layers._rnn import FinalState, OrthoRNN, OrthoRNNCell
from orthonet.layers._rnn_contractive import ContractiveRNN, ContractiveRNNCell
from orthonet.layers._rnn_gated import OrthoGRU, OrthoGRUCell, OrthoLSTM, OrthoLSTMCell

__all__ = [
    "Abs",
    "AdaptiveL2NormPool1d",
    "AdaptiveL2NormPool2d",
    "AdaptiveL2NormPool3d",
    "AdaptiveOrthoConv2d",
    "AdaptiveScaledAvgPool1d",
    "AdaptiveScaledAvgPool2d",
    "AdaptiveScaledAvgPool3d",
    "AdditiveResidual",
    "BatchCentering1d",
    "BatchCentering2d",
    "BatchCentering3d",
    "ConcatResidual",
    "ContractiveRNN",
    "ContractiveRNNCell",
    "ConvexResidual",
    "FinalState",
    "GlobalL2NormPool1d",
    "GlobalL2NormPool2d",
    "GlobalL2NormPool3d",
    "GlobalScaledAvgPool1d",
    "GlobalScaledAvgPool2d",
    "GlobalScaledAvgPool3d",
    "GroupSort",
    "HouseholderActivation",
    "L2NormPool1d",
    "L2NormPool2d",
    "L2NormPool3d",
    "L2NormResidual",
    "LayerCentering",
    "MaxMin",
    "Normalize",
    "OrthoConv1d",
    "OrthoConv2d",
    "OrthoConv3d",
    "OrthoConvTranspose1d",
    "OrthoConvTranspose2d",
    "OrthoConvTranspose3d",
    "OrthoGRU",
    "OrthoGRUCell",
    "OrthoLSTM",
    "OrthoLSTMCell",
    "OrthoLinear",
    "OrthoRNN",
    "OrthoRNNCell",
    "ScaledAvgPool1d",
    "ScaledAvgPool2d",
    "ScaledAvgPool3d",
    "SpaceToDepth1d",
    "SpaceToDepth2d",
    "SpaceToDepth3d",
    "UnitNormLinear",
]
