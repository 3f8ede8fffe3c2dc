"""The wording of every argument error.

One sentence says what is required and what was got, a second one says what to do::

    {Class}: {requirement}, got {name}={value}. {Advice}.

Nothing else in the library words an argument error, so that the messages stay alike.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

__all__ = [
    "boolean",
    "channels",
    "conv_arguments",
    "factory",
    "fail",
    "floating",
    "in_range",
    "integer",
    "kernel",
    "lipschitz_constant",
    "matrices",
    "message",
    "module",
    "non_negative_int",
    "numbers",
    "one_of",
    "optimizer",
    "positive_int",
    "real_input",
    "require",
    "sizes",
    "tensor",
    "weight_shape",
]


_LONGEST = 160  # characters of a value
_MOST = 6  # entries of a list


def _show(value: Any) -> str:
    """A value in one line that is not too long: of tensors and arrays shape and dtype."""
    if isinstance(value, nn.Module):
        return f"a module of class {type(value).__name__}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Tensor) or (hasattr(value, "shape") and hasattr(value, "dtype")):
        return f"{type(value).__name__}(shape={tuple(value.shape)}, dtype={value.dtype})"
    if type(value) in (list, tuple) and len(value) > 1:
        shown = ", ".join(map(_show, value[:_MOST])) + (", ..." if len(value) > _MOST else "")
        return f"[{shown}]" if type(value) is list else f"({shown})"
    if type(value) is dict:
        keys = ", ".join(map(repr, list(value)[:_MOST])) + (", ..." if len(value) > _MOST else "")
        return f"a dict of {len(value)} entries ({keys})"
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def message(owner: object, requirement: str, advice: str, /, **values: Any) -> str:
    """The sentence of an argument error; `owner` is a name, a class or an instance."""
    if not isinstance(owner, str):
        owner = owner.__name__ if isinstance(owner, type) else type(owner).__name__
    got = ", ".join(f"{name}={_show(value)}" for name, value in values.items())
    got = f", got {got}" if got else ""
    return f"{owner}: {requirement}{got}. {advice.rstrip('.')}."


def fail(
    owner: object,
    requirement: str,
    advice: str,
    error: type[Exception] = ValueError,
    /,
    **values: Any,
) -> NoReturn:
    """Raise `error` with the library's wording."""
    raise error(message(owner, requirement, advice, **values)) from None


def require(
    condition: bool,
    owner: object,
    requirement: str,
    advice: str,
    error: type[Exception] = ValueError,
    /,
    **values: Any,
) -> None:
    """Raise `error` with the library's wording unless `condition` holds."""
    if not condition:
        fail(owner, requirement, advice, error, **values)


def tensor(owner: object, /, **values: Any) -> None:
    """Every value must be a tensor: not an array, a list or a number."""
    for name, value in values.items():
        require(
            isinstance(value, Tensor) or type(value).__module__ == _TRACED,
            owner,
            f"{name} must be a tensor",
            f"Convert it, e.g. torch.as_tensor({name})",
            **{name: value},
        )


def module(owner: object, /, **values: Any) -> None:
    """Every value must be a module: not its class, its `state_dict` or a function."""
    for name, value in values.items():
        require(
            isinstance(value, nn.Module),
            owner,
            f"{name} must be a torch.nn.Module",
            "Pass the module itself: not its state_dict, its class, or an exported program",
            **{name: value},
        )


def optimizer(owner: object, /, **values: Any) -> None:
    """Every value must be an optimizer of PyTorch."""
    for name, value in values.items():
        require(
            isinstance(value, torch.optim.Optimizer),
            owner,
            f"{name} must be an optimizer of PyTorch",
            "Pass the optimizer itself, e.g. torch.optim.AdamW(model.parameters())",
            TypeError,
            **{name: value},
        )


def real_input(owner: object, x: Any, /, name: str = "x") -> None:
    """What a layer is called with must be a real floating-point tensor, or stand for one."""
    good = x.is_floating_point() if isinstance(x, Tensor) else type(x).__module__ == _TRACED
    if not good:
        floating(owner, **{name: x})


_TRACED = "torch.fx.proxy"  # where torch.fx records a forward pass


