"""Options of the convolutions: richer kernels, other constructions, factors instead of kernels."""

import functools

import pytest
import torch
from torch import nn

from orthonet import functional
from orthonet.certify import certify
from orthonet.errors import NotOnManifoldError
from orthonet.layers import OrthoConv1d, OrthoConv2d, OrthoConvTranspose2d
from orthonet.layers.convolution.padding import pad_input, padding_norm, required_sizes
from orthonet.linalg import haar
from orthonet.reparametrizers import (
    KERNEL_METHODS,
    OrthoKernel,
    OrthoWeight,
    ReshapedKernel,
    caching,
)
from orthonet.reparametrizers.providers.engine import ENGINE
from orthonet.testing import LAYER_LAWS, singular_values, tolerances

ALLOWED = tolerances.OPERATOR_PROMISE
FREE = functools.partial(OrthoConv2d, 4, 4, 3, padding=1, padding_mode="circular", ranks="free")
FACTORIES = {
    "free": FREE,
    "rko": functools.partial(OrthoConv2d, 4, 6, 3, padding=1, method="rko"),
    "factors": functools.partial(OrthoConv2d, 4, 6, (3, 2), padding="same", apply_by="factors"),
    "reflect": functools.partial(OrthoConv2d, 4, 6, 3, padding=1, padding_mode="reflect"),
}


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
@pytest.mark.parametrize("law", LAYER_LAWS, ids=lambda law: law.__name__)
def test_laws(law, factory):
    law(factory, (4, 6, 6))


# --- the complete separable family -----------------------------------------------------------


def shift_kernel(channels: int = 4, dtype=torch.float64) -> torch.Tensor:
    """Every channel moves down by one pixel."""
    kernel = torch.zeros(channels, channels, 3, 3, dtype=dtype)
    kernel[range(channels), range(channels), 0, 1] = 1
    return kernel


