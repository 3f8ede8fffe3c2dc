"""An invertible residual flow in the plane: exact densities, an inverse with an error bound."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify import certify
from orthonet.layers import OrthoLinear, Scale
from orthonet.recipes.beyond.report import BeyondReport, grid
from orthonet.recipes.running.figures import BLUE, figure_of, save_figure
from orthonet.recipes.running.fitting import fitted, seeded
from orthonet.recipes.running.folder import guarded
from orthonet.recipes.running.options import check_choices, option
from orthonet.recipes.running.processes import part_of
from orthonet.recipes.running.registry import Recipe, register
from orthonet.reparametrizers import QR_ORTHO_PARAMS

__all__ = [
    "DENSITIES",
    "FlowConfig",
    "Inverse",
    "ResidualFlow",
    "invert",
    "moons",
    "rings",
    "train_flow",
]


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Learn the density of points in the plane by an invertible network.

    Attributes:
        density: What is learned; "moons" or "rings".
        blocks: Residual blocks.
        hidden: Width of the two hidden layers of each.
        contraction: Constant of each block's branch, below 1.
        batch_size: Points in a step.
        iterations: Optimizer steps.
        lr: Highest learning rate.
        seed: Seed of weights and points.

    Raises:
        ValueError: A value out of range.
    """

    density: str = option("moons", choices=lambda: tuple(DENSITIES))
    blocks: int = 8
    hidden: int = 32
    contraction: float = 0.9
    batch_size: int = 256
    iterations: int = 800
    lr: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        _checks.positive_int(
            self,
            blocks=self.blocks,
            hidden=self.hidden,
            batch_size=self.batch_size,
            iterations=self.iterations,
        )
        _checks.in_range(self, 0.01, 0.999, contraction=self.contraction)
        _checks.in_range(self, 1e-6, 1e3, lr=self.lr)
        _checks.non_negative_int(self, seed=self.seed)


