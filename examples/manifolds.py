"""Four problems on manifolds, each drawn beside its closed form or reference.

python -m examples.manifolds [--out DIR]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import orthonet
from orthonet.manifolds import SO, Correlation, Grassmannian
from orthonet.recipes.running.figures import BLUE, GRAY, figure_of, save_figure

Curve = list[float]


def holder(value: Tensor) -> nn.Module:
    module = nn.Module()
    module.x = nn.Parameter(value)
    return module


def descend(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    error: Callable[[Tensor], Tensor],
    steps: int,
    lr: float,
    rebase: int = 0,
) -> Curve:
    """Adam steps; the error after each."""
    opt = torch.optim.Adam(module.parameters(), lr=lr)
    opt_rate = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    if rebase:
        orthonet.rebase_every(module, opt, rebase)
    curve = []
    for _ in range(steps):
        opt.zero_grad()
        loss(module.x).backward()
        opt.step()
        opt_rate.step()
        curve.append(float(error(module.x.detach())))
    return curve


def eigenvectors(steps: int = 300) -> Curve:
    """Largest eigenvectors by the Rayleigh quotient; distance of subspaces to those of `eigh`."""
    a = torch.diag(torch.arange(1.0, 11.0)).double() + 0.1
    exact = torch.linalg.eigh(a).eigenvectors[:, -3:]
    module = orthonet.grassmannian(holder(torch.randn(10, 3, dtype=a.dtype)), "x")
    distance = Grassmannian().distance
    return descend(
        module, lambda x: -(x.T @ a @ x).trace(), lambda x: distance(x, exact), steps, 0.1, 10
    )


def procrustes(steps: int = 300) -> Curve:
    """The rotation between two clouds; geodesic distance to the closed form of Kabsch."""
    points, truth = torch.randn(3, 50).double(), SO().sample((3, 3), dtype=torch.float64)
    seen = truth @ points + 0.1 * torch.randn(3, 50)
    exact = SO().project(seen @ points.T)
    module = orthonet.orthogonal(holder(torch.eye(3, dtype=points.dtype)), "x", det=1)
    return descend(
        module,
        lambda x: (x @ points - seen).square().mean(),
        lambda x: SO().distance(x, exact),
        steps,
        0.1,
    )


def nearest_correlation(given: Tensor, sweeps: int = 2000) -> Tensor:
    """Alternating projections with Dykstra's correction (Higham, IMA J. Numer. Anal. 22, 2002)."""
    y, correction = given.clone(), torch.zeros_like(given)
    for _ in range(sweeps):
        r = y - correction
        values, vectors = torch.linalg.eigh(r)
        x = (vectors * values.clamp_min(0)) @ vectors.T
        correction = x - r
        y = x - torch.diag(x.diagonal() - 1.0)
    return y


def correlation(steps: int = 600) -> Curve:
    """The nearest correlation matrix; Frobenius distance to that of alternating projections."""
    given = 2 * torch.eye(4) - torch.diag(torch.ones(3), 1) - torch.diag(torch.ones(3), -1)
    given = given.double()
    exact = nearest_correlation(given)
    module = orthonet.constraints.constrain(holder(torch.eye(4).double()), "x", Correlation())
    return descend(
        module, lambda x: (x - given).square().sum(), lambda x: torch.dist(x, exact), steps, 0.05
    )


def completion(steps: int = 1500) -> Curve:
    """A matrix of rank 2 from 60 % of its entries; relative error of the whole matrix."""
    truth = (torch.randn(20, 2) @ torch.randn(2, 15)).double()
    seen = torch.rand(20, 15) < 0.6
    module = orthonet.low_rank(holder(torch.where(seen, truth, 0.0)), "x", rank=2)
    return descend(
        module,
        lambda x: (x - truth)[seen].square().mean(),
        lambda x: torch.dist(x, truth) / truth.norm(),
        steps,
        0.05,
    )


EXAMPLES = {
    "eigenvectors": (eigenvectors, "Largest eigenvectors on Gr(10, 3)", "distance to eigh"),
    "procrustes": (procrustes, "Procrustes on SO(3)", "angle to the closed form"),
    "correlation": (correlation, "Nearest correlation matrix", "distance to Higham (2002)"),
    "completion": (completion, "Completion of a matrix of rank 2", "relative error, all entries"),
}


def draw(path: Path, curve: Curve, title: str, label: str) -> Path:
    figure = figure_of(6.0, 3.8)
    axes = figure.subplots()
    axes.semilogy(range(1, len(curve) + 1), [max(e, 1e-16) for e in curve], color=BLUE, lw=2)
    axes.axhline(curve[-1], color=GRAY, lw=1, ls=":")
    axes.set(xlabel="optimizer step", ylabel=label, title=f"{title}: {curve[-1]:.1e} at the end")
    return save_figure(figure, path, axes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/manifolds"), help="directory")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, (example, title, label) in EXAMPLES.items():
        torch.manual_seed(0)
        curve = example()
        print(
            f"{title}, {label}: {curve[-1]:.1e}, {draw(out / f'{name}.png', curve, title, label)}"
        )


if __name__ == "__main__":
    main()
