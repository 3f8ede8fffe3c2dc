"""What a user can expect from this library and its peers, each answer found by trying it.

    python -m tests.peers.comparison

writes the table of README.md and docs/comparison.md from `EXPECTED`. `test_comparison.py` tries
every cell whose library is installed.
"""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import orthonet
from orthonet.testing import singular_values

__all__ = ["EXPECTED", "LIBRARIES", "PAGES", "PROBES", "answer", "installed", "render"]

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "comparison.md")
# The name on the page, and the package to import.
LIBRARIES = {
    "orthonet": "orthonet",
    "orthogonium": "orthogonium",
    "deel-torchlip": "deel",
    "GeoTorch": "geotorch",
    "geoopt": "geoopt",
}
N = 16
PROBES: dict[str, Callable[[str], bool]] = {}


def installed(library: str) -> bool:
    return find_spec(LIBRARIES[library]) is not None


def probe(title: str) -> Callable[[Callable[[str], bool]], Callable[[str], bool]]:
    """Register a row: a function that answers for one library."""

    def register(function: Callable[[str], bool]) -> Callable[[str], bool]:
        PROBES[title] = function
        return function

    return register


def linear(library: str) -> nn.Module:
    """Return the layer that the library offers for an orthogonal 16 x 16 weight."""
    if library == "orthonet":
        return orthonet.OrthoLinear(N, N)
    if library == "orthogonium":
        return importlib.import_module("orthogonium.layers").OrthoLinear(N, N)
    if library == "deel-torchlip":
        layers = importlib.import_module("deel.torchlip")
        return layers.SpectralLinear(N, N, eps_spectral=1e-6, eps_bjorck=1e-6)
    layer = nn.Linear(N, N)
    if library == "GeoTorch":
        importlib.import_module("geotorch").orthogonal(layer, "weight")
    else:
        geoopt = importlib.import_module("geoopt")
        start = nn.init.orthogonal_(torch.empty(N, N))
        layer.weight = geoopt.ManifoldParameter(start, manifold=geoopt.Stiefel())
    return layer


def convolution(library: str) -> nn.Module:
    """Return the layer that the library offers for an orthogonal 3 x 3 kernel, circular padding."""
    options = {"padding": 1, "padding_mode": "circular", "bias": False}
    if library == "orthonet":
        return orthonet.OrthoConv2d(8, 8, 3, **options)
    if library == "orthogonium":
        return importlib.import_module("orthogonium.layers").AdaptiveOrthoConv2d(8, 8, 3, **options)
    if library == "deel-torchlip":
        return importlib.import_module("deel.torchlip").SpectralConv2d(8, 8, 3, **options)
    layer = nn.Conv2d(8, 8, 3, **options)
    if library == "GeoTorch":
        importlib.import_module("geotorch").orthogonal(layer, "weight")
    else:  # the first two dimensions are no matrix that its manifolds know: slices, as above
        geoopt = importlib.import_module("geoopt")
        start = torch.stack([nn.init.orthogonal_(torch.empty(3, 3)) for _ in range(64)])
        start = start.reshape(8, 8, 3, 3)
        layer.weight = geoopt.ManifoldParameter(start, manifold=geoopt.Stiefel())
    return layer


def train(library: str, layer: nn.Module, x: Tensor, steps: int = 20) -> nn.Module:
    """Take steps of Adam toward a random target, with the optimizer that the library asks for."""
    if library == "geoopt":
        optimizer = importlib.import_module("geoopt").optim.RiemannianAdam(layer.parameters(), 1e-2)
    else:
        optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    layer.train()
    target = torch.randn_like(layer(x).detach())
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    return layer.eval()


def off(weight: Tensor) -> float:
    """Return the largest distance of a singular value to 1."""
    return (torch.linalg.svdvals(weight.detach().double()) - 1).abs().max().item()


def operator(library: str) -> Tensor:
    layer = train(library, convolution(library), torch.randn(4, 8, 6, 6))
    return singular_values(layer, (8, 6, 6))


@probe("Linear layers stay orthogonal in training, to 1e-5")
def stays_orthogonal(library: str) -> bool:
    layer = train(library, linear(library), torch.randn(32, N))
    return off(operator_of(layer)) < 1e-5


def operator_of(layer: nn.Module) -> Tensor:
    """Return the matrix that a layer applies, whatever it calls its weight."""
    with torch.no_grad():
        eye = torch.eye(N, dtype=next(layer.parameters()).dtype)
        return (layer(eye) - layer(torch.zeros_like(eye[:1]))).T


@probe("Linear layers are orthogonal for any parameter: here Gaussian")
def any_parameter(library: str) -> bool:
    """GeoTorch's coordinates are drawn, the parameters of others; geoopt has no free parameter."""
    layer = linear(library)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter))
    return off(operator_of(layer)) < 1e-5


