"""A training step of orthogonal convolutions over the plain layer, and building their kernels.

python -m benchmarks.convolutions [--quick] [--threads N] [--seconds S] [--out DIR]

Before every step the parameters move by +-lr times the sign of a gradient, as Adam would move them,
so that nothing is kept from the step before. The baseline of a layer is `nn.Conv2d` with zero
padding, and `nn.Conv2d`'s convolution behind our circular padding stands next to it; that of a
kernel is ours with the default preset. Peers are left out where they are not installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import _harness as harness
from benchmarks._candidates import OURS, PEER, Candidate, disturbed, moving_step, write_raw
from orthonet import reparametrizers
from orthonet.functional import circular_pad
from orthonet.layers import OrthoConv2d

PLAIN, OWN_PAD, TORCH_PAD = "plain zeros", "plain, our circular pad", "plain circular"
OUR_PRESETS = ("DEFAULT", "QR")
PEER_PRESETS = ("DEFAULT", "QR")


@dataclass(frozen=True)
class Settings:
    """What is measured: (in, out, kernel, stride, batch, size), and (channels, kernel)."""

    layers: tuple[tuple[int, ...], ...] = (
        (64, 64, 3, 1, 32, 16),
        (256, 256, 3, 1, 32, 16),
        (64, 128, 3, 2, 32, 16),
        (256, 256, 3, 1, 32, 4),
    )
    kernels: tuple[tuple[int, int], ...] = ((64, 3), (128, 3), (256, 3), (256, 5))
    seconds: float = 18.0  # per layer or kernel
    rounds: tuple[int, int] = (3, 25)
    lr: float = 3e-4


QUICK = Settings(
    layers=((4, 4, 3, 1, 2, 4), (4, 8, 3, 2, 2, 4)), kernels=((4, 3),), seconds=0.0, rounds=(3, 3)
)


def moving(
    module: nn.Module, output: Callable[[], Tensor], extra: list[Tensor], lr: float
) -> harness.Step:
    """Move the parameters, compute the output, pull a fixed gradient back to them and `extra`."""
    write_raw(module, disturbed)
    raw = [p for n, p in module.named_parameters() if p.requires_grad and n != "bias"]
    direction = torch.randn(output().shape)
    return moving_step(raw, output, direction, lr, extra)


def plain_steps(shape: tuple[int, ...], lr: float) -> dict[str, harness.Step]:
    """A step of the plain layer with each padding."""
    inner, out, k, s, batch, size = shape
    x = torch.randn(batch, inner, size, size, requires_grad=True)
    pads = (k // 2,) * 4
    plain = nn.Conv2d(inner, out, k, s, k // 2, bias=False)
    wrapped = nn.Conv2d(inner, out, k, s, k // 2, bias=False, padding_mode="circular")

    def own() -> Tensor:
        return F.conv2d(circular_pad(x, pads), plain.weight, None, s)

    return {
        PLAIN: moving(plain, lambda: plain(x), [x], lr),
        OWN_PAD: moving(plain, own, [x], lr),
        TORCH_PAD: moving(wrapped, lambda: wrapped(x), [x], lr),
    }


def layer_steps(shape: tuple[int, ...], lr: float) -> dict[str, harness.Step]:
    """A step of every candidate for one layer."""
    inner, out, k, s, batch, size = shape
    x = torch.randn(batch, inner, size, size, requires_grad=True)
    steps = plain_steps(shape, lr)
    for mode in ("zeros", "circular"):
        for preset in OUR_PRESETS:
            params = getattr(reparametrizers, f"{preset}_ORTHO_PARAMS")
            layer = OrthoConv2d(
                inner, out, k, s, k // 2, bias=False, padding_mode=mode, ortho_params=params
            )
            name = f"{OURS} {preset} {mode}"
            steps[name] = moving(layer, lambda layer=layer: layer(x), [x], lr)
            if layer.application(x) == "factors":  # what the choice gains
                kernel = OrthoConv2d(
                    inner,
                    out,
                    k,
                    s,
                    k // 2,
                    bias=False,
                    padding_mode=mode,
                    ortho_params=params,
                    apply_by="kernel",
                )
                steps[f"{name}, by kernel"] = moving(kernel, lambda c=kernel: c(x), [x], lr)
    for preset in PEER_PRESETS:
        candidate = Candidate(PEER, preset)
        if candidate.installed:
            peer = candidate.conv(inner, out, k, s)
            steps[f"{candidate.name} zeros"] = moving(peer, lambda peer=peer: peer(x), [x], lr)
    return steps


def kernel_steps(channels: int, k: int, lr: float) -> dict[str, tuple[harness.Step, Tensor]]:
    """A step of every candidate for one kernel, and a kernel to measure."""
    found = {}
    for preset in OUR_PRESETS:
        params = getattr(reparametrizers, f"{preset}_ORTHO_PARAMS")
        layer = OrthoConv2d(channels, channels, k, bias=False, ortho_params=params)
        step = moving(layer, lambda layer=layer: layer.weight, [], lr)
        found[f"{OURS} {preset}"] = (step, layer.weight.detach())
    for preset in PEER_PRESETS:
        candidate = Candidate(PEER, preset)
        if candidate.installed:
            peer = candidate.conv(channels, channels, k, 1)
            step = moving(peer, lambda peer=peer: peer.weight, [], lr)
            found[candidate.name] = (step, peer.weight.detach())
    return found


def symbol_error(kernel: Tensor) -> float:
    """Largest |sigma - 1| of a circular convolution over random frequencies."""
    torch.manual_seed(0)
    phases = torch.rand(4, kernel.ndim - 2, dtype=torch.float64) * 6.283185307179586
    taps = torch.cartesian_prod(*(torch.arange(n) for n in kernel.shape[2:])).double()
    waves = torch.exp(1j * (phases @ taps.reshape(-1, kernel.ndim - 2).T))
    symbol = torch.einsum("oit,ft->foi", kernel.double().flatten(2).to(waves.dtype), waves)
    return float((torch.linalg.svdvals(symbol) - 1).abs().max())


def run(settings: Settings) -> dict[str, Any]:
    """Everything, as one JSON-able result."""
    torch.manual_seed(0)
    layers, kernels = [], []
    for shape in settings.layers:
        steps = layer_steps(shape, settings.lr)
        timings = harness.interleaved(
            steps, PLAIN, seconds=settings.seconds, rounds=settings.rounds
        )
        inner, out, k, s, batch, size = shape
        title = f"{inner}->{out} k{k} s{s} B{batch} {size}x{size}"
        own = timings[OWN_PAD].ratio
        layers += [
            {
                "layer": title,
                "name": name,
                "ratio": t.ratio,
                "ratio_low": t.ratio_low,
                "ratio_high": t.ratio_high,
                "over_own_pad": t.ratio / own,
                "seconds": t.seconds,
                "peak_bytes": harness.peak_bytes(steps[name]),
            }
            for name, t in timings.items()
        ]
    for channels, k in settings.kernels:
        built = kernel_steps(channels, k, settings.lr)
        steps = {name: step for name, (step, _) in built.items()}
        base = f"{OURS} {OUR_PRESETS[0]}"
        timings = harness.interleaved(steps, base, seconds=settings.seconds, rounds=settings.rounds)
        kernels += [
            {
                "kernel": f"{channels} k{k}",
                "name": name,
                "ratio": t.ratio,
                "seconds": t.seconds,
                "residual": symbol_error(built[name][1]),
            }
            for name, t in timings.items()
        ]
    environment = harness.environment("cpu", [PEER])
    return {"lr": settings.lr, "layers": layers, "kernels": kernels, "environment": environment}


def summary(result: dict[str, Any]) -> str:
    """Step over the plain layer with zeros and with our circular pad, then kernels over ours."""
    parts = []
    for title in dict.fromkeys(row["layer"] for row in result["layers"]):
        rows = [row for row in result["layers"] if row["layer"] == title]
        parts.append(
            harness.table(
                [title, "over plain zeros", "over plain, our pad", "ms", "peak MB"],
                (
                    [
                        row["name"],
                        f"{row['ratio']:.2f}",
                        f"{row['over_own_pad']:.2f}",
                        f"{1e3 * row['seconds']:.1f}",
                        f"{row['peak_bytes'] / 2**20:.0f}",
                    ]
                    for row in rows
                ),
            )
        )
    for title in dict.fromkeys(row["kernel"] for row in result["kernels"]):
        rows = [row for row in result["kernels"] if row["kernel"] == title]
        parts.append(
            harness.table(
                [f"kernel {title}", f"over {OURS} {OUR_PRESETS[0]}", "ms", "max abs(sigma - 1)"],
                (
                    [
                        row["name"],
                        f"{row['ratio']:.2f}",
                        f"{1e3 * row['seconds']:.2f}",
                        f"{row['residual']:.0e}",
                    ]
                    for row in rows
                ),
            )
        )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, figures of no meaning")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=Settings.seconds, help="per row of tables")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="directory of the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = run(QUICK if arguments.quick else Settings(seconds=arguments.seconds))
    path = harness.write("convolutions", result, arguments.out)
    print(f"{summary(result)}\n\nwritten to {path}")


if __name__ == "__main__":
    main()
