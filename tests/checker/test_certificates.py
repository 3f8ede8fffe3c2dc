"""What `certificate.save` writes: the model's own graph, checked near the prover's bound."""

import json
import pickle

import pytest
import torch
from torch import nn

from orthonet import models
from orthonet.certify import LipschitzCertificate, certify
from orthonet.errors import UncertifiableError
from orthonet_checker import Rejected, check
from orthonet_checker.operations import OPERATIONS
from orthonet_checker.verify import verify
from tests.certify.functions import Lambda
from tests.checker import oracle
from tests.checker.mutations import store_of
from tests.checker.nets import NETS, deep_convolutions

SMALL = {
    "mlp": ({"in_features": 49, "num_classes": 10}, (49,)),
    "mlp_digits": ({}, (1, 8, 8)),
    "convnet": ({"in_shape": (3, 16, 16), "num_classes": 10}, (3, 16, 16)),
    "convnet_digits": ({}, (1, 8, 8)),
    "convnet_mnist": ({}, (1, 28, 28)),
    "convnet_zoo": ({}, (1, 8, 8)),
    "convnet_series": ({"in_shape": (3, 16), "num_classes": 4, "width": 8}, (3, 16)),
    "convnet_images": ({"in_shape": (3, 16, 16), "num_classes": 10, "width": 8}, (3, 16, 16)),
    "convnet_xs": ({"in_shape": (3, 4, 4), "depth": 2}, (3, 4, 4)),
}


def test_every_operation_is_written_by_some_network(saved):
    used = {n["op"] for name in NETS for n in oracle.load(saved(name))[0]["nodes"]}
    assert used >= set(OPERATIONS) - {"opaque"}


@pytest.mark.parametrize("name", models.list_models())
def test_models_have_nothing_assumed(name, tmp_path):
    """Every model of the library, at its defaults but for the size."""
    options, shape = SMALL[name]
    model = models.create(name, **options).eval()
    found = certify(model, torch.zeros(1, *shape), lower=False, effort="fast")
    found.save(tmp_path / "c.json")
    verdict = check(tmp_path / "c.json")
    assert verdict.assumed == []
    assert any("samples" in note for note in verdict.notes)
    # Orthogonal layers: 1 but for what float32 rounds the weights, observed 3e-7 to 4e-6 a layer.
    assert 1 < float(verdict.bound) < 1.0001
    assert float(verdict.bound) <= found.constant.value * (1 + 1e-5)


@pytest.mark.parametrize(
    "options",
    [{"activation": "group_sort", "lipschitz": 2.5}, {"activation": "abs", "head": "unit_norm"}],
    ids=["group_sort", "abs"],
)
def test_options_of_models_have_nothing_assumed(options, tmp_path):
    model = models.convnet_digits(**options).eval()
    found = certify(model, torch.zeros(1, 1, 8, 8), lower=False)
    found.save(tmp_path / "c.json")
    verdict = check(tmp_path / "c.json")
    assert verdict.assumed == []
    assert float(verdict.bound) == pytest.approx(found.constant.value, rel=1e-5)


@pytest.mark.parametrize("layer", ["aol", "bro", "cpl", "lipnext", "sll"])
def test_layers_of_the_zoo_have_nothing_assumed(layer, tmp_path):
    """As `orthonet train --layer` puts them into a network."""
    model = models.convnet_zoo(layer=layer, width=4, depth=1, hidden=8).eval()
    found = certify(model, torch.zeros(1, 1, 8, 8), lower=False, effort="fast")
    found.save(tmp_path / "c.json")
    verdict = check(tmp_path / "c.json")
    assert verdict.assumed == []
    assert float(verdict.bound) <= found.constant.value * (1 + 1e-5)


def test_the_network_of_the_demo_is_checked_near_its_bound(tmp_path):
    """The network of `orthonet train mnist5k`: how long it takes, measure.py says."""
    model = models.convnet_mnist().eval()
    found = certify(model, torch.zeros(1, 1, 28, 28), lower=False)
    found.save(tmp_path / "c.json")
    verdict = check(tmp_path / "c.json")
    assert verdict.assumed == []
    assert 0 <= float(verdict.bound) - found.constant.value < 1e-5