@probe("The weight stays orthogonal to 1e-5 under bfloat16 autocast")
def autocast(library: str) -> bool:
    layer, seen = linear(library), []
    layer.train()
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(4, N))
        seen.append(layer.weight.detach().float())
    return off(seen[0]) < 1e-5


@probe("float64 computes to 1e-10")
def double(library: str) -> bool:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        layer = train(library, linear(library), torch.randn(4, N), steps=3)
        return off(operator_of(layer)) < 1e-10
    finally:
        torch.set_default_dtype(before)


@probe("Convolutions are orthogonal as operators, to 1e-4")
def convolutions(library: str) -> bool:
    sigma = operator(library)
    return (sigma - 1).abs().max().item() < 1e-4


@probe("Convolutions have norm at most 1 as operators")
def convolutions_lipschitz(library: str) -> bool:
    return operator(library).max().item() < 1 + 1e-4


@probe("Evaluation gives the same bits twice and leaves the `state_dict` alone")
def pure(library: str) -> bool:
    layer, x = linear(library), torch.randn(4, N)
    layer.train()
    layer(x).sum().backward()
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    same = torch.equal(layer(x), layer(x))
    after = layer.state_dict()
    return same and all(torch.equal(before[k], after[k]) for k in before)


@probe("Evaluation after an optimizer step uses the new weight")
def current(library: str) -> bool:
    x = torch.randn(32, N)
    layer = train(library, linear(library), x, steps=1)
    with torch.no_grad():
        evaluated = layer(x)
        trained = layer.train()(x)
    return torch.allclose(evaluated, trained, atol=1e-4)


@probe("`pickle` and `copy.deepcopy`")
def pickles(library: str) -> bool:
    layer, x = linear(library), torch.randn(4, N)
    layer.train()
    layer(x)
    layer.eval()
    copies = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)))
    return all(torch.allclose(twin(x), layer(x), atol=1e-5) for twin in copies)


@probe("`torch.compile(fullgraph=True)` in training")
def compiles(library: str) -> bool:
    layer, x = linear(library), torch.randn(4, N)
    torch.compile(layer, fullgraph=True, backend="eager")(x).sum().backward()
    return True


@probe("The checkpoint of an `nn.Linear` loads, and the weight is orthogonal")
def plain_checkpoint(library: str) -> bool:
    layer = linear(library)
    layer.load_state_dict(nn.Linear(N, N).state_dict())
    layer.eval()
    return off(operator_of(layer)) < 1e-5


@probe("Export to plain weights with equal outputs")
def export(library: str) -> bool:
    layer, x = linear(library), torch.randn(4, N)
    layer.train()
    layer(x)
    layer.eval()
    expected = layer(x)
    if library == "orthonet":
        plain = orthonet.to_plain(layer)
    elif library == "deel-torchlip":
        plain = layer.vanilla_export()
    elif library == "geoopt":  # the parameter is the weight
        plain = nn.Linear(N, N)
        plain.load_state_dict(layer.state_dict())
    elif hasattr(layer, "parametrizations"):
        plain = nn.utils.parametrize.remove_parametrizations(layer, "weight")
    else:
        return False
    stock = isinstance(plain, nn.Linear) and type(plain.weight) is nn.Parameter
    return stock and torch.allclose(plain(x), expected, atol=1e-5)


