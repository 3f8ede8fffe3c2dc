"""The retraction distributed across two real processes, with whole parameters and with shards."""

import contextlib
import copy
import io
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import orthonet
from orthonet.layers import OrthoConv2d, OrthoLinear
from orthonet.linalg import retraction
from orthonet.linalg.distributed import by_ranks, collect, hand_out, in_rows
from orthonet.reparametrizers import OrthoWeight
from orthonet.reparametrizers.providers.engine import ENGINE
from tests.presets import PRESETS
from tests.ranks import two_processes


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


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def train(model, xs, micro=1, make=momentum):
    optimizer = make(model.parameters())
    for x in xs:
        optimizer.zero_grad()
        pieces = x.chunk(micro)
        for piece in pieces[:-1]:
            with model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext():
                (loss(model, piece) / micro).backward()
        (loss(model, pieces[-1]) / micro).backward()
        optimizer.step()
    return optimizer


@torch.no_grad()
def differ(a, b):
    return max(float((p - q).abs().max()) for p, q in zip(a, b, strict=True))


def batches():
    return torch.randn(3, 2, 4, 4, 4, 4, generator=torch.Generator().manual_seed(7))


def weights(model):
    return [m for m in model.modules() if isinstance(m, OrthoWeight)]


def same_everywhere(tensors):
    for tensor in tensors:
        others = [torch.empty_like(tensor) for _ in range(2)]
        distributed.all_gather(others, tensor.detach().contiguous())
        assert torch.equal(*others)


def worst(model):
    sigma = [torch.linalg.svdvals(w().detach().double()) for w in weights(model)]
    return max(float((s - 1).abs().max()) for s in sigma)


@contextlib.contextmanager
def counted(counts, name, module=distributed):
    """Count the calls of a function."""
    function = getattr(module, name)

    def call(*args, **kwargs):
        counts[name] = counts.get(name, 0) + 1
        return function(*args, **kwargs)

    setattr(module, name, call)
    try:
        yield
    finally:
        setattr(module, name, function)


# ------------------------------------------------------------------ whole parameters


def shared(rank, preset, make=momentum, micro=1, **options):
    """Next to each process that retracts everything, and to one process."""
    model, plain, one = build(preset), build(preset), build(preset)
    names = orthonet.share_among_ranks(model)
    assert len(names) == 2 and all(names)
    everything = {n for n, m in model.named_modules() if isinstance(m, OrthoWeight)}
    assert sorted(sum(names, ())) == sorted(everything)
    train(DistributedDataParallel(model, **options), batches()[:, rank], micro, make)
    train(DistributedDataParallel(plain, **options), batches()[:, rank], micro, make)
    train(one, batches().flatten(1, 2), make=make)
    same_everywhere([*model.parameters(), *plain.parameters()])
    same_everywhere([w() for w in (*weights(model), *weights(plain))])
    # float32 of size 1 and below, three steps: a few units of 6e-8 each; 2e-7 was seen
    assert differ(model.parameters(), plain.parameters()) < 1e-6
    assert differ(model.parameters(), one.parameters()) < 1e-6
    assert worst(model) < 2e-6


def replicas(rank):
    for preset in ("DEFAULT", "QR", "CHOLESKY", "POLAR_WARM"):
        shared(rank, preset)
    shared(rank, "DEFAULT", micro=2, find_unused_parameters=True)
    shared(rank, "QR", static_graph=True)
    for options in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        shared(rank, "DEFAULT", lambda p, o=options: torch.optim.SGD(p, 0.1, momentum=0.9, **o))


