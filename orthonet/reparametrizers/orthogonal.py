"""The sub-module of a layer that owns the raw parameter of one orthogonal matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from orthonet import _checks, _torch
from orthonet.linalg import haar
from orthonet.linalg.distributed import whole
from orthonet.linalg.matrix import compute_dtype
from orthonet.linalg.retraction import POLAR, QR, CenteredMap
from orthonet.reparametrizers._normalizers import BatchedIdentity, BatchedPowerIteration
from orthonet.reparametrizers.orthogonalizers import Orthogonalizer, nearest_semi_orthogonal
from orthonet.reparametrizers.params import (
    DEFAULT_ORTHO_PARAMS,
    OrthoParams,
    described,
    read_params,
)
from orthonet.reparametrizers.recorded import RecordedWeight
from orthonet.reparametrizers.weight import GIVEN, settled

__all__ = ["IDENTITY", "OrthoWeight"]

IDENTITY = "identity"  # the function of a matrix that is a parameter itself

_SCALING = (BatchedIdentity, BatchedPowerIteration)  # they multiply by a positive number


class OrthoWeight(RecordedWeight):
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

    Note:
        Orthogonalizers of the polar and the QR map do not depend on a positive factor, so that the
        normalizers of this library need not run in front of them.
    """

    opaque = True

    def __init__(
        self,
        shape: Sequence[int],
        ortho_params: OrthoParams | str = DEFAULT_ORTHO_PARAMS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = _checks.weight_shape(self, shape)
        ortho_params = read_params(self, ortho_params)
        _checks.factory(self, device, dtype)
        self.original = nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))
        normalizer, orthogonalizer = ortho_params.build(sizes)
        self.normalizer = normalizer.to(self.original)
        self.orthogonalizer = orthogonalizer.to(self.original)
        self.reset_parameters()

    @property
    def shape(self) -> torch.Size:
        """Shape (*batch, m, n) of the matrix."""
        return self.original.shape

    @property
    def map(self) -> CenteredMap | None:
        """That of the orthogonalizer, where the normalizer does not change the result."""
        cls = type(self)
        if cls.evaluate is not OrthoWeight.evaluate or cls.compute is not OrthoWeight.compute:
            return None  # a subclass computes something else
        if type(self.normalizer) not in _SCALING or _torch.is_hooked(self.normalizer):
            return None
        step = self.orthogonalizer
        if not isinstance(step, Orthogonalizer) or _torch.is_hooked(step):
            return None
        return step.map

    @property
    def made_by(self) -> str:
        """The function, the normalizer and the orthogonalizer, as `state_dict` holds them."""
        scaled = type(self.normalizer) in _SCALING
        function = getattr(self.orthogonalizer, "function", "") if scaled else ""
        return f"{function} | {described(self.normalizer)}, {described(self.orthogonalizer)}"

    def accepts(self, made_by: str) -> bool:
        """Whether a parameter of a weight made so gives the same weight here.

        Matrices of `orthonet.convert.on_manifold` are parameters of themselves for the polar and
        the QR map; a model of it looks at the matrices that are loaded.
        """
        functions = {self.made_by.split(" | ")[0], made_by.split(" | ")[0]}
        return super().accepts(made_by) or (
            IDENTITY in functions and functions <= {IDENTITY, POLAR.name, QR.name}
        )

    def evaluate(self) -> Tensor:
        """Compute the constrained matrix, in the dtype of `original`."""
        return self.compute().to(self.original.dtype)

    def compute(self) -> Tensor:
        """Return the constrained matrix in the dtype of the computation, float32 at least."""
        stored = self.original
        with _torch.without_autocast(stored):
            # A shard of FSDP2, outside of the forward pass of its unit, is gathered by all
            # processes.
            w = settled(whole(stored)).to(compute_dtype(stored.dtype))
            # A positive factor changes neither the value nor the exact gradient of such a map.
            exact = self.map is not None and getattr(self.orthogonalizer, "exact", False)
            return self.orthogonalizer(w if exact else self.normalizer(w))

    def as_part(self) -> Tensor:
        """As `compute`, for a kernel: what was given, and what hooks (of pruning) make of it."""
        return self() if GIVEN in vars(self) or _torch.is_hooked(self) else self.compute()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a matrix from the Haar distribution; nothing happens on the meta device."""
        if self.original.is_meta:
            return
        for step in (self.normalizer, self.orthogonalizer):  # of a user's own
            reset = getattr(step, "reset_parameters", None)
            if reset is not None:
                reset()
        dtype = compute_dtype(self.original.dtype)
        self._set(haar(self.original.shape, dtype=dtype, device=self.original.device))

    @torch.no_grad()
    def update_base(self) -> None:
        """Make the matrix itself, before it is rounded to the storage dtype, the parameter."""
        self.assign_(self.compute())

    def _fit(self, w: Tensor, owner: object, exactly: bool) -> tuple[Tensor, float]:
        self._require_shape(w, owner)
        return nearest_semi_orthogonal(w, owner, exactly)

    def _set(self, fitted: Tensor) -> None:
        value = fitted.to(device=self.original.device, dtype=compute_dtype(self.original.dtype))
        for step in (self.orthogonalizer, self.normalizer):
            inverse = getattr(step, "right_inverse", None)
            value = value if inverse is None else inverse(value)
        self.original.copy_(value)

    def extra_repr(self) -> str:
        """Return the shape."""
        return f"shape={tuple(self.original.shape)}"
