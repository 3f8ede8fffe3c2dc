"""Beside a thread that moves the parameters, a weight is computed from one point."""

import functools
import threading

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import orthonet
from orthonet import layers
from orthonet.reparametrizers import Weight
from tests.each import each

LAYERS = {
    "polar": lambda: layers.OrthoLinear(6, 6),
    "cholesky": lambda: layers.OrthoLinear(6, 4, ortho_params="cholesky"),
    "exp": lambda: layers.OrthoLinear(5, 5, ortho_params="exp"),
    "kernel": lambda: layers.OrthoConv2d(3, 4, 3),
    "reshaped": lambda: layers.OrthoConv2d(3, 4, 3, method="rko"),
    "recurrent": lambda: layers.OrthoRNNCell(3, 4),
    "constraint": lambda: orthonet.orthogonal(nn.Linear(5, 5), "weight"),
    "unit norm": lambda: layers.UnitNormLinear(3, 4),
    **{
        name: functools.partial(getattr(layers, name), *sizes)
        for sizes, names in {
            (3, 4): ("AOLLinear", "SpectralLinear", "FrobeniusLinear", "SandwichLinear"),
            (4, 4): ("CPLLinear", "SLLLinear", "BROLinear", "CayleyLinear", "CholeskyLinear"),
            (4, 4, 3): (
                "AOLConv2d",
                "SOCConv2d",
                "CPLConv2d",
                "SLLConv2d",
                "CayleyConv2d",
                "LOTConv2d",
            ),
        }.items()
        for name in names
    },
}


class Moving(TorchDispatchMode):
    """Moves a tensor as soon as an operation has read it."""

    def __init__(self, tensor):
        super().__init__()
        self.tensor, self.left = tensor, 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        place = self.tensor.untyped_storage().data_ptr()

        def at_place(found):
            found = found if isinstance(found, (list, tuple)) else [found]
            tensors = (t for t in found if isinstance(t, torch.Tensor))
            return any(t.untyped_storage().data_ptr() == place for t in tensors)

        if self.left and at_place(args) and not at_place(result):
            self.left = 0
            self.tensor.detach().normal_()
        return result


@each("name", LAYERS)
def test_a_map_reads_one_point(name):
    layer, done = LAYERS[name](), threading.Event()
    weights = [m for m in layer.modules() if isinstance(m, Weight)]
    pairs = [(w, p) for w in weights for p in w.parameters() if p.numel() > 1]
    assert pairs
    for weight, parameter in pairs:
        with torch.no_grad():
            parameter.normal_()
        before, expected = parameter.detach().clone(), weight.evaluate()
        beside = threading.Thread(target=done.wait)
        beside.start()
        try:
            with Moving(parameter) as moving:
                found = weight.evaluate()
        finally:
            done.set()
            beside.join()
            done.clear()
        assert moving.left == 0, "the parameter has been read"
        assert not torch.equal(parameter, before)
        assert torch.equal(found, expected)