def each_its_part(rank):
    """A process retracts what is its own, by one exchange; no read is a collective."""
    model = build()
    owned = orthonet.share_among_ranks(model)[rank]
    x, counts, seen = batches()[0, rank], {}, []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss(model, batches()[0, 0]).backward()  # the same gradients in both processes
    retract = ENGINE.retract
    ENGINE.retract = lambda groups, move=True: (
        seen.extend(m.parameter for group in groups for m in group) or retract(groups, move)
    )
    try:
        with counted(counts, "broadcast"):  # gloo: one from each process that has a part
            optimizer.step()
            assert counts == {"broadcast": 2}
            own = [w for n, w in model.named_modules() if n in owned]
            assert sum(x.numel() for x in seen) == sum(w.original.numel() for w in own)
            seen.clear()
            model(x)  # another batch in each
            assert not seen and counts == {"broadcast": 2}  # everything stands at the center
    finally:
        del ENGINE.retract
    if rank == 0:  # alone
        with torch.no_grad():
            model(x)
            model.eval()(x)
        model.train()
        twin = copy.deepcopy(model)
        twin(x).sum().backward()
        torch.optim.SGD(twin.parameters(), 0.1).step()  # a copy is not shared
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        loaded(x).sum().backward()
        torch.optim.SGD(loaded.parameters(), 0.1).step()
        assert worst(twin) < 2e-6 and worst(loaded) < 2e-6
    distributed.barrier()
    before = [p.detach().clone() for p in model.parameters()]
    with counted(counts, "broadcast"):
        optimizer.step()
        assert counts == {"broadcast": 4}
    same_everywhere(model.parameters())
    assert differ(model.parameters(), before) > 0.0
    assert orthonet.share_among_ranks(model, enabled=False) == (
        tuple(n for n, m in model.named_modules() if isinstance(m, OrthoWeight)),
    )
    with counted(counts, "broadcast"):
        optimizer.step()
    assert counts == {"broadcast": 4}
    assert not ENGINE.shares


