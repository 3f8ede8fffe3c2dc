"""Drop-in layers: what `torch.nn` has, under an l2 -> l2 constraint that holds exactly."""

from orthonet.layers._activations import (
    Abs,
    BetaAbs,
    ChannelShuffle,
    FullSort,
    GroupSort,
    HouseholderActivation,
    HouseholderActivation2,
    MaxMin,
    NActivation,
    SoftHuber,
)
from orthonet.layers._batch_norm import BatchCentering, BatchLipNorm, BatchScaling, SharedFactors
from orthonet.layers._downsampling import (
    PadToStride,
    SpaceToDepth1d,
    SpaceToDepth2d,
    SpaceToDepth3d,
)
from orthonet.layers._linear import OrthoLinear, UnitNormLinear
from orthonet.layers._normalize import LayerCentering, Normalize
from orthonet.layers._pooling import (
    AdaptiveL2NormPool,
    AdaptiveScaledAvgPool,
    GlobalL2NormPool,
    GlobalScaledAvgPool,
    L2NormPool,
    ScaledAvgPool,
)
from orthonet.layers._registry import (
    Method,
    available,
    make_conv,
    make_linear,
    method,
    register_method,
    table,
)
from orthonet.layers._scale import FirstChannels, Scale
from orthonet.layers.attention._block import LipschitzTransformerBlock
from orthonet.layers.attention._clip import RMSClip
from orthonet.layers.attention._cosine import CosineAttention
from orthonet.layers.attention._distance import DistanceAttention
from orthonet.layers.attention._mixing import TokenMixing
from orthonet.layers.convolution.conv import OrthoConv1d, OrthoConv2d, OrthoConv3d
from orthonet.layers.convolution.padding import SymmetricPad
from orthonet.layers.convolution.transpose import (
    OrthoConvTranspose1d,
    OrthoConvTranspose2d,
    OrthoConvTranspose3d,
)
from orthonet.layers.recurrent.contractive import ContractiveRNN
from orthonet.layers.recurrent.gated import OrthoGRU, OrthoGRUCell, OrthoLSTM, OrthoLSTMCell
from orthonet.layers.recurrent.layers import FinalState, OrthoRNN, OrthoRNNCell
from orthonet.layers.residual import (
    AdditiveResidual,
    ConcatResidual,
    ConvexResidual,
    L2NormResidual,
    PrescaledResidual,
)
from orthonet.layers.zoo._fourier import (
    BROConv2d,
    BROLinear,
    CayleyConv2d,
    CayleyLinear,
    LOTConv2d,
)
from orthonet.layers.zoo._lipnext import LipNeXtBlock2d, SpatialShift2d
from orthonet.layers.zoo._norms import L1Linear, LinfLinear, Monotone
from orthonet.layers.zoo._rescaled import (
    AOLConv2d,
    AOLLinear,
    CholeskyConv2d,
    CholeskyLinear,
    FrobeniusConv2d,
    FrobeniusLinear,
    LiResConv2d,
    LiResLinear,
    SpectralConv2d,
    SpectralLinear,
)
from orthonet.layers.zoo._residual import CPLConv2d, CPLLinear, SLLConv2d, SLLLinear
from orthonet.layers.zoo._sandwich import SandwichConv2d, SandwichLinear
from orthonet.layers.zoo._soc import SOCConv2d, SOCConvTranspose2d
from orthonet.layers.zoo._transposed import AOLConvTranspose2d, SpectralConvTranspose2d

__all__ = [
    "AOLConv2d",
    "AOLConvTranspose2d",
    "AOLLinear",
    "Abs",
    "AdaptiveL2NormPool",
    "AdaptiveScaledAvgPool",
    "AdditiveResidual",
    "BROConv2d",
    "BROLinear",
    "BatchCentering",
    "BatchLipNorm",
    "BatchScaling",
    "BetaAbs",
    "CPLConv2d",
    "CPLLinear",
    "CayleyConv2d",
    "CayleyLinear",
    "ChannelShuffle",
    "CholeskyConv2d",
    "CholeskyLinear",
    "ConcatResidual",
    "ContractiveRNN",
    "ConvexResidual",
    "CosineAttention",
    "DistanceAttention",
    "FinalState",
    "FirstChannels",
    "FrobeniusConv2d",
    "FrobeniusLinear",
    "FullSort",
    "GlobalL2NormPool",
    "GlobalScaledAvgPool",
    "GroupSort",
    "HouseholderActivation",
    "HouseholderActivation2",
    "L1Linear",
    "L2NormPool",
    "L2NormResidual",
    "LOTConv2d",
    "LayerCentering",
    "LiResConv2d",
    "LiResLinear",
    "LinfLinear",
    "LipNeXtBlock2d",
    "LipschitzTransformerBlock",
    "MaxMin",
    "Method",
    "Monotone",
    "NActivation",
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
    "PadToStride",
    "PrescaledResidual",
    "RMSClip",
    "SLLConv2d",
    "SLLLinear",
    "SOCConv2d",
    "SOCConvTranspose2d",
    "SandwichConv2d",
    "SandwichLinear",
    "Scale",
    "ScaledAvgPool",
    "SharedFactors",
    "SoftHuber",
    "SpaceToDepth1d",
    "SpaceToDepth2d",
    "SpaceToDepth3d",
    "SpatialShift2d",
    "SpectralConv2d",
    "SymmetricPad",
    "SpectralConvTranspose2d",
    "SpectralLinear",
    "TokenMixing",
    "UnitNormLinear",
    "available",
    "make_conv",
    "make_linear",
    "method",
    "register_method",
    "table",
]
