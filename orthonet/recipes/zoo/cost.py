"""What a training step costs: process time and the memory kept for the backward pass."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from orthonet.losses import OffsetCrossEntropyLoss
from orthonet.recipes.data.digits import Images
from orthonet.recipes.images.config import TrainConfig

__all__ = ["StepCost", "step_cost"]


class StepCost(NamedTuple):
    """Cost of one training step.

    Attributes:
        seconds: Process time on all threads, the least of some steps, with that of Adam.
        saved_bytes: Distinct memory that the forward pass keeps for the backward pass, without
            parameters.
    """

    seconds: float
    saved_bytes: int


def step_cost(config: TrainConfig, images: Images, model: nn.Module, *, steps: int = 4) -> StepCost:
    """Measure some steps, which change the network.

    Args:
        config: What is trained.
        images: Where the batch comes from.
        model: The network.
        steps: Steps that are timed, after one that is not.
    """
    model = model.to(config.device).train()
    x, y = (t[: config.batch_size].to(config.device) for t in images)
    loss_fn = OffsetCrossEntropyLoss(config.offset, config.temperature)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    times = []
    for step in range(steps + 1):
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        start = time.perf_counter() if x.is_cuda else time.process_time()
        if step:
            loss = loss_fn(model(x), y)
        else:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = loss_fn(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        stop = time.perf_counter() if x.is_cuda else time.process_time()
        times.append(stop - start)
    return StepCost(min(times[1:]), sum(saved.values()))
