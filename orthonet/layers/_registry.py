"""Lipschitz layers by name: a network is written once and its layer swapped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from orthonet import _checks
from orthonet.layers._linear import OrthoLinear, UnitNormLinear
from orthonet.layers.convolution.conv import OrthoConv2d
from orthonet.layers.zoo._fourier import (
    BROConv2d,
    BROLinear,
    CayleyConv2d,
    CayleyLinear,
    LOTConv2d,
)
from orthonet.layers.zoo._lipnext import LipNeXtBlock2d
from orthonet.layers.zoo._rescaled import (
    AOLConv2d,
    AOLLinear,
    CholeskyConv2d,
    CholeskyLinear,
    FrobeniusConv2d,
    FrobeniusLinear,
    LiResConv2d,
    LiResLinear,
    SpectralConv2d,
    SpectralLinear,
)
from orthonet.layers.zoo._residual import CPLConv2d, CPLLinear, SLLConv2d, SLLLinear
from orthonet.layers.zoo._sandwich import SandwichConv2d, SandwichLinear
from orthonet.layers.zoo._soc import SOCConv2d

__all__ = [
    "Method",
    "available",
    "make_conv",
    "make_linear",
    "method",
    "register_method",
    "table",
]


@dataclasses.dataclass(frozen=True)
class Method:
    """A Lipschitz layer of the literature.

    Attributes:
        name: Its name in the registry.
        title: Its usual name.
        linear: Class or function with the arguments of `nn.Linear`, or None.
        conv: Class or function with the arguments of `nn.Conv2d`, or None.
        promise: "orthogonal" (all singular values are 1), "1-Lipschitz" (at most 1), or "rows"
            (each output on its own is 1-Lipschitz).
        nonlinear: The layer contains its activation.
        stride: The convolution takes a stride.
        source: Paper and year.
        note: What else a user should know.
    """

    name: str
    title: str
    linear: Callable[..., nn.Module] | None
    conv: Callable[..., nn.Module] | None
    promise: str
    nonlinear: bool = False
    stride: bool = True
    source: str = ""
    note: str = ""


_METHODS: dict[str, Method] = {}


def register_method(entry: Method) -> Method:
    """Make a method known to [`make_linear`][orthonet.layers.make_linear] and `make_conv`.

    Args:
        entry: What to register, under its own name.

    Raises:
        ValueError: The name is taken, or there is neither a linear layer nor a convolution.
    """
    _checks.require(
        entry.name not in _METHODS,
        "register_method",
        "every method needs its own name",
        "Choose another one",
        name=entry.name,
    )
    _checks.require(
        entry.linear is not None or entry.conv is not None,
        "register_method",
        "a method must have a linear layer or a convolution",
        "Give one of them",
        name=entry.name,
    )
    _METHODS[entry.name] = entry
    return entry


def available(kind: str | None = None) -> list[str]:
    """Return the names of the methods, sorted.

    Args:
        kind: "linear" or "conv" for those that have such a layer; None for all.

    Raises:
        ValueError: `kind` is another.

    Examples:
        >>> "bro" in available("conv")
        True
    """
    _checks.one_of("available", (None, "linear", "conv"), kind=kind)
    return sorted(n for n, m in _METHODS.items() if kind is None or getattr(m, kind) is not None)


def method(name: str) -> Method:
    """Return the entry of a method.

    Raises:
        ValueError: The name is unknown.

    Examples:
        >>> method("aol").linear.__name__
        'AOLLinear'
    """
    _checks.one_of("method", available(), name=name)
    return _METHODS[name]


def make_linear(name: str, in_features: int, out_features: int, *args: Any, **kwargs: Any) -> Any:
    """Build a linear layer of the method `name`.

    Args:
        name: One of `available("linear")`.
        in_features: As of `nn.Linear`.
        out_features: As there.
        args: Further arguments of `nn.Linear`.
        kwargs: Further keywords of `nn.Linear` and of the method, e.g. `lipschitz`.

    Returns:
        The new layer, an `nn.Module`.

    Raises:
        ValueError: A name without a linear layer, or an argument that the layer refuses.

    Examples:
        >>> make_linear("aol", 8, 4)
        AOLLinear(in_features=8, out_features=4, bias=True)
    """
    _checks.one_of("make_linear", available("linear"), name=name)
    build: Any = _METHODS[name].linear
    return build(in_features, out_features, *args, **kwargs)


def make_conv(
    name: str, in_channels: int, out_channels: int, kernel_size: Any, *args: Any, **kwargs: Any
) -> Any:
    """Build a convolution of the method `name`.

    With `padding="same"` and `padding_mode="circular"` every method takes the same arguments;
    `"cholesky"` needs `kernel_size=1`, and [`Method.stride`][orthonet.layers.Method] tells which
    take a stride. `"lipnext"` has no kernel: its size and padding are read by none, `kernel_size`
    must be 3, the reach of its shifts.

    Args:
        name: One of `available("conv")`.
        in_channels: As of `nn.Conv2d`.
        out_channels: As there.
        kernel_size: As there.
        args: Further arguments of `nn.Conv2d`.
        kwargs: Further keywords of `nn.Conv2d` and of the method, e.g. `lipschitz`.

    Returns:
        The new layer.

    Raises:
        ValueError: A name without a convolution, or an argument that the layer refuses.

    Examples:
        >>> layer = make_conv("bro", 4, 8, 3, padding="same", padding_mode="circular")
        >>> type(layer).__name__
        'BROConv2d'
    """
    _checks.one_of("make_conv", available("conv"), name=name)
    build: Any = _METHODS[name].conv
    return build(in_channels, out_channels, kernel_size, *args, **kwargs)


def table() -> str:
    """Return the registry as a table in Markdown; the documentation is made from it."""
    rows = [
        "| name | method | linear | convolution | promise | stride | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in available():
        entry = _METHODS[name]
        linear, conv = (
            f"`{getattr(f, 'layer', f).__name__}`" if f is not None else "-"
            for f in (entry.linear, entry.conv)
        )
        stride = ("yes" if entry.stride else "no") if entry.conv is not None else "-"
        inside = ", activation inside" if entry.nonlinear else ""
        rows.append(
            f"| `{name}` | {entry.title} | {linear} | {conv} | {entry.promise}{inside} | {stride} "
            f"| {entry.source} |"
        )
    return "\n".join(rows) + "\n"


def _lipnext_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: Any = 3,
    stride: Any = 1,
    padding: Any = "same",
    dilation: Any = 1,
    groups: int = 1,
    bias: bool = True,
    padding_mode: str = "circular",
    device: Any = None,
    dtype: Any = None,
    **options: Any,
) -> LipNeXtBlock2d:
    """Return a LipNeXt block behind the arguments of `nn.Conv2d`."""
    good = (
        kernel_size in (3, (3, 3))
        and stride in (1, (1, 1))
        and padding in ("same", 1, (1, 1))
        and dilation in (1, (1, 1))
        and groups == 1
    )
    _checks.require(
        good,
        LipNeXtBlock2d,
        "the shifts reach one pixel: kernel_size must be 3, stride and dilation 1, padding 'same' "
        "and groups 1",
        "Use SpaceToDepth2d before the block instead of a stride",
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    return LipNeXtBlock2d(
        in_channels, out_channels, bias, device, dtype, padding_mode=padding_mode, **options
    )


_INSIDE = {"nonlinear": True}
_rko_conv: Any = partial(OrthoConv2d, method="rko")
_rko_conv.layer = OrthoConv2d
_lipnext_conv.layer = LipNeXtBlock2d

# The name, title, layers, promise and source of a method, and what it has beyond the defaults.
_TABLE: tuple[tuple[Any, ...], ...] = (
    (
        "ortho",
        "AOC, BCOP and RKO composed",
        OrthoLinear,
        OrthoConv2d,
        "orthogonal",
        "Li 2019, Boissin 2025",
    ),
    ("aol", "Almost-orthogonal", AOLLinear, AOLConv2d, "1-Lipschitz", "Prach & Lampert 2022"),
    ("soc", "Skew orthogonal", None, SOCConv2d, "orthogonal", "Singla & Feizi 2021"),
    ("cayley", "Cayley", CayleyLinear, CayleyConv2d, "orthogonal", "Trockman & Kolter 2021"),
    ("lot", "Layer-wise orthogonal training", OrthoLinear, LOTConv2d, "orthogonal", "Xu 2022"),
    ("bro", "Block reflector", BROLinear, BROConv2d, "orthogonal", "Lai 2025"),
    ("cpl", "Convex potential", CPLLinear, CPLConv2d, "1-Lipschitz", "Meunier 2022", _INSIDE),
    ("sll", "SDP-based", SLLLinear, SLLConv2d, "1-Lipschitz", "Araujo 2023", _INSIDE),
    (
        "sandwich",
        "Sandwich (LBDN)",
        SandwichLinear,
        SandwichConv2d,
        "1-Lipschitz",
        "Wang & Manchester 2023",
        _INSIDE,
    ),
    ("cholesky", "Cholesky (CHORD)", CholeskyLinear, CholeskyConv2d, "1-Lipschitz", "Hu 2024"),
    ("liresnet", "Linear residual", LiResLinear, LiResConv2d, "1-Lipschitz", "Hu 2023"),
    ("rko", "Reshaped kernel", None, _rko_conv, "1-Lipschitz", "Cisse 2017, Serrurier 2021"),
    (
        "spectral",
        "Spectral normalization",
        SpectralLinear,
        SpectralConv2d,
        "1-Lipschitz",
        "Miyato 2018, Delattre 2023",
    ),
    (
        "frobenius",
        "Frobenius normalization",
        FrobeniusLinear,
        FrobeniusConv2d,
        "1-Lipschitz",
        "Serrurier 2021",
    ),
    ("unit_norm", "Last-layer normalization", UnitNormLinear, None, "rows", "Singla 2022"),
    (
        "lipnext",
        "LipNeXt",
        None,
        _lipnext_conv,
        "orthogonal",
        "Hu 2026",
        {**_INSIDE, "stride": False},
    ),
)
for _name, _title, _linear, _conv, _promise, _source, *_more in _TABLE:
    _options: dict[str, Any] = {"source": _source, **(_more[0] if _more else {})}
    register_method(Method(_name, _title, _linear, _conv, _promise, **_options))
