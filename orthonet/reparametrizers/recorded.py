"""How a weight is made, kept in its `state_dict`: a checkpoint of another function is refused."""

from __future__ import annotations

import abc
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.errors import PresetWarning
from orthonet.reparametrizers.params import name_of
from orthonet.reparametrizers.weight import Weight

__all__ = ["RecordedWeight", "keep_if_refused"]

_KEY = "_extra_state"  # the name that PyTorch, its distributed checkpoints and FSDP give it
_SIZE = 256  # distributed checkpoints load in place: equal shapes, so that the sentence is ours
_noted: list[Any] = [None]  # the list of errors of the load that was noted last


def _decoded(state: object) -> str | None:
    """The text of an entry, in whatever dtype it has been converted to; None if it holds none."""
    if not isinstance(state, Tensor) or state.is_meta:
        return None
    content = state.detach().round().to(device="cpu", dtype=torch.uint8).flatten().tolist()
    return bytes(content).rstrip(b"\0").decode(errors="replace")


class RecordedWeight(Weight):
    """A weight whose `state_dict` says how it is made, in an entry of small integers (UTF-8).

    The entry is the *extra state* of the module: no parameter, no buffer. A checkpoint of another
    function is refused, and nothing is changed; one without the entry loads, with a
    [`PresetWarning`][orthonet.errors.PresetWarning].
    """

    @property
    @abc.abstractmethod
    def made_by(self) -> str:
        """The name of the function of the parameters, ` | `, and the map with its arguments.

        Weights of one named function compute the same; without a name, the whole text counts.
        """

    @property
    def preset(self) -> str:
        """The name of the published preset that makes the weight, or what it consists of."""
        return name_of(self.made_by.partition(" | ")[2])

    def accepts(self, made_by: str) -> bool:
        """Whether the parameters of a weight made so give the same weight here."""
        function = self.made_by.split(" | ")[0]
        same = function == made_by.split(" | ")[0]
        return self.made_by == made_by or (same and function != "")

    def get_extra_state(self) -> Tensor:
        """Return `made_by`, for `state_dict`."""
        content = self.made_by.encode()
        content = content.ljust(-(-len(content) // _SIZE) * _SIZE, b"\0")
        return torch.tensor(list(content), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: object) -> None:
        """Do nothing: the entry has been compared, and stays."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Compare the entry; accept checkpoints from before there was one, with a note."""
        keep_if_refused(self, state_dict, prefix, error_msgs := rest[-1])
        if prefix + _KEY not in state_dict:
            if any(key.startswith(prefix) for key in state_dict):
                _note(self, error_msgs)
            state_dict[prefix + _KEY] = self.get_extra_state()
        super()._load_from_state_dict(state_dict, prefix, *rest)


def keep_if_refused(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]
) -> None:
    """Keep all of `module` as it is if one of its weights is made otherwise in `state_dict`.

    Its entries in `state_dict` become its own tensors, and one sentence goes to `error_msgs`.

    Args:
        module: The module that is about to be loaded.
        state_dict: The checkpoint; changed.
        prefix: Prefix of the keys of the module.
        error_msgs: As in `nn.Module._load_from_state_dict`.
    """
    refused = False
    for name, weight in module.named_modules():
        if isinstance(weight, RecordedWeight):
            made_by = _decoded(state_dict.get(f"{prefix}{name}{'.' if name else ''}{_KEY}"))
            if made_by is not None and not weight.accepts(made_by):
                refused, other = True, name_of(made_by.partition(" | ")[2])
                sentence = _checks.message(
                    weight,
                    f"the checkpoint must be made with {weight.preset}, as the model is, got "
                    f"checkpoint={other}",
                    f"Build the model with {other}, or convert: load the checkpoint into such a "
                    "model, `other`, and then "
                    "model.load_state_dict(orthonet.to_plain(other).state_dict())",
                )
                if sentence not in error_msgs:
                    error_msgs.append(sentence)
    if refused:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[key]
        own: Mapping[str, Any] = module.state_dict(prefix=prefix, keep_vars=True)
        state_dict.update(own)


def _note(weight: RecordedWeight, error_msgs: list[str]) -> None:
    """Warn, once for all weights of a load: they share the list of its errors."""
    if _noted[0] is error_msgs:
        return
    _noted[0] = error_msgs
    sentence = _checks.message(
        weight,
        "the checkpoint does not say how its weights are made, and is taken to be made with "
        f"{weight.preset}, as the model is",
        "If that is so, save it again: it will say so then",
    )
    warnings.warn(sentence, PresetWarning, stacklevel=2)
