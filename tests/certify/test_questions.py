"""What forward asks and writes is seen while it runs: values in Python, layouts, shared memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from orthonet import layers
from orthonet.certify import certify
from orthonet.errors import UncertifiableError


class Lambda(nn.Module):
    def __init__(self, function, *children):
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(children)
        self.register_buffer("weight", torch.tensor([2.0, 3.0]))

    def forward(self, x):
        return self.function(self, x)


def _tried(question):
    def forward(s, x):
        try:
            large = bool(question(x))
        except Exception:  # that of a trace
            large = False
        return 50.0 * x if large else 1.0 * x

    return forward


def _eager(question):
    def forward(s, x):
        return 50.0 * x if not torch.compiler.is_exporting() and question(x) else 1.0 * x

    return forward


READ = {
    "bool": lambda x: x.sum() > 1000,
    "item": lambda x: x.sum().item() > 1000,
    "tolist": lambda x: max(x.tolist()[0]) > 1000,
    "numpy": lambda x: x.detach().numpy().max() > 1000,
    "array": lambda x: memoryview(x.detach().__array__())[0, 0] > 1000,
    "float": lambda x: float(x.detach()[0, 0]) > 1000,
    "int": lambda x: int(x[0, 0]) > 1000,
    "index": lambda x: [0, 1][x[0, 0].clamp(0, 1).long()] == 1,
    "equal": lambda x: torch.equal(x, x.clamp_min(1000.0)),
    "allclose": lambda x: torch.allclose(x, x.clamp_min(1000.0)),
    "is_nonzero": lambda x: torch.is_nonzero((x[0, 0] - 1000).relu()),
    "contains": lambda x: 2000.0 in x,
    "repr": lambda x: "2000" in repr(x),
    "format": lambda x: f"{x[0, 0]}" > "1000",
    "of a view": lambda x: x.view(-1).detach()[0].item() > 1000,
    "written": lambda x: torch.zeros(1, 2).copy_(x[:1])[0, 0].item() > 1000,
}


@pytest.mark.parametrize("how", [_tried, _eager])
@pytest.mark.parametrize("name", READ)
def test_values_in_python_are_refused(name, how):
    with pytest.raises(UncertifiableError, match="certify: "):
        certify(Lambda(how(READ[name])).eval(), torch.zeros(1, 2), lower=False)


ASKED = {
    "gradients": lambda x: torch.is_grad_enabled() and not x.requires_grad,
    "leaf": lambda x: torch.is_grad_enabled() and x.is_leaf,
    "graph": lambda x: torch.is_grad_enabled() and x.grad_fn is None,
    "stride": lambda x: x.stride(0) > x.shape[1],
    "contiguous": lambda x: not x.is_contiguous(),
    "offset": lambda x: x.storage_offset() > 5,
    "address": lambda x: x.data_ptr() % 64 == 48,
    "storage": lambda x: len(x.untyped_storage()) > 100,
    "version": lambda x: x._version > 5,
    "base": lambda x: x._base is not None,
}


@pytest.mark.parametrize("name", ASKED)
def test_questions_about_more_than_shape_and_dtype_are_refused(name):
    def forward(s, x):
        return 50.0 * x if ASKED[name](x) else 1.0 * x

    with pytest.raises(UncertifiableError, match=r"certify: "):
        certify(Lambda(forward).eval(), torch.zeros(1, 2), lower=False)


SETTINGS = {
    "deterministic": lambda: torch.are_deterministic_algorithms_enabled(),
    "anomalies": lambda: torch.is_anomaly_enabled(),
    "warnings": lambda: torch.is_warn_always_enabled(),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_make_no_difference(name):
    def forward(s, x):
        return 50.0 * x if SETTINGS[name]() else 1.0 * x

    with pytest.raises(UncertifiableError, match="certify: "):
        certify(Lambda(forward).eval(), torch.zeros(1, 2), lower=False)


def _data(s, x):
    y = F.relu(x - 1000) * 1.0
    y.data = y * 50
    return y


def _set(s, x):
    y = F.relu(x - 1000) * 1.0
    y.detach().set_(y * 50)
    return y


@pytest.mark.parametrize("forward", [_data, _set])
def test_other_data_in_a_tensor_is_refused(forward):
    with pytest.raises(UncertifiableError, match="certify: "):
        certify(Lambda(forward).eval(), torch.zeros(1, 2), lower=False)


class Loud(nn.Parameter):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found * 100.0 if func is F.linear else found


class Own(torch.Tensor):
    pass


def test_tensors_of_other_classes_are_refused():
    model = Lambda(lambda s, x: F.linear(F.relu(x - 1000), s.own)).eval()
    model.own = Loud(torch.eye(2))
    with pytest.raises(UncertifiableError, match="not of another class"):
        certify(model, torch.zeros(1, 2))
    del model.own
    model.register_buffer("own", torch.eye(2).as_subclass(Own))
    with pytest.raises(UncertifiableError, match="not of another class"):
        certify(model, torch.zeros(1, 2))
    hidden = [torch.eye(2).as_subclass(Own)]
    with pytest.raises(UncertifiableError, match="certify: "):
        certify(Lambda(lambda s, x: x @ hidden[0]).eval(), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="example_input"):
        certify(Lambda(lambda s, x: x).eval(), torch.zeros(1, 2).as_subclass(Own))


WRITES = {
    "output": lambda y, z: z.mul_(10),
    "input": lambda y, z: y.mul_(10),
    "operator": lambda y, z: z.__imul__(10),
    "item": lambda y, z: z.__setitem__(slice(None), 10 * z),
    "view": lambda y, z: z[:, 1:].mul_(10),
    "activation": lambda y, z: F.relu(z.neg_(), inplace=True),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_into_what_a_rule_returns_of_its_input_are_refused(name):
    def forward(s, x):
        y = F.relu(x - 1000)
        z = s.parts[0](y)
        WRITES[name](y, z)
        return y + z

    model = Lambda(forward, layers.ChannelShuffle(1)).eval()
    with pytest.raises(UncertifiableError, match="shares with its input"):
        certify(model, torch.zeros(1, 4), lower=False)


def test_ordinary_questions_and_writes_are_allowed():
    def forward(s, x):
        n, c = x.size(0), x.shape[1]
        assert x.ndim == 2 and x.dtype.is_floating_point and not x.is_complex()
        y = s.parts[0](x).relu_()
        y = F.relu(s.parts[1](y), inplace=True)
        y[:, 0] = 0.0
        return y.view(n, c) * 2.0 if s.weight.is_contiguous() else y

    model = Lambda(forward, layers.SLLLinear(4, 4), nn.Linear(4, 4)).eval()
    assert certify(model, torch.zeros(1, 4), lower=False).constant.value > 0


def test_layers_followed_by_writes_are_certified():
    model = nn.Sequential(
        layers.SLLLinear(4, 4),
        nn.ReLU(inplace=True),
        layers.MaxMin(),
        nn.ReLU(inplace=True),
        layers.ChannelShuffle(2),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.ReLU(inplace=True),
    ).eval()
    assert certify(model, torch.zeros(1, 4)).constant.value == pytest.approx(1.0, rel=1e-4)
