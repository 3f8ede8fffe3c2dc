"""A certificate holds for the model that it was made for, in the modes that it was made in."""

import copy
import io
import threading

import pytest
import torch
from torch import nn

from orthonet.certify import LipschitzCertificate, certified_accuracy, certify
from orthonet.certify.graph.outside import digest
from orthonet.errors import UncertifiableError
from orthonet.layers import MaxMin, OrthoLinear


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(6, 3), 2.0
        self.register_buffer("shift", torch.zeros(3))

    def forward(self, x):
        return self.scale * self.linear(x) + self.shift


def _add(tensor):
    with torch.no_grad():
        tensor.view(-1)[0] = tensor.view(-1)[0].nextafter(torch.tensor(9.0))


CHANGES = {
    "one unit in the last place": lambda m: _add(m.linear.weight),
    "through data": lambda m: m.linear.bias.data.add_(1.0),
    "buffer": lambda m: _add(m.shift),
    "attribute": lambda m: setattr(m, "scale", 3.0),
    "dtype": lambda m: m.double(),
    "layer": lambda m: setattr(m, "linear", nn.Linear(6, 3)),
    "hook": lambda m: m.register_forward_hook(lambda *args: 2 * args[-1]),
    "forward": lambda m: setattr(m, "forward", lambda x: 2 * x),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_an_error(name):
    """R4."""
    model = Scaled().eval()
    x = torch.randn(5, 6)
    certificate = certify(model, x)
    logits = model(x).detach()
    assert certificate.matches(model) and certificate.matches(copy.deepcopy(model))
    found = certificate.radius(model, x)
    assert torch.equal(found, certificate.radius(logits, inputs=x, model=model))
    assert torch.equal(found, certificate.radius(logits, inputs=x))
    CHANGES[name](model)
    assert not certificate.matches(model)
    for call in (
        lambda: certificate.radius(model, x),
        lambda: certificate.radius(logits, model=model),
        lambda: certified_accuracy(model, [(x, torch.zeros(5).long())], [0.0], certificate),
    ):
        with pytest.raises(ValueError, match="the model must be the one that was certified"):
            call()


def test_the_hashes_are_those_of_the_bytes():
    model = nn.Sequential(OrthoLinear(4, 4), MaxMin(), nn.Linear(4, 2)).eval()
    certificate = certify(model, torch.zeros(1, 4))
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    assert certificate.hashes == {n: digest(p) for n, p in tensors.items()}
    assert set(model.state_dict()) - set(tensors) == {
        "0.parametrization._extra_state"
    }  # the preset
    assert certificate.constants["0.weight"] == digest(model[0].weight)
    assert certificate.constants["2.bias"] == certificate.hashes["2.bias"]
    stored = io.BytesIO()
    torch.save(certificate, stored)
    stored.seek(0)
    again = torch.load(stored, weights_only=False)
    assert again.matches(model) and again.constants == certificate.constants
    assert certificate.hashes["2.weight"] in certificate.to_json()
    model.train().eval()
    assert certificate.matches(model)
    assert not certificate.matches(nn.Linear(4, 2))


def test_radius_of_a_model_holds_for_its_forward_pass():
    """The class in float32 is the same at the returned distance, in every direction tried."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 3)).eval()
    x = 1e3 * torch.randn(100, 6)
    certificate = certify(model, x)
    radius, logits = certificate.radius(model, x), model(x).detach()
    exact = LipschitzCertificate(certificate.constant, (), (6,), certificate.pairs)
    assert bool((radius < exact.radius(logits.double())).all())  # its rounding is taken off
    weight, top = model[0].weight.detach().double(), logits.argmax(1)
    for rival in range(3):
        step = weight[rival] - weight[top]
        step = step / step.norm(dim=1, keepdim=True).clamp_min(1e-30) * radius[:, None]
        near = (x.double() + 0.9999 * step).float()
        inside = (near.double() - x.double()).norm(dim=1) < radius
        assert bool((model(near).argmax(1) == top)[inside].all())
    labels = (top + 1) % 3
    assert certificate.radius(model, x, labels=labels).max() == 0.0
    with pytest.raises(ValueError, match=r"Call certificate.radius\(model, x\)"):
        certificate.radius(model)
    with pytest.raises(ValueError, match=r"Call certificate.radius\(model, x\)"):
        certificate.radius(logits, x)
    with pytest.raises(ValueError, match="eval mode"):
        certificate.radius(model.train(), x)


def test_flushed_subnormal_numbers_are_refused():
    model = nn.Linear(6, 3).eval()
    x = torch.randn(2, 6)
    certificate = certify(model, x)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush")
    try:
        with pytest.raises(UncertifiableError, match="must not be flushed to zero"):
            certify(model, x)
        with pytest.raises(UncertifiableError, match="must not be flushed to zero"):
            certificate.radius(model, x)
    finally:
        torch.set_flush_denormal(False)
    assert certificate.radius(model, x).shape == (2,)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_with_fewer_bits_are_refused(precision):
    model = nn.Linear(6, 3).eval()
    x = torch.randn(2, 6)
    certificate = certify(model, x)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with pytest.raises(UncertifiableError, match="multiplied with fewer bits"):
            certificate.radius(model, x)
        double = certify(model.double(), x.double())
        assert double.radius(model, x.double()).shape == (2,)
    finally:
        torch.set_float32_matmul_precision(before)


class Failing(nn.Module):
    def forward(self, x):
        raise RuntimeError("not today")


def test_threads_certify_side_by_side():
    torch.manual_seed(0)
    models = [nn.Sequential(OrthoLinear(6, 8), MaxMin(), nn.Linear(8, 3)).eval() for _ in range(8)]
    x, before = torch.randn(2, 6), torch.backends.mkldnn.enabled
    alone = [certify(m, x, lower=False).constant.value for m in models]
    outputs = [m(x) for m in models]
    found, errors = [None] * 8, []

    def work(i):
        try:
            for _ in range(2):
                found[i] = certify(models[i], x, lower=False).constant.value
                # PyTorch traces with other kernels than it runs with; allowed 1e-5, observed 1e-7
                assert torch.allclose(models[i](x), outputs[i], atol=1e-5)
            with pytest.raises(UncertifiableError, match="not today"):
                certify(Failing().eval(), x)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert found == alone
    assert torch.backends.mkldnn.enabled == before
    assert all(torch.equal(m(x), out) for m, out in zip(models, outputs, strict=True))


def test_the_arguments_of_certified_accuracy():
    model = nn.Linear(6, 3).eval()
    x, labels = torch.randn(8, 6), torch.randint(3, (8,))
    certificate = certify(model, x)
    loader = [(x[:5], labels[:5]), (x[5:], labels[5:])]
    found = certified_accuracy(model, loader, [0.0, 0.1])
    assert found == certified_accuracy(model, loader, [0.0, 0.1], certificate)
    assert found[0] == float((model(x).argmax(1) == labels).double().mean())
    rounded, exact = (
        certified_accuracy(model, loader, [0.1], certificate, exact=e)[0] for e in (False, True)
    )
    assert rounded <= exact
    with pytest.raises(ValueError, match=r"must be \(model, loader, radii, certificate\)"):
        certified_accuracy(model, certificate, loader, [0.0])
    with pytest.raises(ValueError, match=r"must be \(model, loader, radii, certificate\)"):
        certified_accuracy(model, x, [0.0])
    for radii in ([-0.1], [float("nan")], 0.1):
        with pytest.raises(ValueError, match="radii must be a list of numbers >= 0"):
            certified_accuracy(model, loader, radii, certificate)
        with pytest.raises(ValueError, match="radii must be a list of numbers >= 0"):
            certificate.certified_accuracy(model(x), labels, radii)
    with pytest.raises(ValueError, match="one label for each sample, an integer"):
        certificate.certified_accuracy(model(x), labels.float(), [0.1])
    with pytest.raises(ValueError, match="every batch of the loader"):
        certified_accuracy(model, [x], [0.0], certificate)


def test_a_certificate_shows_itself_in_a_few_lines():
    model = nn.Sequential(*(m for _ in range(9) for m in (nn.Linear(4, 4), nn.ReLU()))).eval()
    certificate = certify(model, torch.zeros(1, 4), lower=False)
    text = repr(certificate)
    assert text.startswith("LipschitzCertificate: Lipschitz constant (l2, upper): ")
    assert len(text.splitlines()) <= 14
    assert max(map(len, text.splitlines())) < 100
    page = certificate._repr_html_()
    assert page.count("<tr>") <= 13
    assert "<script" not in page
    short = LipschitzCertificate(certificate.constant, certificate.rows[:2], (4,))
    assert len(repr(short).splitlines()) == 3
