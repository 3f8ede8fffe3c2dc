"""Spectral normalizers: the first half of an `OrthoParams`, bringing a matrix to unit scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.errors import NotOnManifoldError
from orthonet.linalg.matrix import compute_dtype, rms_scale
from orthonet.linalg.spectral import rounds

__all__ = ["BatchedIdentity", "BatchedPowerIteration", "L2Normalize", "Step"]


class Step(nn.Module):
    """Base class of normalizers and orthogonalizers: made for one shape, shown with its options."""

    _shown: ClassVar[tuple[str, ...]] = ()  # the arguments after the shape

    def __init__(self, weight_shape: Sequence[int]) -> None:
        super().__init__()
        self.weight_shape = _checks.weight_shape(self, weight_shape)

    def right_inverse(self, w: Tensor) -> Tensor:
        """Return a matrix for which the step returns `w`: `w` itself."""
        return w

    def extra_repr(self) -> str:
        names = ("weight_shape", *self._shown)
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class BatchedIdentity(Step):
    """No normalization: for orthogonalizers that bear any scale.

    Args:
        weight_shape: Shape (*batch, m, n) of the weights.

    Shape:
        Input and output: `weight_shape`.
    """

    def forward(self, w: Tensor) -> Tensor:
        """Return `w`."""
        return w


class BatchedPowerIteration(Step):
    r"""Divide each matrix by a power-iteration estimate of its spectral norm.

    \(W / (\sigma + \mathrm{eps}\,s)\) with \(\sigma = u^\top W v\) after `power_it_niter` rounds
    that start from a fixed vector, and \(s\) the root mean square singular value (so that `eps` is
    relative to the scale of W; a constant for autograd).

    It has no state: the same matrix gives the same result in training and in evaluation, and
    nothing is written. Vectors kept from step to step would make the estimate closer, at the price
    of a buffer that a forward pass writes.

    Args:
        weight_shape: Shape (*batch, m, n) of the weights.
        power_it_niter: Rounds per call, at least 1.
        eps: Relative guard against division by zero.

    Shape:
        Input and output: `weight_shape`.

    Guarantee:
        The estimate is from below, so the result may have a norm above 1; zero stays zero. The
        orthogonalizers of this library accept any scale and do not rely on it. `right_inverse` is
        exact for weights of unit norm.

    Raises:
        ValueError: `weight_shape`, `power_it_niter` or `eps` is out of range.

    References:
        Miyato, Kataoka, Koyama & Yoshida, *Spectral normalization for GANs*, ICLR 2018.
    """

    _shown = ("power_it_niter", "eps")

    def __init__(
        self, weight_shape: Sequence[int], power_it_niter: int = 3, eps: float = 1e-12
    ) -> None:
        super().__init__(weight_shape)
        _checks.positive_int(self, power_it_niter=power_it_niter)
        _checks.in_range(self, 0.0, 1.0, eps=eps)
        self.power_it_niter = power_it_niter
        self.eps = eps

    def start(self, w: Tensor) -> Tensor:
        """Return the unit vectors at which the rounds start."""
        angles = torch.arange(1, w.shape[-2] + 1, dtype=w.dtype, device=w.device)
        start = torch.cos(angles.square_())
        return (start / torch.linalg.vector_norm(start)).expand(w.shape[:-1])

    def forward(self, w: Tensor) -> Tensor:
        r"""Return `w` divided by its estimated norm."""
        scale = rms_scale(w.detach())
        x = w / scale
        u, v = rounds(x, self.start(w).unsqueeze(-1), self.power_it_niter)
        sigma = (u * (x @ v)).sum(-2, keepdim=True)
        return x / (sigma + self.eps).clamp_min(torch.finfo(x.dtype).tiny ** 0.5)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Also accept the vectors `u` that checkpoints held before."""
        state_dict.pop(f"{prefix}u", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class L2Normalize(nn.Module):
    r"""Divide by the Euclidean norm, over one dimension or over all: \(w / \|w\|_2\).

    A zero vector has no direction: it maps to the constant vector of unit norm.

    Args:
        dtype: Least precision of the computation; the norm is taken in the wider of `dtype`,
            float32 and the dtype of the input.
        dim: Dimension of the vectors; None takes the whole tensor as one vector.

    Shape:
        Any; the output has the shape and dtype of the input.

    Guarantee:
        Unit norm to rounding in the dtype of the input.

    Raises:
        ValueError: `dtype` is not a floating-point dtype.
        NotOnManifoldError: `right_inverse` of a tensor whose vectors do not have unit norm.
    """

    def __init__(self, dtype: torch.dtype, dim: int | None = None) -> None:
        super().__init__()
        _checks.require(
            isinstance(dtype, torch.dtype) and dtype.is_floating_point,
            self,
            "dtype must be a floating-point torch.dtype",
            "Pass e.g. torch.float32",
            dtype=dtype,
        )
        self.dtype = dtype
        self.dim = dim

    def _norm(self, w: Tensor) -> Tensor:
        return torch.linalg.vector_norm(w, dim=self.dim, keepdim=True)

    def forward(self, w: Tensor) -> Tensor:
        """Return the normalized tensor."""
        if w.numel() == 0:
            return w
        work = w.to(torch.promote_types(compute_dtype(w.dtype), self.dtype))
        largest = work.detach().abs().amax(() if self.dim is None else self.dim, keepdim=True)
        work = work / torch.where(largest > 0, largest, 1.0)
        norm = self._norm(work)
        constant = work + (work.numel() // norm.numel()) ** -0.5
        return torch.where(norm > 0, work / torch.where(norm > 0, norm, 1.0), constant).to(w.dtype)

    def right_inverse(self, w: Tensor) -> Tensor:
        """Return `w` if its vectors have unit norm."""
        distance = float((self._norm(w.detach().double()) - 1.0).abs().amax()) if w.numel() else 0.0
        allowed = 1e3 * torch.finfo(w.dtype).eps
        _checks.require(
            distance <= allowed,
            self,
            f"vectors must have unit norm (to {allowed:.1e})",
            "Normalize it first, e.g. torch.nn.functional.normalize",
            NotOnManifoldError,
            distance=distance,
        )
        return w

    def extra_repr(self) -> str:
        return f"dtype={self.dtype}, dim={self.dim}"