def test_free_ranks_learn_a_shift_of_all_channels():
    """Smooth images, their shifted copies, and Adam; with half ranks the loss stays above a half.

    The scores are trained more slowly, so that projectors turn before their ranks jump.
    """
    torch.manual_seed(0)
    frequency = torch.fft.fftfreq(8)
    smooth = 1 / (0.15 + (frequency[:, None] ** 2 + frequency**2).sqrt())
    losses = {}
    for ranks in ("free", "half"):
        layer = OrthoConv2d(4, 4, 3, padding=1, padding_mode="circular", bias=False, ranks=ranks)
        outer = layer.parametrization.outer
        with torch.no_grad():  # no path leads from one determinant to the other
            if torch.linalg.det(outer().squeeze()) < 0:
                outer.assign_(outer() * torch.tensor([-1.0, 1, 1, 1])[:, None])
        slow = [p for n, p in layer.named_parameters() if n.endswith("scores")]
        fast = [p for n, p in layer.named_parameters() if not n.endswith("scores")]
        optimizer = torch.optim.Adam([{"params": fast}, {"params": slow, "lr": 1.5e-3}], lr=5e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
        for _ in range(300):
            x = torch.fft.ifft2(torch.fft.fft2(torch.randn(16, 4, 8, 8)) * smooth).real
            target = x.roll(1, 2)
            loss = (layer(x) - target).square().mean() / target.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        losses[ranks] = loss.item()
        sigma = singular_values(layer, (4, 5, 5))
        assert float((sigma - 1).abs().max()) <= ALLOWED[torch.float32]
    assert losses["free"] <= 1e-2, losses
    assert losses["half"] >= 0.3, losses


def test_gradient_of_a_rank_is_the_change_of_the_kernel():
    """The kernel is affine in each weight: the straight-through gradient is a finite difference."""
    kernel = OrthoKernel(3, 3, (3,), (1,), ranks="free", dtype=torch.float64)
    target = torch.randn(kernel.shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((kernel() * target).sum(), kernel.scores)
    for f, j in ((0, 0), (1, 2)):
        values = []
        for score in (1.0, -1.0):
            with torch.no_grad():
                before = kernel.scores[0, f, j].clone()
                kernel.scores[0, f, j] = score
                values.append((kernel() * target).sum())
                kernel.scores[0, f, j] = before
        torch.testing.assert_close(gradient[0, f, j], values[0] - values[1])


def paraunitary(channels: int, ranks: list[int], columns: int) -> torch.Tensor:
    """(channels, columns, taps): a product of factors of the given ranks, written out."""
    kernel = haar((channels, columns), dtype=torch.float64).unsqueeze(-1)
    for rank in ranks:
        v = haar((channels, channels), dtype=torch.float64)[:, :rank]
        p = v @ v.mT
        rest = torch.eye(channels, dtype=torch.float64) - p
        now = torch.einsum("ab,bct->act", p, kernel)
        later = torch.einsum("ab,bct->act", rest, kernel)
        kernel = nn.functional.pad(now, (0, 1)) + nn.functional.pad(later, (1, 0))
    return kernel


@pytest.mark.parametrize("ranks", [[0, 0], [5, 0, 5], [1, 1, 4], [3]], ids=str)
@pytest.mark.parametrize(("out", "inner"), [(5, 5), (5, 2), (2, 5)])
def test_every_one_dimensional_orthogonal_kernel_can_be_assigned(ranks, out, inner):
    kernel = paraunitary(max(out, inner), ranks, min(out, inner))
    kernel = kernel if out >= inner else kernel.transpose(0, 1)
    layer = OrthoConv1d(inner, out, len(ranks) + 1, ranks="free", dtype=torch.float64)
    layer.weight = kernel
    torch.testing.assert_close(layer.weight.detach(), kernel, atol=1e-10, rtol=0)  # obs. 8e-15
    single = OrthoConv1d(inner, out, len(ranks) + 1, ranks="free")
    single.weight = kernel.float()
    torch.testing.assert_close(single.weight, kernel.float(), atol=1e-5, rtol=0)


def test_what_is_outside_is_refused():
    """A shift with half ranks, and a kernel that is no product of one-dimensional ones."""
    shift = shift_kernel()
    free = FREE(dtype=torch.float64)
    free.weight = shift
    assert torch.equal(free.weight.round(decimals=10), shift)
    with pytest.raises(NotOnManifoldError, match="or use ranks='free'"):
        OrthoConv2d(4, 4, 3, dtype=torch.float64).weight = shift
    quincunx = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
    quincunx[0, 0, 0, 1] = quincunx[1, 1, 1, 0] = 1  # one channel moves right, the other down
    OrthoConv2d(2, 2, 2, ranks="free", dtype=torch.float64).weight = quincunx
    rotation = haar((2, 2), dtype=torch.float64)
    one = paraunitary(2, [1], 2)  # z_1
    other = paraunitary(2, [1], 2)
    mixed = torch.einsum("abs,bct->acst", one, other)  # K_1(z_1) K_2(z_2): inside one order only
    twice = torch.einsum("abst,bc,cdu->adstu", mixed, rotation, paraunitary(2, [1], 2))
    first_again = torch.zeros(2, 2, 3, 2, dtype=torch.float64)  # K_1(z_1) K_2(z_2) K_3(z_1)
    for shift in range(2):
        first_again[:, :, shift : shift + 2] += twice[..., shift]
    layer = OrthoConv2d(2, 2, (3, 2), ranks="free", dtype=torch.float64)
    before = layer.weight.detach().clone()
    with pytest.raises(NotOnManifoldError, match=r"relative_distance=0\.\d"):
        layer.weight = first_again
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("ranks", ["half", "free"])
@pytest.mark.parametrize(
    "arguments",
    [(3, 16, 4, 2), (3, 16, 3, 2), (1, 9, (5, 3), 2), (2, 18, (4, 5), (2, 3)), (4, 32, 4, 2)],
    ids=str,
)
def test_expanding_strided_kernels_are_always_assigned(arguments, ranks):
    """By algebra: the Gram matrix of the taps gives what stands before the stride."""
    for seed in range(2):
        torch.manual_seed(seed)
        make = functools.partial(OrthoConv2d, *arguments, ranks=ranks, dtype=torch.float64)
        target, layer = make().weight.detach(), make()
        layer.weight = target
        torch.testing.assert_close(layer.weight.detach(), target, atol=1e-10, rtol=0)
        single = OrthoConv2d(*arguments, ranks=ranks)
        single.weight = target.float()
        torch.testing.assert_close(single.weight, target.float(), atol=1e-5, rtol=0)


# --- reshaped kernels ------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [OrthoConv2d, OrthoConvTranspose2d])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 1, 1), (2, 2, 1), (3, 2, 2), (1, 2, 1)]
)
def test_reshaped_kernels_are_one_lipschitz(cls, kernel, stride, dilation, dtype):
    for groups in (1, 4):
        layer = cls(
            4, 8, kernel, stride, dilation=dilation, groups=groups, dtype=dtype, method="rko"
        )
        assert layer.method == "rko"
        assert isinstance(layer.parametrization, ReshapedKernel)
        for size in (7, 8, 9):
            sigma = singular_values(layer, (4, size, size))
            assert float(sigma[0]) <= 1 + ALLOWED[dtype]
        if layer.parametrization.orthogonal and cls is OrthoConv2d and kernel == stride:
            sigma = singular_values(layer, (4, 8, 8))
            assert float((sigma - 1).abs().max()) <= ALLOWED[dtype]
        other = cls(
            4, 8, kernel, stride, dilation=dilation, groups=groups, dtype=dtype, method="rko"
        )
        other.weight = layer.weight
        torch.testing.assert_close(other.weight, layer.weight, atol=1e-6, rtol=0)
        with pytest.raises(NotOnManifoldError):
            other.weight = 0.5 * layer.weight


def test_depthwise_kernels_that_exist_can_be_trained():
    """A multiplier or a stride leaves something to train; where nothing is left, the error says so
    and what it advises is built."""
    x = torch.randn(2, 4, 8, 8)
    for make in (
        functools.partial(OrthoConv2d, 4, 8, 3, padding=1, groups=4),
        functools.partial(OrthoConv2d, 4, 4, 3, 2, 1, groups=4),
        functools.partial(OrthoConv2d, 4, 4, 3, padding=1, groups=4, method="rko"),
        functools.partial(OrthoConv2d, 4, 4, 3, padding=1, groups=4, ranks="free"),
    ):
        layer = make()
        before = layer.weight.detach().clone()
        optimizer = torch.optim.SGD(layer.parameters(), lr=10.0)
        for _ in range(3):
            optimizer.zero_grad()
            (layer(x) - x.mean()).pow(2).mean().backward()
            optimizer.step()
        assert float((layer.weight - before).detach().norm()) > 1e-3
        assert float(singular_values(layer, (4, 6, 6))[0]) <= 1 + ALLOWED[torch.float32]
    with pytest.raises(ValueError, match=r"out_channels=8 \(a multiplier\).*ranks='free'.*'rko'"):
        OrthoConv2d(4, 4, 3, groups=4)


def test_registered_constructions_are_those_of_the_layers():
    assert KERNEL_METHODS["aoc"] is OrthoKernel
    assert KERNEL_METHODS["rko"] is ReshapedKernel
    assert "method='rko'" in repr(FACTORIES["rko"]())
    with pytest.raises(ValueError, match="only an orthogonal layer"):
        OrthoConv2d(4, 4, 3, padding=1, padding_mode="circular", method="rko").inverse(
            torch.randn(1, 4, 5, 5)
        )


# --- factors instead of the kernel -----------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "keywords", "shape"),
    [
        ((4, 6, 3), {"padding": 1, "padding_mode": "circular"}, (2, 4, 6, 6)),
        ((6, 4, (3, 2)), {"padding": (1, 0)}, (2, 6, 5, 6)),
        ((4, 16, 3, 2), {"padding": 1, "padding_mode": "reflect"}, (2, 4, 7, 7)),
        ((3, 16, 4, 2), {"padding": 1, "padding_mode": "replicate"}, (3, 8, 8)),
        ((4, 8, 3), {"groups": 2, "dilation": 2, "ranks": "free"}, (2, 4, 7, 8)),
        ((4, 4, 1), {}, (2, 4, 3, 3)),
    ],
)
def test_factors_and_kernel_agree(arguments, keywords, shape):
    layer = OrthoConv2d(*arguments, dtype=torch.float64, apply_by="factors", **keywords)
    nn.init.normal_(layer.bias)
    kernel = OrthoConv2d(*arguments, dtype=torch.float64, apply_by="kernel", **keywords)
    kernel.load_state_dict(layer.state_dict())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    outputs, gradients = [], []
    for one in (layer, kernel):
        outputs.append(one(x))
        inputs = [x, *one.parameters()]
        direction = torch.linspace(-1, 1, outputs[-1].numel(), dtype=x.dtype)
        direction = direction.cos().view(outputs[-1].shape)
        gradients.append(torch.autograd.grad(outputs[-1], inputs, direction))
    torch.testing.assert_close(*outputs)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7)
    plain = layer.to_plain()
    torch.testing.assert_close(plain(x), outputs[0])


