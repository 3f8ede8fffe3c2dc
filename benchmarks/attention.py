"""Attention: proved constants over the steepest Jacobian that is found.

    python -m benchmarks.attention

One head in float64 between projections that are the identity, but for the sign of the keys of
clipped attention, so that the constant is C(N). Adam climbs the norm of the Jacobian from random
tokens of two scales, one token between two distant groups, a star, and a token that all see.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import _harness as harness
from orthonet import layers

LENGTHS = (8, 32, 128)
KINDS = ("distance", "cosine")
TEMPERATURE = 2.0


def published(length: int) -> float:
    """Theorem 3.2 of Kim et al. for one head of norm 1: sqrt(N) (4 W((N - 1) / e) + 1)."""
    low, high = 0.0, float(length)
    for _ in range(200):
        middle = (low + high) / 2.0
        less = middle * math.exp(middle) < (length - 1) / math.e
        low, high = (middle, high) if less else (low, middle)
    return math.sqrt(length) * (4.0 * high + 1.0)


def core(
    name: str, length: int, width: int, causal: bool, sign: float = 1.0
) -> tuple[Callable[..., Tensor], float]:
    """One head of a layer without its projections but the sign of keys, and its constant."""
    options: dict[str, Any] = {"max_length": length, "causal": causal, "dtype": torch.float64}
    if name == "distance":
        layer: Any = layers.DistanceAttention(width, 1, bias=False, **options)
    else:
        layer = layers.CosineAttention(width, 1, bias=False, temperature=TEMPERATURE, **options)
        torch.nn.init.constant_(layer.logit, 50.0)  # at the limit of the scores
    for part, projection in layer.named_children():
        projection.weight = (sign if part == "k_proj" else 1.0) * torch.eye(
            width, dtype=torch.float64
        )
    bound = layer.constant(length)
    plain, factor = layer.to_plain().requires_grad_(False), layer.lipschitz / bound
    return lambda z: plain(z) / factor, bound


def starts(length: int, width: int) -> dict[str, Tensor]:
    """Tokens from which the search begins, and at which a constant is tried."""
    draw = torch.randn(length, width, dtype=torch.float64)
    r = math.sqrt(math.log(length) + 1.0)
    found = {f"{scale:g}": scale * draw for scale in (0.3, 1.0)}
    found["sides"] = 1e-2 * draw
    found["sides"][:-1, 0] += r * (-1.0) ** torch.arange(length - 1)  # the last sees all others
    found["star"] = 1e-2 * draw + 0.9 * r * torch.eye(length, width, dtype=torch.float64)
    found["sink"] = 1e-2 * draw
    found["sink"][:, 0] += 1.0
    found["sink"][0, 0] -= 2.0  # seen by all others where keys have the other sign
    return found


def steepest(
    f: Callable[[Tensor], Tensor],
    z: Tensor,  # (starts, length, width)
    steps: int,
    rate: float = 0.05,
) -> Tensor:
    """The largest Jacobian norm on the way of Adam up the norm from each start, (starts,).

    A norm is |J u| for the unit vector u that power iteration has found: never above the true one.
    """
    z = z.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], rate)
    u, best = _unit(torch.randn_like(z)), torch.zeros(len(z), dtype=z.dtype)
    for step in range(steps):
        y = f(z)
        w = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, z, w, create_graph=True)  # J^T w, linear in w
        for _ in range(4 if step else 20):
            (pushed,) = torch.autograd.grad(pulled, w, u, retain_graph=True)
            u = _unit(torch.autograd.grad(y, z, pushed, retain_graph=True)[0])
        (pushed,) = torch.autograd.grad(pulled, w, u, retain_graph=True)
        best = torch.maximum(best, _lengths(pushed))
        (pulled,) = torch.autograd.grad(y, z, _unit(pushed), create_graph=True)
        (z.grad,) = torch.autograd.grad(-(pulled * u).sum(), z)
        optimizer.step()
    return best


def _lengths(z: Tensor) -> Tensor:
    return z.flatten(1).norm(dim=1)


def _unit(z: Tensor) -> Tensor:
    return z / _lengths(z).clamp_min(1e-300)[:, None, None]


def measure(
    lengths: tuple[int, ...] = LENGTHS, steps: int = 200, widths: tuple[int, ...] = (1, 4)
) -> list[dict[str, Any]]:
    """One row for each layer, mask and length."""
    rows = []
    for name in KINDS:
        for causal in (False, True):
            for length in lengths:
                torch.manual_seed(0)
                start, found = time.process_time(), {}
                bound = 0.0
                for width, sign in itertools.product(widths, (1.0, -1.0)[: 1 + (name == "cosine")]):
                    f, bound = core(name, length, width, causal, sign)
                    begun = starts(length, width)
                    norms = steepest(f, torch.stack(list(begun.values())), steps).tolist()
                    for place, norm in zip(begun, norms, strict=True):
                        found[place, width, sign] = norm
                best = max(found, key=lambda key: found[key])
                rows.append(
                    {
                        "layer": name,
                        "causal": causal,
                        "length": length,
                        "bound": bound,
                        "published": published(length) if name == "distance" else None,
                        "steepest": found[best],
                        "start": f"{best[0]}, width {best[1]}, keys times {best[2]:g}",
                        "ratio": bound / found[best],
                        "seconds": time.process_time() - start,
                    }
                )
                print(summary({"rows": rows[-1:]}).splitlines()[-1], flush=True)
    return rows


def summary(result: Mapping[str, Any]) -> str:
    """The rows as a table."""
    lines = []
    for row in result["rows"]:
        shown = "-" if row["published"] is None else f"{row['published']:.1f}"
        lines.append(
            [
                row["layer"] + (", causal" if row["causal"] else ""),
                str(row["length"]),
                f"{row['bound']:.2f}",
                shown,
                f"{row['steepest']:.2f}",
                f"{row['ratio']:.2f}",
            ]
        )
    head = ["attention", "tokens", "C(N), proved", "Kim et al.", "steepest found", "ratio"]
    return harness.table(head, lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = measure(tuple(chosen.lengths), chosen.steps)
    result = {"environment": harness.environment(), "steps": chosen.steps, "rows": rows}
    print(harness.write("attention", result, chosen.out))


if __name__ == "__main__":
    main()
