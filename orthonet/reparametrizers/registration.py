"""Constraining a tensor of any module: `torch.nn.utils.parametrize` with classes that are shared.

torch makes one class for each parametrized module, which a deep copy then shares by accident: to
remove the parametrization of the copy breaks the original, and nothing can be pickled. Here all
modules of one class with the same constrained tensors share one class on purpose, and what torch's
own functions do to that class through one module leaves the others alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from orthonet import _checks
from orthonet._torch import without_autocast
from orthonet.reparametrizers.weight import Weight, relative_distance, settled

__all__ = ["CachedParametrizationList", "adopt", "bake", "register", "remove"]


class CachedParametrizationList(Weight, ParametrizationList):
    """The parametrizations of one tensor, which is computed once per optimizer step.

    What torch calls `module.parametrizations[tensor_name]`, with the same parameters and keys.
    """

    def evaluate(self) -> Tensor:
        """Compute the tensor from the originals, in full precision also under autocast."""
        originals = [*map(settled, self._originals())]
        with without_autocast(originals[0]):
            first, *rest = self
            value = first(*originals)
            for stage in rest:
                value = stage(value)
        return value

    def _originals(self) -> list[Any]:
        names = ["original"] if self.is_tensor else [f"original{i}" for i in range(self.ntensors)]
        return [getattr(self, name) for name in names]

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        last: Any = self[len(self) - 1]
        shape = getattr(last, "value_shape", None)
        return super().shape if shape is None else torch.Size(shape)

    def assign_(self, w: Tensor, owner: object = None) -> None:
        """Make `w` the value of the tensor."""
        self._require_shape(w, owner or self)
        self.right_inverse(w)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make whatever the state holds finite, since it may never have been set."""
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                tensor.zero_()
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()

    @torch.no_grad()
    def project_(self, value: Tensor, owner: object = None) -> float:
        """Make what the parametrizations make of `value` the value; return the relative distance.

        Here they must accept it; lists of `orthonet.constraints` project it first.
        """
        self.right_inverse(value)
        return relative_distance(self(), value)

    @torch.no_grad()
    def right_inverse(self, value: Tensor) -> None:
        """Make `value` the value of the tensor, by writing into the originals.

        In place where the shape stays, so that an optimizer and DistributedDataParallel keep
        their tensor; nothing is written when a parametrization refuses `value`.
        """
        stages: list[Any] = [self[index] for index in range(len(self))]
        for stage in reversed(stages):
            _checks.require(
                hasattr(stage, "right_inverse"),
                stage,
                "a tensor can be assigned only if every parametrization has right_inverse",
                "Add the method, or change the originals in module.parametrizations",
            )
            value = stage.right_inverse(value)
        values = [value] if isinstance(value, Tensor) else list(value)
        originals = self._originals()
        _checks.require(
            len(values) == len(originals)
            and all(v.dtype == o.dtype for v, o in zip(values, originals, strict=True)),
            stages[0],
            f"right_inverse must return {len(originals)} tensor(s) of the dtype of the originals",
            "Let it return what it returned at registration",
            dtypes=[v.dtype for v in values],
        )
        for new, old in zip(values, originals, strict=True):
            if new.shape == old.shape:
                old.copy_(new)
            else:
                old.set_(new.clone())


