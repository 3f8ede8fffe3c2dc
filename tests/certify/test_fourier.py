"""Fourier transforms and complex constants in certified models, against the dense operator."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import orthonet
from orthonet.certify.ops import fourier
from orthonet.errors import UncertifiableError
from tests.certify.functions import Lambda

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="PyTorch 2.6 exports no transform with a free batch size"
)


def _model(function: object) -> nn.Module:
    return Lambda(function).eval()


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _dense(function: object, shape: tuple[int, ...]) -> Tensor:
    """The matrix of a linear function of one sample."""
    size = torch.Size(shape).numel()
    unit = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    return function(unit).reshape(size, -1).mT  # type: ignore[operator]


_NORMS = ["backward", "ortho", "forward"]
_ONE = itertools.product(["fft", "ifft", "rfft"], [(None, 1), (4, -1)])
_SEVERAL = itertools.product(["fft2", "rfft2", "ifftn"], [(2, 6)])


def test_constants_of_transforms_are_those_of_the_dense_map() -> None:
    functions, norms = [], itertools.cycle(_NORMS)
    for (name, (n, dim)), norm in zip(_ONE, norms, strict=False):
        run = getattr(torch.fft, name)
        functions.append(lambda x, r=run, n=n, d=dim, o=norm: _real(r(x, n=n, dim=d, norm=o)))
    for (name, size), norm in zip(_SEVERAL, norms, strict=False):
        run = getattr(torch.fft, name)
        functions.append(lambda x, r=run, s=size, o=norm: _real(r(x, s=s, dim=(-2, -1), norm=o)))
    for n, norm in zip([4, 5, 8, 9], norms, strict=False):
        functions.append(
            lambda x, n=n, o=norm: torch.fft.irfft(torch.complex(x, x.flip(1)), n=n, norm=o)
        )
        functions.append(
            lambda x, n=n, o=norm: torch.fft.irfft2(
                torch.complex(x, x.flip(1)), s=(3, n), dim=(1, 2), norm=o
            )
        )
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    for function in functions:
        certificate = orthonet.certify(_model(function), x, lower=False)
        truth = float(torch.linalg.matrix_norm(_dense(function, (3, 5)), 2))
        # Singular values of matrices of up to 30 columns in float64: 30 * 64 units; observed 4.
        assert truth * (1 - 1e-12) <= certificate.constant.value <= truth * (1 + 1e-10)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 9, 31])
def test_gains_of_records_hold_where_no_matrix_is_written(size: int) -> None:
    """The rule alone, as for signals that are too long for a matrix."""
    for scale, inverse in itertools.product(range(3), [False, True]):
        gain = fourier._gain(scale, size)
        run = lambda x, s=scale, i=inverse: fourier.fourier(x, (1,), s, i)  # noqa: E731
        truth = float(torch.linalg.matrix_norm(_dense(run, (size, 2)), 2))
        assert truth * (1 - 1e-12) <= gain <= truth * (1 + 1e-12)
        half = lambda x, s=scale: fourier.half_to_real(x, 1, s, size)  # noqa: E731
        truth = float(torch.linalg.matrix_norm(_dense(half, (size // 2 + 1, 2)), 2))
        wanted = gain * (2.0**0.5 if size > 2 else 1.0)
        assert truth * (1 - 1e-12) <= wanted <= truth * (1 + 1e-12)


def test_the_matrices_of_islands_are_the_transforms() -> None:
    """What islands multiply out is computed from cosines, not by PyTorch's transforms."""
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 5, 8, 15):
        x = torch.randn(2, size, 2, dtype=torch.float64, generator=generator)
        for scale, inverse in itertools.product(range(3), [False, True]):
            a = {"pairs": x, "dims": [1], "scale": scale, "inverse": inverse}
            found = fourier._run(a, False)  # type: ignore[arg-type]
            wanted = fourier.fourier(x, [1], scale, inverse)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13 * size)
            assert bool((fourier._run(a | {"pairs": x.abs()}, True) >= wanted.abs() - 1e-12).all())
        for n in {2 * (size - 1), 2 * size - 1} - {0}:
            a = {"pairs": x, "dim": 1, "scale": 2, "size": n}
            found = fourier._half_run(a, False)  # type: ignore[arg-type]
            torch.testing.assert_close(
                found, fourier.half_to_real(x, 1, 2, n), rtol=0, atol=1e-13 * size
            )


