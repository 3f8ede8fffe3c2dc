"""What a constrained weight is: the interface that layers, cells, constraints and conversions hold.

A weight says *what* it is: `evaluate` computes it from parameters. *When* it is computed is not its
business: reading it asks the providers, in order, and computes it where none of them answers.
"""

from __future__ import annotations

import abc
import copy
import itertools
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from orthonet import _checks, _torch
from orthonet.errors import NotOnManifoldError, ProjectionWarning
from orthonet.linalg.matrix import high
from orthonet.linalg.retraction import CenteredMap

__all__ = [
    "COMPILED",
    "GIVEN",
    "PROVIDERS",
    "Composition",
    "EmptyInCopies",
    "Provider",
    "Slot",
    "Weight",
    "alive",
    "caching",
    "numbered",
    "relative_distance",
    "settled",
]

GIVEN = "_given"  # the attribute of a part for its value, while something made of it is computed

W = TypeVar("W", bound="Weight")
E = TypeVar("E", bound="EmptyInCopies")

_alive: weakref.WeakValueDictionary[int, Weight] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def numbered(number: int) -> Weight | None:
    """The weight of this number, if it is alive."""
    return _alive.get(number)


def alive() -> Iterator[Weight]:
    """All weights of the process, in the order in which they were made, copied or unpickled."""
    for reference in _alive.valuerefs():  # a list: threads may make weights meanwhile
        weight = reference()
        if weight is not None:
            yield weight


class Provider(NamedTuple):
    """Who keeps values of weights.

    Attributes:
        read: Returns the present value of a weight, differentiable if gradients are enabled; None
            if it is not known.
        forget: Forgets what is kept of a module, or of all.
    """

    read: Callable[[Weight], Tensor | None]
    forget: Callable[[nn.Module | None], None]


PROVIDERS: list[Provider] = []
"""Who is asked for the value of a weight, in this order: `orthonet.reparametrizers.providers`."""

COMPILED: list[Callable[[Weight], Tensor]] = []
"""At most one function that reads a weight inside of `torch.compile`, set by the providers."""


def settled(parameter: Tensor) -> Tensor:
    """Return a copy of a parameter where another thread may move it: a map must read one point.

    It shares the version of the parameter, so that autograd refuses an old graph as without it.
    """
    if torch.compiler.is_compiling() or threading.active_count() == 1:
        return parameter
    if not _torch.eager() or type(parameter) not in (Tensor, nn.Parameter):
        return parameter.clone()
    copied = parameter.view_as(parameter)
    copied.data = parameter.detach().clone()
    return copied


def relative_distance(new: Tensor, w: Tensor) -> float:
    r"""Return \(\|U - W\| / \|W\|\), infinite for W = 0, in float64 where the device has it."""
    new = high(new)
    w = w.to(new)
    norm = float(torch.linalg.vector_norm(w))
    return float(torch.linalg.vector_norm(new - w)) / norm if norm > 0 else float("inf")


class EmptyInCopies:
    """A place of a module for what was computed: that of a copy or a pickled one is empty."""

    __slots__ = ()

    def __deepcopy__(self: E, memo: dict[int, Any]) -> E:
        return type(self)()

    def __reduce__(self: E) -> tuple[type[E], tuple[()]]:
        return type(self), ()


class Slot(EmptyInCopies):
    """What the providers keep of a weight."""

    __slots__ = ("current", "lock", "off", "reading")

    def __init__(self) -> None:
        self.reading: Any = None  # of the engine
        self.current: Any = None  # of the cold cache, which locks while it computes
        self.lock = threading.RLock()
        self.off = False  # for good: what the weight computes depends on more than can be seen


class caching:  # noqa: N801 (spelled as torch.no_grad and torch.set_grad_enabled)
    """Switch the keeping of constrained weights on or off, for the process or for a block.

    It is on when the process starts. Then a constrained weight is computed once per optimizer step
    and once in evaluation; a backward pass leaves it intact. With the switch off, and for a module
    whose attribute `caching` is false, every read computes the weight, and no optimizer step is
    followed by a retraction.

    Args:
        enabled: Whether weights are kept.

    Examples:
        >>> with caching(False):
        ...     pass  # every read computes
        >>> _ = caching(True)  # from here on, as a function
    """

    on = True

    def __init__(self, enabled: bool) -> None:
        _checks.boolean("caching", enabled=enabled)
        self._before, self.enabled = caching.on, enabled
        caching.on = enabled

    def __enter__(self) -> caching:
        return self

    def __exit__(self, *_: object) -> None:
        caching.on = self._before