class _SharedType(type):
    """Metaclass: a property given to, or taken from, the class leaves its other modules as is."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if isinstance(value, property):
            value = _constrained(name)
        super().__setattr__(name, value)

    def __delattr__(cls, name: str) -> None:
        if not isinstance(vars(cls).get(name), property):
            super().__delattr__(name)


def _entry(module: nn.Module, name: str) -> parametrize.ParametrizationList | None:
    """The list that constrains the tensor `name`; None if nothing does."""
    lists: Any = module._modules.get("parametrizations")
    return None if lists is None else lists._modules.get(name)


def _constrained(name: str) -> property:
    """The property that reads and assigns the constrained tensor `name`."""

    def read(module: nn.Module) -> Any:
        entry = _entry(module, name)
        if entry is not None:
            return entry()
        return nn.Module.__getattr__(module, name)  # constrained in other modules of this class

    def assign(module: nn.Module, value: Any) -> None:
        entry = _entry(module, name)
        if entry is not None:
            owner = type(module).__name__.removeprefix("Parametrized")
            _checks.tensor(owner, **{name: value})
            entry.right_inverse(value)
        else:
            vars(module)[name] = value

    return property(read, assign, doc=f"The constrained `{name}`; assigning sets its originals.")


def _rebuild(base: type[nn.Module], names: tuple[str, ...], args: tuple[Any, ...]) -> nn.Module:
    cls = _shared_class(base, names)
    return cls.__new__(cls, *args)


def _reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """For pickle and deepcopy: the class is found or made again, from the one it extends."""
    base = type(self).__bases__[0]
    names = tuple(self.get_submodule("parametrizations")._modules)
    reduced = super(type(self), self).__reduce_ex__(max(protocol, 2))
    _, (_, *args), state, *rest = cast(tuple[Any, ...], reduced)
    weights = state.get("_flat_weights") if isinstance(state, dict) else None
    if weights is not None:  # of an RNN: what it has read last, which it compares before use
        own = [None, *self._parameters.values(), *self._buffers.values()]
        kept = [w if any(w is o for o in own) else w.new_empty(0) for w in weights]
        state = {**state, "_flat_weights": kept}
    return (_rebuild, (base, names, tuple(args)), state, *rest)


def _load_from_state_dict(self: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Accept a checkpoint of the plain module too: its tensors are projected, with a warning."""
    lists: Any = self._modules["parametrizations"]
    for name, entry in lists.items():
        own = f"{prefix}parametrizations.{name}."
        entry.load_plain(state, f"{prefix}{name}", own, rest[-1], self)
    type(self).__bases__[0]._load_from_state_dict(self, state, prefix, *rest)


@torch.no_grad()
def _reset_parameters(self: nn.Module) -> None:
    """Draw all tensors as the plain class does, and project those that are constrained.

    Where the space has no projection of what was drawn, it draws by itself. Nothing happens on the
    meta device.
    """
    base: Any = type(self).__bases__[0]
    lists: Any = self._modules["parametrizations"]
    if any(p.is_meta for p in self.parameters()):
        return
    drawn = {
        name: nn.Parameter(next(entry.parameters()).new_empty(entry.shape))
        for name, entry in lists.items()
    }
    plain: Any = base.__new__(base)
    vars(plain).update(vars(self))
    vars(plain)["_parameters"] = self._parameters | drawn
    vars(plain)["_modules"] = {k: m for k, m in self._modules.items() if k != "parametrizations"}
    base.reset_parameters(plain)
    for name, entry in lists.items():
        entry.reset_parameters()
        try:
            entry.project_(plain._parameters[name].detach(), self)
        except ValueError:  # nothing near it in the space
            sample = getattr(entry[len(entry) - 1], "sample", None)
            if sample is None:
                raise
            entry.right_inverse(sample())


def _shared_class(base: type[nn.Module], names: Iterable[str]) -> type[nn.Module]:
    """The class of all modules of class `base` whose tensors `names` are constrained."""
    key = tuple(sorted(names))
    for known in type.__subclasses__(base):
        if isinstance(known, _SharedType) and vars(known).get("_constrained_names") == key:
            return cast(type[nn.Module], known)
    meta = type(base)
    if not issubclass(meta, _SharedType):
        meta = _SharedType if meta is type else type(meta.__name__, (_SharedType, meta), {})
    content = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce_ex,
        "_constrained_names": key,
        "_load_from_state_dict": _load_from_state_dict,
        **{name: _constrained(name) for name in key},
    }
    if hasattr(base, "reset_parameters"):
        content["reset_parameters"] = _reset_parameters
    return cast(type[nn.Module], meta(f"Parametrized{base.__name__}", (base,), content))


def _adopt(module: nn.Module) -> None:
    """Give a parametrized module the shared class that its constrained tensors ask for."""
    lists: Any = module.parametrizations
    for entry in lists.values():
        if type(entry) is ParametrizationList:
            entry.__class__ = CachedParametrizationList
            CachedParametrizationList._enroll(cast("CachedParametrizationList", entry))
    module.__class__ = _shared_class(type(module).__bases__[0], lists)


def adopt(module: nn.Module) -> nn.Module:
    """Take over what `torch.nn.utils.parametrize` has registered, in `module` and its sub-modules.

    From then on it is as if it had been registered by
    [`register`][orthonet.reparametrizers.register]: computed once per step, pickled, copied.
    Parameters and `state_dict` stay.

    Args:
        module: Any module.

    Returns:
        `module`.

    Examples:
        >>> from torch.nn.utils.parametrizations import orthogonal
        >>> layer = adopt(orthogonal(torch.nn.Linear(3, 3)))
        >>> layer.weight is layer.weight
        True
    """
    _checks.module("adopt", module=module)
    for part in module.modules():
        if is_parametrized(part):
            _adopt(part)
    return module


