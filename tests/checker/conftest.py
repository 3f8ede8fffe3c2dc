"""Certificates to check, each saved once."""

import pytest
import torch

from orthonet.certify import certify
from tests.checker.nets import NETS


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The path of a saved certificate of a small network, by the name of the network."""
    known = {}

    def path_of(name):
        if name not in known:
            torch.manual_seed(0)
            model, example = NETS[name]()
            path = tmp_path_factory.mktemp(name) / "certificate.json"
            certify(model.eval(), example, lower=False).save(path)
            known[name] = path
        return known[name]

    return path_of
