"""Sums of two activations that are 1-Lipschitz whenever both operands are."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from orthonet._checks import real_input, require
from orthonet._torch import is_traced

__all__ = ["BranchGain", "ConvexSum", "PrescaledSum"]


def _check_operands(owner: nn.Module, branch: Tensor, skip: Tensor) -> None:
    if is_traced():
        return
    real_input(owner, branch, "branch")
    real_input(owner, skip, "skip")
    if not isinstance(branch, Tensor) or not isinstance(skip, Tensor):  # torch.fx traces
        return
    pairs = zip(reversed(branch.shape), reversed(skip.shape), strict=False)
    require(
        all(m == n or 1 in (m, n) for m, n in pairs),
        owner,
        "branch and skip must have shapes that broadcast",
        "Give the branch the shape of its input, or project the skip connection",
        branch=branch,
        skip=skip,
    )


class ConvexSum(nn.Module):
    r"""\((1 - a)\,s + a\,b\) of a skip connection s and a branch b, with a learnable a in (0, 1).

    What [`orthogonalize`][orthonet.convert.orthogonalize] with `residual="convex"` puts in the
    place of a sum; [`ConvexResidual`][orthonet.layers.ConvexResidual] is the same around a branch.

    Args:
        init: The initial a, strictly between 0 and 1.

    Shape:
        branch, skip: shapes that broadcast; returns their sum's.

    Guarantee:
        If both operands are L-Lipschitz functions of the same input and of equal shape, so is the
        result, in train and eval; a is computed in float32 at least.

    Raises:
        ValueError: `init` outside (0, 1).

    Examples:
        >>> ConvexSum(0.25)(torch.tensor([4.0]), torch.tensor([0.0])).detach()
        tensor([1.])
    """

    def __init__(
        self,
        init: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        good = isinstance(init, (int, float)) and 0 < init < 1
        require(good, self, "init must lie strictly between 0 and 1", "Use init=0.5", init=init)
        self.init = init
        self.logit = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set a back to `init`."""
        nn.init.constant_(self.logit, math.log(self.init / (1 - self.init)))

    def forward(self, branch: Tensor, skip: Tensor) -> Tensor:
        """Return the weighted sum, in the dtype of `skip`."""
        _check_operands(self, branch, skip)
        a = self.logit.to(torch.promote_types(self.logit.dtype, torch.float32)).sigmoid()
        return ((1 - a) * skip + a * branch).to(skip.dtype)

    def extra_repr(self) -> str:
        """Show the initial weight."""
        return f"init={self.init:g}"


class BranchGain(nn.Module):
    r"""The learnable gain \(g > 0\) in front of a branch, as part of a `PrescaledSum`.

    Args:
        init: The initial g, positive.

    Shape:
        Any; the output has the same.

    Guarantee:
        Constant exactly g, in train and eval.
    """

    def __init__(
        self,
        init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        good = isinstance(init, (int, float)) and 0 < init < math.inf
        require(good, self, "init must be positive", "Use init=1.0", init=init)
        self.init = init
        self.log_gain = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set g back to `init`."""
        nn.init.constant_(self.log_gain, math.log(self.init))

    @property
    def gain(self) -> Tensor:
        """The gain g, of shape (1,), in float32 at least."""
        wide = torch.promote_types(self.log_gain.dtype, torch.float32)
        return self.log_gain.to(wide).clamp(-20.0, 20.0).exp()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the gain."""
        return (self.gain * x).to(x.dtype)

    def extra_repr(self) -> str:
        """Show the initial gain."""
        return f"init={self.init:g}"


class PrescaledSum(nn.Module):
    r"""\((s + b) / (1 + g)\) of a skip connection s and a branch b whose input was scaled by g.

    What [`orthogonalize`][orthonet.convert.orthogonalize] with `residual="prescaled"` puts in the
    place of a sum, with calls of `before` where the branch begins;
    [`PrescaledResidual`][orthonet.layers.PrescaledResidual] is the same around a branch.

    Args:
        init: The initial gain g, positive.

    Attributes:
        before: The gain, called on each input of the branch.

    Shape:
        branch, skip: shapes that broadcast; returns their sum's.

    Guarantee:
        If s and the branch are L-Lipschitz, of equal shape, the result is, in train and eval.

    Raises:
        ValueError: `init` is not positive.

    Examples:
        >>> layer, x = PrescaledSum(3.0), torch.tensor([4.0])
        >>> layer(layer.before(x), x).detach()
        tensor([4.])
    """

    def __init__(
        self,
        init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.before = BranchGain(init, device, dtype)

    def forward(self, branch: Tensor, skip: Tensor) -> Tensor:
        """Return the sum, divided by one plus the gain, in the dtype of `skip`."""
        _check_operands(self, branch, skip)
        return ((skip + branch) / (1 + self.before.gain)).to(skip.dtype)
