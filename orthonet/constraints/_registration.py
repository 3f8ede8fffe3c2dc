"""Putting a constraint on a tensor of a module, moving its base, taking it off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from orthonet import _checks, reparametrizers
from orthonet.constraints._list import ConstrainedList
from orthonet.errors import NotOnManifoldError
from orthonet.manifolds import Manifold, Parametrization
from orthonet.manifolds.maps import ProjectedParametrization
from orthonet.reparametrizers import Weight

__all__ = ["Init", "M", "assign", "constrain", "entry_of", "parametrizations_of", "register"]

M = TypeVar("M", bound=nn.Module)
Init = Literal["keep", "project", "sample"] | str | Tensor | None


def constrain(
    module: M,
    tensor_name: str,
    space: Manifold | Parametrization,
    *,
    init: Init = None,
    flatten: bool = False,
    **options: Any,
) -> M:
    """Constrain `module.<tensor_name>` to a space, and return the module.

    The verbs (`orthogonal`, `low_rank`, ...) are this function with a space of their own, and share
    its arguments.

    Args:
        module: Any module.
        tensor_name: Name of a parameter or buffer of it, constrained already or not. On a
            tensor that has a constraint the new one is applied to its result: by projection, so
            that the last constraint holds, and the earlier ones as far as the projection keeps
            them. Where the projection leaves an earlier space, the coordinates stay, and the
            value is the projection of the present one.
        space: The space, or a parametrization that was built for the shape of the tensor.
        init: What becomes of the present value. None keeps it where it lies on the space and
            projects it otherwise; "keep" raises otherwise; "project" projects; "sample" draws a
            random point; the name of a distribution draws from that; a tensor is assigned.
        flatten: Treat a tensor of more than two dimensions, such as a convolution kernel, as the
            one matrix `tensor.flatten(1)`, instead of a batch of matrices in its last two
            dimensions.
        **options: Options of `space.parametrization`. Two are common.
            `triv`, of spaces with orthonormal frames: "exponential" (or "expm", "matrix_exp"),
            "cayley", or a map from skew-symmetric matrices to orthogonal ones.
            `f`, of spaces with positive numbers: "softplus", "exp", "absolute"; of spaces with
            numbers in an interval: "fold" (a triangle wave, whose slope is nowhere 0), "sin",
            "tanh",
            "scaled_sigmoid", all into [-1, 1]; or a function, or a pair of a function and its
            inverse.

    Raises:
        ValueError: The module has no tensor of this name, or the space has no points of its shape
            and dtype.
        NotOnManifoldError: The present value is off the space and `init` is "keep", or what
            `init` asks for is off it, or off the space of an earlier constraint. After an error the
            module is as it was.

    Examples:
        >>> from orthonet.constraints import constrain
        >>> from orthonet.manifolds import SO
        >>> layer = constrain(nn.Linear(8, 8), "weight", SO(), triv="cayley")
        >>> bool(SO().contains(layer.weight))
        True
    """
    _checks.module("constrain", module=module)
    _checks.require(
        isinstance(space, (Manifold, Parametrization)),
        "constrain",
        "space must be a space of orthonet.manifolds, an object",
        "Pass one, e.g. orthonet.manifolds.SO()",
        space=space,
    )
    _checks.boolean("constrain", flatten=flatten)
    _checks.require(
        init is None or isinstance(init, (str, Tensor)),
        "constrain",
        "init must be None, a tensor, or the name of a distribution",
        "Pass e.g. init='sample', or a point of the space",
        init=init,
    )
    tensor = getattr(module, tensor_name, None) if isinstance(tensor_name, str) else None
    _checks.require(
        tensor is None
        or not isinstance(getattr(module, "parametrization", None), Weight)
        or tensor_name in module._parameters,
        "constrain",
        f"the tensor of that name is constrained by {type(module).__name__} already",
        "Constrain the tensor of the stock layer instead, e.g. of torch.nn.Linear",
        tensor_name=tensor_name,
    )
    if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
        _checks.fail(
            "constrain",
            f"{type(module).__name__} must have a floating-point tensor of that name",
            "Pass the name of a parameter or buffer, such as 'weight'",
            tensor_name=tensor_name,
        )
    kind = space.space if isinstance(space, Parametrization) else space
    _checks.require(
        not tensor.is_complex() or kind.has_complex,
        "constrain",
        "a complex tensor must go into a space that has complex points",
        "Use orthonet.unitary or orthonet.symmetric (Hermitian), or constrain real and imaginary "
        "part as one real tensor",
        space=space,
        dtype=tensor.dtype,
    )
    chained = parametrize.is_parametrized(module, tensor_name)
    parametrization = _build(space, tensor, flatten, chained, options)
    value = _initial(parametrization, tensor.detach(), init)
    if chained:
        _chain(module, tensor_name, parametrization, value, init)
        return module
    before = tensor.detach().clone()
    with torch.no_grad():
        tensor.copy_(value)
    try:
        register(module, tensor_name, parametrization)
    except (RuntimeError, ValueError):
        with torch.no_grad():
            tensor.copy_(before)
        raise
    return module


def _chain(
    module: nn.Module, tensor_name: str, parametrization: Parametrization, value: Tensor, init: Init
) -> None:
    """Apply one more parametrization to a constrained tensor, and assign `value`, or do nothing."""
    if not value.is_meta:
        parametrization.nearest(value, project=False)  # what a space cannot project is refused here
    register(module, tensor_name, parametrization)
    try:
        setattr(module, tensor_name, value)
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, NotOnManifoldError) and init in (None, "keep", "project"):
            return  # off an earlier space; the projection of the present value is in place already
        del entry_of(module, tensor_name)[-1]
        raise


def register(module: M, tensor_name: str, parametrization: nn.Module) -> M:
    """Register a parametrization by `orthonet.reparametrizers.register`, with our list."""
    reparametrizers.register(module, tensor_name, parametrization)
    entry = entry_of(module, tensor_name)
    if not isinstance(entry, ConstrainedList):
        entry.__class__ = ConstrainedList
        entry.remember()
    return module


def assign(module: nn.Module, tensor_name: str, value: Tensor, *, project: bool = False) -> None:
    """Set a constrained tensor; `module.<tensor_name> = value` does the same without options.

    Args:
        module: The module.
        tensor_name: Name of the constrained tensor.
        value: The value, of the shape of the tensor.
        project: Take the nearest point where `value` is off the space, instead of raising.

    Raises:
        ValueError: The tensor is not constrained, or has another shape.
        NotOnManifoldError: `value` is off the space and `project` is false; nothing has changed.

    Examples:
        >>> import orthonet
        >>> layer = orthonet.orthogonal(nn.Linear(2, 2))
        >>> orthonet.constraints.assign(layer, "weight", 2 * torch.eye(2), project=True)
        >>> layer.weight.allclose(torch.eye(2))
        True
    """
    _require_constrained(module, tensor_name)
    last = list(parametrizations_of(module, tensor_name))[-1]
    if project and isinstance(last, Parametrization):
        value = last.nearest(value)
    setattr(module, tensor_name, value)


def entry_of(module: nn.Module, tensor_name: str) -> Any:
    """Return the list of the parametrizations of a constrained tensor."""
    lists: Any = module.parametrizations
    return lists[tensor_name]


def parametrizations_of(module: nn.Module, tensor_name: str) -> Iterator[nn.Module]:
    """Return the parametrizations of a constrained tensor, in the order of their application."""
    yield from entry_of(module, tensor_name).children()


def _require_constrained(module: nn.Module, tensor_name: str) -> None:
    _checks.require(
        parametrize.is_parametrized(module, tensor_name),
        "constraints",
        f"{type(module).__name__} must have a constrained tensor of that name",
        "Constrain it first, e.g. orthonet.orthogonal(module, tensor_name)",
        tensor_name=tensor_name,
    )


def _build(
    space: Manifold | Parametrization,
    tensor: Tensor,
    flatten: bool,
    chained: bool,
    options: dict[str, Any],
) -> Parametrization:
    shape = tuple(tensor.shape)
    if isinstance(space, Parametrization) and not chained:
        _checks.require(
            space.value_shape == shape and not options and not flatten,
            "constrain",
            f"a parametrization must have the shape of the tensor, {shape}, and brings its options",
            "Pass the space, such as SO(), with the options",
            shape=space.value_shape,
        )
        return space.to(tensor.device, tensor.dtype)
    space = cast("Manifold", space.space if isinstance(space, Parametrization) else space)
    matrix = (shape[0], tensor[0].numel()) if flatten and len(shape) > 2 else shape
    if chained:
        parametrization: Parametrization = ProjectedParametrization(space, matrix)
    else:
        parametrization = space.parametrization(matrix, **options)
    if matrix != shape:
        parametrization = parametrization.viewed_as(shape)
    if tensor.is_complex():  # `Module.to` warns of complex dtypes
        parametrization._apply(lambda t: t.to(tensor.device, t.dtype.to_complex()))
        return parametrization
    return parametrization.to(tensor.device, tensor.dtype)


def _initial(parametrization: Parametrization, tensor: Tensor, init: Init) -> Tensor:
    if tensor.is_meta:
        return tensor
    if isinstance(init, Tensor):
        return parametrization.nearest(init, project=False)
    if init in (None, "keep", "project"):
        return parametrization.nearest(tensor, project=init != "keep")
    options = {} if init == "sample" else {"distribution": init}
    return parametrization.sample(dtype=tensor.dtype, device=tensor.device, **options)
