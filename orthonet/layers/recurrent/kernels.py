"""What recurrent cells and layers share: named recurrent kernels that are kept orthogonal."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.layers._base import ReadsPlain
from orthonet.linalg.matrix import compute_dtype
from orthonet.manifolds import Stiefel
from orthonet.manifolds.trivialization import Triv
from orthonet.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams, OrthoWeight, Weight
from orthonet.reparametrizers.orthogonalizers import nearest_semi_orthogonal
from orthonet.reparametrizers.params import read_params
from orthonet.reparametrizers.recorded import RecordedWeight, keep_if_refused
from orthonet.reparametrizers.weight import settled

__all__ = [
    "INITIALIZATIONS",
    "RecurrentKernels",
    "TrivializedWeight",
    "check_nonlinearity",
    "uniform_",
]

INITIALIZATIONS = ("haar", "henaff", "torus", "cayley", "identity")


class TrivializedWeight(RecordedWeight):
    """An orthogonal matrix (or stack) by a map from the skew-symmetric ones, around a base.

    Args:
        shape: (*batch, m, n).
        triv: "exponential", "cayley" or a map of skew-symmetric matrices.
        device: Device of the parameter.
        dtype: Floating-point dtype of the parameter.
    """

    def __init__(
        self,
        shape: Sequence[int],
        triv: Triv,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.trivialization = Stiefel().parametrization(tuple(shape), triv=triv)
        coordinates = torch.zeros(self.trivialization.coordinate_shape, device=device, dtype=dtype)
        self.original = nn.Parameter(coordinates)
        self.trivialization.to(device=device, dtype=self.original.dtype)
        self._triv: Any = getattr(self.trivialization, "triv", triv)  # without its aliases

    @property
    def made_by(self) -> str:
        """The map from skew-symmetric matrices, as `state_dict` holds it."""
        return f" | triv={getattr(self._triv, '__name__', self._triv)}"

    @property
    def shape(self) -> torch.Size:
        """Shape (*batch, m, n) of the matrix."""
        return torch.Size(self.trivialization.shape)

    def evaluate(self) -> Tensor:
        """Compute the matrix, in the dtype of `original`."""
        return self.trivialization(settled(self.original))

    def reset_parameters(self) -> None:
        """Draw a matrix from the Haar distribution; nothing happens on the meta device."""
        if not self.original.is_meta:
            self.assign_(self.trivialization.sample(device=self.original.device))

    def _fit(self, w: Tensor, owner: object, exactly: bool) -> tuple[Tensor, float]:
        self._require_shape(w, owner)
        return nearest_semi_orthogonal(w, owner, exactly)

    def _set(self, fitted: Tensor) -> None:
        """Make it the base, with zero coordinates."""
        value = fitted.to(device=self.original.device, dtype=compute_dtype(self.original.dtype))
        self.original.copy_(self.trivialization.right_inverse(value, project=True))

    @torch.no_grad()
    def update_base(self) -> None:
        """Move the base to the present matrix."""
        coordinates, *_ = self.trivialization.update_base(self.original)
        self.original.copy_(coordinates)


class RecurrentKernels(ReadsPlain, nn.Module):
    """Mixin before an `nn` class: some named matrices are computed by sub-modules.

    `recurrent[name]` owns the raw parameter of the matrix `name`, for example `weight_hh_l0`.
    Reading the attribute of that name gives the matrix as the `nn` twin stores it, with the gates
    one below the other; assigning sets it, if it is orthogonal.
    """

    recurrent: nn.ModuleDict
    init: str

    def _kernel_options(
        self, ortho_params: OrthoParams | str, triv: Triv | None, init: str
    ) -> None:
        """Check and keep how the kernels are made and where they start."""
        _checks.one_of(self, INITIALIZATIONS, init=init)
        ortho_params = read_params(self, ortho_params)
        _checks.require(
            triv is None or ortho_params == DEFAULT_ORTHO_PARAMS,
            self,
            "a kernel must be made either by ortho_params or by triv",
            "Pass one of the two",
            triv=triv,
        )
        self.init, self._made_by = init, ortho_params if triv is None else triv

    def _add_kernel(
        self,
        name: str,
        shape: Sequence[int],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Register an orthogonal matrix, or a stack of one for each gate."""
        made_by = self._made_by
        if isinstance(made_by, OrthoParams):
            self.recurrent[name] = OrthoWeight(tuple(shape), made_by, device, dtype)
        else:
            self.recurrent[name] = TrivializedWeight(shape, made_by, device, dtype)

    def _weight_of(self, name: str) -> Weight:
        return cast(Weight, self.recurrent[name])

    def _kernel(self, name: str) -> Tensor:
        """Return the matrix, gates one below the other, in the dtype of the computation."""
        weight = self.recurrent[name]()
        weight = weight.to(compute_dtype(weight.dtype))
        return weight if weight.ndim == 2 else weight.flatten(0, 1)

    def __getattr__(self, name: str) -> Any:
        kernels = self.__dict__.get("_modules", {}).get("recurrent")
        if kernels is not None and name in kernels:
            weight = kernels[name]()
            return weight if weight.ndim == 2 else weight.flatten(0, 1)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        kernels = self.__dict__.get("_modules", {}).get("recurrent")
        if kernels is None or name not in kernels:
            super().__setattr__(name, value)
            return
        _checks.require(
            isinstance(value, Tensor),
            self,
            f"{name} must be a tensor",
            "Assign a tensor",
            **{name: type(value)},
        )
        kernels[name].assign_(self._unstacked(name, value), self)

    def project_(self, name: str, weight: Tensor) -> float:
        r"""Set the matrix `name` to the orthogonal one nearest to `weight`, gate by gate.

        Args:
            name: The name in the `nn` twin, e.g. `"weight_hh_l0"`.
            weight: A matrix of the shape that the twin stores.

        Returns:
            The relative distance \(\|W_{new} - W\|_F / \|W\|_F\) of the projection.

        Raises:
            ValueError: The name is unknown, or `weight` has another shape or is not finite.
        """
        _checks.one_of(self, tuple(self.recurrent), name=name)
        return self._weight_of(name).project_(self._unstacked(name, weight), self)

    def _unstacked(self, name: str, weight: Tensor) -> Tensor:
        shape = tuple(self._weight_of(name).shape)
        stored = shape if len(shape) == 2 else (shape[0] * shape[1], shape[2])
        _checks.require(
            weight.shape == stored,
            self,
            f"{name} must have shape {stored}",
            "Transpose it",
            **{name: weight},
        )
        return weight.detach().reshape(shape)

    @torch.no_grad()
    def _reset_kernels(self) -> None:
        for name in self.recurrent:
            kernel = self._weight_of(name)
            kernel.reset_parameters()
            original = next(kernel.parameters())
            if self.init != "haar" and not original.is_meta and name.startswith("weight_hh"):
                dtype = compute_dtype(original.dtype)
                options: Any = {
                    "distribution": self.init,
                    "dtype": dtype,
                    "device": original.device,
                }
                start = Stiefel().sample(tuple(kernel.shape), **options)
                kernel.assign_(start, self)

    @torch.no_grad()
    def update_base(self) -> None:
        """Make every recurrent kernel the base of its own trivialization (dynamic trivialization).

        The kernels keep their values. With an exponential or Cayley parametrization the gradient at
        the base is the Riemannian one, so that plain SGD with an update after every step is
        Riemannian gradient descent. State that an optimizer keeps for the old coordinates
        (momentum, second moments) is not translated.
        """
        for name in self.recurrent:
            self._weight_of(name).update_base()

    def _read_plain(self, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> bool:
        """Also accept the kernels of the `nn` twin: they are projected, with a warning."""
        keep_if_refused(self, state_dict, prefix, error_msgs)
        for name in self.recurrent:
            plain, own = f"{prefix}{name}", f"{prefix}recurrent.{name}."
            adapt = functools.partial(self._unstacked, name)
            self._weight_of(name).load_plain(state_dict, plain, own, error_msgs, self, adapt)
        return True


def uniform_(parameters: Sequence[Tensor], bound: float) -> None:
    """Fill parameters that are not on the meta device uniformly in (-bound, bound)."""
    for parameter in parameters:
        if not parameter.is_meta:
            nn.init.uniform_(parameter, -bound, bound)


def check_nonlinearity(
    owner: object, choices: Sequence[str], nonlinearity: str, hidden_size: int
) -> None:
    """Refuse other choices, and an odd size where channels are paired."""
    _checks.one_of(owner, choices, nonlinearity=nonlinearity)
    _checks.require(
        nonlinearity != "max_min" or hidden_size % 2 == 0,
        owner,
        "hidden_size must be even for nonlinearity='max_min'",
        "Add or drop a feature",
        hidden_size=hidden_size,
    )
