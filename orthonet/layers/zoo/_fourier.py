"""Layers that are orthogonalized at each frequency of the image: Cayley, LOT, BRO."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.layers._base import add_bias
from orthonet.layers.zoo._base import MappedLinear, delta_orthogonal
from orthonet.layers.zoo._fourier_base import FourierConv2d
from orthonet.linalg.unitary import (
    block_reflector,
    cayley_parameter,
    cayley_rectangular,
    unitary_polar,
)
from orthonet.reparametrizers import MappedWeight

__all__ = ["BROConv2d", "BROLinear", "CayleyConv2d", "CayleyLinear", "LOTConv2d"]


def _gaussian(shape, *, dtype=None, device=None) -> Tensor:
    return torch.randn(tuple(shape), dtype=dtype, device=device) * shape[1] ** -0.5


def _rank_of(owner: type, rank: int | None, size: int) -> int:
    """Return the number of columns of V, half of the rows by default."""
    value = max(1, size // 2) if rank is None else rank
    _checks.positive_int(owner, rank=value)
    _checks.require(
        value <= size,
        owner,
        f"rank must be at most the number of channels (of a group), {size}",
        "Leave it out for half of them",
        rank=rank,
    )
    return value


class CayleyConv2d(FourierConv2d):
    r"""Orthogonal convolution by the Cayley transform of the symbol at each frequency.

    The kernel of k x k taps is the free parameter; the convolution that is applied covers the
    image, because the transform of a short kernel is not short. A stride s is a space-to-depth step
    before the convolution, with ceil(k / s) taps. The other arguments are those of
    [`AOLConv2d`][orthonet.layers.AOLConv2d].

    Args:
        stride: The same in both dims.
        padding: "same", or zeros added on both sides with `padding_mode="zeros"`.
        padding_mode: "circular", or "zeros": the image is padded with zeros, convolved on the torus
            of the padded size, and the outputs that `nn.Conv2d` has are kept.
        image_size: Height and width of the input, if they are fixed; `to_plain` needs them.

    Shape:
        As `nn.Conv2d`, any image size, even or odd, unbatched input included.

    Guarantee:
        Circular: all singular values are `lipschitz` to \(10^{-5}\) (float32) or \(10^{-12}\)
        (float64) relative, for every finite parameter. Zeros: at most that.

    Raises:
        ValueError: A stride or padding is another, or `lipschitz` not a positive number; when
            called: the stride does not divide the image size, or it is not `image_size`.

    Examples:
        >>> CayleyConv2d(8, 8, 3, stride=2)(torch.zeros(1, 8, 6, 6)).shape
        torch.Size([1, 8, 3, 3])

    References:
        Trockman & Kolter, *Orthogonalizing convolutional layers with the Cayley transform*, ICLR
        2021, arXiv:2104.07167.
    """

    _function = staticmethod(cayley_rectangular)
    _center = False
    _noise = 1.0


class LOTConv2d(FourierConv2d):
    r"""Orthogonal convolution by the polar factor \(W (W^* W)^{-1/2}\) at each frequency.

    Arguments, shapes and errors are those of [`CayleyConv2d`][orthonet.layers.CayleyConv2d]. The
    inverse square root comes from eigenvectors, two Newton steps and a measured residual, with a
    singular value decomposition where that is too large; its gradient is implicit, so nothing of
    an iteration is stored. See [`unitary_polar`][orthonet.linalg.unitary_polar].

    Guarantee:
        As of `CayleyConv2d`, for parameters of full rank at every frequency, of any condition
        number; where the rank is deficient the singular values are at most that.

    Examples:
        >>> LOTConv2d(8, 8, 3)(torch.zeros(1, 8, 5, 5)).shape
        torch.Size([1, 8, 5, 5])

    References:
        Xu, Li & Li, *LOT: layer-wise orthogonal training on improving l2 certified robustness*,
        NeurIPS 2022, arXiv:2210.11620.
    """

    _function = staticmethod(unitary_polar)


class BROConv2d(FourierConv2d):
    r"""Orthogonal convolution by a block reflector \(I - 2 V (V^* V)^{-1} V^*\) at each frequency.

    The reflector is square: channels of zeros are appended before, or dropped after, where the
    numbers
    of channels differ. The other arguments, shapes and errors are those of
    [`CayleyConv2d`][orthonet.layers.CayleyConv2d].

    Args:
        rank: Columns of V in each group; half of the channels by default.

    Guarantee:
        As of [`AOLLinear`][orthonet.layers.AOLLinear]. Circular with in_channels = out_channels:
        orthogonal to the same tolerance where V is well conditioned at every frequency, see
        [`block_reflector`][orthonet.linalg.block_reflector].

    Examples:
        >>> BROConv2d(8, 6, 3, rank=2)(torch.zeros(1, 8, 5, 5)).shape
        torch.Size([1, 6, 5, 5])

    References:
        Lai, Huang, Wang & Zhang, *Enhancing certified robustness via block reflector orthogonal
        layers and logit annealing loss*, ICML 2025, arXiv:2505.15174.
    """

    _function = staticmethod(block_reflector)
    _square = True
    _noise = 0.1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = "same",
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "circular",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int | None = None,
        lipschitz: float = 1.0,
        image_size: int | tuple[int, int] | None = None,
    ) -> None:
        self._rank = rank
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
            lipschitz=lipschitz,
            image_size=image_size,
        )

    def _make(
        self,
        shape: tuple[int, int, int],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        groups, rows, _ = shape
        self.rank = _rank_of(type(self), self._rank, rows)
        super()._make((groups, rows, self.rank), device, dtype)


class CayleyLinear(MappedLinear):
    """`nn.Linear` with a semi-orthogonal weight by the rectangular Cayley transform.

    See [`cayley_rectangular`][orthonet.linalg.cayley_rectangular]. A weight can be assigned unless
    its
    upper square block has the eigenvalue -1. Arguments and errors are those of
    [`AOLLinear`][orthonet.layers.AOLLinear].

    Guarantee:
        All singular values are `lipschitz`, to the tolerance of `AOLLinear`.

    Examples:
        >>> layer = CayleyLinear(3, 8)
        >>> (layer.weight.T @ layer.weight).allclose(torch.eye(3), atol=1e-5)
        True

    References:
        Trockman & Kolter, ICLR 2021.
    """

    _initial = staticmethod(_gaussian)
    _inverse = staticmethod(cayley_parameter)

    def _map(self) -> Callable[[Tensor], Tensor]:
        return cayley_rectangular


def _cropped_reflector(v: Tensor, *, rows: int, columns: int) -> Tensor:
    return block_reflector(v)[:rows, :columns]


class BROLinear(MappedLinear):
    """`nn.Linear` with a block reflector of low rank, cropped to the wanted sides.

    The reflector has the larger of both sides; see
    [`block_reflector`][orthonet.linalg.block_reflector]. A weight cannot be assigned. The other
    arguments and errors are those of [`AOLLinear`][orthonet.layers.AOLLinear].

    Args:
        rank: Columns of V; half of the larger side by default.

    Guarantee:
        As of `AOLLinear`; all singular values are `lipschitz` where V is well conditioned.

    Examples:
        >>> layer = BROLinear(3, 8, rank=2)
        >>> (layer.weight.T @ layer.weight).allclose(torch.eye(3), atol=1e-5)
        True

    References:
        Lai et al., ICML 2025.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int | None = None,
        lipschitz: float = 1.0,
    ) -> None:
        nn.Module.__init__(self)
        _checks.positive_int(type(self), in_features=in_features, out_features=out_features)
        size = max(in_features, out_features)
        self.rank = _rank_of(type(self), rank, size)
        _checks.lipschitz_constant(type(self), lipschitz)
        _checks.factory(type(self), device, dtype)
        self.in_features = in_features
        self.out_features = out_features
        function = partial(_cropped_reflector, rows=out_features, columns=in_features)
        self.parametrization = MappedWeight(
            (size, self.rank),
            function,
            delta_orthogonal,
            lipschitz,
            device,
            dtype,
            weight_shape=(out_features, in_features),
        )
        add_bias(self, bias, out_features, device, dtype)
