"""Loads every family, so that its records are known."""

from orthonet.certify.ops import (
    activations,
    arithmetic,
    contraction,
    convolution,
    modules,
    normalization,
    pooling,
    recurrent,
    reductions,
    selection,
    shapes,
    sorting,
)

__all__ = [
    "activations",
    "arithmetic",
    "contraction",
    "convolution",
    "modules",
    "normalization",
    "pooling",
    "recurrent",
    "reductions",
    "selection",
    "shapes",
    "sorting",
]
