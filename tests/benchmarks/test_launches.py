"""The benchmark of launches runs at tiny sizes, and its counters count what they say."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import _counts as counts
from benchmarks import _nets as nets
from benchmarks import launches
from benchmarks._candidates import OURS, PLAIN, Candidate
from orthonet import OrthoConv2d, OrthoLinear, caching

BOOKKEEPING = {"_record_function_enter_new", "_record_function_exit"}


class Dispatched(TorchDispatchMode):
    """What reaches the backends: the definition of a launch, by other means than the counter's."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func._schema.name.partition("::")
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if space == "aten" and not view and name not in counts.FREE | BOOKKEEPING:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def convolutional():
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.LayerNorm(4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)), (4, 5)),
        (convolutional, (2, 3, 6, 6)),
    ],
    ids=["linear", "convolutional"],
)
@pytest.mark.parametrize("optimizer", ["fused", "foreach"])
def test_launches_are_what_is_dispatched(build, shape, optimizer):
    step = nets.training_step(build(), torch.randn(shape), optimizer=optimizer)
    step()
    counted = counts.count(step)
    with Dispatched() as truth:
        step()
    read = truth.names.pop("_local_scalar_dense", 0)
    assert counted.names == truth.names
    assert counted.launches == truth.names.total()
    # Adam that is not fused reads its step counts, which lie on the CPU with any device.
    assert counted.waits == read
    assert (read == 0) == (optimizer == "fused")


def test_launches_of_overloads_that_are_composite():
    x = torch.randn(4)

    def block():
        torch.where(x > 0, x, 0.0)
        torch.isfinite(x)
        x.reshape(2, 2).T.reshape(4)
        torch.linalg.norm(x)

    counted = counts.count(block)
    with Dispatched() as truth:
        block()
    assert counted.names == truth.names


VECTOR, NUMBER = torch.tensor([1.0, 2.0]), torch.tensor(1.0)


@pytest.mark.parametrize(
    "read",
    [
        lambda: NUMBER.item(),
        lambda: NUMBER.tolist(),
        lambda: VECTOR.tolist(),
        lambda: bool(NUMBER > 0),
        lambda: float(NUMBER),
        lambda: VECTOR.cpu(),
        lambda: VECTOR.numpy(),
        lambda: VECTOR.nonzero(),
        lambda: VECTOR[VECTOR > 1],
        lambda: torch.where(VECTOR > 1),
        lambda: torch.equal(VECTOR, VECTOR),
        lambda: torch.linalg.cholesky(torch.ones(1, 1)),
        lambda: VECTOR.unique(),
    ],
)
def test_every_read_by_the_host_is_one_wait(read):
    assert counts.count(read).waits == 1
    assert (
        counts.count(lambda: (VECTOR + 1, VECTOR[0], torch.where(VECTOR > 1, 0.0, 1.0))).waits == 0
    )


@pytest.mark.parametrize("layer", [OrthoLinear(6, 6), OrthoConv2d(4, 4, 3)], ids=["linear", "conv"])
def test_counting_leaves_kept_weights_in_use(layer):
    """Where nothing is kept, the same read launches the whole computation."""
    x = torch.randn(2, *((6,) if isinstance(layer, nn.Linear) else (4, 5, 5)))
    step = nets.training_step(layer, x)
    for _ in range(2):
        step()
    _ = layer.weight
    assert counts.count(lambda: layer.weight).launches == 0
    with caching(False):
        assert counts.count(lambda: layer.weight).launches > 0


def test_files_of_a_read_are_those_of_the_library():
    assert counts.files(lambda: nn.Linear(2, 2)(torch.ones(1, 2))) == []
    layer = OrthoLinear(3, 3)
    read = counts.files(lambda: layer.weight)
    assert read
    assert all(name.endswith(".py") for name in read)
    assert counts.files(lambda: layer.extra_repr()) != read


def test_counts_of_a_step_repeat():
    net, candidate = nets.mlp(2, 6, 4), Candidate(OURS, "DEFAULT")
    first, again = (launches.measure(net, candidate, launches.QUICK) for _ in range(2))
    assert first == again


def test_every_candidate_has_a_row():
    result = launches.run(launches.QUICK)
    rows = result["rows"]
    for net in launches.QUICK.nets:
        mine = [row for row in rows if row["net"] == net.name]
        assert len(mine) == len(launches.QUICK.candidates) + 1
        assert mine[-1]["preset"] == PLAIN["preset"]
        assert mine[-1]["waits"] == 0
        for row in mine:
            if row["library"] == OURS:
                # A 3 x 3 kernel has a matrix and 4 squares of factors. Observed 3e-6.
                assert row["residual"] <= (9 if net.convolutions else 1) * 2e-6
                assert row["over_plain"] >= 0
                assert 9 >= row["files_after_step"] >= row["files_again"] > 0
                assert row["files_again"] <= 4
    text = launches.summary(result)
    assert all(net.name in text for net in launches.QUICK.nets)
    assert "orthonet DEFAULT" in text
    default = [row for row in rows if row["library"] == OURS and row["preset"] == "DEFAULT"]
    cells = " | ".join(f"{row['over_plain']} ({row['waits']})" for row in default)
    table = launches.overview(result)
    assert f"| {cells} |" in table
    assert table.count("orthonet") == len(
        {row["over_plain"] for row in rows if row["library"] == OURS and row["net"] == net.name}
    )


def test_residual_of_a_network_is_that_of_its_worst_layer():
    net = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 4, 2, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(1.5 * torch.eye(2)[..., None, None])
        net[1].weight.zero_()[0, 0, 0, 0] = 1.0
    assert nets.residual(net[:1]) == pytest.approx(0.5, rel=1e-6)
    assert nets.residual(net) == pytest.approx(1.0, rel=1e-6)
