"""Certificates to check, each saved once."""

import pytest

from tests.checker.nets import save


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The path of a saved certificate of a small network, by the name of the network."""
    known = {}

    def path_of(name):
        if name not in known:
            known[name] = save(name, tmp_path_factory.mktemp(name))
        return known[name]

    return path_of
