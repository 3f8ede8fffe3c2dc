"""Orthogonalizers: the second half of an `OrthoParams`, from any matrix to a semi-orthogonal one.

All share one call shape, `Batched...Orthogonalization(weight_shape, ...)`, and the protocol of
`torch.nn.utils.parametrize`: `forward` constrains, `right_inverse` accepts what is constrained.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from orthonet import _checks
from orthonet.errors import NotOnManifoldError
from orthonet.linalg import cholesky_qr, polar, polar_svd, qr, rotate_base
from orthonet.linalg.retraction import POLAR, QR, CenteredMap
from orthonet.linalg.unitary import polish
from orthonet.reparametrizers._normalizers import Step
from orthonet.reparametrizers.weight import relative_distance

__all__ = [
    "BatchedBjorckOrthogonalization",
    "BatchedCholeskyOrthogonalization",
    "BatchedExponentialOrthogonalization",
    "BatchedPolarOrthogonalization",
    "BatchedQROrthogonalization",
    "Orthogonalizer",
    "nearest_semi_orthogonal",
    "require_semi_orthogonal",
]


def nearest_semi_orthogonal(w: Tensor, owner: object, exactly: bool) -> tuple[Tensor, float]:
    """The polar factor of `w` and its relative distance; `w` itself with `exactly`, or a refusal.

    As `Weight._fit`, for weights whose values are all semi-orthogonal matrices.
    """
    if exactly:
        require_semi_orthogonal(owner, w)
        return w, 0.0
    u = polar_svd(w.double())
    return u, relative_distance(u, w)


def require_semi_orthogonal(owner: object, w: Tensor) -> None:
    r"""Raise unless every matrix of `w` has \(\max|\sigma - 1| \le \sqrt{\mathrm{eps}}\).

    Raises:
        NotOnManifoldError: with the distance in the message.
    """
    allowed = torch.finfo(w.dtype).eps ** 0.5
    distance = 0.0
    if w.numel():
        finite = bool(torch.isfinite(w).all())
        sigma = torch.linalg.svdvals(w.detach().double()) if finite else w.new_tensor(torch.nan)
        distance = float((sigma - 1.0).abs().amax())
    _checks.require(
        distance <= allowed,
        owner,
        f"the weight must be semi-orthogonal, all singular values 1 (to {allowed:.1e})",
        "Assign the nearest one, orthonet.linalg.polar(weight), if that is what you mean",
        NotOnManifoldError,
        distance=distance,
        shape=tuple(w.shape),
    )


class Orthogonalizer(Step, abc.ABC):
    """Base class: the shape and the assignment protocol that all orthogonalizers share.

    `right_inverse` returns a parameter that `forward` maps to the given weight. Off the manifold
    it raises [`NotOnManifoldError`][orthonet.errors.NotOnManifoldError], except in the first call
    of a fresh module: that is the one which `register_parametrization` makes with whatever the
    module's weight is, and the weight is then kept as the parameter, that is, projected.

    Args:
        weight_shape: Shape (*batch, m, n) of the weights.

    Attributes:
        centered: The map that a class computes, if it has a center: its parameters are then kept
            there after optimizer steps. A subclass computes something else, for all that is known:
            it has to name its map again.
        exact: Whether the gradient is that of the map, also away from its center.

    Raises:
        ValueError: `weight_shape` is not a matrix shape, or a weight is not finite.
    """

    centered: ClassVar[CenteredMap | None] = None
    exact: bool = True

    @property
    def map(self) -> CenteredMap | None:
        """`centered`, if the very class of the module names it."""
        return vars(type(self)).get("centered")

    @property
    def function(self) -> str:
        """The name of the map, which several classes compute; empty for one of its own."""
        return "" if self.map is None else self.map.name

    def __init__(self, weight_shape: Sequence[int]) -> None:
        super().__init__(weight_shape)
        self._fresh = True

    @abc.abstractmethod
    def _orthogonalize(self, w: Tensor) -> Tensor: ...

    def forward(self, w: Tensor) -> Tensor:
        """Return the semi-orthogonal matrices of `w`, shape `weight_shape`."""
        if self._fresh:
            self._fresh = False
        if w.shape != self.weight_shape:
            _checks.fail(
                self,
                f"the weight must have shape {self.weight_shape}",
                "Build the orthogonalizer with tuple(weight.shape)",
                shape=tuple(w.shape),
            )
        return self._orthogonalize(w)

    def right_inverse(self, w: Tensor) -> Tensor:
        """Return a parameter for the semi-orthogonal weight `w`."""
        if self._fresh:
            self._fresh = False
        else:
            require_semi_orthogonal(self, w)
        return w


class BatchedBjorckOrthogonalization(Orthogonalizer):
    r"""Nearest semi-orthogonal matrix by Björck iteration, always to working precision.

    Polynomials of certified error lead there in fewer products than the iteration takes, where they
    reach (condition numbers up to about 4; weights in training are closer). Beyond, up to `niters`
    steps \(W \leftarrow (1 + \beta) W - \beta W W^\top W\) bring the weight within their reach.
    What is not there then (ill-conditioned, rank-deficient, zero) is brought home by further steps
    or an SVD, see [`polar`][orthonet.linalg.polar]. The limit is the same on all ways.

    Args:
        weight_shape: Shape (*batch, m, n) of the weights.
        beta: Step size in (0, 1]; 0.5 converges quadratically.
        niters: Björck steps at most, before the further measures.
        pass_through: Take the gradient of the last step only,
            \(G \mapsto G - U\,\mathrm{sym}(U^\top G)\) for square weights, instead of the exact
            one. Two products instead of an eigendecomposition in backward; inexact where singular
            values of the parameter differ, which they do not after an optimizer step of a layer.

    Shape:
        Input and output: `weight_shape`.

    Guarantee:
        \(\max|\sigma - 1| \le 2\cdot 10^{-6}\) (float32), \(10^{-12}\) (float64) for every finite
        input; finite gradients; no state.

    Raises:
        ValueError: an argument is out of range, or the weight is not finite.

    References:
        Björck & Bowie (1971); Anil, Lucas & Grosse, *Sorting out Lipschitz function
        approximation*, ICML 2019.
    """

    centered = POLAR
    _shown = ("beta", "niters", "pass_through")

    def __init__(
        self,
        weight_shape: Sequence[int],
        beta: float = 0.5,
        niters: int = 12,
        pass_through: bool = False,
    ) -> None:
        super().__init__(weight_shape)
        _checks.in_range(self, 1e-3, 1.0, beta=beta)
        _checks.non_negative_int(self, niters=niters)
        self.beta = beta
        self.niters = niters
        self.pass_through = pass_through
        self.exact = not pass_through

    def _orthogonalize(self, w: Tensor) -> Tensor:
        if not self.pass_through:
            return polar(w, beta=self.beta, niters=self.niters)
        u = polar(w.detach(), beta=self.beta, niters=self.niters)
        return polish(u + (w - w.detach()))  # the value of u with the gradient of w


class BatchedPolarOrthogonalization(Orthogonalizer):
    r"""Nearest semi-orthogonal matrix, by the cheapest way the parameter allows.

    See [`polar`][orthonet.linalg.polar]: a few matrix products near the manifold, an
    eigendecomposition of the Gram matrix farther away, always ended by a measured residual. The
    result is the same as that of
    [`BatchedBjorckOrthogonalization`][orthonet.reparametrizers.BatchedBjorckOrthogonalization].

    Args:
        weight_shape: Shape (*batch, m, n) of the weights.

    Shape:
        Input and output: `weight_shape`.

    Guarantee:
        \(\max|\sigma - 1| \le 2\cdot 10^{-6}\) (float32), \(10^{-12}\) (float64) for every finite
        input, in train and eval mode; finite gradients; no state.

    Examples:
        >>> BatchedPolarOrthogonalization((3, 3))
        BatchedPolarOrthogonalization(weight_shape=(3, 3))

    References:
        Higham, *Functions of Matrices*, 2008, chapter 8; Absil & Malick, *Projection-like
        retractions on matrix manifolds*, SIAM J. Optim. 22 (2012).
    """

    centered = POLAR

    def _orthogonalize(self, w: Tensor) -> Tensor:
        return polar(w)


class BatchedCholeskyOrthogonalization(Orthogonalizer):
    r"""Orthogonal factor by Cholesky-QR2, \(W = Q R\) (wide weights: \(W = L Q\)).

    See [`cholesky_qr`][orthonet.linalg.cholesky_qr]: two rounds, a shifted round or Householder
    reflections where the Gram matrix is too ill-conditioned, an exact gradient that keeps
    only Q and R.

    Args:
        weight_shape: Shape (*batch, m, n) of the weights.
        stable: Begin with the shifted round always, for parameters whose condition number
            exceeds about 1e3 in float32.

    Shape:
        Input and output: `weight_shape`.

    Guarantee:
        \(\max|\sigma - 1| \le 2\cdot 10^{-6}\) (float32), \(10^{-12}\) (float64) for every finite
        input; finite gradients; no state.

    References:
        Fukaya et al. (2020); Hu, Leino, Wang & Fredrikson, *A recipe for improved certifiable
        robustness*, ICLR 2024, for the use in Lipschitz networks.
    """

    centered = QR
    _shown = ("stable",)

    def __init__(self, weight_shape: Sequence[int], stable: bool = False) -> None:
        super().__init__(weight_shape)
        _checks.boolean(self, stable=stable)
        self.stable = stable

    def _orthogonalize(self, w: Tensor) -> Tensor:
        return cholesky_qr(w, shifted=self.stable)


class BatchedQROrthogonalization(Orthogonalizer):
    r"""Orthogonal factor by Householder QR with a non-negative diagonal of R.

    Args:
        weight_shape: Shape (*batch, m, n) of the weights.

    Shape:
        Input and output: `weight_shape`.

    Guarantee:
        \(\max|\sigma - 1| \le 2\cdot 10^{-6}\) (float32), \(10^{-12}\) (float64) for every finite
        input, zero included; finite gradients; no state.
    """

    centered = QR

    def _orthogonalize(self, w: Tensor) -> Tensor:
        return qr(w)


class BatchedExponentialOrthogonalization(Orthogonalizer):
    r"""Rotation of a base by the exponential of a skew-symmetric matrix.

    \(Q = e^{W B^\top - B W^\top} B\) for tall weights (wide ones by transposition), with the buffer
    `base` B. At first B holds the leading columns of the identity: then a square weight gives
    \(e^{W - W^\top}\), and a rectangular one is padded by zeros, exponentiated and cropped.
    Assigning X moves the base to X, with the parameter X, where the map is X itself and its
    differential reaches every tangent direction: any semi-orthogonal X can be assigned, of
    either determinant.

    Args:
        weight_shape: Shape (*batch, m, n) of the weights.
        niters: Degree of the Taylor polynomial, before squaring.

    Shape:
        Input and output: `weight_shape`.

    Guarantee:
        \(\max|\sigma - 1| \le 2\cdot 10^{-6}\) (float32), \(10^{-12}\) (float64) for weights of
        norm up to about 100 (normalized weights have norm 1). The base changes on assignment only.

    Raises:
        ValueError: an argument is out of range, or the weight is not finite.

    References:
        Lezcano-Casado & Martínez-Rubio, *Cheap orthogonal constraints in neural networks*, ICML
        2019; Singla & Feizi, *Skew orthogonal convolutions*, ICML 2021.
    """

    _shown = ("niters",)
    base: Tensor

    def __init__(self, weight_shape: Sequence[int], niters: int = 7) -> None:
        super().__init__(weight_shape)
        _checks.positive_int(self, niters=niters)
        self.niters = niters
        eye = torch.eye(*self.weight_shape[-2:])
        self.register_buffer("base", eye.expand(self.weight_shape).clone())

    def _orthogonalize(self, w: Tensor) -> Tensor:
        return rotate_base(w, self.base.to(w.dtype), degree=self.niters)

    def right_inverse(self, w: Tensor) -> Tensor:
        """Move the base to the semi-orthogonal weight `w` and return `w`."""
        base = polar(w.detach()) if self._fresh else w.detach()
        super().right_inverse(w)
        self.base.copy_(base)
        return base.clone()
