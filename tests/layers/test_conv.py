import functools
import itertools
import math
import re

import pytest
import torch
from torch import nn

import orthonet
from orthonet.errors import NotOnManifoldError, ProjectionWarning
from orthonet.layers import (
    OrthoConv1d,
    OrthoConv2d,
    OrthoConv3d,
    OrthoConvTranspose2d,
)
from orthonet.testing import LAYER_LAWS, MATRIX_CASES, hard_matrix, singular_values, tolerances
from tests.presets import PRESETS

# Observed 1.5e-6 and 2.2e-15.
ALLOWED = tolerances.OPERATOR_PROMISE
FACTORIES = {
    "same": functools.partial(OrthoConv2d, 4, 6, 3, padding=1, padding_mode="circular"),
    "strided": functools.partial(OrthoConv2d, 4, 6, (3, 2), 2, padding=(1, 0), groups=2),
}


def train_steps(layer: nn.Module, shape: tuple[int, ...], steps: int, lr: float = 1e-2) -> None:
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr)
    target = torch.randn_like(layer.weight)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(2, *shape, dtype=layer.weight.dtype)
        (layer(x).square().mean() + (layer.weight * target).sum()).backward()
        optimizer.step()


def same_padding(size: int, k: int, s: int, d: int) -> int | None:
    """A symmetric padding that gives size / s outputs."""
    found = [p for p in range(size + 1) if (size + 2 * p - d * (k - 1) - 1) // s + 1 == size // s]
    return found[0] if found else None


def table() -> list[tuple]:
    """Configurations: dimension, kernel, stride, channels, groups, dilation, padding."""
    rows = []
    channels = [(3, 5), (4, 4), (8, 2), (2, 8), (2, 18)]
    for k, s, (ci, co), g, d in itertools.product(
        (1, 2, 3, 4, 5), (1, 2, 3), channels, (1, 2), (1, 2)
    ):
        possible = k >= s and ci % g == 0 and co % g == 0 and math.gcd(d, s) == 1
        if possible:
            rows += [(2, k, s, ci, co, g, d, mode) for mode in ("circular", "valid", "zeros")]
    return rows


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("mode", ["circular", "valid", "zeros"])
def test_table_of_configurations(mode, stride):
    size, checked = 6, 0
    for _, k, s, ci, co, g, d, padding_mode in table():
        if padding_mode != mode or s != stride or d * (k - 1) + 1 > size:
            continue
        padding = {"circular": same_padding(size, k, s, d), "valid": 0, "zeros": k // 2}[mode]
        if padding is None:
            continue
        layer = OrthoConv2d(
            ci,
            co,
            k,
            s,
            padding,
            d,
            g,
            dtype=torch.float64,
            padding_mode="circular" if mode == "circular" else "zeros",
        )
        sigma = singular_values(layer, (ci, size, size))
        row = (k, s, ci, co, g, d)
        assert float(sigma.max()) <= 1 + ALLOWED[torch.float64], row
        if mode == "circular" or (mode == "valid" and co <= ci * s**2):
            assert float(sigma.min()) >= 1 - ALLOWED[torch.float64], row
        checked += 1
    assert checked >= {1: 40, 2: 10, 3: 10}[stride]


@pytest.mark.parametrize(
    ("cls", "kernel", "shape"),
    [
        (OrthoConv1d, 4, (4, 8)),
        (OrthoConv2d, (3, 1), (4, 6, 4)),
        (OrthoConv2d, (2, 5), (4, 6, 6)),
        (OrthoConv3d, (3, 2, 1), (4, 4, 3, 2)),
    ],
)
@pytest.mark.parametrize("out", [2, 4, 7])
def test_dimensions_and_rectangular_kernels(cls, kernel, shape, out, dtype):
    layer = cls(4, out, kernel, padding="same", padding_mode="circular", dtype=dtype)
    for steps in (0, 20):
        train_steps(layer, shape, steps)
        sigma = singular_values(layer, shape)
        assert float((sigma - 1).abs().max()) <= ALLOWED[dtype]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_after_training(name, dtype):
    for args in ((6, 4, 3, 1, 1), (3, 16, 3, 2, 1)):
        layer = OrthoConv2d(*args, padding_mode="circular", dtype=dtype, ortho_params=PRESETS[name])
        train_steps(layer, (args[0], 6, 6), 20)
        sigma = singular_values(layer, (args[0], 6, 6))
        assert float((sigma - 1).abs().max()) <= ALLOWED[dtype], args


@pytest.mark.parametrize("name", PRESETS)
def test_errors_of_the_factors_do_not_add_up(name):
    """Seven taps are twelve factors; bases that err by 8e-7 would add up to 2e-5."""
    layer = OrthoConv2d(6, 4, 7, padding=3, padding_mode="circular", ortho_params=PRESETS[name])
    train_steps(layer, (6, 8, 8), 10)
    for apply_by in ("kernel", "factors"):
        layer.apply_by = apply_by
        sigma = singular_values(layer, (6, 8, 8))
        assert float((sigma - 1).abs().max()) <= ALLOWED[torch.float32]  # observed 1.6e-6


@pytest.mark.parametrize("case", MATRIX_CASES)
def test_hard_parameters(case):
    layer = OrthoConv2d(4, 6, 3, padding=1, padding_mode="circular")
    with torch.no_grad():
        for parameter in layer.parametrization.parameters():
            parameter.copy_(hard_matrix(case, parameter.shape))
    sigma = singular_values(layer, (4, 5, 5))
    assert float((sigma - 1).abs().max()) <= ALLOWED[torch.float32]
    layer(torch.randn(1, 4, 5, 5)).sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert bool(torch.isfinite(parameter.grad).all())


def test_square_strided_case_stays_orthogonal():
    """c_out = c_in s^2: the composition must not pass through more channels than it keeps."""
    layer = OrthoConv2d(16, 64, 3, 2, 1, padding_mode="circular")
    for steps in (0, 100):
        train_steps(layer, (16, 8, 8), steps)
        sigma = singular_values(layer, (16, 8, 8))
        assert float((sigma - 1).abs().max()) <= ALLOWED[torch.float32]  # observed 5.6e-7


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
@pytest.mark.parametrize("law", LAYER_LAWS, ids=lambda law: law.__name__)
def test_laws(law, factory):
    law(factory, (4, 6, 6))


@pytest.mark.parametrize("shape", [(4, 7, 7), (2, 4, 7, 6)], ids=str)
def test_is_the_plain_layer_with_its_weight(shape):
    layer = OrthoConv2d(4, 6, (3, 2), (2, 1), (1, 0), groups=2)
    x = torch.randn(shape)
    expected = nn.functional.conv2d(x, layer.weight, layer.bias, (2, 1), (1, 0), groups=2)
    torch.testing.assert_close(layer(x), expected)
    assert isinstance(layer, nn.Conv2d)
    assert layer.method == "aoc"
    assert repr(layer).startswith("OrthoConv2d(4, 6, kernel_size=(3, 2), stride=(2, 1), padd")
    plain = layer.to_plain()
    assert type(plain) is nn.Conv2d
    torch.testing.assert_close(plain(x), layer(x))
    assert repr(plain) == repr(nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), groups=2))