@pytest.mark.slow
def test_ten_wide_convolutions_are_checked(tmp_path):
    model = deep_convolutions().eval()
    found = certify(model, torch.zeros(1, 3, 8, 8), lower=False, effort="fast")
    found.save(tmp_path / "c.json")
    verdict = check(tmp_path / "c.json")
    assert verdict.assumed == []
    # observed 1 + 4.6e-5: float32 weights are orthogonal within some 2^-18
    assert 1 < float(verdict.bound) < 1.0001


@pytest.mark.parametrize("name", NETS)
def test_the_graph_of_the_file_is_the_model(name, tmp_path):
    """In float64, at random points, to the last digits: by the checker and by the oracle."""
    model, example = NETS[name]()
    model, example = model.eval().double(), example.double()
    certify(model, example, lower=False).save(tmp_path / "c.json")
    content, arrays = oracle.load(tmp_path / "c.json")
    x = torch.randn(7, *example.shape[1:], dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
    expected = expected if isinstance(expected, tuple) else (expected,)
    values = oracle.run(content, {n: v.double() for n, v in arrays.items()}, [x])
    for place, y in zip(content["outputs"], expected, strict=True):
        assert torch.allclose(values[place], y, rtol=0, atol=1e-12)
    # Writing outputs of another input into the samples must be noticed.
    notes = check(tmp_path / "c.json").notes
    off = float(notes[-1].rsplit(" ", 1)[1])
    assert off < 1e-13


def test_what_is_saved_is_loaded(saved):
    path = saved("plain")
    content = json.loads(path.read_text())
    found = LipschitzCertificate.load(path)
    assert found.constant.value.hex() == content["bound"]
    assert found.constant.kind == "upper"
    assert found.input_shape == (2, 5, 6)
    assert [b.value.hex() for b in found.outputs] == content["each"]
    assert found.pairs is not None
    assert found.pairs.shape == (3, 3)
    assert "Lipschitz constant" in found.table()
    logits = torch.tensor([[0.0, 1.0, 3.0]])
    assert float(found.radius(logits)) >= 2.0 / (2**0.5 * found.constant.value) * (1 - 1e-6)
    with pytest.raises(UncertifiableError, match="Call certify again"):
        found.save(path)


def test_a_loaded_certificate_keeps_the_numbers_of_the_prover(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    first = certify(model, torch.zeros(1, 4))
    first.save(tmp_path / "c.json")
    second = LipschitzCertificate.load(tmp_path / "c.json")
    assert second.lower == first.lower
    assert second.rows == first.rows
    assert second.constant.value >= first.lower.value


def test_what_has_no_graph_cannot_be_saved(tmp_path):
    found = certify(nn.Linear(2, 2).eval(), torch.zeros(1, 2))
    with pytest.raises(UncertifiableError, match="Call certify again"):
        pickle.loads(pickle.dumps(found)).save(tmp_path / "c.json")
    with pytest.raises(ValueError, match="the constants go next to it"):
        found.save(tmp_path / "c.safetensors")


def test_other_files_are_refused(tmp_path, saved):
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(ValueError, match="format"):
        LipschitzCertificate.load(tmp_path / "c.json")
    content = json.loads(saved("convolutional").read_text())
    content["constants"]["pairs"]["sha256"] = "0" * 64
    (tmp_path / "d.json").write_text(json.dumps(content))
    (tmp_path / content["weights"]).write_bytes(
        saved("convolutional").with_suffix(".safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match="Keep the JSON and the safetensors file"):
        LipschitzCertificate.load(tmp_path / "d.json")


def test_margins_of_another_shape_are_refused(tmp_path, saved):
    """The same bytes as a row: each margin would be another one."""
    content = json.loads(saved("plain").read_text())
    (tmp_path / "c.json").write_text(json.dumps(content))
    data = saved("plain").with_suffix(".safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    assert header["pairs"]["shape"] == [3, 3]
    header["pairs"]["shape"] = [1, 9]
    text = json.dumps(header).encode()
    file = tmp_path / content["weights"]
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    with pytest.raises(ValueError, match="Keep the JSON and the safetensors file"):
        LipschitzCertificate.load(tmp_path / "c.json")
    with pytest.raises(Rejected, match="'pairs'"):
        check(tmp_path / "c.json")


class Halve(nn.Module):
    def forward(self, x):
        return torch.logsumexp(x, 1, keepdim=True) + torch.softmax(x, 1)


def test_what_the_checker_does_not_know_is_listed(tmp_path):
    """Operations of the prover that the checker does not have are assumptions, and said so."""
    model = nn.Sequential(nn.Linear(4, 4), Halve(), nn.Linear(4, 2)).eval()
    found = certify(model, torch.zeros(1, 4), lower=False)
    found.save(tmp_path / "c.json")
    verdict = check(tmp_path / "c.json")
    assert len(verdict.assumed) == 3  # logsumexp, softmax, the sum of two shapes
    assert "softmax" in "".join(verdict.assumed)
    assert "verified, but for what is assumed" in str(verdict)
    assert any("cannot be checked" in note for note in verdict.notes)


def test_equal_constants_are_stored_once(tmp_path):
    layer = nn.Linear(3, 3)
    certify(nn.Sequential(layer, nn.ReLU(), layer).eval(), torch.zeros(1, 3)).save(
        tmp_path / "c.json"
    )
    content = json.loads((tmp_path / "c.json").read_text())
    names = [n for c in content["constants"].values() for n in c["names"]]
    assert names.count("0.weight") == names.count("2.weight") == 1
    assert sum("0.weight" in c["names"] for c in content["constants"].values()) == 1
    assert sum(n.endswith("weight") for n in names) == 2
    assert check(tmp_path / "c.json").assumed == []


def test_multipliers_prove_less_than_the_product_of_the_norms(saved):
    """And nothing below what a slope of the network refutes."""
    content, arrays = oracle.load(saved("perceptron"))
    last = content["nodes"][content["outputs"][0]]
    gain = float.fromhex(last["chain"]["gain"])
    product = 1.0
    for node in content["nodes"][1:]:
        product *= float.fromhex(node["gain"])
    assert gain < 0.9 * product
    store = store_of(arrays)
    assert float(verify(content, store).bound) == gain
    wide = {name: value.double() for name, value in arrays.items()}
    points = torch.randn(200, 1, 6, dtype=torch.float64)
    steepest = max(oracle.slope(lambda x: oracle.run(content, wide, [x])[-1], p) for p in points)
    assert 0.2 * gain < steepest < gain
    last["chain"]["gain"] = (steepest * (1 - 1e-6)).hex()
    with pytest.raises(Rejected, match="the multipliers do not prove"):
        verify(content, store)


ODD = {  # number of inputs, function, assumed
    "input that nothing reads": (2, lambda x, y: y * 2, 0),
    "terms that cancel": (1, lambda x: x @ SQUARE - x @ SQUARE, 0),
    "open end": (1, lambda x: nn.functional.hardtanh(x, -torch.inf, 1.0), 1),
    "tiny constant": (1, lambda x: x @ (SQUARE * 1e-250) + x, 1),
    "no number": (1, lambda x: torch.where(FIRST, x, torch.full((4,), torch.nan).double()), 1),
}
SQUARE = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FIRST = torch.tensor([True, False, True, True])


@pytest.mark.parametrize("name", ODD)
def test_odd_graphs_are_written_so_that_the_checker_takes_them(name, tmp_path):
    count, function, assumed = ODD[name]
    x = torch.randn(2, 4, dtype=torch.float64)
    found = certify(Lambda(function).eval(), (x,) * count, lower=False)
    found.save(tmp_path / "c.json")
    verdict = check(tmp_path / "c.json")
    assert found.constant.value <= float(verdict.bound) * (1 + 1e-9)
    assert len(verdict.assumed) == assumed


def test_graphs_of_empty_tensors_are_not_saved(tmp_path):
    model = Lambda(lambda x: torch.cat([x[:, :0], x], 1)).eval()
    found = certify(model, torch.zeros(1, 4))
    with pytest.raises(UncertifiableError, match="every tensor on the way must have entries"):
        found.save(tmp_path / "c.json")
    assert not list(tmp_path.iterdir())
