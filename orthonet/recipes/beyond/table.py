"""The recipes beyond classification by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from orthonet.recipes.beyond.distance import SDFConfig, train_sdf
from orthonet.recipes.beyond.flow import FlowConfig, train_flow
from orthonet.recipes.beyond.wasserstein import W1Config, train_w1

__all__ = ["BEYOND_RECIPES", "BeyondRecipe"]


class BeyondRecipe(NamedTuple):
    """A configuration, and the function that carries it out."""

    config: Callable[..., Any]
    run: Callable[..., Any]


BEYOND_RECIPES = {
    "flow": BeyondRecipe(FlowConfig, train_flow),
    "sdf": BeyondRecipe(SDFConfig, train_sdf),
    "w1": BeyondRecipe(W1Config, train_w1),
}