@pytest.mark.parametrize("size", [7, 9])
def test_circular_size_that_the_stride_does_not_divide_is_refused(size):
    layer = OrthoConv2d(4, 8, 3, 2, 1, padding_mode="circular")
    with pytest.raises(ValueError, match=rf"multiple of the stride.*input_size=\({size}, {size}\)"):
        layer(torch.randn(1, 4, size, size))
    zeros = OrthoConv2d(4, 8, 3, 2, 1)
    assert float(singular_values(zeros, (4, size, size)).max()) <= 1 + ALLOWED[torch.float32]


def test_circular_padding_that_would_repeat_outputs_is_refused():
    layer = OrthoConv2d(4, 4, 3, padding=2, padding_mode="circular")
    with pytest.raises(ValueError, match="at most size / stride outputs"):
        layer(torch.randn(1, 4, 6, 6))
    with pytest.raises(ValueError, match=r"at least the padding, .*padding=\(3, 3\)"):
        OrthoConv2d(4, 4, 7, padding=3, padding_mode="circular")(torch.randn(1, 4, 2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 3, "padding_mode": "constant"}, "must be one of 'zeros', 'circular', 're"),
        ({"kernel_size": 3, "groups": 3}, "groups must divide"),
        ({"kernel_size": 3, "groups": 4}, "more than one channel"),
        ({"kernel_size": 1, "stride": 2, "groups": 4}, "more than one channel"),
        ({"kernel_size": 3, "method": "bcop"}, "method must be one of 'aoc', 'rko'"),
        ({"kernel_size": 3, "ranks": 2}, "ranks must be one of 'half', 'free'"),
        ({"kernel_size": 3, "ranks": "free", "method": "rko"}, "ranks belongs to method='aoc'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=rf"^Ortho\w+: .*{message}.*got .*\. \w+"):
        OrthoConv2d(4, 4, **arguments)


@pytest.mark.parametrize("cls", [OrthoConv2d, OrthoConvTranspose2d])
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 2)])
def test_the_error_names_the_nearest_orthogonal_configuration(cls, kernel, dilation):
    """Where inputs are never read no kernel is isometric; what the message advises is built."""
    channels = (4, 6) if cls is OrthoConv2d else (6, 4)
    with pytest.raises(ValueError, match="no kernel is orthogonal") as error:
        cls(*channels, kernel, 2, dilation=dilation)
    text = str(error.value)
    advised = tuple(
        map(int, re.search(r"nearest that is: kernel_size=\((\d), (\d)\)", text).groups())
    )
    spread = tuple(map(int, re.search(r"\), dilation=\((\d), (\d)\), or", text).groups()))
    fewer = int(re.search(r", or \w+_channels=(\d+), or", text).group(1))
    assert fewer == 4  # one value of every 2 x 2 block is read
    nearest = cls(*channels, advised, 2, dilation=spread, dtype=torch.float64)
    smaller = cls(4, 4, kernel, 2, dilation=dilation, dtype=torch.float64)
    allowed = ALLOWED[torch.float64]
    assert float((singular_values(smaller, (4, 6, 6)) - 1).abs().max()) <= allowed
    assert float(singular_values(nearest, (channels[0], 6, 6)).max()) <= 1 + allowed
    reshaped = cls(*channels, kernel, 2, dilation=dilation, method="rko", dtype=torch.float64)
    assert float(singular_values(reshaped, (channels[0], 6, 6)).max()) <= 1 + allowed


