"""Orthogonal and 1-Lipschitz layers for PyTorch, with constants that are proved.

The names below are the ones most programs need; the rest lives in the sub-packages `layers`,
`constraints`, `manifolds`, `functional`, `init`, `reparametrizers`, `linalg`, `losses`, `optim`,
`certify`, `convert`, `models`, `recipes` and `testing`. All are loaded when they are first used.
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


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if name == "__version__":
        value: object = version(__name__)
    elif home is None:
        error = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(error, name=name, obj=sys.modules[__name__])
    elif home == __name__:
        value = import_module(f"{home}.{name}")
    else:
        value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*_HOMES, "__version__", *(name for name in globals() if name.startswith("__"))})