def moons(number: int, generator: torch.Generator) -> Tensor:
    """Two half circles that reach into each other, with noise, (number, 2)."""
    angle = torch.rand(number, generator=generator) * math.pi
    upper = torch.rand(number, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1.0 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return 1.4 * torch.stack((x, y), 1) + 0.1 * torch.randn(number, 2, generator=generator)


def rings(number: int, generator: torch.Generator) -> Tensor:
    """Two circles, one inside the other, with noise, (number, 2)."""
    angle = torch.rand(number, generator=generator) * (2 * math.pi)
    radius = torch.where(torch.rand(number, generator=generator) < 0.4, 0.7, 1.8)
    points = radius[:, None] * torch.stack((angle.cos(), angle.sin()), 1)
    return points + 0.1 * torch.randn(number, 2, generator=generator)


DENSITIES = {"moons": moons, "rings": rings}


class ResidualFlow(nn.Module):
    r"""\(z = x + g_i(x)\), block after block, with \(\mathrm{Lip}(g_i) \le c < 1\).

    Each branch is linear, ELU, linear, ELU, linear with orthogonal weights, times c: ELU has a
    continuous derivative in (0, 1], so that the map is invertible and its density continuous. In
    the plane \(\log |\det (I + J)|\) is two tangents and a formula: exact, no series, no trace
    estimate.

    Args:
        blocks: Number of blocks.
        hidden: Width of the hidden layers.
        contraction: c.

    Shape:
        (N, 2) to the same, and the logarithms (N,).

    References:
        Behrmann et al., *Invertible residual networks*, ICML 2019.
    """

    def __init__(self, blocks: int, hidden: int, contraction: float) -> None:
        super().__init__()
        _checks.positive_int(self, blocks=blocks, hidden=hidden)
        _checks.require(
            isinstance(contraction, (int, float)) and 0.0 < contraction < 1.0,
            self,
            "contraction must lie strictly between 0 and 1, or a block has no inverse",
            "Use 0.9",
            contraction=contraction,
        )
        self.contraction = contraction
        self.branches = nn.ModuleList(
            nn.Sequential(
                OrderedDict(
                    linear1=OrthoLinear(2, hidden, ortho_params=QR_ORTHO_PARAMS),
                    activation1=nn.ELU(),
                    linear2=OrthoLinear(hidden, hidden, ortho_params=QR_ORTHO_PARAMS),
                    activation2=nn.ELU(),
                    linear3=OrthoLinear(hidden, 2, ortho_params=QR_ORTHO_PARAMS),
                    scale=Scale(contraction),
                )
            )
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logarithm = x.new_zeros(len(x))
        for branch in self.branches:
            value, tangent = x, torch.eye(2, dtype=x.dtype, device=x.device)[:, None]
            for layer in branch.children():
                if isinstance(layer, nn.ELU):
                    # the derivative is 1 above 0, exp below: 1 + ELU there
                    value = layer(value)
                    tangent = tangent * (1.0 + value.clamp(max=0.0))
                elif isinstance(layer, Scale):
                    value, tangent = layer(value), layer(tangent)
                elif isinstance(layer, OrthoLinear):
                    value = layer(value)
                    tangent = tangent @ layer.weight.mT
            # tangent[i]: derivative of the branch along the i-th coordinate, (N, 2)
            (a, b), (c, d) = (part.expand(len(x), 2).unbind(-1) for part in tangent)
            logarithm = logarithm + torch.log((1 + a) * (1 + d) - b * c)
            x = x + value
        return x, logarithm

    def log_density(self, x: Tensor) -> Tensor:
        """Logarithm of the density at points (N, 2), of a standard normal law behind the flow."""
        z, logarithm = self(x)
        return logarithm - 0.5 * z.square().sum(1) - math.log(2 * math.pi)


class Inverse(NamedTuple):
    """Points, and a proved bound of how far each is from the true preimage."""

    points: Tensor
    error: Tensor


@torch.no_grad()
def invert(flow: ResidualFlow, z: Tensor, constants: Sequence[float], steps: int = 500) -> Inverse:
    r"""The inverse by fixed points \(x \leftarrow z - g(x)\), with an error bound.

    A block with constant c of its branch satisfies \(\|x - x'\| \le \|z - z'\| / (1 - c)\).
    The points found are sent through the flow again: how far they arrive from z, over the product
    of all \(1 - c\), bounds how far they are from the preimage (an error a posteriori, as the fixed
    points themselves may stop anywhere).

    Args:
        flow: The flow, in eval mode.
        z: What to invert, (N, 2).
        constants: Proved constant c of each branch, below 1.
        steps: Steps of each block, at most; fewer where the points stand still.

    Guarantee:
        Each point is within its `error` of the preimage, up to the rounding of one evaluation.

    Raises:
        ValueError: A constant is not below 1.
    """
    for constant in constants:
        _checks.in_range("invert", 0.0, 1.0 - 1e-9, constants=constant)
    x, rounding = z, torch.finfo(z.dtype).eps
    for branch in reversed(flow.branches):
        start = x
        for _ in range(steps):
            new = start - branch(x)
            still = bool((torch.linalg.vector_norm(new - x, dim=1) <= 4 * rounding).all())
            x = new
            if still:
                break
    missed = torch.linalg.vector_norm(flow(x)[0] - z, dim=1)
    return Inverse(x, missed / math.prod(1.0 - c for c in constants))


@guarded
def train_flow(
    config: FlowConfig,
    out: str | os.PathLike[str],
    *,
    progress: bool = False,
    resume: bool = False,
    tensorboard: bool = False,
) -> BeyondReport | None:
    """Fit a flow by maximum likelihood, check its inverse and its total mass, and draw it.

    Into the folder `out` go `metrics.json`, `model.pt` and `density.png`.

    The arguments are those of [`train`][orthonet.recipes.train], and so are the errors.

    Returns:
        The report, None in all processes of `torchrun` but the first. Its figures are `nats` (mean
        negative log-likelihood of fresh points), `base_nats` (that of the best single normal law),
        `mass` (integral of the density over [-4, 4]^2), `constant` (largest proved constant of a
        branch), `inverse_error` (largest proved error of the inverse) and `round_trip` (the largest
        found).
    """
    draw = DENSITIES[config.density]
    generator = torch.Generator().manual_seed(config.seed)
    with seeded(config.seed):
        flow = ResidualFlow(config.blocks, config.hidden, config.contraction)

    def loss_of() -> Tensor:
        return -flow.log_density(part_of(draw(config.batch_size, generator))).mean()

    switches = {"progress": progress, "resume": resume, "tensorboard": tensorboard}
    history = fitted(flow, loss_of, generator, config, "flow", out, **switches)
    if history is None:
        return None
    flow = flow.double().requires_grad_(False)
    origin = torch.zeros(1, 2, dtype=torch.float64)
    constants = [certify(branch, origin).constant.value for branch in flow.branches]
    fresh = draw(4000, generator).double()
    nats = -flow.log_density(fresh).mean().item()
    spread = torch.linalg.slogdet(torch.cov(fresh.T)).logabsdet.item()
    inverse = invert(flow, flow(fresh[:500])[0], constants)
    mesh = grid(-4.0, 4.0, 240)
    density = flow.log_density(mesh.flatten(0, 1)).exp().reshape(240, 240)
    figures = {
        "nats": nats,
        "base_nats": math.log(2 * math.pi) + 1.0 + 0.5 * spread,
        "mass": density.sum().item() * (8.0 / 240) ** 2,
        "constant": max(constants),
        "inverse_error": inverse.error.max().item(),
        "round_trip": (inverse.points - fresh[:500]).norm(dim=1).max().item(),
    }
    low, high = (math.log1p(sign * max(constants)) for sign in (-1, 1))
    text = (
        f"residual flow on {config.density}, {config.blocks} blocks, {config.iterations} steps",
        f"negative log-likelihood       {nats:.4f} nats, exact (one normal law: "
        f"{figures['base_nats']:.4f})",
        f"mass in [-4, 4]^2             {figures['mass']:.5f}",
        f"constant of a branch          {figures['constant']:.9f}  (proved upper bound): "
        f"log-det of a block in [{2 * low:.2f}, {2 * high:.2f}]",
        f"inverse of 500 points         found within {figures['round_trip']:.1e}, proved within "
        f"{figures['inverse_error']:.1e}",
    )
    report = BeyondReport("flow", dataclasses.asdict(config), figures, text, history)
    picture = _picture(Path(out) / "density.png", flow, config, density, constants, generator)
    return report.written(Path(out), flow, picture)


def _picture(
    path: Path,
    flow: ResidualFlow,
    config: FlowConfig,
    density: Tensor,
    constants: Sequence[float],
    generator: torch.Generator,
) -> Path:
    figure = figure_of(12.0, 4.2)
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    data = DENSITIES[config.density](2000, generator)
    normal = torch.randn(2000, 2, generator=generator).double()
    made = invert(flow, normal, constants, steps=60).points
    x, y = grid(-4.0, 4.0, 240).unbind(-1)
    panels[0].plot(data[:, 0], data[:, 1], ".", color=BLUE, ms=2)
    panels[0].set_title("data")
    panels[1].pcolormesh(
        *(t.numpy() for t in (x, y, density)), cmap="magma", shading="nearest", rasterized=True
    )
    panels[1].set_title("density, exact")
    panels[2].plot(made[:, 0], made[:, 1], ".", color=BLUE, ms=2)
    panels[2].set_title("samples, by the inverse")
    for axes in panels:
        axes.set(aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    return save_figure(figure, path, *panels)


register("flow", Recipe(FlowConfig, FlowConfig, train_flow))
