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
from orthonet_checker.__main__ import main
from tests.checker.nets import convolutional

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
        cwd=saved("convolutional").parent, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
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
