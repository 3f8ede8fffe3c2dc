"""Orthogonalization shared out among two real processes: the steps of one process."""

import contextlib
import copy
import io
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import orthonet
from orthonet.layers import OrthoConv2d, OrthoLinear
from orthonet.reparametrizers import OrthoWeight
from tests.presets import PRESETS


def build(preset="DEFAULT"):
    torch.manual_seed(0)
    params = PRESETS[preset]
    return nn.Sequential(
        OrthoConv2d(4, 8, 3, stride=2, padding=1, ortho_params=params),
        nn.Flatten(),
        OrthoLinear(32, 12, ortho_params=params),
        nn.Tanh(),
        OrthoLinear(12, 12, ortho_params=params),
        nn.Tanh(),
        OrthoLinear(12, 12, ortho_params=params),
    )


def loss(model, x):
    return (model(x) + 1).sin().pow(2).mean()


def train(model, xs, micro=1):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x in xs:
        optimizer.zero_grad()
        pieces = x.chunk(micro)
        for piece in pieces[:-1]:
            with model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext():
                (loss(model, piece) / micro).backward()
        (loss(model, pieces[-1]) / micro).backward()
        optimizer.step()


@torch.no_grad()
def differ(a, b):
    return max(float((p - q).abs().max()) for p, q in zip(a, b, strict=True))


def batches():
    return torch.randn(3, 2, 4, 4, 4, 4, generator=torch.Generator().manual_seed(7))


def same_everywhere(tensors):
    for tensor in tensors:
        others = [torch.empty_like(tensor) for _ in range(2)]
        distributed.all_gather(others, tensor.detach().contiguous())
        assert torch.equal(*others)


def shared(rank, preset):
    model, plain = build(preset), build(preset)
    names = orthonet.share_among_ranks(model)
    assert len(names) == 2 and all(names)
    everything = {
        n for n, m in model.named_modules() if isinstance(m, orthonet.reparametrizers.OrthoWeight)
    }
    assert set().union(*map(set, names)) == everything
    ddp = DistributedDataParallel(model)
    train(ddp, batches()[:, rank])
    train(DistributedDataParallel(plain), batches()[:, rank])
    # 2e-7; the shift of a warm parameter may be told apart by its norm only
    assert differ(model.parameters(), plain.parameters()) < 1e-6
    same_everywhere([*model.parameters(), *model.buffers()])
    with torch.no_grad():
        x = batches()[0, 0]
        assert differ([model.eval()(x)], [plain.eval()(x)]) < 2e-6  # 5e-7


def one_process(rank):
    """Beside the whole batch in one process."""
    model, reference = build("QR"), build("QR")
    orthonet.share_among_ranks(model)
    train(DistributedDataParallel(model), batches()[:, rank], micro=2)
    train(reference, batches().flatten(1, 2))
    assert differ(model.parameters(), reference.parameters()) < 1e-6  # 1.5e-7


def surroundings(rank):
    model = build()
    owned = orthonet.share_among_ranks(model)[rank]
    x = batches()[0, rank]
    with orthonet.defer_pullback():
        loss(model, x).backward()
    for name, m in model.named_modules():  # one process pulls back, for all
        if isinstance(m, OrthoWeight):
            assert bool(m.original.grad.any()) == (name in owned)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for m in (*twin.modules(), *loaded.modules()):
        assert getattr(m, "_group", None) is None
    if rank == 0:  # alone: what does not train is computed without the others
        with torch.no_grad():
            model(x)
        model.eval()(x)
        model.train()
        twin(x).sum().backward()
    distributed.barrier()
    orthonet.invalidate(model)  # as a step of the optimizer does, in all processes
    y = model(x)
    with pytest.raises(RuntimeError, match="cannot be shared out"):
        torch.autograd.grad(y.sum(), list(model.parameters()), create_graph=True)
    orthonet.unfuse(model)
    assert all(getattr(m, "_group", None) is None for m in model.modules())
    half = build()
    fully_shard(half[2])
    with pytest.raises(ValueError, match="before share_among_ranks"):
        orthonet.share_among_ranks(half)
    orthonet.share_among_ranks(model)
    fully_shard(model)
    with pytest.raises(ValueError, match="Call fully_shard before"):
        model(x)


