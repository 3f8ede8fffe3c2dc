"""Training with orthogonal weights on an accelerator: on the manifold, with one wait a step.

What a CPU can check runs there too; everything on a GPU is marked `gpu`. Weights are compared, not
outputs, because cuDNN convolves in TF32.
"""

import copy
import re
from functools import partial

import pytest
import torch
from torch import nn

import orthonet
from benchmarks import _counts as counts
from benchmarks import _nets as nets
from orthonet.testing import tolerances

CUDA = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)
ON_CUDA = [pytest.param("cuda", marks=CUDA)]
DEVICES = ["cpu", *ON_CUDA]
NAMES = ("DEFAULT", "QR", "CHOLESKY", "EXP")
BATCH, WIDTH, CHANNELS, SIZE = 8, 16, 6, 5


def linear_net(params, layers=3):
    parts = (orthonet.OrthoLinear(WIDTH, WIDTH, ortho_params=params) for _ in range(layers))
    return nn.Sequential(*(m for part in parts for m in (part, orthonet.GroupSort())))


def mixed_net(params):
    """Two shapes of kernels, two of matrices, one of them tall and one wide."""
    return nn.Sequential(
        orthonet.OrthoConv2d(3, CHANNELS, 3, padding=1, ortho_params=params),
        nn.ReLU(),
        orthonet.OrthoConv2d(CHANNELS, CHANNELS, 3, padding=1, ortho_params=params),
        nn.ReLU(),
        orthonet.OrthoConv2d(CHANNELS, CHANNELS, 3, padding=1, ortho_params=params),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        orthonet.OrthoLinear(CHANNELS, WIDTH, ortho_params=params),
        nn.ReLU(),
        orthonet.OrthoLinear(WIDTH, 4, ortho_params=params),
    )


SHAPES = {linear_net: (BATCH, WIDTH), mixed_net: (BATCH, 3, SIZE, SIZE)}
BUILDS = pytest.mark.parametrize("build", list(SHAPES), ids=["linear", "mixed"])


def made(build, device, name="DEFAULT", dtype=torch.float32):
    """A network and an input."""
    params = getattr(orthonet, f"{name}_ORTHO_PARAMS")
    return build(params).to(device, dtype), torch.randn(SHAPES[build], device=device, dtype=dtype)


def allowed(build, dtype=torch.float32):
    """Bound of |sigma - 1| of every weight.

    A 3 x 3 kernel is composed of a matrix and four pairs of projectors, each of them the square of
    a factor: in float32, nine times the error of one.
    """
    if dtype != torch.float32:
        return tolerances.ROUNDING[dtype].allowed
    factors = 9 if build is mixed_net else 1
    return factors * tolerances.PRESETS[dtype, "DEFAULT"].allowed


def cold(layer):
    """The weight that the parameters stand for, whatever has been kept."""
    twin = copy.deepcopy(layer)
    with orthonet.caching(False), torch.no_grad():
        return twin.weight.clone()


def is_current(layer, atol=4e-6):
    """Whether the weight is that of the parameters; each of the two is off by at most 2e-6."""
    return bool((layer.weight.detach() - cold(layer)).abs().max() <= atol)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
@BUILDS
def test_every_step_ends_on_the_manifold(build, name, device):
    """Observed on a CPU 7e-7 for matrices, 3e-6 for kernels, and 1.1e-5 for those of EXP."""
    net, x = made(build, device, name)
    step = nets.training_step(net, x, lr=1e-2)
    for i in range(6):
        if i == 3:  # a jump, which no earlier step announces
            with torch.no_grad():
                for p in net.parameters():
                    p.add_(torch.randn_like(p))
        step()
        assert nets.residual(net) <= allowed(build)
    if name != "EXP":  # whose scale is an estimate that every read in training improves
        assert all(is_current(layer, 4 * allowed(build)) for layer in nets.constrained(net))


@pytest.mark.parametrize("device", DEVICES)
@BUILDS
def test_autocast_leaves_weights_in_full_precision(build, device):
    net, x = made(build, device)

    def forward(x):
        with torch.autocast(device, dtype=torch.bfloat16):
            return net(x)

    step = nets.training_step(net, x, lr=1e-2, forward=forward)
    for _ in range(5):
        step()
        # Observed on a CPU 5e-7 for matrices and 2e-6 for kernels.
        assert nets.residual(net) <= allowed(build)
    for layer in nets.constrained(net):
        with torch.autocast(device, dtype=torch.bfloat16):
            under = layer.weight
        assert under.dtype == torch.float32
        assert torch.equal(under, layer.weight)