def test_the_choice_follows_the_shape_and_can_be_asked():
    layer = OrthoConv2d(128, 128, 3, padding=1)
    few, many = torch.empty(8, 128, 4, 4), torch.empty(32, 128, 16, 16)
    assert layer.application(few) == "factors"
    assert layer.application(many) == "kernel"
    assert layer.application(few[0]) == "kernel"
    with torch.no_grad():
        assert layer.application(few) == "kernel"
    assert layer.application(few.bfloat16()) == "kernel"
    assert layer.eval().application(few) == "kernel"
    narrow = OrthoConv2d(16, 16, 3, padding=1, apply_by="factors")
    assert narrow.application(torch.empty(32, 16, 9, 9)) == "factors"
    with pytest.raises(ValueError, match="apply_by must be one of 'auto', 'kernel', 'factors'"):
        OrthoConv2d(4, 4, 3, apply_by="fft")
    with pytest.raises(ValueError, match="only method='aoc' has factors"):
        OrthoConv2d(4, 4, 3, apply_by="factors", method="rko")


# --- paddings --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["reflect", "replicate", "symmetric"])
@pytest.mark.parametrize("pads", [(1, 1), (2, 1), (0, 2), (3, 3), (2, 0), (0, 0)])
def test_norm_of_the_padding_is_exact(mode, pads):
    least = required_sizes(mode, pads)[0]
    for size in range(least, least + 4):
        sigma = singular_values(lambda x: pad_input(x, mode, pads), (1, size), dtype=torch.float64)
        assert float(sigma[0]) == pytest.approx(padding_norm(mode, pads), rel=1e-14)


