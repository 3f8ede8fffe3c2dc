"""What recurrent cells and layers share: named recurrent kernels that are kept orthogonal."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.errors import ProjectionWarning
from orthonet.linalg import haar
from orthonet.linalg._matrix import compute_dtype
from orthonet.reparametrizers import OrthoParams, OrthoWeight

__all__ = ["INITIALIZATIONS", "RecurrentKernels", "initial_kernel"]

INITIALIZATIONS = ("haar", "henaff", "cayley", "identity")


def initial_kernel(
    shape: Sequence[int],
    init: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""An orthogonal matrix (or batch) to start a recurrent kernel from.

    `"henaff"` and `"cayley"` are block diagonal with 2x2 rotations by independent angles, uniform
    in \((-\pi, \pi)\) and in \((0, \pi/2)\); the last entry of an odd size is 1. A rectangular
    matrix gets the leading rows or columns.

    References:
        Henaff, Szlam & LeCun, *Recurrent orthogonal networks and long-memory tasks*, ICML 2016;
        Helfrich, Willmott & Ye, *Orthogonal recurrent neural networks with scaled Cayley
        transform*, ICML 2018, for the angles of `"cayley"`.
    """
    *batch, m, n = shape
    if init == "haar":
        return haar(shape, dtype=dtype, device=device, generator=generator)
    size = max(m, n)
    matrix = torch.eye(size, dtype=dtype, device=device).repeat(*batch, 1, 1)
    if init != "identity":
        draw = torch.rand(*batch, size // 2, dtype=dtype, device=device, generator=generator)
        angle = (2 * draw - 1) * math.pi if init == "henaff" else draw * (math.pi / 2)
        even = torch.arange(0, size - 1, 2, device=device)
        odd = even + 1
        matrix[..., even, even] = matrix[..., odd, odd] = angle.cos()
        matrix[..., even, odd] = -angle.sin()
        matrix[..., odd, even] = angle.sin()
    return matrix[..., :m, :n].contiguous()


class RecurrentKernels:
    """Mixin before an `nn` class: some named matrices are computed by sub-modules.

    `recurrent[name]` owns the raw parameter of the matrix `name`, for example `weight_hh_l0`.
    Reading the attribute of that name gives the matrix as the `nn` twin stores it, with the gates
    one below the other; assigning sets it, if it is orthogonal.
    """

    recurrent: nn.ModuleDict
    init: str

    def _add_kernel(
        self,
        name: str,
        shape: Sequence[int],
        ortho_params: OrthoParams,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Register an orthogonal matrix, or a stack of one for each gate."""
        sizes = tuple(shape)
        self.recurrent[name] = OrthoWeight(sizes, ortho_params, device, dtype)

    def _kernel(self, name: str) -> Tensor:
        """The matrix, gates one below the other, in the dtype of the computation."""
        weight = self.recurrent[name]()
        weight = weight.to(compute_dtype(weight.dtype))
        return weight if weight.ndim == 2 else weight.flatten(0, 1)

    def __getattr__(self, name: str) -> Any:
        kernels = self.__dict__.get("_modules", {}).get("recurrent")
        if kernels is not None and name in kernels:
            weight = kernels[name]()
            return weight if weight.ndim == 2 else weight.flatten(0, 1)
        return super().__getattr__(name)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        kernels = self.__dict__.get("_modules", {}).get("recurrent")
        if kernels is None or name not in kernels:
            super().__setattr__(name, value)
            return
        _checks.require(
            isinstance(value, Tensor), self, f"{name} must be a tensor", "Assign a tensor",
            **{name: type(value)},
        )  # fmt: skip
        kernels[name].assign_(self._unstacked(name, value), self)

    def project_(self, name: str, weight: Tensor) -> float:
        r"""Set the matrix `name` to the orthogonal one nearest to `weight`, gate by gate.

        Args:
            name: The name in the `nn` twin, e.g. `"weight_hh_l0"`.
            weight: A matrix of the shape that the twin stores.

        Returns:
            The relative distance \(\|W_{new} - W\|_F / \|W\|_F\) that the projection moved it.

        Raises:
            ValueError: an unknown name, another shape, or a weight that is not finite.
        """
        _checks.one_of(self, tuple(self.recurrent), name=name)
        kernel: Any = self.recurrent[name]
        return kernel.project_(self._unstacked(name, weight), self)

    def _unstacked(self, name: str, weight: Tensor) -> Tensor:
        kernel: Any = self.recurrent[name]
        shape = tuple(kernel.shape)
        stored = shape if len(shape) == 2 else (shape[0] * shape[1], shape[2])
        _checks.require(
            weight.shape == stored, self, f"{name} must have shape {stored}", "Transpose it",
            **{name: weight},
        )  # fmt: skip
        return weight.detach().reshape(shape)

    @torch.no_grad()
    def _reset_kernels(self) -> None:
        for name, module in self.recurrent.items():
            kernel: Any = module
            kernel.reset_parameters()
            original = next(module.parameters())
            if self.init != "haar" and not original.is_meta and name.startswith("weight_hh"):
                dtype = compute_dtype(original.dtype)
                start = initial_kernel(kernel.shape, self.init, device=original.device, dtype=dtype)
                kernel.assign_(start, self)

    @torch.no_grad()
    def update_base(self) -> None:
        """Make every recurrent kernel the base of its own trivialization (dynamic trivialization).

        The kernels keep their values. With an exponential or Cayley parametrization the gradient at
        the base is the Riemannian one, so that plain SGD with an update after every step is
        Riemannian gradient descent. State that an optimizer keeps for the old coordinates
        (momentum, second moments) is not translated.
        """
        for module in self.recurrent.values():
            kernel: Any = module
            kernel.assign_(kernel.compute(), self)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Also accept the kernels of the `nn` twin: they are projected, with a warning."""
        moved = 0.0
        for name in self.recurrent:
            plain, own = f"{prefix}{name}", f"{prefix}recurrent.{name}."
            if plain not in state_dict or any(key.startswith(own) for key in state_dict):
                continue
            weight = state_dict.pop(plain)
            try:
                kernel, distance = self._projected(name, weight)
            except ValueError as error:
                error_msgs.append(f"{plain}: {error}")
                continue
            if distance > torch.finfo(weight.dtype).eps ** 0.5:
                moved = max(moved, distance)
            state_dict.update(kernel.state_dict(prefix=own))
        if moved:
            sentence = _checks.message(
                self,
                "plain recurrent kernels were loaded and projected onto the constraint",
                "Fine-tune, or load a checkpoint of this class to keep its weights exactly",
                largest_relative_distance=round(moved, 6),
            )
            warnings.warn(sentence, ProjectionWarning, stacklevel=2)
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _projected(self, name: str, weight: Tensor) -> tuple[nn.Module, float]:
        """A copy of a kernel that holds the projection of `weight`."""
        kernel: Any = copy.deepcopy(self.recurrent[name])
        if any(t.is_meta for t in kernel.state_dict().values()):
            device = torch.device("cpu") if weight.is_meta else weight.device
            kernel = kernel.to_empty(device=device)
            kernel.reset_parameters()
        return kernel, kernel.project_(self._unstacked(name, weight), self)


def uniform_(parameters: Sequence[Tensor], bound: float) -> None:
    """Fill parameters that are not on the meta device uniformly in (-bound, bound)."""
    for parameter in parameters:
        if not parameter.is_meta:
            nn.init.uniform_(parameter, -bound, bound)


def check_nonlinearity(
    owner: object, choices: Sequence[str], nonlinearity: str, hidden_size: int
) -> None:
    """One of the choices, and an even size where channels are paired."""
    _checks.one_of(owner, choices, nonlinearity=nonlinearity)
    _checks.require(
        nonlinearity != "max_min" or hidden_size % 2 == 0,
        owner,
        "hidden_size must be even for nonlinearity='max_min'",
        "Add or drop a feature",
        hidden_size=hidden_size,
    )