def channels(owner: object, input: Any, count: int, dim: int, /, spatial: int = 0) -> None:
    """The input of a layer must be a real tensor with `count` channels in `dim`, from behind."""
    real_input(owner, input, "input")
    if not isinstance(input, Tensor):
        return
    good = input.ndim >= -dim and input.shape[dim] == count
    if not good or (spatial and input.ndim > spatial + 2):
        form = "".join(f", L{i + 1}" for i in range(spatial))
        wanted = f"(N, {count}{form}) or ({count}{form})" if spatial else f"(*, {count})"
        fail(
            owner,
            f"input must have the shape {wanted}",
            "Pass what the layer was made for, or make it for these channels",
            input=input,
        )


def integer(owner: object, /, **values: Any) -> None:
    """Every value must be an integer."""
    for name, value in values.items():
        good = isinstance(value, int) and not isinstance(value, bool)
        require(
            good, owner, f"{name} must be an integer", f"Pass one, e.g. {name}=-1", **{name: value}
        )


def numbers(owner: object, name: str, value: Any, /) -> tuple[float, ...]:
    """Return a real number, or a list, an array or a tensor of them, as a tuple of floats."""
    try:
        found = torch.as_tensor(value, device="cpu")
    except (RuntimeError, TypeError, ValueError):
        found = None
    if found is None or found.is_complex():
        requirement = f"{name} must be a real number, or a list of them"
        fail(owner, requirement, f"Pass e.g. {name}=0.5", **{name: value})
    return tuple(found.double().reshape(-1).tolist())


def positive_int(owner: object, /, **values: Any) -> None:
    """Every value must be an integer >= 1."""
    for name, value in values.items():
        _bounded_int(owner, name, value, 1)


def non_negative_int(owner: object, /, **values: Any) -> None:
    """Every value must be an integer >= 0."""
    for name, value in values.items():
        _bounded_int(owner, name, value, 0)


def _bounded_int(owner: object, name: str, value: Any, low: int) -> None:
    """One integer >= low that PyTorch can hold."""
    number = isinstance(value, int) and not isinstance(value, bool)
    beyond = number and value >= 2**63
    require(
        number and value >= low and not beyond,
        owner,
        f"{name} must be an integer >= {low}" + (" and below 2**63" if beyond else ""),
        f"Pass {name} >= {low}" if not beyond else "Pass a smaller one",
        **{name: value},
    )


def boolean(owner: object, /, **values: Any) -> None:
    """Every value must be True or False (or 1 or 0), not merely something that has a truth."""
    for name, value in values.items():
        preset = ", and a preset by its keyword, ortho_params=preset" if name == "bias" else ""
        require(
            isinstance(value, int) and value in (0, 1),
            owner,
            f"{name} must be True or False",
            f"Pass {name}=True or {name}=False{preset}",
            **{name: value},
        )


def sizes(owner: object, count: int, low: int, /, **values: Any) -> None:
    """Every value must be an integer >= `low`, or `count` of them."""
    for name, value in values.items():
        entries = value if isinstance(value, (tuple, list)) else (value,) * count
        good = len(entries) == count and all(
            isinstance(n, int) and not isinstance(n, bool) and n >= low for n in entries
        )
        require(
            good,
            owner,
            f"{name} must be an integer >= {low}" + (f", or {count} of them" if count > 1 else ""),
            f"Pass {name}={max(1, low)}, or one entry for each spatial dimension",
            **{name: value},
        )


def conv_arguments(owner: object, count: int, /, **values: Any) -> None:
    """What makes the geometry of a convolution with `count` spatial dimensions."""
    for name, value in values.items():
        if name == "padding" and isinstance(value, str):
            require(
                "output_padding" not in values,
                owner,
                "padding of a transposed convolution must be an integer, or one for each "
                "spatial dimension",
                "Pass the number, e.g. padding=kernel_size // 2, or choose padding=0",
                padding=value,
            )
            one_of(owner, ("same", "valid"), padding=value)
            stride = values.get("stride", 1)
            require(
                value != "same" or stride in (1, (1,) * count),
                owner,
                "padding='same' must go with stride=1",
                "Pass the padding as a number, e.g. kernel_size // 2",
                padding=value,
                stride=stride,
            )
        else:
            sizes(owner, count, 0 if "padding" in name else 1, **{name: value})