@pytest.mark.parametrize("device", DEVICES)
@BUILDS
def test_weights_stored_in_bfloat16_stay_near_the_manifold(build, device):
    net, x = made(build, device, dtype=torch.bfloat16)
    step = nets.training_step(net, x, lr=1e-2, optimizer="foreach")
    for _ in range(5):
        step()
        # Rounding of the entries, 2 ** -9 each. Observed on a CPU 1.1e-2.
        assert nets.residual(net) <= 2 * allowed(build, torch.bfloat16)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["high", "medium"])
@BUILDS
def test_products_of_low_precision_are_not_used_for_weights(build, precision, device):
    """TF32 and bfloat16, which PyTorch may take for float32 where the user allows it."""
    net, x = made(build, device)
    step = nets.training_step(net, x, lr=1e-2)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for _ in range(5):
            step()
            assert nets.residual(net) <= allowed(build)
    finally:
        torch.set_float32_matmul_precision(before)


# The exponential map has no center: its weights are computed one by one when they are read.
RETRACTED = tuple(name for name in NAMES if name != "EXP")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RETRACTED)
@BUILDS
def test_one_host_wait_a_step(build, name, device):
    net, x = made(build, device, name)
    step = nets.training_step(net, x)
    for _ in range(4):
        step()
    assert max(counts.count(step, device).waits for _ in range(2)) <= 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizers", [1, 2])
def test_one_host_wait_for_each_step_of_an_optimizer_of_two_models(optimizers, device):
    pairs = [made(linear_net, device), made(mixed_net, device, "CHOLESKY")]
    parameters = [list(net.parameters()) for net, _ in pairs]
    groups = parameters if optimizers == 2 else [parameters[0] + parameters[1]]
    adams = [torch.optim.Adam(group, fused=True) for group in groups]

    def step():
        sum(net(x).square().mean() for net, x in pairs).backward()
        for adam in adams:
            adam.step()
            adam.zero_grad()

    for _ in range(4):
        step()
    assert counts.count(step, device).waits <= optimizers


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_of_one_model_leaves_the_other_alone(device):
    (first, x), (second, y) = made(linear_net, device), made(linear_net, device)
    one, two = nets.training_step(first, x), nets.training_step(second, y)
    for _ in range(3):
        one()
        two()
    parameters = [p.detach().clone() for p in second.parameters()]
    weights = [layer.weight.detach().clone() for layer in nets.constrained(second)]
    for _ in range(2):
        one()
        assert all(map(torch.equal, parameters, second.parameters()))
        for weight, layer in zip(weights, nets.constrained(second), strict=True):
            torch.testing.assert_close(layer.weight, weight, rtol=0, atol=4e-6)
    assert all(is_current(layer) for layer in nets.constrained(first))


UNCAPTURED = pytest.mark.filterwarnings("ignore:This instance was constructed with capturable")


def _implementations():
    for implementation in ({"fused": True}, {"foreach": True}):
        yield pytest.param("cpu", implementation, id=f"cpu-{next(iter(implementation))}")
        for more in ({}, {"capturable": True}):
            options = implementation | more
            yield pytest.param("cuda", options, marks=CUDA, id=f"cuda-{'-'.join(options)}")


