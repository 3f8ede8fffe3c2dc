"""Registered constraints: shared classes, independent copies, together with torch's functions."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from orthonet.reparametrizers import CachedParametrizationList, adopt, register, remove


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT

    def right_inverse(self, x):
        return x.triu()


class Product(nn.Module):
    """Two originals."""

    def forward(self, a, b):
        return a @ b

    def right_inverse(self, x):
        return x.clone(), torch.eye(x.shape[-1])


class Upper(Symmetric):
    """Refuses what is not symmetric."""

    def right_inverse(self, x):
        if not torch.equal(x, x.mT):
            raise ValueError("not symmetric")
        return x.triu()


def symmetric(n=4):
    return register(nn.Linear(n, n), "weight", Symmetric())


def test_one_class_for_all_modules_of_a_class():
    one, two = symmetric(), symmetric()
    assert type(one) is type(two) is not nn.Linear
    assert isinstance(one, nn.Linear)
    assert type(one).__name__ == "ParametrizedLinear"
    assert parametrize.type_before_parametrizations(one) is nn.Linear
    assert parametrize.is_parametrized(one, "weight")
    assert isinstance(one.parametrizations.weight, CachedParametrizationList)
    register(two, "bias", nn.Softplus())
    assert type(one) is not type(two)
    assert torch.func.stack_module_state([one, symmetric()])
    plain = nn.Linear(4, 4)
    parametrize.register_parametrization(plain, "weight", Symmetric())
    assert list(one.state_dict()) == list(plain.state_dict())
    assert one.load_state_dict(plain.state_dict())
    assert torch.equal(one.weight, plain.weight)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: [
        file := io.BytesIO(),
        torch.save(m, file),
        file.seek(0),
        torch.load(file, weights_only=False),
    ][-1],
}
MODULES = {
    "Linear": (lambda: symmetric(), lambda m: m(torch.ones(2, 4))),
    "RNN": (
        lambda: register(nn.RNN(3, 4), "weight_hh_l0", Symmetric()),
        lambda m: m(torch.ones(2, 5, 3))[0],
    ),
    "LSTM": (
        lambda: register(nn.LSTM(4, 4, 2), "weight_hh_l1", nn.Tanh()),
        lambda m: m(torch.ones(2, 5, 4))[0],
    ),
    "MultiheadAttention": (
        lambda: (
            register(
                register(nn.MultiheadAttention(4, 2), "in_proj_weight", nn.Tanh()).out_proj,
                "weight",
                Symmetric(),
            )
            and register(nn.MultiheadAttention(4, 2), "in_proj_weight", nn.Tanh())
        ),
        lambda m: m(*[torch.ones(2, 5, 4)] * 3)[0],
    ),
    "several originals": (
        lambda: register(nn.Linear(4, 4), "weight", Product()),
        lambda m: m(torch.ones(2, 4)),
    ),
    "a buffer": (
        lambda: register(nn.BatchNorm1d(4), "running_var", nn.Softplus()).eval(),
        lambda m: m(torch.ones(2, 4)),
    ),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("case", MODULES.values(), ids=MODULES)
def test_copies_are_independent(case, copied):
    make, call = case
    module = make()
    (name,) = module.parametrizations
    before = call(module)
    twin = copied(nn.Sequential(module))[0]
    assert type(twin) is type(module)
    assert torch.equal(call(twin), before)
    parametrize.remove_parametrizations(twin, name)
    assert type(twin) is type(module).__bases__[0]
    assert torch.equal(call(twin), before)
    assert torch.equal(call(module), before)
    with torch.no_grad():
        for tensor in module.parametrizations[name].parameters():
            tensor.mul_(0.5)
    assert torch.equal(call(twin), before)
    fresh = call(module)
    if module.parametrizations[name].ntensors != 0 and name != "running_var":
        assert not torch.equal(fresh, before)
        fresh.sum().backward()
        assert next(module.parametrizations[name].parameters()).grad is not None


def test_the_recurrent_kernel_is_read_and_computed_once_per_step():
    class Counting(Symmetric):
        calls = 0

        def forward(self, x):
            Counting.calls += 1
            return super().forward(x)

    rnn = register(nn.RNN(3, 4), "weight_hh_l0", Counting())
    step = torch.optim.SGD(rnn.parameters(), 0.1)
    Counting.calls = 0
    for _ in range(3):
        for _ in range(2):
            rnn(torch.ones(2, 5, 3))[0].sum().backward()
        step.step()
    assert Counting.calls == 3 - 1  # the value of registration serves the first step


def test_torchs_functions_on_one_module_leave_the_others():
    one, two, three = symmetric(), symmetric(), symmetric()
    weight = three.weight.clone()
    parametrize.register_parametrization(one, "bias", nn.Softplus())
    assert isinstance(two.bias, nn.Parameter)
    two.bias = nn.Parameter(torch.ones(4))
    assert torch.equal(two.bias, torch.ones(4))
    parametrize.remove_parametrizations(two, "weight")
    parametrize.remove_parametrizations(one, "weight")
    assert torch.equal(three.weight, weight)
    assert isinstance(one.weight, nn.Parameter)
    one.weight = nn.Parameter(torch.zeros(4, 4))
    assert torch.equal(one(torch.ones(1, 4))[0], one.bias)
    assert torch.equal(copy.deepcopy(one).bias, one.bias)
    assert not hasattr(two, "parametrizations")
    del two.weight
    assert not hasattr(two, "weight")


def test_remove():
    layer = symmetric()
    register(layer, "bias", nn.Softplus())
    weight, bias, original = layer.weight.detach(), layer.bias, layer.parametrizations.bias.original
    step = torch.optim.SGD(layer.parameters(), 0.1)
    remove(layer, "weight")
    assert torch.equal(layer.weight, weight)
    assert any(layer.weight is p for p in step.param_groups[0]["params"])
    assert torch.equal(layer.bias, bias)
    remove(layer, "bias", keep_value=False)
    assert layer.bias is original
    assert type(layer) is nn.Linear
    with pytest.raises(ValueError, match="must be a constrained tensor of Linear"):
        remove(layer, "weight")
    layer(torch.ones(1, 4)).sum().backward()
    step.step()


def test_what_is_removed_shares_nothing_with_an_old_graph():
    layer = symmetric()
    y = layer(torch.ones(2, 4, requires_grad=True)).pow(2).sum()
    saved = layer.weight
    remove(layer, "weight")
    before = saved.detach().clone()
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(saved, before)
    y.backward()


def test_several_constraints_are_chained():
    layer = register(symmetric(), "weight", nn.Tanh())
    original = layer.parametrizations.weight.original
    assert torch.equal(layer.weight, torch.tanh(original.triu() + original.triu(1).mT))
    assert len(layer.parametrizations.weight) == 2


def test_assignment_is_in_place_and_all_or_nothing():
    layer = register(nn.Linear(4, 4), "weight", Symmetric())
    chained = register(register(nn.Linear(4, 4), "weight", Symmetric()), "weight", Product1())
    original = layer.parametrizations.weight.original
    pointer = original.data_ptr()
    loss = layer.weight.sum()
    layer.weight = torch.ones(4, 4)
    assert layer.parametrizations.weight.original is original
    assert original.data_ptr() == pointer
    assert torch.equal(layer.weight, torch.ones(4, 4))
    loss.backward()
    layer.weight = layer.weight  # what was read must not become the parameter itself
    with torch.no_grad():
        original.add_(1)
    assert torch.equal(layer.weight, torch.full((4, 4), 2.0))
    before = chained.weight.clone()
    with pytest.raises(ValueError, match="refused"):
        chained.weight = torch.full((4, 4), -1.0)
    assert torch.equal(chained.weight, before)
    layer = register(layer, "weight", nn.Tanh())
    with pytest.raises(ValueError, match="Tanh: a tensor can be assigned only if every"):
        layer.weight = torch.zeros(4, 4)


class Product1(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        if (x < 0).all():
            raise ValueError("refused")
        return x / 2


def test_what_torch_registered_can_be_adopted():
    model = nn.Sequential(
        parametrizations.orthogonal(nn.Linear(4, 4)),
        parametrizations.weight_norm(nn.Linear(4, 4)),
        parametrizations.spectral_norm(nn.Linear(4, 4)),
        symmetric(),
    ).eval()
    x = torch.randn(3, 4)
    before = model(x)
    assert adopt(model) is model
    torch.testing.assert_close(model(x), before)
    assert model[0].weight is model[0].weight
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    for index in (0, 2, 3):  # torch's weight_norm adds a local function, which has no pickle
        restored = pickle.loads(pickle.dumps(model[index]))
        assert torch.equal(restored.weight, model[index].weight)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_registration_on_what_torch_registered():
    layer = parametrizations.orthogonal(nn.Linear(4, 4))
    register(layer, "bias", nn.Softplus())
    assert type(layer).__bases__ == (nn.Linear,)
    assert torch.equal(pickle.loads(pickle.dumps(layer)).weight, layer.weight)


def test_errors():
    layer = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=r"tensor_name must be one of the tensors of Linear"):
        register(layer, "wieght", Symmetric())
    with pytest.raises(ValueError, match=r"tensor_name must be one"):
        register(layer, "bias", Symmetric())
    with pytest.raises(ValueError, match=r"parametrization must be a torch.nn.Module"):
        register(layer, "weight", torch.tanh)
    with pytest.raises(ValueError, match="may not change the shape"):
        register(layer, "weight", nn.Flatten(0))
    assert type(layer) is nn.Linear
    assert isinstance(layer.weight, nn.Parameter)


def test_a_metaclass_of_the_module_is_kept():
    class Meta(type):
        pass

    class Layer(nn.Linear, metaclass=Meta):
        pass

    layer = register(Layer(2, 2), "weight", Symmetric())
    assert isinstance(type(layer), Meta)
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)


def test_eval_mode_of_the_module_is_taken_over():
    layer = register(nn.Linear(2, 2).eval(), "weight", nn.Dropout())
    assert not layer.parametrizations.weight.training
    assert torch.equal(layer.weight, layer.parametrizations.weight.original)