@pytest.mark.parametrize(
    "arguments",
    [
        (6, 6, 3),
        (8, 4, 3),
        (4, 8, 3),
        (4, 16, 3, 2),
        (16, 32, 3, 2),
        (12, 64, 3, 2),
        (6, 6, (1, 4)),
        (4, 4, 1),
    ],
    ids=str,
)
def test_kernels_of_the_family_can_be_assigned(arguments):
    target = OrthoConv2d(*arguments, dtype=torch.float64).weight.detach()
    layer = OrthoConv2d(*arguments, dtype=torch.float64)
    layer.weight = target
    torch.testing.assert_close(
        layer.weight.detach(), target, atol=1e-10, rtol=0
    )  # observed 6.5e-13
    with pytest.raises(NotOnManifoldError, match=r"OrthoConv2d: the kernel must be one that"):
        layer.weight = 0.5 * target
    torch.testing.assert_close(layer.weight.detach(), target, atol=1e-10, rtol=0)
    single = OrthoConv2d(*arguments)
    single.weight = target.float()
    torch.testing.assert_close(single.weight, target.float(), atol=1e-5, rtol=0)  # observed 1.6e-7


@pytest.mark.parametrize("arguments", [(4, 6, 3), (6, 4, 2), (4, 6, 3, 2), (3, 16, 4, 2)], ids=str)
def test_plain_checkpoint_is_projected_with_a_message(arguments):
    plain = nn.Conv2d(*arguments)
    layer = OrthoConv2d(*arguments)
    random = layer.weight.detach()
    with pytest.warns(ProjectionWarning, match="OrthoConv2d: a plain weight was loaded"):
        layer.load_state_dict(plain.state_dict())
    inner = torch.nn.functional.cosine_similarity
    weight = plain.weight.detach().flatten()
    # nearer than a random kernel of the family is; observed .54 to .79 against .00 to .18
    assert float(inner(layer.weight.detach().flatten(), weight, dim=0)) > 0.3
    assert float(inner(random.flatten(), weight, dim=0)) < 0.3
    assert torch.equal(layer.bias, plain.bias)


def test_projection_improves_on_every_sweep():
    from orthonet.linalg.kernels.fit import fit_factors

    for arguments in ((4, 6, (3, 3), (1, 1)), (9, 3, (3, 3), (1, 1)), (12, 2, (4, 4), (2, 2))):
        kernel = orthonet.reparametrizers.OrthoKernel(*arguments, dtype=torch.float64)
        target = torch.randn(1, *kernel.shape, dtype=torch.float64)
        distances = [fit_factors(kernel.geometry, target, sweeps=n)[1] for n in (0, 1, 3, 10)]
        assert distances == sorted(distances, reverse=True)
        assert distances[-1] < distances[0]


def test_weight_gradcheck():
    layer = OrthoConv2d(3, 4, 2, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters() if name != "bias"]
    x = torch.randn(1, 3, 3, 3, dtype=torch.float64)

    def output(*values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [
        v.detach().clone().requires_grad_() for n, v in layer.named_parameters() if n in names
    ]
    assert torch.autograd.gradcheck(output, values)
