"""The layers under test: ours, orthogonium's and torch's own, built alike."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from orthonet import caching, layers, reparametrizers

PRESETS = (
    "DEFAULT",
    "BJORCK_PASS_THROUGH",
    "DEFAULT_TEST",
    "EXP",
    "QR",
    "CHOLESKY",
    "CHOLESKY_STABLE",
)
TORCH_MAPS = ("householder", "cayley", "matrix_exp")
OURS, PEER, TORCH, GEOTORCH = "orthonet", "orthogonium", "torch", "geotorch"
GEOTORCH_MAPS = ("expm", "cayley")
PLAIN = {"library": TORCH, "preset": "plain"}  # the row of the `nn` twin
MATRICES_ONLY = {TORCH, GEOTORCH}  # libraries without orthogonal convolutions


def _peer(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"{PEER}.{module}")
    except ModuleNotFoundError:
        return None


@dataclass(frozen=True)
class Candidate:
    """A way to build an orthogonal layer: a library and the name of its preset or map."""

    library: str
    preset: str

    @property
    def name(self) -> str:
        return f"{self.library} {self.preset}"

    @property
    def row(self) -> dict[str, str]:
        return {"library": self.library, "preset": self.preset}

    @property
    def installed(self) -> bool:
        if self.library == GEOTORCH:
            return importlib.util.find_spec(GEOTORCH) is not None
        return self.library != PEER or _peer("layers") is not None

    def linear(
        self, in_features: int, out_features: int, dtype: torch.dtype = torch.float32
    ) -> nn.Module:
        """A linear layer, built in `dtype`: some peers cannot be converted later."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return self._linear(in_features, out_features)
        finally:
            torch.set_default_dtype(before)

    def _linear(self, in_features: int, out_features: int) -> nn.Module:
        if self.library == TORCH:
            layer = nn.Linear(in_features, out_features)
            if self.preset == PLAIN["preset"]:
                return layer
            return orthogonal(layer, "weight", orthogonal_map=self.preset)
        if self.library == GEOTORCH:
            layer, geotorch = (
                nn.Linear(in_features, out_features),
                importlib.import_module(GEOTORCH),
            )
            geotorch.orthogonal(layer, "weight", triv=self.preset)
            return layer
        if self.library == OURS:
            make, params = layers.OrthoLinear, reparametrizers
        else:
            make, params = _peer("layers").OrthoLinear, _peer("reparametrizers")
        params = getattr(params, f"{self.preset}_ORTHO_PARAMS")
        return make(in_features, out_features, ortho_params=params)

    def conv(self, channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Module:
        """A convolution with zero padding; torch has no orthogonal one."""
        if self.row == PLAIN:
            return nn.Conv2d(channels, out_channels, kernel_size, stride, kernel_size // 2)
        if self.library == OURS:
            make, params = layers.OrthoConv2d, reparametrizers
        else:
            make, params = _peer("layers.conv.AOC").AdaptiveOrthoConv2d, _peer("reparametrizers")
        return make(
            channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            padding_mode="zeros",
            ortho_params=getattr(params, f"{self.preset}_ORTHO_PARAMS"),
        )


def candidates(presets: tuple[str, ...] = PRESETS, *, conv: bool = False) -> Iterator[Candidate]:
    """Every preset of ours and the peer's, then torch's maps (matrices only)."""
    for preset in presets:
        yield Candidate(OURS, preset)
        yield Candidate(PEER, preset)
    if not conv:
        for orthogonal_map in TORCH_MAPS:
            yield Candidate(TORCH, orthogonal_map)


@torch.no_grad()
def write_raw(layer: nn.Module, fill: Callable[[Tensor], Tensor]) -> None:
    """Set every free parameter behind the weight of a layer to `fill` of what it was."""
    for name, raw in layer.named_parameters():
        if name == "bias":
            continue
        value = fill(raw)
        maps = (getattr(module, "orthogonal_map", None) for module in layer.modules())
        if "householder" in (getattr(name, "name", None) for name in maps):
            # The vectors lie below the diagonal (wide weights: above), on which are signs.
            value = torch.where(_vectors(raw), value, raw)
        raw.copy_(value)


def _vectors(raw: Tensor) -> Tensor:
    tall = raw.shape[0] >= raw.shape[1]
    ones = torch.ones_like(raw, dtype=torch.bool)
    return ones.tril(-1) if tall else ones.triu(1)


def gaussian(raw: Tensor) -> Tensor:
    """Independent N(0, 1) entries, the same in both precisions."""
    return torch.randn(raw.shape, dtype=torch.float64).to(raw)


def conditioned(raw: Tensor, kappa: float = 1e3) -> Tensor:
    """Random singular vectors, singular values spaced geometrically from 1 to 1 / kappa."""
    normal = torch.randn(raw.shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(normal, full_matrices=False)
    s = torch.logspace(0, -math.log10(kappa), s.shape[-1], dtype=s.dtype)
    return ((u * s) @ vh).to(raw)


def disturbed(raw: Tensor, relative: float = 0.3) -> Tensor:
    """Moved as training does, so that no iteration starts at its end."""
    return raw + relative * max(raw.shape[-2:]) ** -0.5 * torch.randn_like(raw)


def moving_step(
    raw: list[nn.Parameter],
    read: Callable[[], Tensor],
    direction: Tensor,
    lr: float,
    extra: Sequence[Tensor] = (),
) -> Callable[[], None]:
    """An optimizer moves the parameters to and fro; the output is read, a gradient pulled back.

    Weights are kept, as they are by default, because the steps of the optimizer are part of it.
    """
    gradients = torch.autograd.grad(read(), raw, direction)
    moves, optimizer = [g.sign() for g in gradients], torch.optim.SGD(raw, lr, foreach=True)

    def step() -> None:
        optimizer.param_groups[0]["lr"] *= -1.0
        for p, move in zip(raw, moves, strict=True):
            p.grad = move
        with caching(True):
            optimizer.step()
            torch.autograd.grad(read(), [*raw, *extra], direction)

    return step
