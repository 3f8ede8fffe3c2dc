"""Each law passes on a layer of torch and fails on a layer made to break it."""

from functools import partial

import pytest
import torch
from torch import nn

from orthonet.testing import LAYER_LAWS, laws


class _Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.ones(3))
        self.register_buffer("state", torch.ones(3))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.raw)
        nn.init.ones_(self.state)

    def forward(self, x):
        return x * self.raw * self.state


class WritesInEval(_Broken):
    def forward(self, x):
        self.state.mul_(0.5)
        return x * self.raw


class LagsBehind(_Broken):
    """Keeps the weight of the last training step for eval."""

    def forward(self, x):
        if self.training:
            self.kept = self.raw.detach().clone()
        return x * (self.raw if self.training or not hasattr(self, "kept") else self.kept)


class KeepsStateOutside(_Broken):
    def forward(self, x):
        if self.training:
            self.hidden = getattr(self, "hidden", 0) + 1
        return x * self.raw + getattr(self, "hidden", 0)


class SharesItsParameter(_Broken):
    shared = nn.Parameter(torch.ones(3))

    def __init__(self) -> None:
        super().__init__()
        del self.raw
        self.register_parameter("raw", self.shared)

    def __deepcopy__(self, memo):
        return type(self)()


class DoesNotPickle(_Broken):
    def __getstate__(self):
        return {**self.__dict__, "training": not self.training, "_parameters": {"raw": self.state}}


class CastsUp(_Broken):
    def forward(self, x):
        return (x * self.raw).float()


class LosesPrecision(_Broken):
    @property
    def weight(self):
        return (self.raw.view(3, 1) @ self.raw.view(1, 3)) / 3

    def forward(self, x):
        return x @ self.weight


class ForgetsItsBuffer(_Broken):
    def reset_parameters(self) -> None:
        nn.init.ones_(self.raw)


class HasNoGradient(_Broken):
    def forward(self, x):
        return x * self.raw.detach()


class HasInfiniteGradient(_Broken):
    def forward(self, x):
        return (x * x).sum(1, keepdim=True).sqrt() * self.raw


class BreaksTheGraph(_Broken):
    def forward(self, x):
        return x * self.raw if x.sum().item() > 0 else -x * self.raw


@pytest.mark.parametrize("law", LAYER_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(
    ("factory", "shape"),
    [(partial(nn.Linear, 5, 3), (5,)), (partial(nn.Conv2d, 2, 3, 3), (2, 4, 4))],
    ids=["Linear", "Conv2d"],
)
def test_layers_of_torch_obey(law, factory, shape):
    law(factory, shape)


@pytest.mark.parametrize(
    ("law", "layer", "message"),
    [
        (laws.assert_eval_is_pure, WritesInEval, "an evaluation changed state"),
        (laws.assert_eval_follows_training, LagsBehind, "eval lags behind"),
        (laws.assert_state_dict_round_trip, KeepsStateOutside, "computes something else"),
        (laws.assert_pickle_round_trip, DoesNotPickle, "computes something else"),
        (laws.assert_deepcopy_is_independent, SharesItsParameter, "changed the original"),
        (laws.assert_dtype_is_followed, CastsUp, "the output is torch.float32"),
        (laws.assert_autocast_is_safe, LosesPrecision, "autocast changed the weight"),
        (laws.assert_materializes_from_meta, ForgetsItsBuffer, "does not set state"),
        (laws.assert_gradients_are_finite, HasNoGradient, "raw gets no gradient"),
        (laws.assert_gradients_are_finite, HasInfiniteGradient, "is not finite"),
    ],
)
def test_a_broken_layer_is_found(law, layer, message):
    with pytest.raises(AssertionError, match=message):
        law(layer, (3,))


def test_a_graph_break_is_found():
    with pytest.raises(RuntimeError, match=r"BreaksTheGraph|x\.sum"):
        laws.assert_compiles(BreaksTheGraph, (3,))
