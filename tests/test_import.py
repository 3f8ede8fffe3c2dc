"""`import orthonet` loads little, and every public name is there when it is asked for."""

import importlib
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import orthonet
from benchmarks import import_time

HEAVY = (
    "numpy",
    "scipy",
    "sympy",
    "matplotlib",
    "sklearn",
    "torch._decomp",
    "torch._dynamo",
    "torch._export",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.export",
    "torch.fx.experimental.proxy_tensor",
    "torch.utils.flop_counter",
    "triton",
)
ROOMS = {"_checks", "_torch", "errors", "functional", "init", "linalg"}


def fresh(code: str) -> str:
    """What `code` prints in an interpreter of its own."""
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:orthonet", "-c", code],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_no_heavy_module():
    loaded = json.loads(
        fresh(
            "import json, sys, torch\n"
            "before = set(sys.modules)\n"
            "import orthonet\n"
            "print(json.dumps(sorted(set(sys.modules) - before)))"
        )
    )
    assert "orthonet.linalg" in loaded
    assert [name for name in HEAVY if name in loaded] == []
    rooms = {name.split(".")[1] for name in loaded if name.startswith("orthonet.")}
    assert rooms <= ROOMS


def test_layers_load_no_certificates():
    loaded = fresh("import sys\nfrom orthonet import OrthoLinear\nprint('\\n'.join(sys.modules))")
    loaded = set(loaded.split())
    assert "orthonet.layers" in loaded
    assert not {"orthonet.certify", "orthonet.recipes", "orthonet.convert"} & loaded


@pytest.mark.parametrize("order", ["", ", reverse=True"])
def test_every_name_of_dir_resolves_in_any_order(order):
    code = (
        "import orthonet\n"
        f"names = sorted(dir(orthonet){order})\n"
        "print(*(name for name in names if getattr(orthonet, name) is not None))"
    )
    found = set(fresh(code).split())
    assert found >= {*orthonet.__all__, "__version__"}


@pytest.mark.parametrize("name", orthonet.__all__)
def test_name_is_that_of_its_room(name):
    space: dict = {}
    exec(f"from orthonet import {name}", space)
    value, home = space[name], orthonet._HOMES[name]
    if home == "orthonet":
        assert value is importlib.import_module(f"orthonet.{name}")
    elif name == "certify":
        assert value is importlib.import_module("orthonet.certify")
    else:
        module = importlib.import_module(home)
        assert value is getattr(module, name)
        assert name in module.__all__ or home.startswith("torch.")


def test_every_room_is_public():
    folder = Path(orthonet.__file__).parent
    files = {file.name.removesuffix(".py") for file in folder.iterdir()}
    rooms = {name for name in files if not name.startswith("_")} - {"cli", "py.typed"}
    assert rooms <= set(orthonet.__all__)


def test_star_import_brings_all():
    space: dict = {}
    exec("from orthonet import *", space)
    assert set(orthonet.__all__) <= space.keys()


def test_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="'orthonet' has no attribute 'OrthoLinaer'"):
        orthonet.OrthoLinaer  # noqa: B018
    with pytest.raises(ImportError, match="OrthoLinaer"):
        exec("from orthonet import OrthoLinaer")


GUESSED = """
OrthoRNN OrthoLSTM SpaceToDepth2d OffsetCrossEntropyLoss StiefelAdam certified_accuracy AOLConv2d
correlation stiefel presets remove models recipes testing is_orthogonal summary unitary certify
evaluate
"""


def test_guessed_names_are_there_or_explained():
    there = {name for name in GUESSED.split() if name in orthonet.__all__}
    assert len(there) > 12
    for name in set(GUESSED.split()) - there:
        with pytest.raises(AttributeError) as caught:
            getattr(orthonet, name)
        text = str(caught.value)
        assert text.startswith(f"module 'orthonet' has no attribute '{name}': ")
        named = re.findall(r"orthonet\.([a-z_]+)\.?([A-Za-z_]\w*)?", text.partition("': ")[2])
        assert named
        for room, member in named:
            value = getattr(orthonet, room)
            assert not member or hasattr(value, member)
    with pytest.raises(AttributeError, match=r"it is orthonet\.layers\.AOLConv2d$"):
        orthonet.AOLConv2d  # noqa: B018


def test_every_guess_that_is_explained_names_what_exists():
    for text in orthonet._GUESSED.values():
        for path in re.findall(r"orthonet((?:\.[A-Za-z_]+)+)", text):
            value = orthonet
            for part in path.strip(".").split("."):
                if part in ("lipschitz",):
                    break
                value = getattr(value, part)


def test_looking_for_a_name_imports_nothing():
    found = fresh(
        "import sys, orthonet\n"
        "before = set(sys.modules)\n"
        "assert not hasattr(orthonet, 'AOLConv2d') and not hasattr(orthonet, 'nonsense')\n"
        "print(*(name for name in set(sys.modules) - before if name.startswith('orthonet')))"
    )
    assert found.split() == []


def test_exported_programs_load_after_the_import_alone(tmp_path):
    layer = orthonet.OrthoLinear(4, 3, ortho_params=orthonet.POLAR_ORTHO_PARAMS)
    x = torch.ones(2, 4)
    file = tmp_path / "layer.pt2"
    torch.export.save(torch.export.export(layer, (x,)), file)
    found = fresh(
        "import torch, orthonet\n"
        f"program = torch.export.load({str(file)!r}).module()\n"
        "print(*program(torch.ones(2, 4)).flatten().tolist())"
    )
    expected = layer(x).flatten()
    # |y| <= 2 = |x| and the weight is accurate to 2e-6; observed 0
    assert torch.allclose(torch.tensor([float(y) for y in found.split()]), expected, atol=8e-6)


def test_the_package_of_certificates_can_be_called():
    model, x = nn.Linear(3, 2).eval(), torch.ones(1, 3)
    function = orthonet.certify.certify
    assert isinstance(orthonet.certify, types.ModuleType) and inspect.isfunction(function)
    assert inspect.signature(orthonet.certify) == inspect.signature(function)
    assert orthonet.certify(model, x).constant == function(model, x).constant
    assert orthonet.certify(model, x, lower=False).constant == function(model, x).constant
    assert pickle.loads(pickle.dumps(function)) is function


def test_import_time_is_measured():
    found = import_time.measure(["import orthonet"], runs=1)
    assert found.keys() == {"import torch", "import orthonet"}
    assert all(seconds > 0.0 for seconds in found.values())
