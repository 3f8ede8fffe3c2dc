"""Deferred calls, and the network of the tutorial of orthogonium."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from orthonet import layers, reparametrizers
from orthonet.compat.orthogonium.convolutions import AdaptiveOrthoConv2d
from orthonet.compat.orthogonium.layers import MaxMin, OrthoLinear, PrescaledAdditiveResidual

__all__ = [
    "ClassParam",
    "PatchBasedExapandedCNN",
]


def _identity(x: Any) -> Any:
    return x


def _shown(value: Any) -> Any:
    return value.get_config(flatten=True) if isinstance(value, ClassParam) else str(value)


class ClassParam(reparametrizers.ClassParam):
    """A class with arguments, to be called with further ones later.

    Arguments of the call replace the ones given here, positional ones by their place.

    Examples:
        >>> make = ClassParam(nn.Linear, 4, 3, bias=False)
        >>> make(8)
        Linear(in_features=8, out_features=3, bias=False)
        >>> str(make)
        'Linear(4,3,bias=False)'
    """

    def __new__(
        cls, fct: Callable[..., Any] | None = None, *args: Any, **kwargs: Any
    ) -> ClassParam:
        """Keep a function and its arguments; without a function calls return their argument."""
        return super().__new__(cls, _identity if fct is None else fct, *args, **kwargs)

    @property
    def fct(self) -> Callable[..., Any]:
        """The function."""
        return self.func

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        if self.func is _identity:
            return _identity
        return self.func(*args, *self.args[len(args) :], **{**self.keywords, **kwargs})

    def __str__(self) -> str:
        arguments = [*map(str, self.args), *(f"{k}={v}" for k, v in self.keywords.items())]
        return f"{self.func.__name__}({','.join(arguments)})"

    def get_config(self, flatten: bool = False) -> dict[str, Any]:
        """Return the names of the functions and the texts of their arguments.

        Args:
            flatten: Whether keys of nested ones are joined by "/" in one level.
        """
        args = {f"args_{i}": value for i, value in enumerate(self.args)}
        if not flatten:
            parts = {"args": args, "kwargs": dict(self.keywords)}
            shown = {part: {k: _shown(v) for k, v in d.items()} for part, d in parts.items()}
            return {"fct": self.func.__name__, **shown}
        config: dict[str, Any] = {"fct": self.func.__name__}
        for key, value in {**args, **self.keywords}.items():
            if isinstance(value, ClassParam):
                inner = value.get_config(flatten=True)
                config.update({f"{key}/{name}": text for name, text in inner.items()})
            else:
                config[key] = str(value)
        return config


_CONV = ClassParam(AdaptiveOrthoConv2d, bias=False, padding="same")


def PatchBasedExapandedCNN(  # noqa: N802 (the name of the peer)
    img_shape: tuple[int, int, int] = (3, 224, 224),
    dim: int = 128,
    depth: int = 12,
    kernel_size: int = 5,
    patch_size: int = 2,
    expand_factor: float = 2,
    groups: int | None = None,
    n_classes: int = 1000,
    skip: bool = False,
    conv: Callable[..., nn.Module] = _CONV,
    act: Callable[..., nn.Module] = MaxMin,
    pool: Callable[..., nn.Module] | None = None,
    lin: Callable[..., nn.Module] = OrthoLinear,
    norm: Callable[..., nn.Module] | None = None,
) -> nn.Sequential:
    """Build the network of orthogonium's tutorial: patches, inverted bottlenecks, a pool, a head.

    Args:
        img_shape: Channels, height and width of the images.
        dim: Channels between the blocks.
        depth: Number of blocks: a grouped and a pointwise convolution each.
        kernel_size: Taps of the grouped convolutions.
        patch_size: Side of the patches that the first convolution reads.
        expand_factor: Channels inside a block, relative to `dim`.
        groups: Groups of the grouped convolutions; two channels in each if None.
        n_classes: Number of classes.
        skip: Whether the blocks are residual branches.
        conv: Makes convolutions.
        act: Makes activations.
        pool: Makes the pool; the norm of every channel if None.
        lin: Makes the head.
        norm: Makes layers behind the activations.
    """
    wide = int(dim * expand_factor)
    parts = min(wide // 2, dim // 2) if groups is None else groups
    between: Callable[..., nn.Module] = nn.Identity if norm is None else norm
    join: Callable[..., nn.Module] = PrescaledAdditiveResidual if skip else nn.Sequential
    blocks = [
        join(
            nn.Sequential(
                conv(in_channels=dim, out_channels=wide, kernel_size=kernel_size, groups=parts),
                act(),
                between(),
                conv(in_channels=wide, out_channels=dim, kernel_size=1, groups=1),
            )
        )
        for _ in range(depth)
    ]
    patches = conv(
        in_channels=img_shape[0],
        out_channels=dim,
        kernel_size=patch_size,
        stride=patch_size,
        padding="valid",
    )
    make_pool = partial(layers.AdaptiveL2NormPool, 1) if pool is None else pool
    return nn.Sequential(patches, *blocks, make_pool(), nn.Flatten(), act(), lin(dim, n_classes))