class _Operator(nn.Module):
    """The spectral layer of a Fourier neural operator, with a pointwise skip."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(2, 3, 3, 3, dtype=torch.cfloat))
        self.skip = nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x)
        out = torch.zeros(x.shape[0], 3, 6, 4, dtype=torch.cfloat)
        out[:, :, :3, :3] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :3, :3], self.weight)
        return torch.nn.functional.gelu(torch.fft.irfft2(out, s=(6, 6)) + self.skip(x))


def test_a_fourier_neural_operator_is_certified() -> None:
    torch.manual_seed(0)
    model, x = _Operator().eval(), torch.randn(2, 2, 6, 6)
    certificate = orthonet.certify(model, x, lower=False)
    slopes = torch.autograd.functional.jacobian(model, 3 * x[:1]).reshape(-1, 72)
    # The Jacobian is taken in float32: some 100 roundings; observed far below the constant.
    assert float(torch.linalg.matrix_norm(slopes, 2)) <= certificate.constant.value * (1 + 1e-5)
    # The affine part is one matrix: nothing but GELU's largest slope is lost.
    affine = _model(lambda v: torch.fft.irfft2(torch.fft.rfft2(v), s=(6, 6)))
    assert orthonet.certify(affine, x, lower=False).constant.value <= 1 + 1e-9


def test_the_rounding_of_transforms_is_not_known() -> None:
    """The order in which a fast transform adds up is not documented, so nothing bounds it."""
    model, x = _model(lambda x: torch.fft.rfft(x).abs()), torch.randn(2, 6)
    certificate = orthonet.certify(model, x, lower=False)
    with pytest.raises(UncertifiableError, match="the rounding of this operation is not known"):
        certificate.radius(model, x)


def test_moving_adding_and_scaling_complex_values_follow_the_dense_map() -> None:
    torch.manual_seed(1)
    c = torch.randn(5, dtype=torch.complex128)
    w = torch.randn(3, 4, dtype=torch.complex128)
    fft = torch.fft.fft
    functions = [
        lambda x: _real(fft(x) * c),
        lambda x: _real(c * x + 2j * x.flip(2)),
        lambda x: _real(fft(x) / 3.0 - c * 0.5),
        lambda x: (fft(x).transpose(1, 2).reshape(x.shape[0], -1) * (1 - 2j)).real,
        lambda x: torch.fft.fftshift(fft(x), dim=-1).conj().imag,
        lambda x: _real(torch.cat([fft(x)[:, :1], fft(x, dim=1)[:, 1:]], -2)),
        lambda x: _real(torch.einsum("bij,io->boj", fft(x), w)),
        lambda x: _real(-fft(x).permute(0, 2, 1).flip(1).roll(1, 2)[:, 1:, None].sum(1)),
        lambda x: _real(torch.nn.functional.pad(fft(x), (1, 2)).squeeze(-1).unsqueeze(1)),
        lambda x: _real(torch.stack([fft(x), c.expand(x.shape[0], 3, 5)], 1)),
    ]
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    for function in functions:
        certificate = orthonet.certify(_model(function), x, lower=False)
        offset = function(torch.zeros_like(x)).detach()
        linear = lambda v, f=function, o=offset: f(v) - o[:1]  # noqa: E731
        truth = float(torch.linalg.matrix_norm(_dense(linear, (3, 5)), 2))
        assert truth * (1 - 1e-12) <= certificate.constant.value <= truth * (1 + 1e-10)


def test_a_long_filter_has_the_largest_modulus() -> None:
    torch.manual_seed(0)
    c = torch.randn(4096, dtype=torch.complex128)
    model = _model(lambda x: _real(torch.fft.fft(x, norm="ortho") * c))
    found = orthonet.certify(model, torch.randn(2, 4096, dtype=torch.float64), lower=False)
    largest = float(c.abs().max())
    assert largest <= found.constant.value * (1 + 1e-15) <= largest * (1 + 1e-12)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (torch.fft.fft(x) * torch.fft.fft(x.flip(1))).abs(),
        lambda x: (torch.fft.fft(x) * x).abs(),
        lambda x: torch.fft.fft(x).angle(),
        lambda x: torch.fft.fft(x).tanh().abs(),
        lambda x: torch.sgn(torch.fft.fft(x)).real,
        lambda x: (1.0 / torch.fft.fft(x)).real,
        lambda x: torch.fft.fft(x, dim=0).abs(),
        lambda x: torch.fft.fft(x),
    ],
)
def test_what_has_no_constant_is_refused(function: object) -> None:
    with pytest.raises(UncertifiableError):
        orthonet.certify(_model(function), torch.randn(3, 6))  # type: ignore[arg-type]
