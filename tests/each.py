"""Many values in one test, for checks that take less time than a test of their own costs."""

import functools
import inspect
import random
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch

# torch.manual_seed formats the stack for each accelerator that is not there: 1 ms a test
_SEED_TORCH = (
    torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
)


def seed_all() -> None:
    """Seed every generator."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries under test may draw from the global generator)
    _SEED_TORCH(0)


def each(name: str, values: Iterable, of: Callable[..., str] | None = None):
    """Call a test with each value of an argument, from the same seed, as one test.

    With `of`, which names the group of a value, there is one test for each group. A test that is
    called so must not skip, since that would leave out the values after it.
    """
    values = list(values)
    groups: dict[str, list] = {}
    for value in values:
        groups.setdefault(of(value) if of else "", []).append(value)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(group: str = "", **arguments) -> None:
            for value in groups[group]:
                seed_all()
                try:
                    test(**arguments, **{name: value})
                except pytest.skip.Exception as error:
                    pytest.fail(f"{name}={value!r} skips the values after it: {error}")
                except Exception as error:
                    if hasattr(error, "add_note"):  # since Python 3.11
                        error.add_note(f"where {name}={value!r}")
                    raise

        signature = inspect.signature(test)
        kept = [p for p in signature.parameters.values() if p.name != name]
        if of is not None:
            kept.append(inspect.Parameter("group", inspect.Parameter.KEYWORD_ONLY))
        run.__signature__ = signature.replace(parameters=kept)
        return run if of is None else pytest.mark.parametrize("group", groups)(run)

    return decorate
