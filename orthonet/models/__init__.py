"""Small 1-Lipschitz classifiers, plain `nn.Sequential` of the library's layers, by name."""

from orthonet.models._convnet import convnet, convnet_digits, convnet_images, convnet_mnist
from orthonet.models._mlp import mlp, mlp_digits
from orthonet.models._pretrained import certificate_path
from orthonet.models._registry import arguments_for, create, list_models, register
from orthonet.models._series import convnet_series
from orthonet.models._xs import convnet_xs
from orthonet.models._zoo import convnet_zoo

__all__ = [
    "arguments_for",
    "certificate_path",
    "convnet",
    "convnet_digits",
    "convnet_images",
    "convnet_mnist",
    "convnet_series",
    "convnet_xs",
    "convnet_zoo",
    "create",
    "list_models",
    "mlp",
    "mlp_digits",
    "register",
]
