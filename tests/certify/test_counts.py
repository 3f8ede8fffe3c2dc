"""The batch size enters shapes and nothing else, also where forward tells numbers from symbols."""

import pytest
import torch
from torch import nn

from orthonet.certify import certify
from orthonet.errors import UncertifiableError


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def _tried(question):
    try:
        return question()
    except Exception:  # that of a trace
        return False


BATCH = {
    "class": lambda x: isinstance(x.shape[0], int) and x.shape[0] == 7,
    "class once": lambda x: (lambda n: isinstance(n, int) and n == 7)(x.shape[0]),
    "class of size": lambda x: (lambda n: isinstance(n, int) and n > 6)(x.size(0)),
    "text of a tuple": lambda x: str(tuple(x.shape)).startswith("(7,"),
    "text of a shape": lambda x: "[7," in str(x.shape),
    "text of the size": lambda x: f"{x.shape[0]}" == "7",
    "format": lambda x: "%s" % x.size(0) == "7",  # noqa: UP031
    "hash": lambda x: _tried(lambda: x.shape[0] in {7}),
    "dictionary": lambda x: _tried(lambda: {7: True}.get(x.shape[0], False)),
    "list": lambda x: _tried(lambda: x.shape[0] in [7, 8]),
    "product": lambda x: (lambda n: isinstance(n, int) and 2 * n + 1 == 15)(x.shape[0]),
    "remainder": lambda x: (lambda n: isinstance(n, int) and n % 7 == 0)(x.shape[0]),
    "entries": lambda x: (lambda n: isinstance(n, int) and n == 14)(x.numel()),
    "tried": lambda x: _tried(lambda: bool(x.shape[0] == 7)),
    "length": lambda x: type(x) is torch.Tensor and len(x) == 7,
}


@pytest.mark.parametrize("name", BATCH)
def test_questions_about_the_batch_size_are_refused(name):
    model = Lambda(lambda x: 50.0 * x if BATCH[name](x) else 1.0 * x).eval()
    with pytest.raises(UncertifiableError, match="certify: "):
        certify(model, torch.zeros(1, 2), lower=False)


def _require(condition):  # a rewritten assert of pytest reads the environment
    if not condition:
        raise ValueError


def test_shapes_are_computed_with():
    def forward(x):
        n, c, h, w = x.shape
        _require(n > 0 and c == 2 and x.shape[1:] == (2, 4, 4) and x.size(-1) == w)
        _require(f"{c} channels of {h} rows" == "2 channels of 4 rows")
        y = x.new_zeros(n, c, h * w).add(1.0)
        y = y + x.reshape(n, c, -1) + x.flatten(2).view((*x.shape[:2], h * w))
        _require(y.shape[0] == x.shape[0] and y.shape == x.flatten(2).shape)
        z = y.reshape(n, c * h, w).transpose(1, 2)
        _require(z.shape[1] == w and z.shape[0] * z.shape[1] == n * w)
        return torch.zeros(x.shape[0], 32) + z.reshape(n, c * h * w)

    found = certify(Lambda(forward).eval(), torch.zeros(1, 2, 4, 4), lower=False)
    assert found.constant.value == pytest.approx(2.0, rel=1e-9)
