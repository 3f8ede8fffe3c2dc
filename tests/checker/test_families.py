"""Two published ways in which certified networks were not: reproduced, and excluded.

Murray, arXiv 2603.13334: certificates in real arithmetic, broken by the floats that execute.
Tobler et al., arXiv 2505.06958: bugs of a certifier of the GloRo kind: norms from power iteration
below the truth, layers that are left out and count as 1.
"""

import json

import numpy as np
import pytest
import torch
from torch import nn

from orthonet.certify import certify
from orthonet.layers import MaxMin
from orthonet_checker import Rejected, check
from tests.checker import oracle


class Cancels(nn.Module):
    """The identity in real arithmetic, stairs of width 2 in float32: logits x and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("large", torch.tensor([2.0**24]))
        self.register_buffer("offset", torch.tensor([0.0, 1.0]))
        self.register_buffer("rows", torch.tensor([[1.0], [0.0]]))

    def forward(self, x):
        return nn.functional.linear(x + self.large - self.large, self.rows, self.offset)


def test_a_real_certificate_that_floats_break(tmp_path):
    model = Cancels().eval()
    found = certify(model, torch.zeros(1, 1), lower=False)
    assert found.constant.value == pytest.approx(1.0)  # and so it is, in exact arithmetic
    x, near = torch.tensor([[1.1]]), torch.tensor([[0.95]])
    logits, moved = model(x), model(near)
    exact = float(found.radius(logits)[0])
    # The attack: within the radius of real arithmetic the deployed network changes its class.
    assert logits.argmax(1) != moved.argmax(1)
    assert float((x - near).norm()) < exact
    # Excluded: the radius of the deployed forward pass has room for its rounding.
    assert float(found.radius(logits, inputs=x)[0]) < float((x - near).norm())
    # The file is refused, too: what the graph gives exactly is not what the model gives.
    found.save(tmp_path / "c.json")
    with pytest.raises(Rejected, match="the graph is not the model"):
        check(tmp_path / "c.json")


class Vanishes(nn.Module):
    """x 2^-140 2^140: exact in real arithmetic, ten bits in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.tensor([0.0, 1.0 + 2.0**-9 + 2.0**-12]))
        self.register_buffer("rows", torch.tensor([[1.0], [0.0]]))

    def forward(self, x):
        x = x * 2.0**-70 * 2.0**-70 * 2.0**70 * 2.0**70
        return nn.functional.linear(x, self.rows, self.offset)


def test_underflow_that_breaks_a_real_certificate():
    model = Vanishes().eval()
    found = certify(model, torch.zeros(1, 1), lower=False)
    edge = 1.0 + 1.5 * 2.0**-9  # the stairs are 2^-9 wide where x is in [1, 2]
    x, near = torch.tensor([[edge + 2.0**-14]]), torch.tensor([[edge - 2.0**-14]])
    logits, moved = model(x), model(near)
    assert logits.argmax(1) != moved.argmax(1)
    assert float((x - near).abs()) < float(found.radius(logits)[0])
    assert float(found.radius(logits, inputs=x)[0]) < float((x - near).abs())


def power_iteration(weight: np.ndarray, steps: int) -> float:
    """The estimate that GloRo takes for the norm: it grows toward it from below."""
    v = np.ones(weight.shape[1]) / weight.shape[1] ** 0.5
    for _ in range(steps):
        v = weight.T @ (weight @ v)
        v /= np.linalg.norm(v)
    return float(np.linalg.norm(weight @ v))


def _tampered(path, tmp_path, change):
    content, arrays = oracle.load(path)
    change(content, arrays)
    (tmp_path / content["weights"]).write_bytes(path.with_suffix(".safetensors").read_bytes())
    (tmp_path / "c.json").write_text(json.dumps(content))
    return tmp_path / "c.json"


@pytest.fixture(scope="module")
def perceptron(tmp_path_factory):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(12, 12), MaxMin(), nn.Linear(12, 12), MaxMin(), nn.Linear(12, 4)
    )
    path = tmp_path_factory.mktemp("gloro") / "c.json"
    certify(model.eval(), torch.zeros(1, 12), lower=False).save(path)
    return path


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_norms_by_power_iteration_are_rejected(perceptron, tmp_path, steps):
    """Each is below the truth, by 1e-3 even after ten steps, and taken by GloRo as the norm."""

    def change(content, arrays):
        node = next(n for n in content["nodes"] if n["op"] == "affine")
        weight = arrays[node["weight"]].double().numpy()
        estimate = power_iteration(weight, steps)
        assert estimate < np.linalg.norm(weight, 2) * (1 - 1e-6)
        node["gain"], node["t"] = estimate.hex(), (estimate**2).hex()

    with pytest.raises(Rejected, match=r"node 1 \(affine"):
        check(_tampered(perceptron, tmp_path, change))


def test_a_layer_that_counts_as_one_is_rejected(perceptron, tmp_path):
    def change(content, arrays):
        last = [n for n in content["nodes"] if n["op"] == "affine"][1]
        assert float.fromhex(last["gain"]) > 1
        last["gain"] = (1.0).hex()

    with pytest.raises(Rejected, match=r"node 3 \(affine"):
        check(_tampered(perceptron, tmp_path, change))


def test_a_layer_that_is_left_out_is_rejected(perceptron, tmp_path):
    """Every norm of what is left is right; but the samples show another function."""

    def change(content, arrays):
        del content["nodes"][3:5]  # a linear layer and its activation
        content["nodes"][3]["inputs"] = [2]
        content["outputs"] = [3]
        used = {n.get(k) for n in content["nodes"] for k in ("weight", "bias")}
        content["constants"] = {
            k: v for k, v in content["constants"].items() if k in used or not k.startswith("c")
        }

    with pytest.raises(Rejected, match="the graph is not the model"):
        check(_tampered(perceptron, tmp_path, change))


def test_an_unknown_layer_never_counts_as_one_in_silence(perceptron, tmp_path):
    """The prover refuses it, and in a file it is an assumption that the verdict names."""

    def change(content, arrays):
        content["nodes"][2] = {
            "op": "opaque",
            "path": "1",
            "inputs": [1],
            "rule": "assumed",
            "into": [12],
            "gains": [(1.0).hex()],
            "hypot": False,
            "reason": "a layer of my own",
        }

    verdict = check(_tampered(perceptron, tmp_path, change))
    assert len(verdict.assumed) == 1
    assert "a layer of my own" in str(verdict)
    assert not str(verdict).startswith("verified:")