class Branches(nn.Module):
    """Layers of one shape, so of one node in the graph, of which a pass uses some."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(OrthoLinear(8, 8) for _ in range(3))

    def forward(self, x, used):
        for i in used:
            x = self.layers[i](x).tanh()
        return x


def unused_layers(rank):
    """A layer that no process has used has no gradient; one that some have used has the mean."""
    model, one = Branches(), Branches()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(3))
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, one)]
    for used in (((0, 1), (0,)), ((2,), (2,)), ((1, 0), (0, 1)), ((0, 1, 2), (2, 0, 1))):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (ddp(x[rank], used[rank]) + 1).sin().square().mean().backward()
        sum((one(x[r], used[r]) + 1).sin().square().mean() / 2 for r in range(2)).backward()
        missing = [p.grad is None for p in one.parameters()]
        assert missing == [p.grad is None for p in model.parameters()]
        for optimizer in optimizers:
            optimizer.step()
    same_everywhere(model.parameters())
    assert differ(model.parameters(), one.parameters()) < 1e-6


def two_networks(rank):
    """A step of one optimizer moves and sends only what it holds; what does not move stays."""
    pair = nn.ModuleList([build(), build("QR")])
    orthonet.share_among_ranks(pair)
    x, counts = batches()[0, 0], {}
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in pair]
    for mine, other, optimizer in ((0, 1, optimizers[0]), (1, 0, optimizers[1])):
        pair.zero_grad()
        (loss(pair[0], x) + loss(pair[1], x)).backward()
        before = [p.detach().clone() for p in pair[other].parameters()]
        versions = [p._version for p in pair[other].parameters()]
        optimizer.step()
        assert differ(pair[other].parameters(), before) == 0.0
        assert versions == [p._version for p in pair[other].parameters()]
        assert worst(pair[mine]) < 2e-6
    before = [(p.detach().clone(), p._version) for p in pair[0].parameters()]
    pair.zero_grad()
    with counted(counts, "broadcast"):
        optimizers[0].step()  # nothing has a gradient
    assert counts == {"broadcast": 2}  # still a collective: nobody asks whether others have one
    for p, (value, version) in zip(pair[0].parameters(), before, strict=True):
        assert torch.equal(p, value) and p._version == version
    same_everywhere(pair.parameters())
    # a jump, and a matrix that cannot be retracted
    with torch.no_grad():
        pair[0][2].parametrization.original.normal_(generator=torch.Generator().manual_seed(1))
        pair[0][4].parametrization.original.zero_()
    pair[0](x).sum().backward()
    optimizers[0].param_groups[0]["lr"] = 0.0
    optimizers[0].step()
    same_everywhere(pair.parameters())
    assert not pair[0][4].parametrization.original.any()
    sigma = torch.linalg.svdvals(pair[0][2].weight.detach().double())
    assert (sigma - 1).abs().max() < 2e-6
    # a matrix has gone
    optimizers = torch.optim.SGD([*pair.parameters()], 0.1)
    del pair[0][6]
    with pytest.raises(RuntimeError, match="Call share_among_ranks again"):
        optimizers.step()
    orthonet.share_among_ranks(pair)
    optimizers.step()
    del pair
    optimizers.step()
    assert not ENGINE.shares  # nothing is left of a model that has gone


def left_to_each(rank):
    """LBFGS and maps without a retraction are computed by each process."""
    model = build("EXP")
    assert orthonet.share_among_ranks(model) == ((), ())
    counts = {}
    with counted(counts, "broadcast"):
        train(model, batches()[:, 0])
        model = build()
        orthonet.share_among_ranks(model)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
        x = batches()[0, 0]

        def closure():
            optimizer.zero_grad()
            found = loss(model, x)
            found.backward()
            return found

        optimizer.step(closure)
    assert not counts
    half = build()
    fully_shard(half[2])
    with pytest.raises(ValueError, match="all of them shards"):
        orthonet.share_among_ranks(half)


# ------------------------------------------------------------------ shards


def shard(model, **options):
    for layer in model:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def whole(tensors):
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]


@contextlib.contextmanager
def no_map():
    """Within it, no cold map may run."""

    def refuse(self, x):
        raise AssertionError("a matrix at the center is orthogonalized")

    kinds = [type(retraction.POLAR), type(retraction.QR)]
    before = [kind.value for kind in kinds]
    orthogonalize = orthonet.reparametrizers.Orthogonalizer.forward
    for kind in kinds:
        kind.value = refuse
    orthonet.reparametrizers.Orthogonalizer.forward = refuse
    try:
        yield
    finally:
        orthonet.reparametrizers.Orthogonalizer.forward = orthogonalize
        for kind, value in zip(kinds, before, strict=True):
            kind.value = value


def in_shards(rank, preset, make=momentum, **options):
    """FSDP2: the steps of whole batches in one process, and no orthogonalization in a pass."""
    model, reference = build(preset), build(preset)
    shard(model, **options)
    # Odd sizes: 12 rows are six each, 8 four; one row of a factor leaves a process without any.
    with no_map():
        train(model, batches()[:, rank], 2, make)
    train(reference, batches().flatten(1, 2), make=make)
    ours = whole(model.parameters())
    same_everywhere(ours)
    # as in `shared`; 2e-7 was seen
    assert differ(ours, list(reference.parameters())) < 1e-6
    x = batches()[0, 0]
    with torch.no_grad(), no_map():
        assert differ([model.eval()(x)], [reference.eval()(x)]) < 2e-6  # 3e-7 was seen
        values = [w() for w in weights(model)]  # read outside of their units
        same_everywhere(values)
    sigma = [torch.linalg.svdvals(value.double()) for value in values]
    assert max(float((s - 1).abs().max()) for s in sigma) < 2e-6


def sharded(rank):
    for preset in ("DEFAULT", "QR", "CHOLESKY"):
        in_shards(rank, preset)
    in_shards(rank, "DEFAULT", lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True))
    # eps, so that no rounding of a gradient near zero makes a step
    in_shards(rank, "DEFAULT", lambda p: torch.optim.Adam(p, 0.01, eps=1e-2, fused=True))
    mesh = distributed.init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    in_shards(rank, "QR", mesh=mesh)  # one dimension replicates
    mesh = distributed.init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    in_shards(rank, "DEFAULT", mesh=mesh, reshard_after_forward=False)
    model = build()
    names = orthonet.share_among_ranks(shard(model))  # says how, and changes nothing
    everything = {n for n, m in model.named_modules() if isinstance(m, OrthoWeight)}
    assert len(names) == 2 and sorted(sum(names, ())) == sorted(everything)
    assert not ENGINE.shares
    train(model, batches()[:, rank])


def shards_are_seen(rank):
    """A change of the shards with no optimizer step is seen, wherever it leads."""
    model, reference = build("QR"), build("QR")
    shard(model)
    train(model, batches()[:, rank])
    train(reference, batches().flatten(1, 2))
    x = batches()[0, 0]
    # Two stay at the center, which is seen by a look, and one leaves it.
    for change in (lambda p: p.mul_(1.5), lambda p: p.mul_(-1.0), lambda p: p.add_(0.1)):
        with torch.no_grad():
            for p, q in zip(model.parameters(), reference.parameters(), strict=True):
                change(p)
                change(q)
        assert differ([model(x)], [reference(x)]) < 2e-6  # 3e-7 was seen
        assert differ([model[4].weight], [reference[4].weight]) < 2e-6
        with orthonet.caching(False):
            assert differ([model(x)], [reference(x)]) < 2e-6
    train(model, batches()[:, rank])
    train(reference, batches().flatten(1, 2))
    assert differ(whole(model.parameters()), list(reference.parameters())) < 2e-6
    with no_map():
        model(x)
        orthonet.invalidate(model)
        model(x)  # by a look
        y = model(x).square().sum()
        grads = torch.autograd.grad(y, list(model.parameters()), allow_unused=True)
    assert all(g is None or bool(g.isfinite().all()) for g in grads)


def an_interrupted_step_is_seen(rank):
    """Fused and foreach steps leave no trace in a shard; one that does not end is seen anyway."""
    for options in ({"fused": True}, {"foreach": True}):
        model = shard(build("QR"))
        optimizer = train(model, batches()[:1, rank], make=lambda p, o=options: adam(p, **o))

        def interrupt(*_):
            raise RuntimeError("interrupted")

        loss(model, batches()[1, rank]).backward()
        optimizer.register_step_post_hook(interrupt)
        optimizer.param_groups[0]["lr"] = 0.3
        with pytest.raises(RuntimeError, match="interrupted"):
            optimizer.step()
        with torch.no_grad():
            sigma = [torch.linalg.svdvals(w().double()) for w in weights(model)]
        assert max(float((s - 1).abs().max()) for s in sigma) < 2e-6


def adam(parameters, **options):
    return torch.optim.Adam(parameters, 0.01, eps=1e-2, **options)


def layouts(rank):
    """Matrices of any dtype and layout are collected, moved by their owners, and handed back."""
    line = distributed.init_device_mesh("cpu", (2,))
    wide, tall = (distributed.init_device_mesh("cpu", shape) for shape in ((1, 2), (2, 1)))
    for mesh, ways in (
        (line, [Shard(0)]),
        (line, [Shard(1)]),
        (line, [Replicate()]),
        (wide, [Replicate(), Shard(1)]),
        (wide, [Shard(0), Shard(1)]),
        (tall, [Shard(1), Shard(0)]),
        (tall, [Shard(0), Replicate()]),
    ):
        group = mesh.get_group(mesh.ndim - 1)
        torch.manual_seed(0)
        kinds = ((5, 3, torch.float32), (1, 4, torch.float64), (3, 3, torch.float32))
        wholes = [torch.randn(m, n, dtype=dtype) for m, n, dtype in kinds]
        parts = [distribute_tensor(w, mesh, ways, src_data_rank=None) for w in wholes]
        owners = [i % distributed.get_world_size(group) for i in range(3)]
        rows = [in_rows(t) for t in parts]
        mine = collect(rows, owners, group)
        assert list(mine) == [i for i in range(3) if owners[i] == distributed.get_rank(group)]
        assert all(torch.equal(found, wholes[i]) for i, found in mine.items())
        handed = hand_out({i: 2 * found for i, found in mine.items()}, rows, owners, group)
        for part, new in zip(parts, handed, strict=True):
            back = new.redistribute(placements=part.placements)
            assert torch.equal(back.to_local(), 2 * part.to_local())
        made = by_ranks(
            [[w, w > 0] for w in wholes],
            owners,
            lambda m, ws=wholes: [(3 * ws[i], ws[i] < 0) for i in m],
            group,
        )
        for w, (point, mark) in zip(wholes, made, strict=True):
            assert torch.equal(point, 3 * w) and torch.equal(mark, w < 0)


def checkpoints(rank, folder):
    """DCP: saved and loaded in a new model, the next steps have the same bits."""
    model, other = shard(build()), shard(build())
    xs = batches()[:, rank]
    optimizer = train(model, xs)
    state = get_state_dict(model, optimizer)
    saved = {"model": state[0], "optimizer": state[1]}
    checkpoint.save(saved, checkpoint_id=folder)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    second = momentum(other.parameters())
    state = get_state_dict(other, second)
    loaded = {"model": state[0], "optimizer": state[1]}
    checkpoint.load(loaded, checkpoint_id=folder)
    set_state_dict(
        other,
        second,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
    )
    for x in xs:
        for module, step in ((model, optimizer), (other, second)):
            step.zero_grad()
            loss(module, x).backward()
            step.step()
        assert differ(whole(model.parameters()), whole(other.parameters())) == 0.0
    # in one process
    plain = build()
    state = model.state_dict()
    shards = {k: v.full_tensor() for k, v in state.items() if hasattr(v, "full_tensor")}
    plain.load_state_dict({**state, **shards})
    with torch.no_grad():
        assert differ([plain(x)], [model(x)]) == 0.0


def full_checkpoints(rank):
    """Gathered by all and sent by the first: the preset is in them, and every process compares."""
    model = shard(build("QR"))
    whole_state = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = get_model_state_dict(model, options=whole_state)
    sent = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    other = shard(build("QR"))
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    set_model_state_dict(other, dict(saved) if rank == 0 else {}, options=sent)
    assert differ(whole(model.parameters()), whole(other.parameters())) == 0.0
    with pytest.raises(RuntimeError, match="checkpoint=QR_ORTHO_PARAMS"):
        set_model_state_dict(shard(build()), dict(saved) if rank == 0 else {}, options=sent)


def mixed_precision(rank):
    """Units that compute in bfloat16: the shards stay at the center, gradients are right."""
    model, reference = build("QR"), build("QR")
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    seen = []
    model[4].register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.detach()))
    loss(model, batches()[0, rank]).backward()
    assert seen[0].dtype == torch.bfloat16
    # two roundings of entries below 1, each of half a unit, 2^-9; the first of them is amplified
    assert (seen[0].float() - reference[4].weight).abs().max() <= 2.0**-7
    loss(reference, batches()[0].flatten(0, 1)).backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        grad = p.grad.full_tensor()
        assert grad.dtype == torch.float32
        assert (grad - q.grad).norm() <= 0.05 * q.grad.norm()  # 0.02 was seen
    momentum(model.parameters()).step()
    for w in weights(model):
        raw = w.original.full_tensor()
        sigma = torch.linalg.svdvals(raw.detach().double())
        assert (sigma / sigma.mean(-1, keepdim=True) - 1).abs().max() < 2e-6


WHOLE = (replicas, each_its_part, unused_layers, two_networks, left_to_each)
SHARDS = (
    *(sharded, shards_are_seen, an_interrupted_step_is_seen, layouts),
    *(checkpoints, full_checkpoints, mixed_precision),
)


def run(rank: int, folder: Path, functions) -> None:
    for function in functions:
        extra = (str(folder / "checkpoint"),) if function is checkpoints else ()
        function(rank, *extra)
        distributed.barrier()


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="gloo is not built in")
@pytest.mark.parametrize("functions", [WHOLE, SHARDS], ids=["whole", "shards"])
def test_two_processes(tmp_path: Path, functions):
    two_processes(run, tmp_path, tmp_path, functions)


def test_one_process_without_a_group_is_told_what_to_do():
    with pytest.raises(RuntimeError, match="init_process_group"):
        orthonet.share_among_ranks(build())


@pytest.mark.parametrize("make", [lambda: OrthoLinear(4, 4), lambda: OrthoConv2d(2, 2, 3)])
def test_hooks_of_a_parameter_that_is_not_used_do_not_run(make):
    """Although a layer of the same shape is, whose gradient is made by the same products."""
    used, other = make(), make()
    seen = []
    for p in other.parameters():
        p.register_hook(seen.append)
        p.register_post_accumulate_grad_hook(seen.append)
    for layer in (used, other):
        seen.clear()
        layer(torch.randn(2, *((4,) if layer.weight.ndim == 2 else (2, 5, 5)))).sum().backward()
        assert bool(seen) == (layer is other)
    assert all(isinstance(t, torch.Tensor) for t in seen)