def register(
    module: nn.Module, tensor_name: str, parametrization: nn.Module, *, unsafe: bool = False
) -> nn.Module:
    r"""Constrain a parameter or buffer of any module: `module.weight` becomes `parametrization(X)`.

    As `torch.nn.utils.parametrize.register_parametrization`, with whose functions (and
    `module.parametrizations`, `original`, `original0`, ... in the `state_dict`) it goes together,
    and beyond it

    - the constrained tensor is computed once per optimizer step, however often it is read, see
      [`caching`][orthonet.caching];
    - the module and models that contain it can be pickled, `torch.save`d and deep-copied, and a
      copy is independent of the original;
    - modules of one class share one class, so that `torch.compile` and
      `torch.func.stack_module_state` see equals;
    - an assignment writes into the originals in place, so that optimizers and
      DistributedDataParallel keep their tensors.

    Several constraints on one tensor are chained: the one registered last is applied last.

    Args:
        module: Holds the tensor.
        tensor_name: Name of a parameter or buffer of `module`, not of a sub-module's.
        parametrization: Maps the unconstrained tensor(s) to the constrained one by `forward`;
            `right_inverse`, if it has one, maps back. It must be a function of its arguments, its
            parameters, buffers and attributes.
        unsafe: Skip the check that shape and dtype stay.

    Returns:
        `module`.

    Raises:
        ValueError: there is no such tensor, or the parametrization changes its shape or dtype.

    Examples:
        >>> class Symmetric(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x.triu() + x.triu(1).mT
        >>> layer = register(torch.nn.Linear(3, 3), "weight", Symmetric())
        >>> bool(torch.equal(layer.weight, layer.weight.mT))
        True
    """
    _checks.module("register", module=module)
    known = tensor_name in module._parameters or tensor_name in module._buffers
    again = is_parametrized(module, tensor_name)
    _checks.require(
        isinstance(parametrization, nn.Module),
        "register",
        "parametrization must be a torch.nn.Module",
        "Wrap the function in a module with a forward method",
        parametrization=parametrization,
    )
    names = [*module._parameters, *module._buffers]
    _checks.require(
        again or (known and getattr(module, tensor_name) is not None),
        "register",
        f"tensor_name must be one of the tensors of {type(module).__name__}, {names}",
        "For a tensor of a sub-module, e.g. 'out_proj.weight', pass the sub-module",
        tensor_name=tensor_name,
    )
    if again:
        parametrize.register_parametrization(module, tensor_name, parametrization, unsafe=unsafe)
    else:
        parametrization.train(module.training)
        entry = CachedParametrizationList([parametrization], getattr(module, tensor_name), unsafe)
        entry.train(module.training)
        delattr(module, tensor_name)
        if not is_parametrized(module):
            module.parametrizations = nn.ModuleDict()
            module.__class__ = _shared_class(type(module), ())
        cast(nn.ModuleDict, module.parametrizations)[tensor_name] = entry
    _adopt(module)
    return module


def remove(module: nn.Module, tensor_name: str, *, keep_value: bool = True) -> nn.Module:
    """Make a constrained tensor an ordinary one again.

    Args:
        module: Holds the tensor.
        tensor_name: Its name.
        keep_value: Leave the present constrained value; otherwise the unconstrained original.

    Returns:
        `module`, of its own class again when no tensor is left constrained.

    Raises:
        ValueError: the tensor is not constrained, or it has several originals and `keep_value` is
            false.
    """
    _checks.require(
        is_parametrized(module, tensor_name),
        "remove",
        f"tensor_name must be a constrained tensor of {type(module).__name__}",
        "See module.parametrizations",
        tensor_name=tensor_name,
    )
    entry = _entry(module, tensor_name)
    if isinstance(entry, CachedParametrizationList):
        # or the parameter would share the memory of a weight that others hold
        entry.caching = False
    parametrize.remove_parametrizations(module, tensor_name, leave_parametrized=keep_value)
    if is_parametrized(module):
        _adopt(module)
    return module


@torch.no_grad()
def bake(module: nn.Module) -> None:
    """Make all constrained tensors of a module, which must be a copy, ordinary parameters.

    A class made by torch is shared with the original, which would lose its tensors; it is taken
    over first.
    """
    if not is_parametrized(module):
        return
    _adopt(module)
    lists: Any = module.parametrizations
    for name in list(lists):
        learns = any(p.requires_grad for p in lists[name].parameters())
        remove(module, name)
        getattr(module, name).requires_grad_(learns)
