"""The package `orthonet.certify` as something to call: it certifies, as its function does."""

import inspect
import sys
from types import ModuleType
from typing import cast

from orthonet.certify import _certify

__all__ = ["certify"]


class _CallablePackage(ModuleType):
    """The class of the package."""

    __call__ = staticmethod(_certify.certify)
    __signature__ = inspect.signature(_certify.certify)


certify = cast(_CallablePackage, sys.modules["orthonet.certify"])
certify.__class__ = _CallablePackage