def shard(model, **options):
    for layer in model:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def whole(tensors):
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]


def in_shards(rank, preset):
    """FSDP2: the steps of whole batches in one process, a copy of the shards at their owners."""
    # FSDP2 takes the cold way of the warm map
    model, reference = build(preset), build(preset.removesuffix("_WARM"))
    shard(model)
    owned = orthonet.share_among_ranks(model)[rank]
    # Odd sizes: 12 rows are six each, 8 four; one row of a factor may leave a process without any.
    train(model, batches()[:, rank], micro=2)
    train(reference, batches().flatten(1, 2))
    # observed 2e-7
    assert differ(whole(model.parameters()), list(reference.parameters())) < 1e-6
    same_everywhere(model.buffers())
    group = model[2].parametrization._group
    names = [n for n, m in model.named_modules() if isinstance(m, OrthoWeight)]
    assert {names[i] for i in group.graphs} == set(owned)  # nobody keeps the others' matrices
    x = batches()[0, 0]
    with torch.no_grad():
        # 3e-7 was seen
        assert differ([model.eval()(x)], [reference.eval()(x)]) < 2e-6
    assert copy.deepcopy(group) is None


def shards_are_seen(rank):
    """A change of the shards with no optimizer step, and modules that are told to forget."""
    model, reference = build("QR"), build("QR")
    shard(model, mesh=distributed.init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b")))
    orthonet.share_among_ranks(model)
    x = batches()[0, 0]
    for _ in range(2):
        # one dimension of the mesh replicates; 2e-7 was seen
        assert differ([model(x)], [reference(x)]) < 1e-6
        with torch.no_grad():
            for p, q in zip(model.parameters(), reference.parameters(), strict=True):
                p.mul_(1.5)
                q.mul_(1.5)
    group = model[2].parametrization._group
    before = group.graphs
    model(x)
    assert group.graphs is not before
    before = group.graphs
    model(x)
    assert group.graphs is before
    loss(model, x).backward()
    grads = [p.grad.full_tensor() for p in model.parameters()]
    model.zero_grad()
    group.task, group.sums = -2, {0: torch.ones(3)}  # as an interrupted backward pass leaves them
    loss(model, x).backward()
    # 0 was seen
    assert differ([p.grad.full_tensor() for p in model.parameters()], grads) < 1e-7
    y = model(x).sum()
    orthonet.invalidate(model)
    with pytest.raises(RuntimeError, match="has been modified since"):
        y.backward()


def mixed_precision(rank):
    """Units that compute in bfloat16: the matrices come from the float32 shards."""
    model, reference = build("QR"), build("QR")
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    orthonet.share_among_ranks(model)
    seen = []
    model[4].register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.detach()))
    loss(model, batches()[0, rank]).backward()
    assert seen[0].dtype == torch.bfloat16
    assert torch.equal(seen[0], reference[4].weight.bfloat16())  # one rounding, not more
    loss(reference, batches()[0].flatten(0, 1)).backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert p.grad is not None
        grad = p.grad.full_tensor()
        assert grad.dtype == torch.float32
        assert (grad - q.grad).norm() <= 0.03 * q.grad.norm()  # 0.012 was seen


def run(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        for preset in ("DEFAULT", "QR", "EXP", "POLAR_WARM"):
            shared(rank, preset)
        one_process(rank)
        surroundings(rank)
        for preset in ("DEFAULT", "QR", "EXP", "POLAR_WARM"):
            in_shards(rank, preset)
        shards_are_seen(rank)
        mixed_precision(rank)
        distributed.barrier()  # nobody leaves while another still talks
    finally:
        distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="gloo is not built in")
def test_two_processes_share_the_work(tmp_path: Path):
    multiprocessing.spawn(run, args=(str(tmp_path / "store"),), nprocs=2)


def test_one_process_without_a_group_is_told_what_to_do():
    with pytest.raises(RuntimeError, match="init_process_group"):
        orthonet.share_among_ranks(build())
