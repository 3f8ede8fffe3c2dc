"""The nearest semi-orthogonal matrix as an orthogonalizer, and the choice that is made by shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet._torch import in_transform, is_exporting
from orthonet.linalg import cholesky_qr, polar
from orthonet.linalg._matrix import compute_dtype
from orthonet.linalg.polar import AtCentre, Decision, recentre_
from orthonet.reparametrizers._orthogonalizers import Orthogonalizer
from orthonet.reparametrizers._rounds import Rounds

__all__ = ["BatchedAutoOrthogonalization", "BatchedPolarOrthogonalization"]


_ROUNDS = Rounds()
_ROUNDS_ON_CPU = False  # for tests: take the accelerator's form everywhere


class BatchedPolarOrthogonalization(Orthogonalizer):
    r"""Nearest semi-orthogonal matrix, by the cheapest way the parameter allows.

    See [`polar`][orthonet.linalg.polar]: a few matrix products near the manifold, an
    eigendecomposition of the Gram matrix farther away, always ended by a measured residual. The
    result is the same as that of
    [`BatchedBjorckOrthogonalization`][orthonet.reparametrizers.BatchedBjorckOrthogonalization].

    **Warm start** (`warm=True`). The forward pass in training mode overwrites the parameter M by
    \(c\,U\) with \(c = \|M\|_F / \sqrt n\): the same point of the manifold and the same norm, so
    the scale of the gradient and what weight decay does to it stay. As an optimizer step moves it
    little, the next forward takes 2 to 4 products, and backward takes 2, since then \(H = c I\).
    After a jump (checkpoint, assignment, huge step) the measured residual leads back to the cold
    way; nothing is assumed about the parameter. The gradient is the exact one at the parameter as
    it then stands. A second forward before the optimizer steps, or the recomputation of a
    checkpointed one, finds it centred and writes nothing.

    Written is only an `nn.Parameter` itself (hence no normalizer before this module), in float32
    or float64, requiring gradient with gradients enabled; never in eval mode, under autocast,
    `torch.export`, `torch.func` transforms, or for plain tensors and subclasses
    (`functional_call`, DTensor): there `warm` changes nothing. `torch.compile` re-centres too,
    without a graph break. On an accelerator the number of passes of all such modules is read in one
    go, by the first of them that runs after an optimizer step; the others wait for nothing, unless
    a weight has jumped. Square [`OrthoLinear`][orthonet.layers.OrthoLinear] layers take their
    gradient from that of their input then.

    Under FSDP2, which lends a temporary parameter to the forward pass, so that what is written is
    lost, [`OrthoWeight`][orthonet.reparametrizers.OrthoWeight] takes the cold way, with the
    gradient at the parameter as it is.

    It is off by default because a parameter that changes in forward is not what everybody expects:
    leave it off with an optimizer that computes with a parameter of before the forward (LBFGS
    builds its curvature pairs so; SAM must restore a copy, not subtract its step); with parameters
    that an earlier penalty has saved for backward (autograd reports it); or when passing an
    `nn.Parameter` of another model to `functional_call`. No other start is kept for these cases: a
    factor of an earlier parameter does not commute with the present Gram matrix, so an iteration
    from it ends at another orthogonal matrix than the polar factor, unless it solves the Lyapunov
    equation of the gradient in forward too. That takes more products than the cold way and was
    slower at every size measured (`benchmarks/floor.py`, last table).

    Args:
        weight_shape: Shape (*batch, m, n) of the weights.
        warm: Re-centre the parameter in training.
        early_dtype: `torch.bfloat16` or `torch.float16`: the dtype of the products while the
            parameter is far from orthogonal, for devices on which they are cheap; the last ones are
            in full precision. Without `warm` the weight differs from the nearest orthogonal matrix
            by their rounding, and the gradient as much from that of the weight; see
            [`polar`][orthonet.linalg.polar]. With it, only jumps are affected, and the gradient is
            exact.

    Shape:
        Input and output: `weight_shape`.

    Guarantee:
        \(\max|\sigma - 1| \le 2\cdot 10^{-6}\) (float32), \(10^{-12}\) (float64) for every finite
        input, in train and eval mode, at every step, whatever `early_dtype`; finite gradients; no
        state of its own.

    Raises:
        ValueError: `weight_shape` is not a matrix shape, another argument is not one of those
            named, or the weight is not finite.

    Examples:
        >>> BatchedPolarOrthogonalization((3, 3))
        BatchedPolarOrthogonalization(weight_shape=(3, 3), warm=False)

    References:
        Higham, *Functions of Matrices*, 2008, chapter 8; Absil & Malick, *Projection-like
        retractions on matrix manifolds*, SIAM J. Optim. 22 (2012): re-centring is the polar
        retraction, applied when the weight is read.
    """

    def __init__(
        self,
        weight_shape: Sequence[int],
        warm: bool = False,
        early_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight_shape)
        _checks.one_of(self, (False, True), warm=warm)
        _checks.one_of(self, (None, torch.bfloat16, torch.float16), early_dtype=early_dtype)
        self.warm = warm
        self.early_dtype = early_dtype

    def _orthogonalize(self, w: Tensor) -> Tensor:
        centred = self.recentre_(w)
        if centred is None:
            return polar(w, early_dtype=self.early_dtype)
        return AtCentre.apply(w, *centred)  # type: ignore[return-value]

    def recentre_(self, w: Tensor) -> tuple[Tensor, Tensor | float] | None:
        """Overwrite `w` by c U and return U and c, (*batch, 1, 1) or a number.

        None where it must not be written.
        """
        if not (self.warm and self._may_write(w)):
            return None
        if self._fresh:
            self._fresh = False
        return recentre_(w, self._decision(w), self.early_dtype)

    def _decision(self, w: Tensor) -> Decision | None:
        """On an accelerator, what has been measured and read for all such modules at once."""
        if torch.compiler.is_compiling() or not (_ROUNDS_ON_CPU or not w.is_cpu):
            return None
        return _ROUNDS.decide(self, w)

    def _may_write(self, w: Tensor) -> bool:
        return (
            self.training
            and not is_exporting()
            and type(w) is nn.Parameter
            and w.requires_grad
            and w.dtype == compute_dtype(w.dtype)
            and torch.is_grad_enabled()
            and not torch.is_autocast_enabled(w.device.type)
            and not in_transform()
        )

    def extra_repr(self) -> str:
        early = "" if self.early_dtype is None else f", early_dtype={self.early_dtype}"
        return f"{super().extra_repr()}, warm={self.warm}{early}"


class BatchedAutoOrthogonalization(BatchedPolarOrthogonalization):
    r"""The fastest orthogonalizer for a shape and a device; `method(device)` tells which.

    | | CPU | accelerator |
    |---|---|---|
    | `warm=True` | polar, re-centring | polar, re-centring |
    | otherwise | Cholesky-QR2 | shifted Cholesky-QR |

    The CPU column follows `benchmarks/orthogonalizers.py`: at every shape there (64x64 to 512x512,
    2048x256, 16x64x64) Cholesky-QR2 is the fastest of the maps that leave the parameter alone, if
    not by much: Householder reflections without a normalizer ("QR alone" there) take 1.0 to 1.5
    times its CPU time on one thread, and the preset `QR_ORTHO_PARAMS`, of which a power iteration
    is part, 1.1 to 1.9 times. Re-centring is 1.6 to 2.1 times faster again. Cholesky-QR2 is as safe
    as the others, since it measures its residual and ends in the shifted round or in Householder
    reflections. On accelerators the shifted round is taken at once, as a failed attempt would have
    to be reported to the host; no time was measured there. Both entries of a row are the same map
    of the parameter, so a model that moves between devices keeps its weights. Re-centring is not
    allowed by default: whether the parameter may change in forward depends on the optimizer and on
    what else reads it, which cannot be seen from here.

    Args:
        weight_shape: Shape (*batch, m, n) of the weights.
        warm: Allow the re-centring of the parameter in training, see
            [`BatchedPolarOrthogonalization`][orthonet.reparametrizers.BatchedPolarOrthogonalization].

    Shape:
        Input and output: `weight_shape`.

    Guarantee:
        \(\max|\sigma - 1| \le 2\cdot 10^{-6}\) (float32), \(10^{-12}\) (float64) for every finite
        input; finite gradients; no state of its own.

    Raises:
        ValueError: `weight_shape` is not a matrix shape, or the weight is not finite.

    Examples:
        >>> BatchedAutoOrthogonalization((64, 32)).method("cpu")
        'cholesky'
        >>> BatchedAutoOrthogonalization((64, 32), warm=True).method("cpu")
        'polar'
    """

    def __init__(self, weight_shape: Sequence[int], warm: bool = False) -> None:
        super().__init__(weight_shape, warm)

    def recentre_(self, w: Tensor) -> tuple[Tensor, Tensor | float] | None:
        """As in the base class, where the choice is the polar factor."""
        return super().recentre_(w) if self.method(w.device) == "polar" else None

    def method(self, device: torch.device | str) -> str:
        """The choice on `device`: 'polar', 'cholesky' or 'shifted cholesky'."""
        if self.warm:
            return "polar"
        return "cholesky" if torch.device(device).type == "cpu" else "shifted cholesky"

    def _orthogonalize(self, w: Tensor) -> Tensor:
        method = self.method(w.device)
        if method == "polar":
            return super()._orthogonalize(w)
        return cholesky_qr(w, shifted=method == "shifted cholesky")

    def extra_repr(self) -> str:
        choices = {kind: self.method(kind) for kind in ("cpu", "cuda")}
        chosen = ", ".join(f"{kind}: {method}" for kind, method in choices.items())
        return f"{super().extra_repr()}, method=({chosen})"
