"""The preset is part of the `state_dict`: a checkpoint of another function is refused."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

import orthonet
from orthonet.errors import PresetWarning
from orthonet.layers import OrthoConv2d, OrthoLinear, OrthoRNN
from orthonet.reparametrizers import BatchedIdentity, Orthogonalizer, OrthoParams
from tests.presets import PRESETS

OTHER_FUNCTIONS = [("QR", "DEFAULT"), ("CHOLESKY", "POLAR"), ("DEFAULT", "EXP"), ("EXP", "QR")]
SAME_FUNCTION = [("DEFAULT", "POLAR"), ("QR", "CHOLESKY"), ("DEFAULT", "BJORCK_PASS_THROUGH")]
STATE = "parametrization._extra_state"


def net(preset):
    """A model whose parameters are not orthogonal, so that the map matters."""
    params = PRESETS[preset]
    model = nn.Sequential(
        OrthoConv2d(2, 4, 2, ortho_params=params),
        nn.Flatten(),
        OrthoLinear(16, 5, ortho_params=params),
        OrthoLinear(5, 5, ortho_params=params),
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.5)
    return model.eval()


def without_record(state):
    return {key: value for key, value in state.items() if "_extra_state" not in key}


X = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}], ids=str)
@pytest.mark.parametrize(("saved", "made"), OTHER_FUNCTIONS)
def test_another_preset_is_refused_by_one_sentence_and_nothing_changes(saved, made, options):
    model, checkpoint = net(made), net(saved).state_dict()
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(checkpoint, **options)
    _, sentence = str(caught.value).split("\n\t")
    assert sentence == (
        f"OrthoWeight: the checkpoint must be made with {made}_ORTHO_PARAMS, as the model is, got "
        f"checkpoint={saved}_ORTHO_PARAMS. Build the model with {saved}_ORTHO_PARAMS, or convert: "
        "load the checkpoint into such a model, `other`, and then "
        "model.load_state_dict(orthonet.to_plain(other).state_dict())."
    )
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))


def test_the_way_out_leads_there():
    other, model = net("QR"), net("DEFAULT")
    model.load_state_dict(orthonet.to_plain(other).state_dict())  # a warning would be an error
    torch.testing.assert_close(model(X), other(X), rtol=0, atol=1e-5)  # observed 5e-7


@pytest.mark.parametrize(("saved", "made"), SAME_FUNCTION)
def test_presets_of_one_map_exchange_checkpoints(saved, made):
    for one, two in ((saved, made), (made, saved)):
        other, model = net(one), net(two)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(X), other(X), rtol=0, atol=1e-5)  # observed 7e-7


def through_torch(state, _):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state, _):
    safetensors = pytest.importorskip("safetensors.torch")
    return safetensors.load(safetensors.save(state))


def through_another_dtype(state, _):
    return {key: value.to(torch.bfloat16) for key, value in state.items()}


def through_distributed_checkpoints(state, folder):
    checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    checkpoint.load(other, checkpoint_id=folder, no_dist=True)
    return other


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
@pytest.mark.parametrize(
    "through",
    [through_torch, through_safetensors, through_another_dtype, through_distributed_checkpoints],
)
def test_the_record_survives_every_format(through, tmp_path):
    source = net("QR")
    state = through(source.state_dict(), tmp_path)
    twin = net("QR")
    twin.load_state_dict(state)
    allowed = 0.2 if through is through_another_dtype else 0.0  # of bfloat16; observed 0.02
    assert (twin(X) - source(X)).abs().max() <= allowed
    with pytest.raises(RuntimeError, match="checkpoint=QR_ORTHO_PARAMS"):
        net("DEFAULT").load_state_dict(state)


def test_checkpoints_from_before_load_with_one_note():
    source, model = net("QR"), net("QR")
    for _ in range(2):
        with pytest.warns(PresetWarning, match="is taken to be made with QR_ORTHO_PARAMS") as seen:
            model.load_state_dict(without_record(source.state_dict()))
        assert len(seen) == 1
    assert torch.equal(model(X), source(X))
    model.load_state_dict(source.state_dict())  # silent
    with pytest.raises(RuntimeError, match="Missing key") as caught:
        model.load_state_dict({})
    assert "_extra_state" not in str(caught.value)


def test_it_is_no_parameter_and_no_buffer():
    layer = OrthoLinear(4, 4)
    assert [name for name, _ in layer.named_parameters()] == ["bias", "parametrization.original"]
    assert not list(layer.buffers())
    state = layer.state_dict()[STATE]
    assert state.dtype == torch.uint8 and state.device.type == "cpu"
    text = bytes(state.tolist()).rstrip(b"\0").decode()
    assert text == (
        "polar | BatchedPowerIteration(power_it_niter=3, eps=1e-06), "
        "BatchedBjorckOrthogonalization(beta=0.5, niters=12, pass_through=False)"
    )
    x = torch.randn(2, 4)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.state_dict().keys() == layer.state_dict().keys()
    assert torch.allclose(functional_call(layer, layer.state_dict(), x), layer(x), atol=1e-6)
    averaged = AveragedModel(layer, use_buffers=True)
    averaged.update_parameters(layer)
    averaged.update_parameters(layer)
    averaged.load_state_dict(averaged.state_dict())
    assert torch.allclose(averaged(x), layer(x), atol=1e-6)
    with torch.device("meta"):
        empty = OrthoLinear(4, 4)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x), layer(x))
    with pytest.raises(RuntimeError, match="EXP_ORTHO_PARAMS"):
        empty.load_state_dict(net("EXP")[3].state_dict(), assign=True)


def test_maps_of_recurrent_kernels_are_recorded_too():
    made = {triv: OrthoRNN(3, 4, triv=triv) for triv in ("exp", "cayley")}
    made["exp"].load_state_dict(OrthoRNN(3, 4, triv="exponential").state_dict())
    layer, before = made["exp"], copy.deepcopy(made["exp"].state_dict())
    for other, name in ((made["cayley"], "triv=cayley"), (OrthoRNN(3, 4), "DEFAULT_ORTHO_PARAMS")):
        with pytest.raises(RuntimeError, match=f"with triv=exponential.* checkpoint={name}"):
            layer.load_state_dict(other.state_dict())
    assert all(torch.equal(before[key], t) for key, t in layer.state_dict().items())


class Own(Orthogonalizer):
    """An orthogonalizer of a user, with an argument that has an address."""

    def __init__(self, weight_shape, function):
        super().__init__(weight_shape)
        self.function_ = function

    def _orthogonalize(self, w):
        return self.function_(w)

    def extra_repr(self):
        return f"{super().extra_repr()}, function={self.function_}"


def test_own_maps_are_told_apart_by_their_class_and_what_they_show():
    def q(w):
        return torch.linalg.qr(w).Q

    def polar(w):
        return orthonet.linalg.polar(w)

    def layer(function):
        params = OrthoParams(BatchedIdentity, lambda shape: Own(shape, function))
        return OrthoLinear(4, 4, ortho_params=params)

    one = layer(q)
    assert " at 0x" not in one.parametrization.made_by
    layer(q).load_state_dict(one.state_dict())
    with pytest.raises(RuntimeError, match=r"<locals>\.q>"):
        layer(polar).load_state_dict(one.state_dict())
