"""Small networks that between them use every operation of the file."""

from pathlib import Path

import torch
from torch import nn

from orthonet import models
from orthonet.certify import certify
from orthonet.layers import (
    BROConv2d,
    CPLConv2d,
    FullSort,
    GroupSort,
    LayerCentering,
    LipNeXtBlock2d,
    LOTConv2d,
    MaxMin,
    OrthoConv2d,
    OrthoLinear,
    SLLConv2d,
    SLLLinear,
)


def convolutional() -> tuple[nn.Module, torch.Tensor]:
    """Like the network of the demo, smaller."""
    net = models.convnet(
        (1, 6, 6), 4, channels=(6, 8), kernel_sizes=(3, 2), strides=(1, 2), hidden=(16,)
    )
    return net, torch.zeros(1, 1, 6, 6)


def circular() -> tuple[nn.Module, torch.Tensor]:
    """Circular convolutions, space to depth, slices, a scale."""
    return models.convnet_xs((1, 4, 4), 3, width=4, depth=1, lipschitz=2.0), torch.zeros(1, 1, 4, 4)


def plain() -> tuple[nn.Module, torch.Tensor]:
    """Layers without any constraint."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
        nn.PReLU(6),
        nn.MaxPool2d(2, 1),
        nn.AvgPool2d(2, 1, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(72, 5),
        nn.LeakyReLU(0.3),
        nn.Linear(5, 3),
    )
    norm = net[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return net, torch.zeros(1, 2, 5, 6)


class Branches(nn.Module):
    """Sums, differences, joins, splits, constants: a graph that is no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = OrthoLinear(8, 8), nn.Linear(8, 8)
        self.register_buffer("factors", torch.linspace(0.5, 1.5, 8))
        self.register_buffer("offset", torch.linspace(-1.0, 1.0, 8)[None])
        self.center, self.sort, self.group = LayerCentering(1), FullSort(), GroupSort(4)

    def forward(self, x):
        a, b = (self.first(x) + 2.0 * x).chunk(2, 1)
        c = torch.cat([a.tanh(), torch.roll(b, 1, 1).flip(1)], 1) * self.factors + self.offset
        d = self.group(self.second(self.center(c))) - 0.5 * self.sort(x)
        e = torch.stack([d, torch.maximum(d, x)], 1)
        return e.mean(1), (e.sum(2) / self.factors[:2])[:, :1]


def branches() -> tuple[nn.Module, torch.Tensor]:
    """Two outputs of a graph."""
    return Branches(), torch.zeros(1, 8)


def one_dimensional() -> tuple[nn.Module, torch.Tensor]:
    """Convolutions in one dim, other paddings, an adaptive pool."""
    net = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1, padding_mode="reflect"),
        nn.SiLU(),
        nn.Conv1d(4, 4, 3, padding=2, padding_mode="replicate"),
        nn.ELU(0.5),
        nn.Hardtanh(),
        nn.AdaptiveAvgPool1d(3),
        nn.Flatten(),
        nn.Linear(12, 2),
    )
    return net, torch.zeros(1, 2, 8)


def perceptron() -> tuple[nn.Module, torch.Tensor]:
    """Activations between plain matrices, bounded jointly by multipliers."""
    net = nn.Sequential(
        nn.Linear(6, 10),
        nn.ReLU(),
        nn.Linear(10, 8),
        nn.LeakyReLU(-0.4),
        nn.Linear(8, 8),
        nn.Sigmoid(),
        nn.Linear(8, 3),
    )
    return net, torch.zeros(1, 6)


def spectral() -> tuple[nn.Module, torch.Tensor]:
    """Layers of the zoo that are checked: matrices at each frequency, shifts of channels."""
    net = nn.Sequential(
        LOTConv2d(2, 4, 3, 2, padding=1, padding_mode="zeros", lipschitz=1.5),
        BROConv2d(4, 2, 3, groups=2),
        LipNeXtBlock2d(2, 6, padding_mode="zeros", fraction=0.7, beta=0.5),
        LipNeXtBlock2d(6, 5),
        CPLConv2d(5, 4, 3, padding_mode="circular", lipschitz=0.5),
        SLLConv2d(4, 2, 3, groups=1, activation="tanh"),
        CPLConv2d(2, 4, 3, (1, 3), groups=2, lipschitz=1.2),
        nn.Flatten(),
        SLLLinear(12, 7, activation="sigmoid"),
    )
    return net, torch.zeros(1, 2, 6, 6)


NETS = {
    "convolutional": convolutional,
    "circular": circular,
    "plain": plain,
    "branches": branches,
    "one_dimensional": one_dimensional,
    "perceptron": perceptron,
    "spectral": spectral,
}


def save(name: str, folder: Path) -> Path:
    """The certificate of a network, in a folder."""
    torch.manual_seed(0)
    model, example = NETS[name]()
    folder.mkdir(exist_ok=True)
    certify(model.eval(), example, lower=False).save(folder / "certificate.json")
    return folder / "certificate.json"


def deep_convolutions(channels: int = 64, depth: int = 10) -> nn.Module:
    """Orthogonal convolutions in a row."""
    layers: list[nn.Module] = [OrthoConv2d(3, channels, 3, padding=1), MaxMin()]
    for _ in range(depth - 1):
        layers += [OrthoConv2d(channels, channels, 3, padding=1), MaxMin()]
    return nn.Sequential(*layers)
