"""The names, argument orders and conventions of orthogonium 0.0.4.

All public names of its sub-modules are here: write
`from orthonet.compat.orthogonium import AdaptiveOrthoConv2d` instead of
`from orthogonium.layers.conv.AOC import AdaptiveOrthoConv2d`. The page "Coming from orthogonium"
lists every name and what differs.
"""

from orthonet.compat._missing import missing
from orthonet.compat.orthogonium import convolutions, layers, losses, model_factory, reparametrizers
from orthonet.compat.orthogonium.convolutions import *
from orthonet.compat.orthogonium.layers import *
from orthonet.compat.orthogonium.losses import *
from orthonet.compat.orthogonium.model_factory import *
from orthonet.compat.orthogonium.reparametrizers import *

__all__: list[str] = []
__all__ += convolutions.__all__
__all__ += layers.__all__
__all__ += losses.__all__
__all__ += model_factory.__all__
__all__ += reparametrizers.__all__

_ABSENT = {
    "AOLReparametrizer": "use AOLConv2D, or orthonet.linalg.almost_orthogonal for the map",
    "MultiStepAOLReparametrizer": "use orthonet.layers.SpectralConv2d, which iterates the norm",
    "BCOPTrivializer": "use orthonet.reparametrizers.OrthoKernel",
    "RKOParametrizer": "use orthonet.reparametrizers.ReshapedKernel",
    "attach_bcop_weight": "use orthonet.reparametrizers.OrthoKernel",
    "attach_rko_weight": "use orthonet.reparametrizers.ReshapedKernel",
    "attach_soc_weight": "use AdaptiveSOCConv2d",
    "ExpParams": "use orthonet.layers.SOCConv2d(terms=...)",
    "FastSOC": "use AdaptiveSOCConv2d",
    "SOCRkoConv2d": "use AdaptiveSOCConv2d with a stride",
    "SOCRkoConvTranspose2d": "use AdaptiveSOCConvTranspose2d with a stride",
    "SOCTranspose": "use AdaptiveSOCConvTranspose2d",
    "SDPBasedLipschitzConv": "use SDPBasedLipschitzResBlock",
    "compute_delattre2023": "use orthonet.linalg.convolution_norm_upper, or get_conv_sv",
    "compute_delattre2024": "use orthonet.linalg.convolution_norm_upper, or get_conv_sv",
    "compute_spectral_rescaling_conv": "use orthonet.linalg.almost_orthogonal",
    "conv_singular_values_numpy": "use layer.singular_values(input_size) of orthonet.layers",
    "fast_matrix_conv": "use nn.Sequential of the two layers",
    "fast_batched_matrix_conv": "use nn.Sequential of the two layers",
    "block_orth": "use orthonet.reparametrizers.OrthoKernel",
    "transpose_kernel": "use the adjoint method of the layer",
    "flatten_config": "use ClassParam.get_config(flatten=True)",
    **dict.fromkeys(
        (
            "AOCNetV1",
            "BCOPLargeCNN",
            "ConvMixerInspired",
            "LargeStagedCNN",
            "LipResNet",
            "LipVGG",
            "MODELS",
            "PatchBasedCNN",
            "ResNet50Block",
            "ResNetBlock",
            "SLLxBCOPResNet50",
            "SplitConcatNetConfigs",
            "StagedCNN",
        ),
        "build the network of the layers here, or take one of orthonet.models",
    ),
}
__getattr__ = missing(__name__, "orthogonium", _ABSENT)
