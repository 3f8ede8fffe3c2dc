"""`orthonet-check`: alone, without PyTorch and the library, with words for every end."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orthonet import to_plain
from orthonet.certify import certify
from orthonet_checker import check
from orthonet_checker.__main__ import main
from tests.checker.nets import NETS, convolutional

PACKAGE = Path(__file__).parents[2] / "checker" / "orthonet_checker"


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("*.py")), ids=lambda f: f.name)
def test_it_imports_neither_the_library_nor_pytorch(file):
    allowed = {*sys.stdlib_module_names, "numpy", "flint", "orthonet_checker"}
    for node in ast.walk(ast.parse(file.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names} <= allowed
        assert not isinstance(node, ast.Assert), "an assert vanishes under python -O"


def test_the_library_does_not_import_it():
    for file in (PACKAGE.parents[1] / "orthonet").rglob("*.py"):
        assert "orthonet_checker" not in file.read_text(), file


def test_it_runs_where_there_is_no_pytorch(saved):
    """In a process of its own in which importing torch or orthonet fails."""
    blocked = "import sys; sys.modules['torch'] = sys.modules['orthonet'] = None\n"
    code = f"{blocked}from orthonet_checker.__main__ import main; sys.exit(main(sys.argv[1:]))"
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-O", "-c", code, str(saved("convolutional"))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=saved("convolutional").parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("verified: constant <= 1.0000")
    assert "for the weights" in last


def test_each_node_has_a_line(saved, capsys):
    assert main([str(saved("circular"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    nodes = json.loads(saved("circular").read_text())["nodes"]
    assert sum(line.startswith("node ") for line in lines) == len(nodes) - 1
    assert lines[-1].startswith("verified: constant <= 2.0000")
    assert main([str(saved("circular")), "--quiet"]) == 0
    assert "node " not in capsys.readouterr().out


def test_a_false_claim_names_its_node(saved, tmp_path, capsys):
    content = json.loads(saved("convolutional").read_text())
    (tmp_path / content["weights"]).write_bytes(
        saved("convolutional").with_suffix(".safetensors").read_bytes()
    )
    content["nodes"][3]["gain"] = (0.99).hex()
    (tmp_path / "c.json").write_text(json.dumps(content))
    assert main([str(tmp_path / "c.json"), "--quiet"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("rejected: node 3 (convolution at 'conv2')")
    assert "above the gain 0.99" in error
    assert main([str(tmp_path / "no.json")]) == 1


def test_the_weights_of_a_model_are_recognized(tmp_path, capsys):
    """By content: the file of the plain model serves, another model's does not."""
    torch.manual_seed(1)
    model, example = convolutional()
    certify(model.eval(), example, lower=False).save(tmp_path / "c.json")
    weights = {f"any.{k}": v.contiguous() for k, v in to_plain(model).state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    command = [str(tmp_path / "c.json"), str(tmp_path / "model.safetensors"), "--quiet"]
    assert main(command) == 0
    # One weight is changed by one ulp: the constant next to the certificate does not help.
    stored = load_file(tmp_path / "model.safetensors")
    key = sorted(stored)[0]
    stored[key].view(-1).view(torch.int32)[0] ^= 1
    save_file(stored, tmp_path / "model.safetensors")
    capsys.readouterr()
    assert main(command) == 1
    assert "no tensor of the weights" in capsys.readouterr().err


def test_assumptions_change_the_exit_status(tmp_path, capsys):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Softmax(1)).eval()
    certify(model, torch.zeros(1, 3), lower=False).save(tmp_path / "c.json")
    assert main([str(tmp_path / "c.json"), "--quiet"]) == 2
    out = capsys.readouterr().out
    assert "assumed: node 2 (opaque at '1'): gain 0.5" in out
    assert "verified, but for what is assumed" in out


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A certificate of two matrices of one shape and equal biases, and the weights of the model."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 3))
    for layer in (model[0], model[2]):
        torch.nn.init.zeros_(layer.bias)
    path = tmp_path_factory.mktemp("plain") / "c.json"
    certify(model.eval(), torch.zeros(1, 3), lower=False).save(path)
    return path, {k: v.detach().clone() for k, v in model.state_dict().items()}


def _swapped(weights):
    return {**weights, "0.weight": weights["2.weight"], "2.weight": weights["0.weight"]}


def _prefixed(prefix, weights):
    return {f"{prefix}{k}": v for k, v in weights.items()}