@dataclass(frozen=True)
class Composition:
    """How a weight is composed of the values of other weights.

    Weights with equal keys are composed together.

    Attributes:
        parts: The other weights.
        scores: Further parameters that the composition reads.
        key: What weights that are composed by one call have in common.
        compose: Called with the values of each part and of each of the scores, of all weights along
            the first dimension, and the number of weights; returns their values, stacked.
    """

    parts: tuple[Weight, ...]
    scores: tuple[nn.Parameter, ...]
    key: Hashable
    compose: Callable[[Sequence[Tensor], Sequence[Tensor], int], Tensor]


class _EnrolledWhenMade(abc.ABCMeta):
    """Metaclass: a weight is known to the process when its constructor has returned."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        weight = super().__call__(*args, **kwargs)
        _alive[weight._number[0]] = weight
        return weight


class Weight(nn.Module, metaclass=_EnrolledWhenMade):
    """Base class of modules that own the raw parameters of one weight and return it when called.

    A subclass defines `evaluate`, a function of the parameters, buffers and attributes of the
    module and its sub-modules, which writes nothing. Calling the module returns the same tensor,
    computed when something that it depends on has changed.

    Attributes:
        caching: Set it to False on an instance to have its value computed at every call.
        map: How an optimizer step is followed by a retraction of the parameter `original`; None
            if the parameter is left alone.
        lipschitz: The factor by which the value is scaled.
        orthogonal: Whether all non-trivial singular values of the map that it stands for are 1.
    """

    caching: bool = True
    lipschitz: float = 1.0
    orthogonal: bool = False
    opaque: bool = False  # whether compiled code reads it by one operation
    composed: bool = False  # whether its value is read by another weight that it is a part of
    _slot: Slot
    _number: tuple[int, Tensor]  # in this process
    _sharded: bool = False  # FSDP2 lends the parameters: what is written to them is lost

    def __init__(self, *args: Any) -> None:
        self._take_number()  # first, because a base class may read the value
        super().__init__(*args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._enroll()

    def _take_number(self) -> None:
        """Take a new number; a copy, also a shallow one, does not share what was found before."""
        number = next(_numbers)
        pair = number, torch.tensor(number, device="cpu")
        vars(self).update(_slot=Slot(), _number=pair)

    def _enroll(self) -> None:
        """Become known to the process; for modules that no constructor of this class has made."""
        self._take_number()
        _alive[self._number[0]] = self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, Tensor) and type(value) not in (Tensor, nn.Parameter):
            # FSDP2 sets its shards so, before it lends full tensors whose changes leave no trace.
            vars(self)["_sharded"] = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._let_go()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._let_go()
        super()._load_from_state_dict(*args)

    def _let_go(self) -> None:
        """Keep nothing that would hinder PyTorch from swapping the parameters for others."""
        if torch.__future__.get_swap_module_params_on_conversion():
            for provider in PROVIDERS:
                provider.forget(None)  # nor a graph that others share
                provider.forget(self)

    @abc.abstractmethod
    def evaluate(self) -> Tensor:
        """Compute the value."""

    def forward(self) -> Tensor:
        """Return the value of `evaluate()`, computed once per optimizer step."""
        if torch.compiler.is_compiling():
            return COMPILED[0](self) if COMPILED else self.evaluate()
        given = vars(self).get(GIVEN)
        if given is not None:
            return given
        for provider in PROVIDERS:
            value = provider.read(self)
            if value is not None:
                return value
        return self.evaluate()

    @property
    def number(self) -> Tensor:
        """Its number in this process, as a tensor that compiled code can read."""
        return self._number[1]

    @property
    def map(self) -> CenteredMap | None:
        """The map of which `original` is kept at the center; None for all others."""
        return None

    def composition(self) -> Composition | None:
        """How the value is composed of those of other weights; None if it is not."""
        return None

    @property
    def shape(self) -> torch.Size:
        """Shape of the value."""
        if torch.compiler.is_compiling():  # cannot copy tensors, and drops what nobody reads
            with torch.no_grad():
                return self.evaluate().shape
        return copy.deepcopy(self).to("meta").evaluate().shape

    @torch.no_grad()
    def assign_(self, w: Tensor, owner: object = None) -> None:
        """Make `w` the value; errors name `owner`.

        Raises:
            ValueError: `w` has another shape.
            NotOnManifoldError: `w` does not satisfy the constraint; nothing has been changed.
        """
        fitted, _ = self._fit(w, owner or self, exactly=True)
        self._set(fitted)

    @torch.no_grad()
    def project_(self, w: Tensor, owner: object = None) -> float:
        r"""Make the nearest value the value; return its relative distance \(\|U - W\| / \|W\|\).

        Raises:
            ValueError: `w` has another shape or is not finite; nothing has been changed.
        """
        fitted, distance = self._fit(w, owner or self, exactly=False)
        self._set(fitted)
        return distance

    def _fit(self, w: Tensor, owner: object, exactly: bool) -> tuple[Any, float]:
        """What `_set` takes to make the value nearest to `w`, and its relative distance.

        Nothing is changed. With `exactly`, a `w` that does not satisfy the constraint is refused.
        """
        self._refuse(owner)

    def _set(self, fitted: Any) -> None:
        """Write what `_fit` has found into the parameters."""
        raise AttributeError("a subclass that has _fit says how")

    @torch.no_grad()
    def update_base(self) -> None:
        """Express the present value by parameters anew; a map with a base takes it as the base."""
        self.assign_(self.evaluate())

    def _require_shape(self, w: Tensor, owner: object) -> None:
        good = isinstance(w, Tensor) and w.shape == self.shape
        _checks.require(
            good and bool(w.isfinite().all()),
            owner,
            f"the weight must have shape {tuple(self.shape)} and be finite",
            "Transpose, reshape or clean it",
            NotOnManifoldError if good else ValueError,
            weight=w,
        )

    def _refuse(self, owner: object) -> NoReturn:
        _checks.fail(
            owner,
            "this weight has no assignment, because it is computed from parameters of another form",
            "Load a state_dict of this class, or use a layer whose weight can be assigned, e.g. "
            "OrthoLinear",
            NotOnManifoldError,
        )

    @abc.abstractmethod
    def reset_parameters(self) -> None:
        """Draw the parameters anew; nothing happens on the meta device."""

    def filled_copy(self: W, like: Tensor) -> W:
        """A copy; one on the meta device is drawn anew on the device of `like`, or the CPU."""
        twin = copy.deepcopy(self)
        if any(t.is_meta for t in twin.state_dict().values()):
            twin = twin.to_empty(device="cpu" if like.is_meta else like.device)
            with torch.no_grad():
                for tensor in twin.state_dict().values():
                    tensor.zero_()
            twin.reset_parameters()
        return twin

    def holding(self: W, values: Sequence[Tensor]) -> W:
        """A copy whose parameters hold these values, one for each, of as many entries."""
        twin = copy.deepcopy(self)
        with torch.no_grad():
            for p, value in zip(twin.parameters(), values, strict=True):
                p.copy_(value.detach().view(p.shape))
        return twin

    def load_plain(
        self,
        state_dict: dict[str, Any],
        plain: str,
        own: str,
        error_msgs: list[str],
        owner: object,
        adapt: Callable[[Tensor], Tensor] = torch.Tensor.detach,
    ) -> tuple[float, Tensor] | None:
        """Let a checkpoint of a module without constraint be loaded.

        If `state_dict` holds the tensor `plain` and no key that begins with `own`, it is replaced
        by the entries of this weight after a projection, with a warning if that moved it by more
        than rounding. A refusal goes to `error_msgs`.

        Args:
            state_dict: The checkpoint; changed.
            plain: Key of the tensor.
            own: Prefix of the keys of this weight.
            error_msgs: As in `nn.Module._load_from_state_dict`.
            owner: Whom errors name.
            adapt: From the tensor of the checkpoint to the value.

        Returns:
            How far the projection moved it, relative, and the tensor; None if nothing was done.
        """
        if plain not in state_dict or any(key.startswith(own) for key in state_dict):
            return None
        value = state_dict.pop(plain)
        try:
            twin = self.filled_copy(value)
            moved = twin.project_(adapt(value), owner)
        except ValueError as error:
            error_msgs.append(f"{plain}: {error}")
            state_dict.update(self.state_dict(prefix=own))
            return None
        state_dict.update(twin.state_dict(prefix=own))
        if moved > torch.finfo(value.dtype).eps ** 0.5:
            sentence = _checks.message(
                owner,
                f"a plain {plain.rpartition('.')[2]} was loaded and projected onto its constraint",
                "Fine-tune, or load a checkpoint of this class to keep its weights exactly",
                relative_distance=round(moved, 6),
                shape=tuple(value.shape),
            )
            warnings.warn(sentence, ProjectionWarning, stacklevel=2)
        return moved, value

    def may_be_kept(self) -> bool:
        """Whether values may be kept here and now, as far as switches and surroundings go."""
        return caching.on and self.caching and _torch.eager()
