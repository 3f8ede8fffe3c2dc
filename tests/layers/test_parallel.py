"""Layers of every family under DistributedDataParallel and FSDP2: two processes as one."""

from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from orthonet import constraints
from orthonet.layers import (
    OrthoConv2d,
    OrthoLinear,
    OrthoRNN,
    available,
    make_conv,
    make_linear,
)
from tests.presets import PRESETS
from tests.ranks import two_processes


class Rows(nn.Module):
    """A recurrent layer as a map of tensors."""

    def __init__(self):
        super().__init__()
        self.rnn = OrthoRNN(4, 6, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


def linear(preset):
    return lambda: nn.Sequential(
        OrthoLinear(6, 8, ortho_params=PRESETS[preset]),
        nn.Tanh(),
        OrthoLinear(8, 4, ortho_params=PRESETS[preset]),
    )


class Read(nn.Module):
    """Weights of layers that are units of FSDP2 but whose forward is not called."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (OrthoLinear(6, 6, bias=False) for _ in range(2))

    def forward(self, x):
        first = self.first.weight
        return x @ first @ self.second.weight @ first.mT


def verb():
    return nn.Sequential(
        constraints.orthogonal(nn.Linear(6, 6), "weight"),
        nn.Tanh(),
        constraints.sphere(nn.Linear(6, 4), "bias"),
    )


MODELS = {
    "OrthoLinear": (linear("DEFAULT"), (6,)),
    "OrthoLinear, warm": (linear("POLAR_WARM"), (6,)),
    "OrthoConv2d": (lambda: OrthoConv2d(4, 8, 3, stride=2, padding=1, groups=2), (4, 6, 6)),
    "OrthoRNN": (Rows, (5, 4)),
    "read outside of its unit": (Read, (6,)),
    "AOL": (lambda: make_linear("aol", 6, 4), (6,)),
    "constraints": (verb, (6,)),
}


def train(model, xs, scale=1.0):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x in xs:
        optimizer.zero_grad()
        (model(x).float() + 1).sin().pow(2).mean().backward()
        optimizer.step()


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def differ(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((full(p) - q).abs().max()) for p, q in pairs)


def shard(model, **options):
    for layer in model.children():
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, **options)
    return fully_shard(model, **options)


ZOO = {
    **{
        f"linear {name}": (lambda n=name: make_linear(n, 6, 6), (6,))
        for name in available("linear")
    },
    **{
        f"conv {name}": (
            lambda n=name: make_conv(n, 4, 4, 1 if n == "cholesky" else 3, padding="same"),
            (4, 6, 6),
        )
        for name in available("conv")
    },
}


def errors_of(cases, rank):
    """How far replicated and sharded training end from that of one process."""
    errors = {}
    for name, (make, size) in cases.items():
        xs = torch.randn(3, 2, 4, *size, generator=torch.Generator().manual_seed(7))
        models = []
        for _ in range(3):
            torch.manual_seed(0)
            models.append(make())
        reference, replicated, sharded = models
        train(reference, xs.flatten(1, 2))
        train(DistributedDataParallel(replicated), xs[:, rank])
        train(shard(sharded), xs[:, rank])
        errors[name] = differ(replicated, reference), differ(sharded, reference)
    return errors


def zoo(rank):
    errors = errors_of(ZOO, rank)
    assert max(max(pair) for pair in errors.values()) < 1e-6, errors  # observed 8e-8


def equal(rank):
    errors = errors_of(MODELS, rank)
    assert max(max(pair) for pair in errors.values()) < 1e-6, errors  # observed 6e-8


def mixed(rank):
    """A unit of its own in float32 for what makes the weight; the rest in bfloat16."""
    torch.manual_seed(0)
    model = linear("DEFAULT")()
    twin = linear("DEFAULT")()
    twin.load_state_dict(model.state_dict())
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    whole = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.bfloat16)
    for layer in model:
        if isinstance(layer, OrthoLinear):
            fully_shard(layer.parametrization, mp_policy=whole)
            fully_shard(layer, mp_policy=half)
    fully_shard(model, mp_policy=half)
    x = torch.randn(4, 6)
    assert model(x).dtype == torch.bfloat16
    for layer, other in zip(model[::2], twin[::2], strict=True):
        weight = layer.weight  # readable outside of forward, since it is a unit
        assert weight.dtype == torch.bfloat16
        # half a unit in the last place of entries below 1: 2e-3
        assert (weight.float() - other.weight).abs().max() <= 2.0**-8
    train(model, x.expand(3, 4, 6))
    for layer in model[::2]:
        sigma = torch.linalg.svdvals(layer.weight.detach().double())
        assert (sigma - 1).abs().max() < 1e-2  # 3e-3, of bfloat16


def outside(rank):
    """Without a unit of its own the parameter is a shard; the weight still comes out whole."""
    torch.manual_seed(0)
    model = linear("QR")()
    twin = linear("QR")()
    twin.load_state_dict(model.state_dict())
    shard(model)
    weight = model[0].weight
    assert (full(weight) - twin[0].weight).abs().max() < 1e-6


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="gloo is not built in")
@pytest.mark.parametrize(
    "what", [equal, *(pytest.param(f, marks=pytest.mark.slow) for f in (mixed, outside))]
)
def test_two_processes(tmp_path: Path, what):
    two_processes(what, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="gloo is not built in")
def test_two_processes_with_every_layer_of_the_zoo(tmp_path: Path):
    two_processes(zoo, tmp_path)