@UNCAPTURED
@pytest.mark.parametrize(("device", "options"), list(_implementations()))
@BUILDS
def test_every_implementation_of_adam_trains_alike(build, device, options):
    net, x = made(build, device, dtype=torch.float64)
    twin, target = copy.deepcopy(net), torch.randn_like(net(x))
    for model, how in ((net, options), (twin, {"foreach": False, "fused": False})):
        adam = torch.optim.Adam(model.parameters(), lr=1e-2, **how)
        for _ in range(5):
            adam.zero_grad()
            nn.functional.mse_loss(model(x), target).backward()
            adam.step()
    for mine, theirs in zip(nets.constrained(net), nets.constrained(twin), strict=True):
        # Adam divides by the size of the gradient, which may be small. Observed on a CPU 2e-14.
        torch.testing.assert_close(mine.weight, theirs.weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@BUILDS
def test_a_step_that_the_scaler_skips_changes_nothing(build, fused, device):
    """Fused Adam is called and skips inside; otherwise the scaler does not call it."""
    net, x = made(build, device)
    adam = torch.optim.Adam(net.parameters(), lr=1e-2, fused=fused, foreach=not fused)
    scaler, target = torch.amp.GradScaler(device, init_scale=256.0), torch.randn_like(net(x))

    def step(factor):
        adam.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = nn.functional.mse_loss(net(x).float(), target)
        scaler.scale(loss * factor).backward()
        before = [p.detach().clone() for p in net.parameters()]
        scaler.step(adam)
        scaler.update()
        return [torch.equal(*pair) for pair in zip(before, net.parameters(), strict=True)]

    for _ in range(2):
        assert not any(step(1.0))
    weights = [layer.weight.detach().clone() for layer in nets.constrained(net)]
    assert all(step(float("inf")))
    for weight, layer in zip(weights, nets.constrained(net), strict=True):
        torch.testing.assert_close(layer.weight, weight, rtol=0, atol=4 * allowed(build))
    assert not any(step(1.0))
    assert nets.residual(net) <= allowed(build)


@pytest.mark.parametrize("device", ON_CUDA)
@BUILDS
def test_a_read_on_a_side_stream_sees_the_step(build, device):
    net, x = made(build, device)
    step, side = nets.training_step(net, x, lr=1e-2), torch.cuda.Stream()
    main = torch.cuda.current_stream()
    for _ in range(4):
        step()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            there = [layer.weight.detach().clone() for layer in nets.constrained(net)]
        main.wait_stream(side)
        for weight, layer in zip(there, nets.constrained(net), strict=True):
            atol = 4 * allowed(build)
            torch.testing.assert_close(weight, cold(layer), rtol=0, atol=atol)


@pytest.mark.parametrize("device", ON_CUDA)
@BUILDS
def test_training_on_a_side_stream(build, device):
    net, x = made(build, device)
    twin, side = copy.deepcopy(net), torch.cuda.Stream()
    target = torch.randn_like(net(x))

    def train(model):
        sgd = torch.optim.SGD(model.parameters(), lr=1e-2)
        for _ in range(4):
            sgd.zero_grad()
            nn.functional.mse_loss(model(x), target).backward()
            sgd.step()

    train(twin)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train(net)
    torch.cuda.current_stream().wait_stream(side)
    for mine, theirs in zip(nets.constrained(net), nets.constrained(twin), strict=True):
        torch.testing.assert_close(mine.weight, theirs.weight, rtol=0, atol=4 * allowed(build))


# A refused capture leaves an empty graph; the warm-up of a captured step is on another stream.
CAPTURE = (
    UNCAPTURED,
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream"),
)
CAPTURING = [pytest.param("cuda", marks=(*CUDA, *CAPTURE))]


def captured(act, same_stream):
    """A CUDA graph of `act` after warm-up; None if the library refuses with a sentence.

    With `same_stream` it warms up on the stream of the capture, so that kept values are at hand.
    """
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            act()
    torch.cuda.current_stream().wait_stream(side)
    said = ""
    try:
        with torch.cuda.graph(graph, stream=side if same_stream else None):
            act()
    except RuntimeError as error:
        said = str(error)
    if not said:
        return graph
    assert re.fullmatch(r"[A-Z]\w+: [^\n]*captur[^\n]*\.", said), said
    return None


@pytest.mark.parametrize("device", CAPTURING)
@pytest.mark.parametrize("same_stream", [False, True], ids=["apart", "same stream"])
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_of_an_evaluation_computes_what_eager_does(name, same_stream, device):
    net, x = made(linear_net, device, name)
    step, results = nets.training_step(net, x.clone(), lr=1e-2), []
    step()

    @torch.no_grad()
    def evaluate():
        results[:] = [net.eval()(x)]
        net.train()

    graph = captured(evaluate, same_stream)
    if graph is None:
        return
    output = results[0]
    for act in (lambda: x.normal_(), step):  # another input, then other parameters
        act()
        graph.replay()
        replayed = output.clone()
        evaluate()
        torch.testing.assert_close(replayed, results[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", CAPTURING)
@pytest.mark.parametrize("same_stream", [False, True], ids=["apart", "same stream"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "optimizer",
    [partial(torch.optim.SGD, momentum=0.9), partial(torch.optim.Adam, capturable=True)],
    ids=["SGD", "Adam"],
)
def test_a_graph_of_a_training_step_trains_as_eager_does(optimizer, name, same_stream, device):
    net, x = made(linear_net, device, name, torch.float64)
    twin, target = copy.deepcopy(net), torch.randn_like(net(x))

    def trainer(model):
        adam = optimizer(model.parameters(), lr=1e-2)

        def step():
            adam.zero_grad(set_to_none=False)
            nn.functional.mse_loss(model(x), target).backward()
            adam.step()

        return step

    step, eager = trainer(net), trainer(twin)
    graph = captured(step, same_stream)
    if graph is None:
        return
    for _ in range(3):  # the warm-up of `captured`
        eager()
    for _ in range(4):
        graph.replay()
        eager()
    orthonet.invalidate(net)  # what a replay writes leaves no trace
    for mine, theirs in zip(nets.constrained(net), nets.constrained(twin), strict=True):
        torch.testing.assert_close(mine.weight, theirs.weight, rtol=0, atol=1e-9)
    assert nets.residual(net) <= tolerances.PRESETS[torch.float64, "CHOLESKY"].allowed