def test_symmetric_padding_mirrors_the_edge_and_keeps_the_certificate():
    x = torch.arange(12.0).view(1, 1, 3, 4)
    rows = functional.symmetric_pad(x, (2, 1, 1, 3))
    assert rows[0, 0, 1].tolist() == [1.0, 0.0, 0.0, 1.0, 2.0, 3.0, 3.0]
    assert rows[0, 0, :, 2].tolist() == [0.0, 0.0, 4.0, 8.0, 8.0, 4.0, 0.0]
    with pytest.raises(ValueError, match="from 0 to the size"):
        functional.symmetric_pad(x, (5, 0))
    layer = OrthoConv2d(2, 3, 5, padding=2, padding_mode="symmetric").eval()
    image = torch.randn(1, 2, 6, 7)
    bound = certify(layer, image, lower=False).constant.value
    found = float(singular_values(layer, (2, 6, 7)).max())
    assert found <= bound * (1 + 1e-6)
    assert bound <= 1 + 1e-5  # the gain of the padding is exact
    again = functional.symmetric_pad(image, (2, 2, 2, 2))
    torch.testing.assert_close(layer(image), nn.functional.conv2d(again, layer.weight, layer.bias))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "symmetric"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_repeating_paddings_stay_below_one(mode, stride, dtype):
    for channels in ((4, 4), (2, 18), (6, 2)):
        layer = OrthoConv2d(*channels, 3, stride, 1, padding_mode=mode, dtype=dtype)
        assert layer.parametrization.geometry.gain == 0.5
        for size in (4, 7, 8, 9):
            sigma = singular_values(layer, (channels[0], size, size))
            assert float(sigma[0]) <= 1 + ALLOWED[dtype]
    with pytest.raises(ValueError, match="every input size must be at least"):
        layer(torch.randn(1, 6, 1, 4, dtype=dtype))
    plain = layer.to_plain()
    x = torch.randn(2, 6, 7, 8, dtype=dtype)
    torch.testing.assert_close(plain(x), layer(x))
    again = OrthoConv2d(6, 2, 3, stride, 1, padding_mode=mode, dtype=dtype)
    again.weight = layer.weight
    torch.testing.assert_close(again.weight, layer.weight, atol=1e-6, rtol=0)