CHANGED = {
    "as it is": (lambda w: w, 0, "verified: "),
    "behind a prefix": (lambda w: _prefixed("net.", w), 0, "verified: "),
    "with integers": (lambda w: {**w, "steps": torch.tensor(3)}, 0, "verified: "),
    "other weights": (lambda w: {k: 1000 * v for k, v in w.items()}, 1, "no tensor of the weights"),
    "other weights, and the old ones under other names": (
        lambda w: {**{k: 1000 * v + 1 for k, v in w.items()}, **_prefixed("unused.", w)},
        1,
        "not the constant of that name",
    ),
    "one other matrix, and the old one under another name": (
        lambda w: {**w, "0.weight": 2 * w["0.weight"], "old": w["0.weight"]},
        1,
        "tensor '0.weight' of the weights is F32",
    ),
    "one other of two equal vectors": (
        lambda w: {**w, "2.bias": w["2.bias"] + 1},
        1,
        "tensor '2.bias' of the weights is F32",
    ),
    "exchanged": (_swapped, 1, "tensor '0.weight' of the weights is F32"),
    "exchanged behind a prefix": (
        lambda w: _prefixed("net.", _swapped(w)),
        1,
        "tensor 'net.0.weight' of the weights is F32",
    ),
    "exchanged, and the true ones elsewhere": (
        lambda w: {**_prefixed("net.", _swapped(w)), **w},
        2,
        "tensor 'net.0.weight' of",
    ),
    "a tensor more": (
        lambda w: {**w, "more": torch.ones(2)},
        2,
        "tensor 'more' of the weights is not used",
    ),
    "half a tensor more": (
        lambda w: {**w, "more": torch.ones(2).half()},
        2,
        "tensor 'more' of the weights",
    ),
    "one less": (
        lambda w: {k: v for k, v in w.items() if k != "0.weight"},
        1,
        "no tensor of the weights",
    ),
    "another shape": (
        lambda w: {**w, "0.weight": w["0.weight"].reshape(9, 1)},
        1,
        "no tensor of the weights",
    ),
    "other numbers with the same bytes": (
        lambda w: {**w, "0.weight": w["0.weight"].view(torch.int32)},
        1,
        "no tensor of the",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_the_deployed_file_is_compared_by_name(plain, name, tmp_path, capsys):
    path, weights = plain
    change, status, words = CHANGED[name]
    changed = {k: v.clone().contiguous() for k, v in change(weights).items()}
    save_file(changed, tmp_path / "model.safetensors")
    assert main([str(path), str(tmp_path / "model.safetensors"), "--quiet"]) == status
    shown = capsys.readouterr()
    assert words in shown.out + shown.err


def test_two_files_of_the_model_must_not_have_one_name(plain, tmp_path, capsys):
    path, weights = plain
    save_file(weights, tmp_path / "a.safetensors")
    save_file({"0.weight": weights["2.weight"]}, tmp_path / "b.safetensors")
    files = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert main([str(path), *files, "--quiet"]) == 1
    assert "two of the files have a tensor '0.weight'" in capsys.readouterr().err


def test_multipliers_are_not_looked_for_in_the_model(saved, tmp_path):
    """They are a witness: the weights that were verified are the same without them."""
    torch.manual_seed(0)
    model, _ = NETS["perceptron"]()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    content = json.loads(saved("perceptron").read_text())
    assert any("chain" in node for node in content["nodes"])
    first = check(saved("perceptron"), [tmp_path / "model.safetensors"])
    assert first.assumed == []
    last = content["nodes"][-1]
    for name in last.pop("chain")["multipliers"]:
        del content["constants"][name]
    product = 1.0
    for node in content["nodes"][1:]:
        product *= float.fromhex(node["gain"]) * (1 + 2.0**-50)
    content["bound"] = content["each"][0] = product.hex()
    samples = content.pop("samples")
    for name in (content.pop("pairs"), *samples["inputs"], *samples["outputs"]):
        del content["constants"][name]
    (tmp_path / "c.json").write_text(json.dumps(content))
    data = saved("perceptron").with_suffix(".safetensors").read_bytes()
    (tmp_path / content["weights"]).write_bytes(data)
    second = check(tmp_path / "c.json")
    assert (second.weights, second.graph) == (first.weights, first.graph)


@pytest.mark.parametrize("name", ["circular", "convolutional", "one_dimensional", "plain"])
def test_the_plain_model_has_every_constant_by_name(saved, name, tmp_path):
    torch.manual_seed(0)
    model, _ = NETS[name]()
    state = {k: v.contiguous() for k, v in to_plain(model.eval()).state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    assert check(saved(name), [tmp_path / "model.safetensors"]).assumed == []
