"""What another environment certifies is the network that was written, sample by sample."""

import sys

import pytest
import torch
from torch import nn

from benchmarks import local_peers, local_radii

STUB = '''
import torch
class Ball:
    def __init__(self, norm, eps):
        assert norm == 2
        self.eps = eps
PerturbationLpNorm = Ball
class BoundedTensor:
    def __init__(self, x, ball):
        self.x, self.eps = x, ball.eps
class BoundedModule:
    """Margins that shrink by the radius: what it certifies is the smallest margin."""
    def __init__(self, model, x, bound_opts, verbose):
        self.model = model
    def compute_bounds(self, x, C, method, bound_upper):
        if method == "refused":
            raise RuntimeError("no such method")
        return ((C @ self.model(x[0].x)[0])[0] - x[0].eps,)
'''


@pytest.mark.slow
def test_the_network_and_its_samples_arrive(tmp_path, monkeypatch):
    package = tmp_path / "auto_LiRPA"
    package.mkdir()
    (package / "__init__.py").write_text(STUB)
    (package / "perturbations.py").write_text("from auto_LiRPA import PerturbationLpNorm\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    torch.manual_seed(0)
    model, x = local_radii.NETS["residual"](), torch.rand(3, 1, 28, 28)
    model(x)  # moves the statistics of its normalizations
    model.eval().requires_grad_(False)
    logits = model(x)
    y = logits.argmax(1)
    best = logits.topk(2, 1).values
    margin = best[:, 0] - best[:, 1]
    found = local_peers.peer(sys.executable, model, x, y, margin.double() * 3, "CROWN")
    radii = torch.tensor(found["radii"])
    assert (radii <= margin * (1 + 1e-5)).all()  # float32 logits of another thread count
    assert (radii >= 0.99 * margin).all()  # the bisection ends within 0.7 %
    refused = local_peers.peer(sys.executable, model, x, y, margin, "refused")
    assert refused == {"error": "RuntimeError: no such method"}


def test_every_layer_of_the_networks_is_written():
    for name in local_peers.NETS:
        model, arrays = local_radii.NETS[name](), {}
        layers = local_peers.written(model, arrays)
        assert set(arrays) == set(model.state_dict())
        assert [kind for kind, *_ in layers] == [type(m).__name__ for m in model.children()]
    with pytest.raises(KeyError):
        local_peers.written(nn.Sequential(nn.GELU()), {})
