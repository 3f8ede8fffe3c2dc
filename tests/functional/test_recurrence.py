"""The fused time loop against the plain one, which PyTorch differentiates."""

import pytest
import torch

from orthonet.functional import mod_relu, recurrence
from orthonet.functional.recurrence import NONLINEARITIES, recurrence_loop

TIME, BATCH, INPUTS, HIDDEN = 4, 3, 2, 4


def arguments(nonlinearity, bias=True, dtype=torch.float64):
    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    kernel = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, dtype=dtype))[0].requires_grad_()
    return (
        draw(TIME, BATCH, INPUTS),
        draw(BATCH, HIDDEN),
        draw(HIDDEN, INPUTS),
        kernel,
        draw(HIDDEN) if bias else None,
        nonlinearity,
        draw(HIDDEN) if nonlinearity == "modrelu" else None,
    )


def tensors(args):
    return [a for a in args if isinstance(a, torch.Tensor)]


def with_tensors(args, values):
    values = iter(values)
    return [next(values) if isinstance(a, torch.Tensor) else a for a in args]


def loss(states, last):
    weights = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view(states.shape)
    return (states * weights).sum() + last.square().sum()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_value_and_derivatives_of_two_orders(nonlinearity, bias):
    args = arguments(nonlinearity, bias)
    torch.testing.assert_close(recurrence(*args), recurrence_loop(*args), rtol=0, atol=1e-14)

    def run(*values):
        return recurrence(*with_tensors(args, values))

    assert torch.autograd.gradcheck(run, tensors(args))
    assert torch.autograd.gradgradcheck(run, tensors(args))


@pytest.mark.parametrize("part", [0, 1], ids=["states", "last"])
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_each_output_alone(nonlinearity, part):
    args = arguments(nonlinearity)
    fused = torch.autograd.grad(recurrence(*args)[part].square().sum(), tensors(args))
    plain = torch.autograd.grad(recurrence_loop(*args)[part].square().sum(), tensors(args))
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_compiled_without_a_break_and_without_unrolling(nonlinearity):
    args = arguments(nonlinearity)
    sizes = []

    def backend(graph, _):
        sizes.append(len(graph.graph.nodes))
        return graph

    torch.compiler.reset()
    compiled = torch.compile(recurrence, fullgraph=True, backend="aot_eager")
    y = compiled(*args)
    torch.testing.assert_close(y, recurrence_loop(*args), rtol=0, atol=1e-14)
    mine = torch.autograd.grad(loss(*y), tensors(args))
    plain = torch.autograd.grad(loss(*recurrence_loop(*args)), tensors(args))
    torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)
    for time in (TIME, 5 * TIME):
        torch.compiler.reset()
        x = torch.randn(time, BATCH, INPUTS, dtype=torch.float64)
        torch.compile(recurrence, fullgraph=True, backend=backend)(x, *args[1:])
    assert sizes[0] == sizes[1]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of torch.func.jvp itself
def test_transforms_and_forward_mode_take_the_plain_loop():
    x, h0, weight_ih, weight_hh, bias, *_ = (
        a.detach() if isinstance(a, torch.Tensor) else a for a in arguments("tanh")
    )

    def last(kernel):
        return recurrence(x, h0, weight_ih, kernel, bias)[1]

    kernels = torch.stack([weight_hh, weight_hh.mT])
    expected = torch.stack([last(kernel) for kernel in kernels])
    torch.testing.assert_close(torch.func.vmap(last)(kernels), expected)
    tangent = torch.randn_like(weight_hh)
    _, forward = torch.func.jvp(last, (weight_hh,), (tangent,))
    jacobian = torch.autograd.functional.jacobian(last, weight_hh)
    torch.testing.assert_close(forward, (jacobian * tangent).sum((-1, -2)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight_hh, tangent)
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(last(dual)).tangent, forward)


def test_only_what_is_asked_gets_a_gradient():
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments("modrelu")]
    args[3].requires_grad_()
    states, last = recurrence(*args)
    last.sum().backward()
    assert [a.grad is not None for a in tensors(args)] == [False] * 3 + [True] + [False] * 2
    assert not recurrence(*(a.detach() if torch.is_tensor(a) else a for a in args))[0].requires_grad
    states, last = recurrence(*args)
    states.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        last.sum().backward()


def test_mod_relu_is_soft_thresholding():
    x = torch.linspace(-3, 3, 13, dtype=torch.float64).expand(2, 13).mT
    shift = torch.tensor([-1.0, 0.0], dtype=torch.float64)
    expected = torch.stack((torch.nn.functional.softshrink(x[:, 0], 1.0), x[:, 1]), 1)
    assert torch.equal(mod_relu(x, shift), expected)
    with pytest.raises(ValueError, match="mod_relu: bias must hold one shift for each feature"):
        mod_relu(x, shift[:1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({5: "sigmoid"}, "nonlinearity must be one of"),
        ({6: None}, "threshold must be given for modrelu"),
        ({5: "tanh"}, "threshold must be given for modrelu, and only there"),
        ({0: torch.zeros(TIME, BATCH, 7)}, "recurrence: x must be"),
        ({0: torch.zeros(0, BATCH, INPUTS)}, r"time >= 1"),
        ({1: torch.zeros(HIDDEN, BATCH)}, "recurrence: x must be"),
        ({4: torch.zeros(HIDDEN + 1)}, "recurrence: x must be"),
    ],
)
def test_bad_arguments(changes, message):
    args = list(arguments("modrelu"))
    for place, value in changes.items():
        args[place] = value
    with pytest.raises(ValueError, match=message):
        recurrence(*args)


def test_max_min_needs_pairs():
    with pytest.raises(ValueError, match="max_min needs an even number"):
        recurrence(
            torch.zeros(2, 1, 1),
            torch.zeros(1, 3),
            torch.zeros(3, 1),
            torch.eye(3),
            None,
            "max_min",
        )
