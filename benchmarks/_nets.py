"""Networks on which whole training steps are counted and timed, alike for every library."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import _harness as harness
from benchmarks._candidates import PLAIN, Candidate

PLAIN_LAYERS = Candidate(**PLAIN)


@dataclass(frozen=True)
class Net:
    """A network to measure.

    Attributes:
        name: Title of its rows.
        build: Returns the network of a candidate.
        shape: Shape of the input, batch first.
        convolutions: Whether the network has any, which some libraries do not offer.
    """

    name: str
    build: Callable[[Candidate], nn.Module]
    shape: tuple[int, ...]
    convolutions: bool = True


class Residual(nn.Module):
    """Mean of the identity and two convolutions."""

    def __init__(self, candidate: Candidate, channels: int) -> None:
        super().__init__()
        self.first = candidate.conv(channels, channels, 3, 1)
        self.second = candidate.conv(channels, channels, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (x + self.second(torch.relu(self.first(x))))


def _mlp(candidate: Candidate, depth: int, width: int) -> nn.Module:
    layers = (candidate.linear(width, width) for _ in range(depth))
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))


def _cnn(candidate: Candidate, depth: int, width: int) -> nn.Module:
    layers = (candidate.conv(width, width, 3, 1) for _ in range(depth))
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))


def _mixed(candidate: Candidate, width: int) -> nn.Module:
    half, double = width // 2, 2 * width
    return nn.Sequential(
        candidate.conv(half, width, 3, 1),
        nn.ReLU(),
        candidate.conv(width, width, 3, 1),
        nn.ReLU(),
        candidate.conv(width, double, 3, 2),
        nn.ReLU(),
        candidate.conv(double, double, 3, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        candidate.linear(double, width),
        nn.ReLU(),
        candidate.linear(width, 10),
    )


def _resnet(candidate: Candidate, blocks: int, width: int) -> nn.Module:
    double = 2 * width
    return nn.Sequential(
        *(Residual(candidate, width) for _ in range(blocks)),
        candidate.conv(width, double, 3, 2),
        nn.ReLU(),
        *(Residual(candidate, double) for _ in range(blocks)),
        candidate.conv(double, 2 * double, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        candidate.linear(2 * double, 10),
    )


def linear(width: int = 512, batch: int = 256) -> Net:
    """One square linear layer."""
    title = f"Linear {width}, batch {batch}"
    return Net(title, lambda c: c.linear(width, width), (batch, width), convolutions=False)


def mlp(depth: int = 12, width: int = 256, batch: int = 512) -> Net:
    """Square linear layers with ReLU between them."""
    title = f"MLP {depth} x {width}, batch {batch}"
    build = partial(_mlp, depth=depth, width=width)
    return Net(title, build, (batch, width), convolutions=False)


def cnn(depth: int = 10, width: int = 64, batch: int = 8, size: int = 16) -> Net:
    """Square convolutions with ReLU between them, 3 x 3, stride 1."""
    title = f"CNN {depth} x {width} k3, batch {batch}, {size} x {size}"
    return Net(title, partial(_cnn, depth=depth, width=width), (batch, width, size, size))


def mixed(width: int = 32, batch: int = 8, size: int = 16) -> Net:
    """Four convolutions and two linear layers of six shapes."""
    title = f"mixed, 6 shapes to {2 * width}, batch {batch}, {size} x {size}"
    return Net(title, partial(_mixed, width=width), (batch, width // 2, size, size))


def resnet(blocks: int = 2, width: int = 32, batch: int = 8, size: int = 16) -> Net:
    """Residual blocks at two resolutions, convolutions of stride 2 between them, a linear head."""
    title = (
        f"ResNet-like, {4 * blocks} + 2 convolutions from {width}, batch {batch}, {size} x {size}"
    )
    return Net(title, partial(_resnet, blocks=blocks, width=width), (batch, width, size, size))


def named(nets: Iterable[Net], words: Iterable[str]) -> tuple[Net, ...]:
    """Networks whose title contains one of the words."""
    return tuple(net for net in nets if any(word in net.name for word in words))


def training_step(
    net: nn.Module,
    x: Tensor,
    *,
    lr: float = 1e-3,
    optimizer: str = "fused",
    forward: Callable | None = None,
) -> harness.Step:
    """One step of Adam toward random targets: zero_grad, forward, backward, step.

    Args:
        net: What is trained.
        x: The input; its gradient is computed if it requires one.
        lr: The learning rate.
        optimizer: "fused" or "foreach", the implementation of Adam.
        forward: What is called instead of `net`, such as its compiled form.
    """
    forward = net if forward is None else forward
    parameters = [p for p in net.parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, lr=lr, **{optimizer: True})
    with torch.no_grad():
        target = torch.randn_like(net(x))

    def step() -> None:
        adam.zero_grad()
        x.grad = None
        nn.functional.mse_loss(forward(x), target).backward()
        adam.step()

    return step


def constrained(net: nn.Module) -> list[nn.Module]:
    """The linear layers and convolutions."""
    return [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


@torch.no_grad()
def residual(net: nn.Module) -> float:
    """Largest |sigma - 1| of any weight; of a convolution, as an operator on a 4 x 4 torus.

    In float64 from the eigenvalues of the Gram matrix, which rounding moves by about 1e-15.
    """
    worst = 0.0
    for layer in constrained(net):
        weight = layer.weight.detach().double()
        if isinstance(layer, nn.Conv2d) and layer.stride == (1, 1):
            # Its blocks in the Fourier basis, one a frequency.
            weight = torch.fft.fft2(weight, s=(4, 4)).permute(2, 3, 0, 1)
        elif isinstance(layer, nn.Conv2d):
            weight = harness.circular_operator(weight, layer.stride[0])
        if not weight.isfinite().all():
            return float("inf")
        weight = weight if weight.shape[-2] <= weight.shape[-1] else weight.mH
        squares = torch.linalg.eigvalsh(weight @ weight.mH).clamp(min=0)
        worst = max(worst, float((squares.sqrt() - 1).abs().max()))
    return worst
