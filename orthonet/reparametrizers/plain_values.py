"""Plain values for constrained tensors: `reset_parameters`, and checkpoints without constraints."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from orthonet import _checks
from orthonet.errors import ProjectionWarning

__all__ = ["load_plain", "reset_parameters", "warn_projected"]


@torch.no_grad()
def reset_parameters(self: nn.Module) -> None:
    """Draw all tensors as the plain class does, and project those that are constrained.

    Where the space has no projection of what was drawn, it draws by itself. Nothing happens on the
    meta device.
    """
    base: Any = type(self).__bases__[0]
    lists: Any = self._modules["parametrizations"]
    if any(p.is_meta for p in self.parameters()):
        return
    plain: Any = base.__new__(base)
    nn.Module.__init__(plain)
    for name, value in vars(self).items():
        if name not in ("_parameters", "_buffers", "_modules"):
            vars(plain)[name] = value
    vars(plain)["_parameters"] = dict(self._parameters)
    vars(plain)["_buffers"] = dict(self._buffers)
    vars(plain)["_modules"] = {k: m for k, m in self._modules.items() if k != "parametrizations"}
    for name, entry in lists.items():
        like = next(entry.parameters())
        vars(plain)["_parameters"][name] = nn.Parameter(like.new_empty(entry.shape))
    base.reset_parameters(plain)
    for name, entry in lists.items():
        entry.reset_parameters()
        try:
            entry.project_(vars(plain)["_parameters"][name].detach(), self)
        except ValueError:  # nothing near it in the space
            sample = getattr(entry[len(entry) - 1], "sample", None)
            if sample is None:
                raise
            entry.right_inverse(sample())


def load_plain(
    self: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Accept a checkpoint of the plain module too: its tensors are projected, with a warning."""
    lists: Any = self._modules["parametrizations"]
    for name, entry in lists.items():
        plain, own = f"{prefix}{name}", f"{prefix}parametrizations.{name}."
        done = entry.load_plain(state_dict, plain, own, error_msgs, self)
        if done is not None:
            moved, value = done
            warn_projected(
                type(self).__name__,
                f"a plain {name} was loaded and projected onto its constraint",
                value.dtype,
                relative_distance=moved,
                shape=tuple(value.shape),
            )
    base: Any = type(self).__bases__[0]
    base._load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    )


def warn_projected(owner: object, what: str, dtype: torch.dtype, **values: Any) -> None:
    """Warn that plain values were projected, unless the first of `values`, how far, is rounding."""
    name, moved = next(iter(values.items()))
    if moved <= torch.finfo(dtype).eps ** 0.5:
        return
    sentence = _checks.message(
        owner,
        what,
        "Fine-tune, or load a checkpoint of this class to keep its weights exactly",
        **{**values, name: round(moved, 6)},
    )
    warnings.warn(sentence, ProjectionWarning, stacklevel=3)
