"""The trained networks of the package: their files, their certificates, what they reach."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import checkpoints
from orthonet import models
from orthonet.certify import LipschitzCertificate, certify
from orthonet.models import _pretrained, certificate_path, create, list_models
from orthonet_checker import check

NAMES = list_models(pretrained=True)
ROOT = Path(__file__).parents[2]


def test_each_network_is_small_and_has_a_certificate():
    assert NAMES == ["fashion", "italy_power_demand", "japanese_vowels"]
    for name in NAMES:
        path = certificate_path(name)
        assert path.with_suffix(".safetensors").stat().st_size < 2**20
        certificate = LipschitzCertificate.load(path)
        assert 0 < certificate.lipschitz <= 1 + 1e-5  # observed 1 + 3e-6
        model = create(name, pretrained=True)
        assert not model.training
        x = torch.rand(2, *certificate.input_shape)
        assert model(x).shape == (2, certificate.pairs.shape[0])
        again = create(name, pretrained=True)
        state = model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in again.state_dict().items())


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="name must be one of 'fashion'"):
        create("convnet", pretrained=True)
    with pytest.raises(ValueError, match="takes no arguments"):
        create("fashion", pretrained=True, width=8)
    with pytest.raises(ValueError, match="pretrained must be True or False"):
        create("fashion", pretrained="yes")
    with pytest.raises(ValueError, match="name must be one of 'fashion'"):
        certificate_path("resnet")


def test_a_changed_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_pretrained, "FOLDER", tmp_path)
    name = "italy_power_demand"
    for suffix in (".json", ".safetensors"):
        shutil.copy(ROOT / f"orthonet/models/checkpoints/{name}{suffix}", tmp_path)
    create(name, pretrained=True)
    file = tmp_path / f"{name}.safetensors"
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for entry in json.loads(whole[8:start]).values():
        changed = bytearray(whole)
        changed[start + entry["data_offsets"][0]] ^= 1
        file.write_bytes(changed)
        with pytest.raises(ValueError, match="constants must be those of the certificate"):
            create(name, pretrained=True)
    file.write_bytes(whole)
    create(name, pretrained=True)
    path = tmp_path / f"{name}.json"
    path.write_text(path.read_text().replace("conv1.weight", "conv2.weight"))
    with pytest.raises(ValueError, match="must be the published one"):
        create(name, pretrained=True)


def test_another_program_verifies_a_network():
    """The rest of them in a slow test."""
    name = "italy_power_demand"
    assert not check(certificate_path(name), [], lambda line: None).assumed


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_network_reaches_what_is_told(name):
    """Certified again, in this version, and by the checker; on the whole test set."""
    path = certificate_path(name)
    verdict = check(path, [], lambda line: None)
    assert not verdict.assumed
    model = create(name, pretrained=True)
    saved = LipschitzCertificate.load(path)
    assert float(verdict.bound) == saved.lipschitz
    kept = json.loads((ROOT / "benchmarks/results/checkpoints.json").read_text())[name]
    try:
        x, y = checkpoints.test_set(name, "data")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    certificate = certify(model, x[:1], lower=False)
    assert certificate.constant.value <= saved.lipschitz
    found = checkpoints.measured(model, x, y, checkpoints.radii_of(name))
    # Another processor rounds logits differently: a sample at the boundary may change sides.
    near = 2 / kept["samples"] + 5e-4
    assert found["accuracy"] == pytest.approx(kept["accuracy"], abs=near)
    assert found["certified"] == pytest.approx(kept["certified"], abs=near)
    assert models.list_models(pretrained=True) == sorted(
        json.loads((ROOT / "benchmarks/results/checkpoints.json").read_text())
    )