_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def factory(owner: object, device: Any, dtype: Any) -> None:
    """The `device` and the `dtype` of new parameters, as `torch.empty` takes them, and real."""
    require(
        dtype is None or dtype in _REAL,
        owner,
        "dtype must be a real floating-point dtype",
        "Choose torch.float32, float64, float16 or bfloat16; orthonet.unitary(module, name) "
        "constrains complex tensors",
        dtype=dtype,
    )
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError):
        fail(
            owner,
            "device must name a device of PyTorch",
            "Pass a torch.device, or a string such as 'cpu' or 'cuda:0'",
            device=device,
        )


def in_range(owner: object, low: float, high: float, /, **values: Any) -> None:
    """Every value must be a number in the closed interval [low, high]."""
    for name, value in values.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        good = number and not math.isnan(value) and low <= value <= high
        requirement = f"{name} must be a number in [{_number(low)}, {_number(high)}]"
        require(good, owner, requirement, f"Choose {name} inside that interval", **{name: value})


def _number(value: float) -> str:
    """A number in six digits, or in full where six digits would be another number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def lipschitz_constant(owner: object, lipschitz: Any) -> float:
    """Return the constant K of a layer as a float, positive and far from the ends of float32."""
    in_range(owner, 1e-30, 1e30, lipschitz=lipschitz)
    return float(lipschitz)


def one_of(owner: object, choices: Collection[Any], /, **values: Any) -> None:
    """Every value must be among `choices`."""
    for name, value in values.items():
        listed = ", ".join(repr(choice) for choice in choices)
        require(
            _is_among(value, choices),
            owner,
            f"{name} must be one of {listed}",
            "Choose one of them",
            **{name: value},
        )


def _is_among(value: Any, choices: Collection[Any]) -> bool:
    try:
        return value in choices
    except (RuntimeError, TypeError, ValueError):  # no hash, or a comparison entry by entry
        return False


def floating(owner: object, /, **tensors: Tensor) -> None:
    """Every value must be a tensor, real and floating point."""
    tensor(owner, **tensors)
    for name, value in tensors.items():
        require(
            value.is_floating_point(),
            owner,
            f"{name} must be a real floating-point tensor",
            f"Convert it, e.g. {name}.to(torch.float32)",
            **{name: value},
        )


def matrices(owner: object, /, *, lifted: bool = True, filled: bool = False, **values: Any) -> None:
    """Every value must be a real or complex matrix, or a batch (*batch, m, n) of them.

    Unless it is `lifted` to single precision by whoever asks, half precision is refused: LAPACK has
    none. A `filled` one has entries.
    """
    tensor(owner, **values)
    for name, value in values.items():
        if not isinstance(value, Tensor):
            continue
        good = value.is_floating_point() or value.is_complex()
        require(
            good and (lifted or value.dtype.itemsize >= 4),
            owner,
            f"{name} must be a floating-point tensor"
            + ("" if lifted else " in single or double precision"),
            f"Convert it, e.g. {name}.float()",
            **{name: value},
        )
        require(
            value.ndim >= 2 and (value.numel() > 0 or not filled),
            owner,
            f"{name} must be a matrix or a batch of matrices (*batch, m, n)"
            + (" with entries" if filled else ""),
            "Reshape it, e.g. kernel.flatten(1) or vector[None]",
            **{name: value},
        )


def kernel(owner: object, kernel: Any, groups: Any, /) -> None:
    """A real matrix or kernel (out, in / groups, *taps) with at most three dimensions of taps."""
    floating(owner, kernel=kernel)
    positive_int(owner, groups=groups)
    require(
        2 <= kernel.ndim <= 5 and kernel.numel() > 0 and kernel.shape[0] % groups == 0,
        owner,
        "kernel must be (out, in / groups, *taps) with entries, up to three dimensions of taps, "
        "and groups must divide out",
        "Pass the weight of a linear or convolutional layer, and its groups",
        kernel=kernel,
        groups=groups,
    )


def weight_shape(owner: object, shape: Any, name: str = "weight_shape") -> tuple[int, ...]:
    """Return `shape` as a tuple (*batch, m, n) of non-negative integers."""
    try:
        sizes = tuple(int(size) for size in torch.Size(shape))
    except TypeError:
        sizes = ()
    require(
        len(sizes) >= 2 and min(sizes, default=-1) >= 0,
        owner,
        f"{name} must be (*batch, m, n)",
        "Give at least the two dimensions of the matrix, e.g. tuple(weight.shape)",
        **{name: shape},
    )
    return sizes
