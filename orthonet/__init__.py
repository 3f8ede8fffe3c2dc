"""Orthogonal and 1-Lipschitz layers for PyTorch, with constants that are proved.

The names below are the ones most programs need; the rest lives in the sub-packages `layers`,
`constraints`, `manifolds`, `functional`, `init`, `reparametrizers`, `linalg`, `losses`, `optim`,
`certify`, `downstream`, `convert`, `models`, `recipes` and `testing`. All are loaded when they are
first used.
"""

import ast
import pkgutil
import sys
from importlib import import_module
from importlib.metadata import version

# These two register operations with PyTorch, and `torch.export.load` asks for them by name.
from orthonet import functional, linalg  # noqa: F401


def _read_homes() -> dict[str, str]:
    """Return the module that each public name comes from, as `__init__.pyi` says."""
    stub = ast.parse(pkgutil.get_data(__name__, "__init__.pyi") or "")
    lines = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(line.module) for line in lines for alias in line.names}


_HOMES = _read_homes()
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


_GUESSED = {
    "stiefel": "the space is orthonet.manifolds.Stiefel, the constraint orthonet.orthogonal",
    "is_orthogonal": "orthonet.summary(model) lists how far weights are from orthogonal, and "
    "orthonet.testing.assert_orthogonal(layer, input_shape) checks it",
    "lipschitz": "layers and certificates have it: orthonet.certify(model, x).lipschitz",
    "convert_model": "it is orthonet.orthogonalize",
    "from_plain": "it is orthonet.orthogonalize",
    "export": "it is orthonet.to_plain, whose result torch.export and ONNX take",
    "Certificate": "it is orthonet.LipschitzCertificate",
    "load": "certificates are read by orthonet.LipschitzCertificate.load(path), models as usual",
    "save": "certificates are written by certificate.save(path), pages by evaluation.save(path)",
    "cli": "the command is orthonet, or python -m orthonet",
}


def _elsewhere(name: str) -> str:
    """Say where a name lives that the top does not have; without importing anything."""
    if name.startswith("_"):
        return ""
    if name in _GUESSED:
        return f": {_GUESSED[name]}"
    rooms = sorted({"certify", *(room for room, home in _HOMES.items() if home == __name__)})
    found = [f"{__name__}.{room}.{name}" for room in rooms if name in _published(room)]
    return f": it is {' or '.join(found)}" if found else ""


def _published(room: str) -> list[str]:
    """The names that a room publishes, read from its source."""
    for file in (f"{room}/__init__.py", f"{room}.py"):
        try:
            source = pkgutil.get_data(__name__, file)
        except OSError:
            continue
        for node in ast.parse(source or "").body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                return ast.literal_eval(node.value)
    return []


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if name == "__version__":
        value: object = version(__name__)
    elif home is None:
        error = f"module {__name__!r} has no attribute {name!r}{_elsewhere(name)}"
        raise AttributeError(error, name=name, obj=sys.modules[__name__])
    elif home == __name__:
        value = import_module(f"{home}.{name}")
    else:
        value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*_HOMES, "__version__", *(name for name in globals() if name.startswith("__"))})