def test_input_smaller_than_the_kernel():
    """On the torus the taps wrap onto each other, and the operator stays orthogonal."""
    for size, kernel in ((2, 3), (1, 3), (3, 5)):
        layer = OrthoConv2d(3, 3, kernel, padding="same", padding_mode="circular")
        if kernel // 2 > size:
            continue
        sigma = singular_values(layer, (3, size, size))
        assert float((sigma - 1).abs().max()) <= ALLOWED[torch.float32]
        zeros = OrthoConv2d(3, 3, kernel, padding="same")
        assert float(singular_values(zeros, (3, size, size))[0]) <= 1 + ALLOWED[torch.float32]


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_export_takes_one_graph(factory):
    layer = factory().eval()
    x = torch.randn(2, 4, 6, 6)
    program = torch.export.export(layer, (x,))
    # two ways to at most 9 factors of 6 x 6 and to 36 taps; observed 1.9e-6 of 8.6e-6
    output = layer(x)
    allowed = tolerances.rounding(
        torch.float32, 2 * (9 * 6 + 36), float(output.detach().abs().max())
    )
    torch.testing.assert_close(program.module()(x), output, atol=allowed, rtol=0)


def test_applied_factors_are_computed_once_per_step(monkeypatch):
    layer = OrthoConv2d(6, 6, 3, padding=1, apply_by="factors", ranks="free")
    evaluated = []
    original = OrthoWeight.evaluate

    def counting(self):
        evaluated.append(self)
        return original(self)

    monkeypatch.setattr(OrthoWeight, "evaluate", counting)
    x = torch.randn(2, 6, 5, 5)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(2):
        looks = ENGINE.looks
        for _ in range(3):  # micro-batches
            layer(x).square().sum().backward()
        # the outer factor and the bases, both at once: at first, then after each step
        assert not evaluated and ENGINE.looks - looks <= 1
        optimizer.step()
    layer.eval()
    with torch.no_grad():
        kept, before = layer(x), len(evaluated)
        torch.testing.assert_close(layer(x), kept, atol=0, rtol=0)
        assert len(evaluated) == before
        layer.apply_by = "kernel"
        torch.testing.assert_close(layer(x), kept, atol=1e-5, rtol=0)  # observed 1e-6
    with caching(False):
        layer.apply_by = "factors"
        before = len(evaluated)
        for _ in range(2):
            layer(x)
        assert len(evaluated) - before == 4  # nothing is kept


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["loop", "fused"])
def test_scores_that_alone_move_are_seen(options):
    """The factors stay where they are, so that nothing is retracted."""
    layers_ = [OrthoConv2d(4, 4, 3, ranks="free", bias=False) for _ in range(2)]
    for layer in layers_:
        layer.parametrization.outer.original.requires_grad_(False)
        layer.parametrization.bases.original.requires_grad_(False)
    scores = layers_[0].parametrization.scores
    before = [layer.weight.detach().clone() for layer in layers_]
    scores.grad = 4.0 * scores.detach().sign()  # every column leaves or joins its projector
    torch.optim.Adam([scores], lr=0.5, **options).step()
    after = [layer.weight.detach() for layer in layers_]
    with caching(False):
        torch.testing.assert_close(after[0], layers_[0].weight.detach(), atol=2e-6, rtol=0)
    assert float((after[0] - before[0]).abs().max()) > 0.01
    assert torch.equal(after[1], before[1])
