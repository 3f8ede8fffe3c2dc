"""Every public name exists, is documented, and has the keywords of its torch twin."""

import importlib
import importlib.metadata
import inspect
import pkgutil

import pytest
from torch import nn

import orthonet
from tests.each import each


def public_modules() -> list[str]:
    """The modules that no part of their dotted name marks as private."""
    walked = pkgutil.walk_packages(orthonet.__path__, "orthonet.")
    names = [info.name for info in walked if "._" not in info.name]
    return ["orthonet", *names]


MODULES = public_modules()
NAMES = [(module, name) for module in MODULES for name in importlib.import_module(module).__all__]
# `OrthoLinear` -> `Linear`, `AdaptiveOrthoConv2d` -> `Conv2d`: the torch class it stands in for.
PREFIXES = ("AdaptiveOrtho", "Ortho", "UnitNorm")
TWINS = [
    (name, name.removeprefix(prefix))
    for name in importlib.import_module("orthonet.layers").__all__
    for prefix in PREFIXES
    if name.startswith(prefix) and hasattr(nn, name.removeprefix(prefix))
]


# The signature of the three is `(*args, **kwargs)`; this is what their documentation tells. They
# are not base classes either: torch.compile refuses every instance of nn.RNN, nn.GRU, nn.LSTM.
_SEQUENCE = (
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "device",
    "dtype",
)
SEQUENCE_LAYERS = {
    "OrthoRNN": (*_SEQUENCE[:3], "nonlinearity", *_SEQUENCE[3:]),
    "OrthoGRU": _SEQUENCE,
    "OrthoLSTM": (*_SEQUENCE[:7], "proj_size", *_SEQUENCE[7:]),
}
TWINS = [pair for pair in TWINS if pair[0] not in SEQUENCE_LAYERS]


@pytest.mark.parametrize("name", SEQUENCE_LAYERS)
def test_recurrent_layer_takes_the_arguments_of_its_torch_twin(name):
    layer = getattr(importlib.import_module("orthonet.layers"), name)
    ours = list(inspect.signature(layer).parameters.values())
    positional = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert tuple(positional) == SEQUENCE_LAYERS[name]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(positional) :])
    assert issubclass(layer, nn.RNNBase)
    twin = getattr(nn, name.removeprefix("Ortho"))(3, 4)
    for p in ours[3 : len(positional) - 2]:
        assert getattr(twin, p.name) == p.default


def test_version_is_that_of_the_package():
    assert orthonet.__version__ == importlib.metadata.version("orthonet")


@each("module", MODULES)
def test_all_lists_each_name_once(module):
    names = importlib.import_module(module).__all__
    assert len(names) == len(set(names))
    assert all(name == "__version__" or not name.startswith("_") for name in names)


@each("full", NAMES)
def test_name_exists_and_is_documented(full):
    module, name = full
    value = getattr(importlib.import_module(module), name)
    if inspect.isclass(value) or inspect.isroutine(value):
        doc = inspect.getdoc(value) if not inspect.isclass(value) else value.__doc__
        assert doc, f"{module}.{name} has no docstring"
        first = inspect.cleandoc(doc).split("\n\n")[0]
        assert first.rstrip().endswith((".", ":")), f"{module}.{name}: begin with a sentence"


@each("module", MODULES)
def test_module_is_documented(module):
    assert importlib.import_module(module).__doc__, f"{module} has no docstring"


@pytest.mark.parametrize(("name", "twin"), TWINS)
def test_layer_takes_the_arguments_of_its_torch_twin(name, twin):
    layer = getattr(importlib.import_module("orthonet.layers"), name)
    ours = list(inspect.signature(layer).parameters.values())
    theirs = list(inspect.signature(getattr(nn, twin)).parameters.values())
    assert issubclass(layer, getattr(nn, twin))
    for mine, its in zip(ours, theirs, strict=False):
        assert (mine.name, mine.kind, mine.default) == (its.name, its.kind, its.default)
    extra = ours[len(theirs) :]
    assert len(ours) >= len(theirs)
    assert all(argument.kind is argument.KEYWORD_ONLY for argument in extra)


def test_layers_have_twins():
    assert ("OrthoLinear", "Linear") in TWINS
    assert ("OrthoConv2d", "Conv2d") in TWINS
