"""Residual connections that are 1-Lipschitz whenever their branch is.

Each class holds the branch as `branch` and tells, by `lipschitz_bound`, the constant of the
whole when that of the branch is known.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from orthonet._checks import boolean, factory, integer, real_input, require
from orthonet.functional import safe_sqrt

__all__ = [
    "AdditiveResidual",
    "ConcatResidual",
    "ConvexResidual",
    "L2NormResidual",
    "PrescaledResidual",
    "root_mean_square",
]


class _Residual(nn.Module):
    """A branch whose output must have the shape of its input."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        require(
            isinstance(branch, nn.Module),
            self,
            "branch must be a torch.nn.Module",
            "Wrap several layers in torch.nn.Sequential",
            branch=branch,
        )
        self.branch = branch

    def _branch(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        require(
            y.shape == x.shape,
            self,
            "the branch must return the shape of its input",
            "Use as many output as input channels, stride 1 and a padding that keeps the size",
            input=tuple(x.shape),
            output=tuple(y.shape),
        )
        return y


class ConvexResidual(_Residual):
    r"""Return \((1 - a)\,x + a\,f(x)\) with a learnable \(a\) in (0, 1).

    One scalar for all channels, \(a = \mathrm{sigmoid}(\ell)\). A vector would not do: with
    \(a = (0, 1)\), \(f\) = swap, the point (1, 0) goes to (1, 1).

    Args:
        branch: The map \(f\); its output has the shape of its input.
        init: The initial \(a\), strictly between 0 and 1.
        device: Of the parameter.
        dtype: Of the parameter.

    Shape:
        As the branch.

    Guarantee:
        If \(f\) is \(L\)-Lipschitz, the whole is \(((1-a) + aL)\)-Lipschitz, so 1-Lipschitz for
        \(L \le 1\): \(\|(1-a)(x-x') + a(f(x)-f(x'))\| \le (1-a)\|x-x'\| + aL\|x-x'\|\). Attained
        by \(f = \mathrm{id}\). Holds in train and eval; \(a\) is computed in at least float32.

    Raises:
        ValueError: `init` outside (0, 1), `branch` not a module; when called: the branch
            changes the shape.

    Examples:
        >>> ConvexResidual(nn.Identity(), init=0.25).lipschitz_bound(1.0)
        1.0
    """

    def __init__(
        self,
        branch: nn.Module,
        init: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(branch)
        factory(self, device, dtype)
        require(
            isinstance(init, (int, float)) and 0 < init < 1,
            self,
            "init must lie strictly between 0 and 1",
            "Use init=0.5, or drop the branch or the skip connection",
            init=init,
        )
        self.init = init
        self.logit = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        r"""Set \(a\) back to `init`; the branch is left as it is."""
        nn.init.constant_(self.logit, math.log(self.init / (1 - self.init)))

    @property
    def alpha(self) -> Tensor:
        r"""The weight \(a\) of the branch, of shape (1,), in float32 at least."""
        return self.logit.to(torch.promote_types(self.logit.dtype, torch.float32)).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        real_input(self, x)
        alpha = self.alpha
        return ((1 - alpha) * x + alpha * self._branch(x)).to(x.dtype)

    def lipschitz_bound(self, branch: float) -> float:
        """Return the constant of the whole for a branch of constant `branch`."""
        return 1 + self.alpha.item() * (branch - 1)

    def extra_repr(self) -> str:
        return f"init={self.init:g}"


class ConcatResidual(_Residual):
    r"""Pass one half of the channels, apply the branch to the other: \((x_1, f(x_2))\).

    Args:
        branch: The map \(f\) on half of the channels, as of
            [`ConvexResidual`][orthonet.layers.ConvexResidual].
        dim: Channel dimension, of even size.
        shuffle: Interleave the two halves of the result, so that stacked blocks mix them.

    Shape:
        Twice the channels of the branch; the output has the shape of the input.

    Guarantee:
        If \(f\) is \(L\)-Lipschitz, the whole is exactly \(\max(1, L)\)-Lipschitz:
        \(\|x_1-x_1'\|^2 + \|f(x_2)-f(x_2')\|^2 \le \max(1, L)^2 \|x-x'\|^2\). It is orthogonal
        (gradient-norm preserving) when \(f\) is. Holds in train and eval.

    Raises:
        ValueError: As of `ConvexResidual`, or an odd number of channels.

    Examples:
        >>> ConcatResidual(nn.ReLU())(torch.tensor([[-1.0, -2.0]]))
        tensor([[-1., 0.]])
    """

    def __init__(self, branch: nn.Module, dim: int = 1, shuffle: bool = False) -> None:
        super().__init__(branch)
        integer(self, dim=dim)
        boolean(self, shuffle=shuffle)
        self.dim = dim
        self.shuffle = shuffle

    def forward(self, x: Tensor) -> Tensor:
        real_input(self, x)
        require(
            -x.ndim <= self.dim < x.ndim and x.shape[self.dim] % 2 == 0,
            self,
            "the channel dimension must exist and be even",
            "Choose an even number of channels, or another dim",
            shape=tuple(x.shape),
            dim=self.dim,
        )
        dim = self.dim % x.ndim
        kept, changed = x.chunk(2, dim)
        halves = (kept, self._branch(changed))
        if self.shuffle:
            return torch.stack(halves, dim + 1).flatten(dim, dim + 1)
        return torch.cat(halves, dim)

    def lipschitz_bound(self, branch: float) -> float:
        """Return the larger of 1 and `branch`."""
        return max(1.0, branch)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, shuffle={self.shuffle}"


class AdditiveResidual(_Residual):
    r"""Return \((x + f(x)) / 2\): the usual sum, scaled.

    `branch`, shapes and errors are those of [`ConvexResidual`][orthonet.layers.ConvexResidual].

    Guarantee:
        If \(f\) is \(L\)-Lipschitz, the whole is \((1 + L)/2\)-Lipschitz, so 1-Lipschitz for
        \(L \le 1\): \(\frac12\|x-x' + f(x)-f(x')\| \le \frac12(1+L)\|x-x'\|\). Attained by
        \(f = \mathrm{id}\). Holds in train and eval.

    Examples:
        >>> AdditiveResidual(nn.ReLU())(torch.tensor([-2.0, 4.0]))
        tensor([-1.,  4.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return ((x + self._branch(x)) / 2).to(x.dtype)

    def lipschitz_bound(self, branch: float) -> float:
        r"""Return \((1 + L) / 2\) for a branch of constant L."""
        return (1 + branch) / 2


def root_mean_square(
    x: Tensor,  # (*shape)
    y: Tensor,  # (*shape)
) -> Tensor:
    """Return the root of the mean of both squares, in the dtype of x; no gradient at zero."""
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x_wide, y_wide = x.to(wide), y.to(wide)
    return safe_sqrt((x_wide * x_wide + y_wide * y_wide) / 2).to(x.dtype)


class L2NormResidual(_Residual):
    r"""Return \(\sqrt{(x^2 + f(x)^2) / 2}\), entry by entry, which is non-negative.

    `branch`, shapes and errors are those of [`ConvexResidual`][orthonet.layers.ConvexResidual].

    Guarantee:
        If \(f\) is \(L\)-Lipschitz, the whole is \(\sqrt{(1 + L^2)/2}\)-Lipschitz, so
        1-Lipschitz for \(L \le 1\): the norm of a pair is 1-Lipschitz, hence the squared
        distance of two outputs is at most \(\frac12(\|x-x'\|^2 + \|f(x)-f(x')\|^2)\). Attained by
        \(f = \mathrm{id}\). The gradient is finite everywhere and 0 where \(x\) and \(f(x)\)
        vanish. Holds in train and eval.

    Examples:
        >>> L2NormResidual(nn.Identity())(torch.tensor([-2.0, 0.0]))
        tensor([2., 0.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return root_mean_square(x, self._branch(x))

    def lipschitz_bound(self, branch: float) -> float:
        r"""Return \(\sqrt{(1 + L^2) / 2}\) for a branch of constant L."""
        return math.sqrt((1 + branch * branch) / 2)


class PrescaledResidual(_Residual):
    r"""Return \((x + f(g\,x)) / (1 + g)\) with a learnable gain \(g > 0\) before the branch.

    The other arguments, shapes and errors are those of
    [`ConvexResidual`][orthonet.layers.ConvexResidual].

    Args:
        init: The initial \(g\), positive.

    Guarantee:
        If \(f\) is \(L\)-Lipschitz, the whole is \(((1 + gL) / (1 + g))\)-Lipschitz, so 1-Lipschitz
        for \(L \le 1\); attained by \(f = \mathrm{id}\). Holds in train and eval.

    Examples:
        >>> PrescaledResidual(nn.Identity(), init=3.0).lipschitz_bound(1.0)
        1.0
    """

    def __init__(
        self,
        branch: nn.Module,
        init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(branch)
        factory(self, device, dtype)
        number = isinstance(init, (int, float)) and not isinstance(init, bool)
        good = number and 0 < init < math.inf
        require(good, self, "init must be positive", "Use init=1.0", init=init)
        self.init = init
        self.log_gain = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        r"""Set \(g\) back to `init`; the branch is left as it is."""
        nn.init.constant_(self.log_gain, math.log(self.init))

    @property
    def gain(self) -> Tensor:
        r"""The gain \(g\), of shape (1,), in float32 at least."""
        wide = torch.promote_types(self.log_gain.dtype, torch.float32)
        return self.log_gain.to(wide).clamp(-20.0, 20.0).exp()

    def forward(self, x: Tensor) -> Tensor:
        real_input(self, x)
        gain = self.gain
        return ((x + self._branch((gain * x).to(x.dtype))) / (1 + gain)).to(x.dtype)

    def lipschitz_bound(self, branch: float) -> float:
        r"""Return \((1 + g L) / (1 + g)\) for a branch of constant L."""
        gain = self.gain.item()
        return 1.0 if branch == 1.0 else (1 + gain * branch) / (1 + gain)

    def extra_repr(self) -> str:
        return f"init={self.init:g}"
