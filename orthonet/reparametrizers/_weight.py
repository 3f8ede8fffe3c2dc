"""The sub-module of a layer that owns the raw parameter of one orthogonal matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet._torch import without_autocast
from orthonet.linalg import haar, polar_svd
from orthonet.linalg._matrix import compute_dtype
from orthonet.linalg._ranks import whole
from orthonet.reparametrizers._cache import CachedWeight
from orthonet.reparametrizers._group import Group
from orthonet.reparametrizers._normalizers import BatchedIdentity
from orthonet.reparametrizers._orthogonalizers import require_semi_orthogonal
from orthonet.reparametrizers._params import DEFAULT_ORTHO_PARAMS, OrthoParams

__all__ = ["OrthoWeight"]


class OrthoWeight(CachedWeight):
    r"""A semi-orthogonal matrix (or batch): `original`, a normalizer and an orthogonalizer.

    Calling it computes `orthogonalizer(normalizer(original))` in float32 at least, also under
    autocast and for half-precision storage, and returns the result in the dtype of `original`.

    Args:
        shape: (*batch, m, n).
        ortho_params: Which normalizer and orthogonalizer.
        device: Device of the parameter.
        dtype: Floating-point dtype of the parameter.

    Shape:
        Output: `shape`.

    Guarantee:
        That of the orthogonalizer, up to the rounding of the storage dtype.
    """

    _group: Group | None = None  # set by `fuse`

    def __init__(
        self,
        shape: Sequence[int],
        ortho_params: OrthoParams = DEFAULT_ORTHO_PARAMS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = _checks.weight_shape(self, shape)
        _checks.require(
            dtype is None or dtype.is_floating_point,
            self,
            "dtype must be a real floating-point dtype",
            "Choose torch.float32 or torch.float64; orthonet.unitary(module, name) constrains "
            "complex tensors",
            dtype=dtype,
        )
        self.original = nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))
        normalizer, orthogonalizer = ortho_params.build(sizes)
        self.normalizer = normalizer.to(self.original)
        self.orthogonalizer = orthogonalizer.to(self.original)
        self.reset_parameters()

    @property
    def shape(self) -> torch.Size:
        """Shape (*batch, m, n) of the matrix."""
        return self.original.shape

    def forward(self) -> Tensor:
        """Return the constrained matrix, in the dtype of `original`."""
        if self._group is not None and not torch.compiler.is_compiling():
            value = self._group.value(self)  # kept by the group
            if value is not None:
                return value.to(self.original.dtype)
        return super().forward()

    def evaluate(self) -> Tensor:
        """Compute the constrained matrix, in the dtype of `original`."""
        return self.compute().to(self.original.dtype)

    def compute(self) -> Tensor:
        """Return the constrained matrix in the dtype of the computation, float32 at least."""
        if self._group is not None and not torch.compiler.is_compiling():
            value = self._group.value(self)
            if value is not None:
                return value
        with without_autocast(self.original):
            return self._constrain(self.original)

    def _constrain(self, stored: Tensor) -> Tensor:
        # A shard of FSDP2, outside of the forward pass of its unit, is gathered by all processes.
        stored = whole(stored).to(compute_dtype(stored.dtype))
        # A view is no parameter, so a warm orthogonalizer does not write to it.
        return self.orthogonalizer(
            self.normalizer(stored.view_as(stored) if self._sharded else stored)
        )

    def recentre_(self) -> tuple[Tensor, Tensor | float] | None:
        """Re-centre `original` to c U and return U, c; None unless a forward pass would do so."""
        method = getattr(self.orthogonalizer, "recentre_", None)
        if method is None or self._sharded or type(self.normalizer) is not BatchedIdentity:
            return None
        return method(self.original)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a matrix from the Haar distribution; nothing happens on the meta device."""
        if self.original.is_meta:
            return
        reset = getattr(self.normalizer, "reset_parameters", None)
        if reset is not None:
            reset()
        dtype = compute_dtype(self.original.dtype)
        self._set(haar(self.original.shape, dtype=dtype, device=self.original.device))

    @torch.no_grad()
    def assign_(self, w: Tensor, owner: object = None) -> None:
        """Make the semi-orthogonal `w` the value of the matrix; errors name `owner`.

        Raises:
            ValueError: `w` has another shape.
            NotOnManifoldError: `w` is not semi-orthogonal; nothing has been changed.
        """
        self._require_shape(w, owner)
        require_semi_orthogonal(owner or self, w)
        self._set(w)

    @torch.no_grad()
    def project_(self, w: Tensor, owner: object = None) -> float:
        r"""Make the polar factor of `w` the value and return \(\|U - W\|_F / \|W\|_F\).

        Raises:
            ValueError: `w` has another shape or is not finite; nothing has been changed.
        """
        self._require_shape(w, owner)
        work = w.double()
        u = polar_svd(work)
        self._set(u.to(compute_dtype(self.original.dtype)))
        norm = float(torch.linalg.vector_norm(work))
        return float(torch.linalg.vector_norm(u - work)) / norm if norm > 0 else float("inf")

    def _require_shape(self, w: Tensor, owner: object) -> None:
        _checks.require(
            isinstance(w, Tensor) and w.shape == self.original.shape,
            owner or self,
            f"the weight must have shape {tuple(self.original.shape)}",
            "Transpose or reshape it",
            weight=w,
        )

    def _set(self, w: Tensor) -> None:
        value = w.to(device=self.original.device, dtype=compute_dtype(self.original.dtype))
        for step in (self.orthogonalizer, self.normalizer):
            inverse = getattr(step, "right_inverse", None)
            value = value if inverse is None else inverse(value)
        self.original.copy_(value)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.original.shape)}"