@probe("A proved bound of the constant of a whole model")
def certificate(library: str) -> bool:
    """The steepest secant between two samples must not be above it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    x = torch.randn(1000, 8)
    with torch.no_grad():
        jacobians = torch.func.vmap(torch.func.jacrev(model))(x)
        truth = torch.linalg.matrix_norm(jacobians, 2).max().item()
    if library == "orthonet":
        return orthonet.certify.certify(model, x[:1]).constant.value >= truth
    if library == "deel-torchlip":
        utils = importlib.import_module("deel.torchlip.utils")
        return float(utils.evaluate_lip_const(model, x[:100])) >= truth
    return _has(library, "certif", "lipschitz_bound", "lip_const")


@probe("Recurrent layers")
def recurrent(library: str) -> bool:
    return _has(library, "rnn", "lstm", "gru")


@probe("Constraints on any parameter of any module, beyond orthogonality")
def spaces(library: str) -> bool:
    """Rotations, spheres and positive definite matrices, for one."""
    return _has(library, "positivedefinite", "positive_definite") and _has(library, "sphere")


@probe("Riemannian optimizers")
def riemannian(library: str) -> bool:
    return _has(library, "riemannian", "stiefeladam")


@probe("Unitary (complex) matrices")
def unitary(library: str) -> bool:
    layer = nn.Linear(N, N, dtype=torch.complex64)
    if library == "orthonet":
        orthonet.constraints.unitary(layer, "weight")
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    elif library == "GeoTorch":
        importlib.import_module("geotorch").orthogonal(layer, "weight")
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    elif library == "geoopt":
        geoopt = importlib.import_module("geoopt")
        start = torch.linalg.qr(torch.randn(N, N, dtype=torch.complex64))[0]
        layer.weight = geoopt.ManifoldParameter(start, manifold=geoopt.Stiefel())
        optimizer = geoopt.optim.RiemannianSGD(layer.parameters(), 0.1)
    else:
        return False
    for _ in range(5):
        optimizer.zero_grad()
        layer(torch.randn(4, N, dtype=torch.complex64)).abs().square().mean().backward()
        optimizer.step()
    w = layer.weight.detach()
    return torch.dist(w @ w.mH, torch.eye(N, dtype=w.dtype)).item() < 1e-4


def _has(library: str, *parts: str) -> bool:
    """Tell whether a public name of the library contains one of some parts."""
    rooms = {
        "orthonet": ["orthonet", "orthonet.layers", "orthonet.optim", "orthonet.manifolds"],
        "orthogonium": [
            "orthogonium.layers", "orthogonium.layers.conv", "orthogonium.layers.linear",
            "orthogonium.reparametrizers", "orthogonium.losses", "orthogonium.model_factory",
        ],
        "deel-torchlip": ["deel.torchlip", "deel.torchlip.utils"],
        "GeoTorch": ["geotorch"],
        "geoopt": ["geoopt", "geoopt.manifolds", "geoopt.optim"],
    }[library]  # fmt: skip
    names = [name.lower() for room in rooms for name in dir(importlib.import_module(room))]
    return any(part in name for part in parts for name in names)


def answer(title: str, library: str) -> bool:
    """Try one cell; what the library refuses or fails at is a no."""
    torch.manual_seed(0)
    try:
        return PROBES[title](library)
    except Exception:
        if library == "orthonet":
            raise
        return False


# One letter a library, in the order of `LIBRARIES`: yes, no, or - where the question has no sense.
EXPECTED = {
    "Linear layers stay orthogonal in training, to 1e-5": "yyyyy",
    "Linear layers are orthogonal for any parameter: here Gaussian": "ynyy-",
    "float64 computes to 1e-10": "yyyyy",
    "The weight stays orthogonal to 1e-5 under bfloat16 autocast": "ynnny",
    "Convolutions are orthogonal as operators, to 1e-4": "yynnn",
    "Convolutions have norm at most 1 as operators": "yyynn",
    "Recurrent layers": "ynnnn",
    "A proved bound of the constant of a whole model": "ynnnn",
    "Constraints on any parameter of any module, beyond orthogonality": "ynnyy",
    "Unitary (complex) matrices": "ynnnn",
    "Riemannian optimizers": "ynnny",
    "Evaluation gives the same bits twice and leaves the `state_dict` alone": "ynyyy",
    "Evaluation after an optimizer step uses the new weight": "yynyy",
    "The checkpoint of an `nn.Linear` loads, and the weight is orthogonal": "ynnnn",
    "Export to plain weights with equal outputs": "yyyyy",
    "`pickle` and `copy.deepcopy`": "ynnny",
    "`torch.compile(fullgraph=True)` in training": "ynnyy",
}
WORDS = {"y": "yes", "n": "no", "-": "-"}
BENCHMARK = ROOT / "benchmarks" / "results" / "orthogonalizers.json"
DEFAULTS = {"orthonet": "DEFAULT", "orthogonium": "DEFAULT", "GeoTorch": "expm"}
FASTEST = {"orthonet": "DEFAULT", "orthogonium": "CHOLESKY", "GeoTorch": "cayley"}
SLOT = re.compile(r"(<!-- comparison -->\n).*?(<!-- end -->)", re.S)


def costs(presets: dict[str, str]) -> list[str]:
    """Return the measured cost of a 512 x 512 weight in products, where it was measured."""
    found = {
        (row["library"].lower(), row["preset"]): row["step"]
        for row in json.loads(BENCHMARK.read_text())["rows"]
        if row["shape"] == "512x512"
    }
    cells = {name: f"{found[name.lower(), preset]:.0f}" for name, preset in presets.items()}
    return [cells.get(library, "not measured") for library in LIBRARIES]


def render() -> str:
    """Return the table, in Markdown."""
    rows = [[title, *(WORDS[letter] for letter in cells)] for title, cells in EXPECTED.items()]
    kind = "Cost of a 512 x 512 weight, forward and backward, in matrix products"
    rows += [[f"{kind}: default map", *costs(DEFAULTS)], [f"{kind}: fastest map", *costs(FASTEST)]]
    lines = ["| | " + " | ".join(LIBRARIES) + " |", "|---|" + "---|" * len(LIBRARIES)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def main() -> None:
    """Write the table into the pages that show it."""
    for page in PAGES:
        page.write_text(SLOT.sub(lambda slot: slot[1] + render() + slot[2], page.read_text()))


if __name__ == "__main__":
    main()
