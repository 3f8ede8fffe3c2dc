"""Laws that every layer obeys, whatever it computes.

Each law takes a factory (a callable without arguments that makes a new layer on the default
device, e.g. `functools.partial(OrthoLinear, 8, 4)`) and the shape of one sample, and raises
AssertionError with a sentence when the layer breaks it. `LAYER_LAWS` lists them for
`pytest.mark.parametrize`.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.testing._operator import check_map, factory_kwargs, preserved
from orthonet.testing.tolerances import OUTPUT

__all__ = [
    "LAYER_LAWS",
    "assert_autocast_is_safe",
    "assert_compiles",
    "assert_deepcopy_is_independent",
    "assert_dtype_is_followed",
    "assert_eval_follows_training",
    "assert_eval_is_pure",
    "assert_gradients_are_finite",
    "assert_materializes_from_meta",
    "assert_pickle_round_trip",
    "assert_state_dict_round_trip",
]

Factory = Callable[[], nn.Module]


def _new(factory: Factory) -> nn.Module:
    _checks.require(
        callable(factory) and not isinstance(factory, nn.Module),
        "LAYER_LAWS",
        "factory must be a function without arguments that makes a layer",
        "Pass e.g. functools.partial(OrthoLinear, 8, 4)",
        factory=factory,
    )
    return factory()


def _input(layer: nn.Module, input_shape: Sequence[int], seed: int = 0) -> Tensor:
    check_map("LAYER_LAWS", layer, input_shape)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, *input_shape, generator=generator).to(**factory_kwargs(layer))


def _check(condition: bool, sentence: str) -> None:
    if not condition:
        raise AssertionError(sentence)


def _evaluate(layer: nn.Module, x: Tensor) -> Tensor:
    with preserved(layer), torch.no_grad():
        return layer(x)


def _relative(y: Tensor, reference: Tensor) -> float:
    difference = (y.double() - reference.double()).norm()
    return (difference / reference.double().norm().clamp(min=1e-30)).item()


def _train_step(layer: nn.Module, x: Tensor) -> None:
    layer.train()
    layer(x.detach().clone().requires_grad_()).square().mean().backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.grad is not None:
                noise = torch.cos(torch.arange(parameter.numel(), device=parameter.device))
                parameter -= 0.1 * parameter.grad + 0.01 * noise.view(parameter.shape)
    layer.zero_grad()


def assert_eval_is_pure(factory: Factory, input_shape: Sequence[int]) -> None:
    """Two evaluations give the same bits and leave `state_dict` as it was, bit for bit."""
    layer = _new(factory).eval()
    x = _input(layer, input_shape)
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        first, second = layer(x), layer(x)
    layer(x).sum().backward() if any(p.requires_grad for p in layer.parameters()) else None
    _check(torch.equal(first, second), "two evaluations differ")
    after = layer.state_dict()
    _check(before.keys() == after.keys(), "an evaluation changed the keys of state_dict")
    for key, value in before.items():
        _check(torch.equal(value, after[key]), f"an evaluation changed {key}")


def assert_eval_follows_training(factory: Factory, input_shape: Sequence[int]) -> None:
    """After a step in train mode, eval uses the new parameters, not older ones."""
    layer = _new(factory)
    x = _input(layer, input_shape)
    _train_step(layer, x)
    fresh = _new(factory)
    fresh.load_state_dict(layer.state_dict())
    with torch.no_grad():
        same = torch.equal(layer.eval()(x), fresh.eval()(x))
    _check(same, "eval lags behind the parameters after a training step")


def assert_state_dict_round_trip(factory: Factory, input_shape: Sequence[int]) -> None:
    """A second layer that loads the `state_dict` strictly gives the same bits."""
    source, target = _new(factory), _new(factory)
    x = _input(source, input_shape)
    _train_step(source, x)
    target.load_state_dict(source.state_dict(), strict=True)
    same = torch.equal(_evaluate(source, x), _evaluate(target, x))
    _check(same, "the layer that loaded the state_dict computes something else")


def assert_pickle_round_trip(factory: Factory, input_shape: Sequence[int]) -> None:
    """A pickled and restored layer gives the same bits."""
    layer = _new(factory)
    x = _input(layer, input_shape)
    _train_step(layer, x)
    restored = pickle.loads(pickle.dumps(layer))
    same = torch.equal(_evaluate(layer, x), _evaluate(restored, x))
    _check(same, "the unpickled layer computes something else")


def assert_deepcopy_is_independent(factory: Factory, input_shape: Sequence[int]) -> None:
    """A deep copy gives the same bits, and training it leaves the original alone."""
    layer = _new(factory)
    x = _input(layer, input_shape)
    expected = _evaluate(layer, x)
    twin = copy.deepcopy(layer)
    _check(torch.equal(_evaluate(twin, x), expected), "the copy computes something else")
    _train_step(twin, x)
    _check(torch.equal(_evaluate(layer, x), expected), "training the copy changed the original")


def assert_dtype_is_followed(factory: Factory, input_shape: Sequence[int]) -> None:
    """`.to(dtype)` works for float64, bfloat16 and float16, and the output has that dtype."""
    layer = _new(factory)
    x = _input(layer, input_shape)
    expected = _evaluate(layer, x)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        converted = copy.deepcopy(layer).to(dtype)
        y = _evaluate(converted, x.to(dtype))
        _check(y.dtype == dtype, f"in {dtype} the output is {y.dtype}")
        error, allowed = _relative(y, expected), OUTPUT[dtype].allowed
        _check(error <= allowed, f"in {dtype} the output is off by {error:.1e} > {allowed:.1e}")
        _train_step(converted, x.to(dtype))
        finite = bool(torch.isfinite(_evaluate(converted, x.to(dtype))).all())
        _check(finite, f"in {dtype} the output is not finite after a training step")


def assert_autocast_is_safe(factory: Factory, input_shape: Sequence[int]) -> None:
    """Under bfloat16 autocast the output is that of bfloat16, and the weight keeps its bits."""
    layer = _new(factory)
    x = _input(layer, input_shape)
    with preserved(layer):
        expected, weight = layer(x), getattr(layer, "weight", None)
        with torch.autocast(x.device.type, torch.bfloat16):
            y, cast_weight = layer(x), getattr(layer, "weight", None)
    error, allowed = _relative(y, expected), OUTPUT[torch.bfloat16].allowed
    _check(error <= allowed, f"the output is off by {error:.1e} > {allowed:.1e}")
    if isinstance(weight, Tensor) and isinstance(cast_weight, Tensor):
        _check(torch.equal(weight, cast_weight), "autocast changed the weight")


def assert_materializes_from_meta(factory: Factory, input_shape: Sequence[int]) -> None:
    """Made on meta, then `to_empty` and `reset_parameters`: every entry of the state is set."""
    with torch.device("meta"):
        layer = _new(factory)
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    for name, tensor in tensors:
        _check(tensor.is_meta, f"{name} was not made on the meta device")
    layer.to_empty(device="cpu")
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    with torch.no_grad():
        for _, tensor in tensors:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
        for module in layer.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    for name, tensor in tensors:
        _check(bool(torch.isfinite(tensor).all()), f"reset_parameters does not set {name}")
    y = _evaluate(layer, _input(layer, input_shape))
    _check(bool(torch.isfinite(y).all()), "the output is not finite")


def assert_gradients_are_finite(factory: Factory, input_shape: Sequence[int]) -> None:
    """The input and every parameter get a finite gradient, at a random and at a zero input."""
    layer = _new(factory)
    x = _input(layer, input_shape)
    for point in (x, torch.zeros_like(x)):
        point.requires_grad_()
        layer.zero_grad()
        layer(point).square().sum().backward()
        for name, tensor in [("the input", point), *layer.named_parameters()]:
            _check(tensor.grad is not None, f"{name} gets no gradient")
            finite = tensor.grad is not None and bool(torch.isfinite(tensor.grad).all())
            _check(finite, f"the gradient of {name} is not finite")


def assert_compiles(
    factory: Factory, input_shape: Sequence[int], backend: str = "aot_eager"
) -> None:
    """`torch.compile(fullgraph=True)` gives the same values, in eval and with a backward.

    Args:
        factory: Makes a layer.
        input_shape: Shape of one sample.
        backend: Of `torch.compile`; the default traces forward and backward without generating
            code, which takes a second instead of many. `"inductor"` also tests the generated code.

    Raises:
        AssertionError: The values are others, or there is no gradient.
        RuntimeError: from torch.compile, at a graph break.
    """
    layer = _new(factory)
    x = _input(layer, input_shape)
    expected = _evaluate(layer, x)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with preserved(layer), torch.no_grad():
        error = _relative(compiled(x), expected)
    allowed = OUTPUT[x.dtype].allowed
    _check(error <= allowed, f"compiled, the output is off by {error:.1e} > {allowed:.1e}")
    layer.train()
    y = compiled(x.requires_grad_())
    y.square().sum().backward()
    _check(x.grad is not None and bool(torch.isfinite(x.grad).all()), "no finite gradient")


LAYER_LAWS: tuple[Callable[[Factory, Sequence[int]], None], ...] = (
    assert_eval_is_pure,
    assert_eval_follows_training,
    assert_state_dict_round_trip,
    assert_pickle_round_trip,
    assert_deepcopy_is_independent,
    assert_dtype_is_followed,
    assert_autocast_is_safe,
    assert_materializes_from_meta,
    assert_gradients_are_finite,
    assert_compiles,
)
"""Every law of this module."""
