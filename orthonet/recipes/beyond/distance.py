"""A signed-distance function as a 1-Lipschitz network, and sphere tracing that is safe by proof."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify import certify
from orthonet.models import mlp
from orthonet.recipes.beyond.report import BeyondReport, grid
from orthonet.recipes.beyond.shapes import SHAPES
from orthonet.recipes.data.digits import require_package
from orthonet.recipes.running.figures import BLUE, GRAY, ORANGE, figure_of, save_figure
from orthonet.recipes.running.fitting import fitted, seeded
from orthonet.recipes.running.folder import guarded
from orthonet.recipes.running.options import check_choices, option
from orthonet.recipes.running.processes import part_of
from orthonet.recipes.running.registry import Recipe, register

__all__ = ["SDFConfig", "Trace", "overshoots", "sphere_trace", "train_sdf"]


@dataclasses.dataclass(frozen=True)
class SDFConfig:
    """Learn the signed distance to a shape, never more than it.

    Attributes:
        shape: The shape inside the box [-1, 1]^d; "star" (in the plane) or "torus" (in space).
        hidden: Width of the three hidden layers, even.
        batch_size: Points in a step, half of them near the surface.
        iterations: Optimizer steps.
        lr: Highest learning rate.
        rays: Rays that are traced along each side of the picture.
        trace_steps: Steps of a ray, at most.
        seed: Seed of weights and points.

    Raises:
        ValueError: A value out of range.
    """

    shape: str = option("torus", choices=tuple(SHAPES))
    hidden: int = 64
    batch_size: int = 512
    iterations: int = 1200
    lr: float = 0.02
    rays: int = option(160, trains=False)
    trace_steps: int = option(80, trains=False)
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        _checks.positive_int(
            self,
            hidden=self.hidden,
            batch_size=self.batch_size,
            iterations=self.iterations,
            rays=self.rays,
            trace_steps=self.trace_steps,
        )
        _checks.in_range(self, 1e-6, 1e3, lr=self.lr)
        _checks.non_negative_int(self, seed=self.seed)


class Trace(NamedTuple):
    """Where rays ended.

    Attributes:
        points: The last points, (N, d); never beyond the first zero of f along the ray.
        hit: Where f fell below the tolerance, (N,).
        lengths: How far each ray went, (N,).
        steps: Steps that each ray took, (N,).
    """

    points: Tensor
    hit: Tensor
    lengths: Tensor
    steps: Tensor


@torch.no_grad()
def sphere_trace(
    f: nn.Module,
    origins: Tensor,
    directions: Tensor,
    *,
    constant: float,
    reach: float,
    steps: int = 80,
    tolerance: float = 1e-3,
) -> Trace:
    r"""March along rays by \(f(x) / K\): no step can pass a zero of f.

    Where f(x) > 0 and f has the constant K, f is positive in the whole open ball of radius f(x) / K
    around x. A ray therefore never enters the surface, whatever f has learned, so long as K is
    proved.

    Args:
        f: A module with one output for each point.
        origins: Where the rays start, f > 0 there.
        directions: Unit vectors.
        constant: K, a proved upper bound.
        reach: Length at which a ray is given up.
        steps: Steps at most.
        tolerance: A ray has arrived where f is at most this.

    Shape:
        `origins`, `directions`: (N, d).

    Guarantee:
        f > 0 at every point of each ray up to its length, up to the rounding of f.
    """
    _checks.in_range("sphere_trace", 1e-30, 1e30, constant=constant, tolerance=tolerance)
    _checks.positive_int("sphere_trace", steps=steps)
    length = torch.zeros(len(origins), dtype=origins.dtype, device=origins.device)
    taken = torch.zeros(len(origins), dtype=torch.long, device=origins.device)
    hit = torch.zeros_like(taken, dtype=torch.bool)
    alive = ~hit
    for _ in range(steps):
        index = alive.nonzero().squeeze(1)
        if not len(index):
            break
        value = f(origins[index] + length[index, None] * directions[index])[:, 0]
        arrived = value <= tolerance
        hit[index[arrived]] = True
        length[index] += torch.where(arrived, 0.0, value / constant)
        taken[index] += 1
        alive[index] = ~arrived & (length[index] < reach)
    length = length.clamp(max=reach)
    return Trace(origins + length[:, None] * directions, hit, length, taken)


@guarded
def train_sdf(
    config: SDFConfig,
    out: str | os.PathLike[str],
    *,
    progress: bool = False,
    resume: bool = False,
    tensorboard: bool = False,
) -> BeyondReport | None:
    """Fit a 1-Lipschitz network to the signed distance of a shape and trace rays against it.

    The network never overestimates the distance to its own surface, which is what a ray tracer
    needs; a plain network has no such property. The traces are checked: each traced segment is
    sampled densely, and no sample may lie inside. Into the folder `out` go `metrics.json`,
    `model.pt` and `distance.png`.

    The arguments are those of [`train`][orthonet.recipes.train], and so are the errors.

    Returns:
        The report, None in all processes of `torchrun` but the first. Its figures are `mean_error`,
        `largest_error` (from the shape's distance, on fresh points), `constant`, `rays`, `hits` and
        `overshoots`.

    References:
        Hart, *Sphere tracing*, The Visual Computer 1996; Coiffier & Béthune, *1-Lipschitz neural
        distance fields*, Computer Graphics Forum 2024.
    """
    shape = SHAPES[config.shape]
    generator = torch.Generator().manual_seed(config.seed)
    with seeded(config.seed):
        model = mlp(shape.dimension, 1, hidden=(config.hidden,) * 3, activation="group_sort")

    def loss_of() -> Tensor:
        x = part_of(_points(config, config.batch_size, generator))
        return (model(x)[:, 0] - shape.distance(x)).square().mean()

    switches = {"progress": progress, "resume": resume, "tensorboard": tensorboard}
    history = fitted(model, loss_of, generator, config, "sdf", out, **switches)
    if history is None:
        return None
    model = model.double().requires_grad_(False)
    constant = certify(model, torch.zeros(1, shape.dimension).double()).constant.value
    x = torch.rand(20_000, shape.dimension, generator=generator).double() * 2 - 1
    error = (model(x)[:, 0] - shape.distance(x)).abs()
    origins, directions = _rays(config, shape.dimension)
    trace = sphere_trace(
        model, origins, directions, constant=constant, reach=4.0, steps=config.trace_steps
    )
    figures = {
        "mean_error": error.mean().item(),
        "largest_error": error.max().item(),
        "constant": constant,
        "rays": len(origins),
        "hits": int(trace.hit.sum()),
        "overshoots": overshoots(model, origins, directions, trace),
    }
    text = (
        f"signed distance to a {config.shape}, {config.iterations} steps on "
        f"{config.batch_size} points",
        f"error on fresh points in the box    mean {figures['mean_error']:.4f}, largest "
        f"{figures['largest_error']:.4f}",
        f"Lipschitz constant                  {constant:.9f}  (l2, proved upper bound)",
        f"rays traced                         {figures['rays']}, {figures['hits']} hit, "
        f"{figures['overshoots']} passed the surface",
    )
    report = BeyondReport("sdf", dataclasses.asdict(config), figures, text, history)
    draw = _plane_picture if shape.dimension == 2 else _space_picture
    picture = draw(Path(out) / "distance.png", model, config, trace)
    return report.written(Path(out), model, picture)


@torch.no_grad()
def overshoots(
    f: nn.Module, origins: Tensor, directions: Tensor, trace: Trace, samples: int = 64
) -> int:
    """How many rays have a point with f < 0 among `samples` up to their end."""
    inside = torch.zeros(len(origins), dtype=torch.bool)
    for share in torch.linspace(0.0, 1.0, samples, dtype=torch.float64):
        points = origins + (share * trace.lengths)[:, None] * directions
        inside |= f(points)[:, 0] < 0
    return int(inside.sum())


def _points(config: SDFConfig, number: int, generator: torch.Generator) -> Tensor:
    """Half of the points uniform in a box around the shape, half of them near its surface."""
    shape = SHAPES[config.shape]
    many = torch.rand(4 * number, shape.dimension, generator=generator) * 2.4 - 1.2
    near = shape.distance(many).abs().argsort()[: number // 2]
    return torch.cat([many[near], many[: number - number // 2]])


def _rays(config: SDFConfig, dimension: int) -> tuple[Tensor, Tensor]:
    """Parallel rays in the plane, a pinhole camera in space."""
    if dimension == 2:
        height = torch.linspace(-0.95, 0.95, config.rays, dtype=torch.float64)
        origins = torch.stack((torch.full_like(height, -1.5), height), 1)
        return origins, torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand_as(origins)
    eye = torch.tensor([0.9, -1.7, 1.5], dtype=torch.float64)
    ahead = -eye / eye.norm()
    right = torch.linalg.cross(ahead, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    right = right / right.norm()
    plane = grid(-0.42, 0.42, config.rays).flatten(0, 1)
    rays = ahead + plane[:, :1] * right + plane[:, 1:] * torch.linalg.cross(right, ahead)
    return eye.expand_as(rays), rays / rays.norm(dim=1, keepdim=True)


def _levels(axes: Any, x: Tensor, y: Tensor, values: Tensor, title: str) -> None:
    levels = [round(-0.3 + 0.1 * i, 1) for i in range(14)]
    middle = require_package("matplotlib.colors", "matplotlib").TwoSlopeNorm(0.0, -0.5, 1.0)
    filled = axes.contourf(
        x, y, values, levels=levels, cmap="RdBu", norm=middle, extend="both", alpha=0.8
    )
    axes.contour(x, y, values, levels=[0.0], colors="black", linewidths=1.6)
    axes.figure.colorbar(filled, ax=axes, shrink=0.8)
    axes.set(aspect="equal", title=title)


def _plane_picture(path: Path, model: nn.Module, config: SDFConfig, trace: Trace) -> Path:
    figure = figure_of(10.0, 4.6)
    left, right = figure.subplots(1, 2)
    points = grid(-1.2, 1.2, 200)
    x, y = points.unbind(-1)
    values = model(points.flatten(0, 1)).reshape(200, 200)
    _levels(left, x, y, values, "network: level lines, its surface in black")
    truth = SHAPES[config.shape].distance(points.flatten(0, 1)).reshape(200, 200)
    right.contour(x, y, truth, levels=[0.0], colors=GRAY, linestyles="--")
    right.contour(x, y, values, levels=[0.0], colors="black")
    for end, hit in zip(trace.points[::3].tolist(), trace.hit[::3].tolist(), strict=True):
        right.plot([-1.5, end[0]], [end[1]] * 2, color=ORANGE if hit else "0.8", lw=0.8)
        if hit:
            right.plot(*end, ".", color=BLUE, ms=5)
    right.set(aspect="equal", xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), title="rays stop at the surface")
    return save_figure(figure, path, left, right)


def _space_picture(path: Path, model: nn.Module, config: SDFConfig, trace: Trace) -> Path:
    figure = figure_of(10.0, 4.6)
    left, right = figure.subplots(1, 2)
    side = math.isqrt(len(trace.hit))
    with torch.enable_grad():
        points = trace.points[trace.hit].requires_grad_()
        (normal,) = torch.autograd.grad(model(points).sum(), points)
    normal = normal / normal.norm(dim=1, keepdim=True).clamp_min(1e-12)
    light = torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64)
    shade = torch.ones(len(trace.hit), dtype=torch.float64)
    shade[trace.hit] = 0.15 + 0.75 * (normal @ (light / light.norm())).clamp_min(0.0)
    left.imshow(shade.reshape(side, side).numpy(), cmap="gray", vmin=0, vmax=1, origin="lower")
    left.set(xticks=[], yticks=[], title="the network, sphere-traced")
    left.spines[:].set_visible(False)
    plane = grid(-1.2, 1.2, 160)
    x, z = plane.unbind(-1)
    cut = torch.stack((x, torch.zeros_like(x), z), -1).flatten(0, 1)
    values = model(cut).reshape(160, 160)
    _levels(right, x, z, values, "cut through the axis")
    truth = SHAPES[config.shape].distance(cut).reshape(160, 160)
    right.contour(x, z, truth, levels=[0.0], colors=ORANGE, linestyles="--")
    return save_figure(figure, path, right)


register("sdf", Recipe(SDFConfig, SDFConfig, train_sdf))
