"""Claims about balls: verified where they are true, whatever the graph, and every lie rejected."""

import contextlib
import copy
import json
import math
import random
from fractions import Fraction

import flint
import numpy as np
import pytest
import torch
from torch import nn

from orthonet.certify import LocalCertificate, certify
from orthonet.errors import UncertifiableError
from orthonet.layers import GroupSort, MaxMin
from orthonet_checker import Rejected, check, norms, ranges
from orthonet_checker.__main__ import main
from orthonet_checker.ball import Ball
from orthonet_checker.maps import Affine
from orthonet_checker.verify import verify
from tests.checker import oracle
from tests.checker.measure import NO_FUNCTION
from tests.checker.mutations import _leaf, hashed, mutate, store_of

ACTIVATIONS = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    MaxMin,
    nn.Tanh,
    nn.Sigmoid,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.ELU,
    nn.SELU,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Softsign,
    nn.Tanhshrink,
    nn.LogSigmoid,
    nn.Softshrink,
    lambda: nn.ELU(-0.7),
    lambda: nn.ELU(1.7),
    lambda: nn.LeakyReLU(-0.4),
    lambda: nn.LeakyReLU(2.5),
    lambda: nn.GELU(approximate="tanh"),
)


class Residual(nn.Module):
    """x + 0.7 branch(x)."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x):
        return x + 0.7 * self.branch(x)


def network(rng: random.Random) -> tuple[nn.Module, torch.Tensor]:
    """A chain or a small image network with everything that is followed in a ball."""

    def act() -> nn.Module:
        return rng.choice(ACTIVATIONS)()

    if rng.random() < 0.5:
        layers, n = [], 5
        for _ in range(rng.randint(1, 3)):
            wide = rng.choice([4, 8, 12])
            layers += [nn.Linear(n, wide), act()]
            n = wide
        if rng.random() < 0.5:
            layers += [Residual(nn.Linear(n, n), act(), nn.Linear(n, n))]
        shape = (5,)
        layers += [nn.Linear(n, 3)]
    else:
        mode = rng.choice(["zeros", "circular", "reflect", "replicate"])
        pool = rng.choice(
            [
                nn.AvgPool2d(2),
                nn.MaxPool2d(2),
                nn.MaxPool2d(2, 1, 1),
                nn.AdaptiveAvgPool2d(2),
            ]
        )
        layers = [nn.Conv2d(2, 4, 3, rng.choice([1, 2])), nn.BatchNorm2d(4), act()]
        if rng.random() < 0.6:
            first = nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)
            layers += [Residual(first, nn.BatchNorm2d(4), act(), nn.Conv2d(4, 4, 1)), act()]
        layers += [pool, nn.Flatten(), nn.LazyLinear(3)]
        shape = (2, 5, 5)
    model, x = nn.Sequential(*layers).eval(), torch.randn(1, *shape)
    with torch.no_grad():
        model(x)
        for p in model.parameters():
            p.mul_(rng.choice([0.5, 1.0, 2.0]))
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.1, 2.0)
            norm.weight.normal_()
            norm.bias.normal_()
    return model, x


def steepest(model: nn.Module, x: torch.Tensor, radius: float, steps: int, count: int):
    """(the steepest secant from x that an ascent in the ball finds, the classes it meets)."""
    start, best, classes = model(x).detach(), 0.0, set()
    a = torch.randn(count, *x.shape[1:], dtype=torch.float64)
    a *= torch.logspace(-2, 1, count, dtype=torch.float64).reshape(-1, *[1] * (x.ndim - 1))
    for _ in range(steps):
        lengths = a.flatten(1).norm(dim=1).clamp_min(1e-9 * radius)
        column = (slice(None), *[None] * (x.ndim - 1))
        a = (a * (lengths.clamp(max=radius * (1 - 1e-12)) / lengths)[column]).detach()
        a.requires_grad_()
        y = model(x + a)
        moved, length = (y - start).norm(dim=1), a.flatten(1).norm(dim=1)
        kept = length > 1e-6 * radius
        best = max(best, float((moved / length).detach()[kept].max()))
        classes |= set(y.argmax(1).tolist())
        objective = (moved.clamp_min(1e-300).log() - length.log()).sum()
        (slope,) = torch.autograd.grad(objective, a)
        slope = slope.nan_to_num()
        size = slope.flatten(1).norm(dim=1).clamp_min(1e-300)
        a = a + 0.2 * slope * (length.detach() / size)[column]
    return best, classes


def written(path, model, x, **options):
    """(content, constants) of a file with claims about balls."""
    certify(model, x[:1], lower=False, effort="fast").save(path / "c.json", local=x, **options)
    return oracle.load(path / "c.json")


def fuzz(path, seeds, steps=20, count=32):
    """Every claim of random networks is verified, and no ascent passes it; the ratios."""
    found = []
    for seed in seeds:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        model, x = network(rng)
        radius = 10.0 ** rng.uniform(-2, 1)
        content, _ = written(path, model, x, radius=radius)
        (claim,) = check(path / "c.json").local
        assert claim.secant <= Fraction(float.fromhex(content["bound"])) * (1 + Fraction(1, 2**17))
        best, classes = steepest(model.double(), x.double(), radius, steps, count)
        assert best <= float(claim.secant), seed
        assert claim.label is None or classes == {claim.label}, seed
        if best > 0 or claim.secant > 1e-100:  # else the network is constant in the ball
            found.append(float(claim.secant) / best)
    return found


def test_claims_of_random_networks_are_verified_and_no_ascent_passes_them(tmp_path):
    fuzz(tmp_path, range(2), steps=8, count=16)


def test_a_network_that_is_constant_in_the_ball_has_a_claim(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # all units stay off
    written(tmp_path, model, torch.zeros(1, 3), radius=1.0)
    (claim,) = check(tmp_path / "c.json").local
    assert claim.secant < 1e-100
    assert claim.label is not None


@pytest.mark.slow
def test_claims_of_three_hundred_networks(tmp_path):
    ratios = torch.tensor(fuzz(tmp_path, range(300)))
    assert float(ratios.median()) < 2.0  # observed 1.20


# --- lies ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A file with a claim about a class, the steepest secant of its ball, and the model."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(1, 4)
    content, arrays = written(tmp_path_factory.mktemp("honest"), model.eval(), x)
    radius = float.fromhex(content["local"][0]["radius"])
    best, _ = steepest(model.double(), x.double(), radius, 60, 64)
    return content, arrays, best


def verdict(content, arrays):
    return verify(hashed(content, arrays), store_of(arrays))


def _claim(**entries):
    def change(content, arrays, best):
        content["local"][0].update(entries)

    return change


def _below_a_secant(content, arrays, best):
    content["local"][0]["secant"] = (0.9999 * best).hex()


def _longer(content, arrays, best):
    claim = content["local"][0]
    claim["radius"] = (1.01 * float.fromhex(claim["radius"])).hex()


def _just_too_long(content, arrays, best):
    """Beyond what the claimed pairs allow: no pass is needed to see it."""
    claim = content["local"][0]
    margin = arrays[content["samples"]["outputs"][0]].double()[0]
    least = arrays[claim["pairs"]][arrays[claim["pairs"]] > 0].min()
    claim["radius"] = float(1.001 * (margin.max() - margin.min()) / least).hex()


def _other_class(content, arrays, best):
    claim = content["local"][0]
    claim["label"] = (claim["label"] + 1) % 3


def _moved(content, arrays, best):
    claim = content["local"][0]
    arrays[claim["sample"][0]] = arrays[claim["sample"][0]] + 1.0


def _pairs_below(content, arrays, best):
    claim = content["local"][0]
    arrays[claim["pairs"]] = 0.5 * arrays[claim["pairs"]]


def _negative_pairs(content, arrays, best):
    claim = content["local"][0]
    arrays[claim["pairs"]] = -arrays[claim["pairs"]]


def _weight(content, arrays, best):
    name = next(n["weight"] for n in content["nodes"] if n["op"] == "affine")
    bits = arrays[name].view(torch.int32)
    bits[0, 0] ^= 1 << 29  # of the exponent


def _as_weight(content, arrays, best):
    content["local"][0]["sample"] = [content["nodes"][1]["bias"]]


LIES = {
    "a secant below one that is attained": (_below_a_secant, "above the secant"),
    "a negative secant": (_claim(secant="-0x1.0000000000000p+0"), "must not be negative"),
    "a secant of 0": (_claim(secant=(0.0).hex()), "above the secant"),
    "a longer radius": (_longer, "only"),
    "a radius beyond the margins": (_just_too_long, "only"),
    "a huge radius": (_claim(radius=(2.0**300).hex()), "between 2\\^-200 and 2\\^200"),
    "a tiny radius": (_claim(radius=(2.0**-300).hex()), "between 2\\^-200 and 2\\^200"),
    "a large radius": (_claim(radius=(2.0**199).hex()), "only"),
    "a radius of 0": (_claim(radius=(0.0).hex()), "between 2\\^-200 and 2\\^200"),
    "a negative radius": (_claim(radius="-0x1.0000000000000p+0"), "must not be negative"),
    "a radius that is no number": (_claim(radius="nan"), "float.hex"),
    "an infinite radius": (_claim(radius="inf"), "float.hex"),
    "a decimal radius": (_claim(radius="0.5"), "float.hex"),
    "a number for the radius": (_claim(radius=1), "float.hex"),
    "another class": (_other_class, "only"),
    "a class that does not exist": (_claim(label=3), "one of at least two classes"),
    "a boolean class": (_claim(label=True), "must be an integer"),
    "another sample": (_moved, "only"),
    "no sample": (_claim(sample=[]), "no node reads"),
    "two samples": (_claim(sample=["local.sample", "local.pairs"]), "shapes of a sample"),
    "a sample that is not there": (_claim(sample=["x"]), "no node reads"),
    "a sample of another shape": (_claim(sample=["local.pairs"]), "no node reads"),
    "a weight as the sample": (_as_weight, "must not be one of"),
    "pairs below what is proved": (_pairs_below, "pairs: the pass proves"),
    "negative pairs": (_negative_pairs, "one bound for each class"),
    "a key more": (_claim(more=1), "unknown keys"),
    "another weight": (_weight, "."),
}


@pytest.mark.parametrize("name", LIES)
def test_every_lie_is_rejected(honest, name):
    content, arrays, best = copy.deepcopy(honest)
    assert verdict(copy.deepcopy(content), dict(arrays)).local[0].label is not None
    change, words = LIES[name]
    change(content, arrays, best)
    with pytest.raises(Rejected, match=words):
        verdict(content, arrays)


@pytest.mark.parametrize("key", ["sample", "radius", "secant", "label", "pairs"])
def test_no_key_of_a_claim_may_be_missing(honest, key):
    content, arrays, _ = copy.deepcopy(honest)
    del content["local"][0][key]
    with pytest.raises(Rejected, match=r"lacks the keys|belong together|no node reads"):
        verdict(content, arrays)


@pytest.mark.parametrize("value", [{}, [], "x", [1], [[]], None])
def test_claims_that_are_none(honest, value):
    content, arrays, _ = copy.deepcopy(honest)
    content["local"] = value
    with pytest.raises(Rejected):
        verdict(content, arrays)


def test_files_without_claims_stay_valid(honest):
    content, arrays, _ = copy.deepcopy(honest)
    claim = content.pop("local")[0]
    for name in (*claim["sample"], claim["pairs"]):
        del content["constants"][name]
    assert verdict(content, arrays).local == []


def test_every_bit_of_the_sample_and_of_the_weights_is_bound_by_its_hash(honest):
    content, arrays, _ = copy.deepcopy(honest)
    for name in (content["local"][0]["sample"][0], content["nodes"][1]["weight"]):
        changed = {**arrays, name: arrays[name].clone()}
        changed[name].view(torch.int32).view(-1)[0] ^= 1
        with pytest.raises(Rejected, match="the tensor of that name is not"):
            verify(hashed(copy.deepcopy(content), arrays), store_of(changed))


# --- what it rests on ----------------------------------------------------------------------------


def test_a_kink_on_the_edge_of_a_ball(tmp_path):
    """relu(x) around 1 with radius 1: its slope is known up to rounding, and 1 is attained."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU()).double()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    for radius in (1.0, math.nextafter(1.0, 2.0), 1.0 + 1e-6, 2.0):
        x = torch.ones(1, 1, dtype=torch.float64)
        content, arrays = written(tmp_path, model.eval(), x, radius=radius)
        assert check(tmp_path / "c.json").local[0].secant >= 1
        content["local"][0]["secant"] = (1.0 - 2.0**-52).hex()
        with pytest.raises(Rejected, match="above the secant"):
            verdict(content, arrays)
    # Around -1 chords to a are (a)_+ / (a + 1): at most 1/2 where a <= 1.
    x = -torch.ones(1, 1, dtype=torch.float64)
    content, arrays = written(tmp_path, model, x, radius=2.0)
    assert Fraction(1, 2) <= check(tmp_path / "c.json").local[0].secant < Fraction(5001, 10000)
    content["local"][0]["secant"] = (0.5 - 2.0**-53).hex()
    with pytest.raises(Rejected, match="above the secant"):
        verdict(content, arrays)


@pytest.mark.parametrize("power", [-190, -120, 0, 120, 190])
def test_numbers_near_the_ends_of_the_range(tmp_path, power):
    """A claim is verified or rejected in one sentence, never verified below the truth."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(2.0 ** (power / 2))
            layer.bias.mul_(2.0 ** (power / 2))
        model[2].bias.zero_()
    x = torch.randn(1, 3, dtype=torch.float64)
    content, arrays = written(tmp_path, model, x, radius=0.25)
    best, _ = steepest(model, x, 0.25, 20, 16)
    assert best <= float(check(tmp_path / "c.json").local[0].secant) <= 4 * best
    content["local"][0]["secant"] = (0.999 * best).hex()
    with pytest.raises(Rejected):
        verdict(content, arrays)


def test_slopes_of_chords_contain_those_of_sampled_chords():
    """Of every activation, in random ranges, with starts anywhere in the error of the center."""
    rng = np.random.default_rng(0)
    numbers = {
        "leaky_relu": (-0.3,),
        "elu": (1.7,),
        "clamp": (-0.5, 0.7),
        "clamp_min": (0.2,),
        "clamp_max": (-0.1,),
        "softshrink": (0.4,),
    }
    torch_of = oracle._ACTIVATIONS
    for name in sorted(torch_of):
        given = numbers.get(name, ())
        center = rng.normal(size=40) * 2
        off, move = rng.choice([0.0, 1e-9, 0.3], 40), 10.0 ** rng.uniform(-3, 1, 40)
        parameters = tuple(Fraction(v) for v in given)
        gain = Fraction(2)
        near = ranges.activation(name, parameters, gain, center, off, move)
        start = torch.tensor(center + off * rng.uniform(-1, 1, 40))[:, None]
        steps = torch.linspace(-1, 1, 201, dtype=torch.float64)
        steps = steps[steps.abs() > 1e-6] * torch.tensor(move)[:, None]
        f = torch_of[name]
        chords = ((f(start + steps, *given) - f(start, *given)) / steps).numpy()
        lost = 1e-12 / move  # values of at most 20 are off by some 1e-15
        assert np.all(near.low - lost <= chords.min(1)), name
        assert np.all(near.high + lost >= chords.max(1)), name
        there = f(start[:, 0], *given).numpy()
        assert np.all(np.abs(near.value - there) <= near.off + 1e-14), name
        if name in ("relu", "abs", "leaky_relu"):  # no wider than the chords
            assert np.all(
                near.high - near.low <= chords.max(1) - chords.min(1) + 4 * off / move + 0.02
            )


def test_bounds_of_second_derivatives_hold_in_ball_arithmetic():
    """By Taylor series on small balls; beyond 45 by |f''| <= 4 x^4 exp(-|x|)."""

    def curve(name, ball):
        x = flint.arb_series([ball, 1], 3)
        if name == "silu":
            y = x / (1 + (-x).exp())
        elif name == "gelu":
            y = x / 2 * (1 + (x / flint.arb(2).sqrt()).erf())
        elif name == "gelu_tanh":
            a = flint.arb(flint.fmpq(44715, 1000000))
            inner = (2 / flint.arb.pi()).sqrt() * (x + a * x * x * x)
            e = (-2 * inner).exp()
            y = x / (1 + e)
        else:
            # tanh(log(1 + e^x)) = 1 - 2 / ((1 + e^x)^2 + 1)
            s = 1 + x.exp()
            y = x - 2 * x / (s * s + 1)
        return abs(2 * y[2])

    flint.ctx.prec = 80
    for name, claim in ranges.CURVED.items():
        if name in ("sin", "cos"):
            assert claim == 1.0
            continue
        stack, steps = [(Fraction(-45), Fraction(45))], 0
        while stack:
            low, high = stack.pop()
            steps += 1
            assert steps < 40000, name
            middle, radius = (low + high) / 2, (high - low) / 2
            ball = flint.arb(float(middle), float(radius) * (1 + 2.0**-40))
            try:
                below = curve(name, ball) < flint.arb(claim)
            except ValueError:  # a division by a ball around 0
                below = False
            if not below:
                stack += [(low, middle), (middle, high)]


def test_norms_are_above_those_of_exact_arithmetic():
    rng = np.random.default_rng(3)
    for shape in ((1, 1), (3, 5), (8, 2), (6, 6)):
        for scale in (1e-150, 1.0, 1e150):
            a = rng.normal(size=shape) * scale
            found, frobenius = norms.spectral(a)
            exact = sum(Fraction(v) ** 2 for v in a.ravel().tolist())
            assert frobenius**2 >= exact
            v = [Fraction(x) for x in np.linalg.svd(a)[2][0].tolist()]
            image = [
                sum(Fraction(x) * y for x, y in zip(row, v, strict=True)) for row in a.tolist()
            ]
            square = sum(w * w for w in image) / sum(y * y for y in v)
            assert square <= found**2 <= square * (1 + Fraction(1, 2**20))
    assert norms.spectral(np.zeros((2, 3)))[0] < Fraction(1, 2**100)


@pytest.mark.slow
def test_norms_of_large_matrices_are_found_without_all_eigenvalues():
    a = np.random.default_rng(0).normal(size=(1100, 1300))
    found, _ = norms.spectral(a)
    true = np.linalg.norm(a, 2)
    assert true <= float(found) <= true * (1 + 2.0**-7)


def test_rows_of_affine_operations_enclose_exact_ones():
    """Rows with errors and centers with errors, in fractions, for sums that cancel."""
    rng = np.random.default_rng(5)
    for _ in range(20):
        w = rng.normal(size=(3, 4)) * 10.0 ** rng.integers(-8, 8, size=(3, 4))
        bias, x = rng.normal(size=3) * 1e6, rng.normal(size=4) * 1e3
        op = Affine({"weight": w, "bias": bias})
        op.shape((4,))
        ball = Ball(4)
        (form,) = ball.inputs([x])
        found = ball.affine(op, [form], math.inf)
        for i in range(3):
            exact = sum(
                Fraction(a) * Fraction(b) for a, b in zip(w[i].tolist(), x.tolist(), strict=True)
            )
            exact += Fraction(float(bias[i]))
            assert abs(exact - Fraction(float(found.center[i]))) <= Fraction(float(found.off[i]))
            square = sum(Fraction(a) ** 2 for a in w[i].tolist())
            reach = ball.reach(found.rows, found.error, math.inf)[i]
            assert square <= Fraction(float(reach)) ** 2


# --- as a user has it ----------------------------------------------------------------------------


def test_save_load_and_the_command(tmp_path, capsys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    x = torch.randn(4, 6)
    certificate = certify(model, x[:1], lower=False)
    classes = model(x).argmax(1)
    wrong = classes.clone()
    wrong[1] = (wrong[1] + 1) % 3
    path = tmp_path / "c.json"
    certificate.save(path, local=x, labels=wrong)
    assert main([str(path), "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("local claim ") for line in lines) == 3
    assert lines[-1].startswith("verified: constant")
    loaded = LocalCertificate.load(path)
    assert list(loaded.labels) == [int(classes[i]) for i in (0, 2, 3)]
    radii = torch.tensor([bound.radius for bound in loaded.constants], dtype=torch.float64)
    assert bool((radii >= certificate.radius(model, x)[[0, 2, 3]] * (1 - 1e-4)).all())
    assert all(
        s.kind == "secant" and s.value < c.value
        for s, c in zip(loaded.secants(), loaded.constants, strict=True)
    )
    assert [c.secant for c in check(path).local] == [Fraction(s.value) for s in loaded.secants()]
    with pytest.raises(UncertifiableError, match="Call certify again"):
        loaded.save(path)
    # The same file by the radius of a local certificate.
    near = certify(model, x, radius=0.05)
    near.save(path, labels=classes)
    again = LocalCertificate.load(path)
    assert [b.radius for b in again.secants()] == [0.05] * 4 and again.radius == 0.05
    assert check(path).bound == Fraction(again.constants[0].value)
    # A claim that fails takes part in the exit status.
    content = json.loads(path.read_text())
    content["local"][2]["secant"] = (1e-3).hex()
    path.write_text(json.dumps(content))
    assert main([str(path), "--quiet"]) == 1
    assert "rejected: local claim 2: the pass proves" in capsys.readouterr().err
    certificate.save(path)
    with pytest.raises(ValueError, match="must hold claims about balls"):
        LocalCertificate.load(path)


def test_bad_arguments_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    x = torch.ones(2, 2)
    certificate = certify(model, x, lower=False)
    path = tmp_path / "c.json"
    for options, words in (
        ({"radius": 0.1}, "radius and labels belong to samples"),
        ({"local": x, "radius": 0.0}, "radius must be a number from"),
        ({"local": x, "radius": math.nan}, "radius must be a number from"),
        ({"local": x, "radius": torch.ones(3)}, "radius must be a number from"),
        ({"local": x, "radius": "1"}, "radius must be a number from"),
        ({"local": x, "labels": torch.ones(2)}, "one class index for each sample"),
        ({"local": x, "labels": torch.ones(3).long()}, "one class index for each sample"),
        ({"local": torch.ones(2, 3)}, "."),
        ({"local": x * 1e-80 * 1e-80}, "."),
    ):
        if options.get("local") is not None and float(options["local"].abs().max()) == 0.0:
            continue  # float32 rounds it to 0
        with pytest.raises(ValueError, match=words):
            certificate.save(path, **options)
    assert not path.exists()


def test_what_is_not_followed_is_refused_on_both_sides(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), GroupSort(4), nn.Linear(4, 2)).eval()
    certificate = certify(model, torch.ones(1, 4), lower=False)
    with pytest.raises(UncertifiableError, match="must follow every operation in a ball"):
        certificate.save(tmp_path / "c.json", local=torch.ones(1, 4))
    certificate.save(tmp_path / "c.json")
    content, arrays = oracle.load(tmp_path / "c.json")
    content["local"] = [
        {"sample": ["x"], "radius": (1.0).hex(), "secant": (1e9).hex()},
    ]
    arrays["x"] = torch.ones(4)
    entry = {"names": [], "dtype": "F32", "shape": [4], "sha256": ""}
    content["constants"]["x"] = entry
    with pytest.raises(Rejected, match="Sort is an operation that is not followed in a ball"):
        verdict(content, arrays)

    class Gate(nn.Module):
        def forward(self, x):
            return x * x.sigmoid()

    near = certify(Gate().eval(), torch.zeros(1, 4), radius=0.1)
    with pytest.raises(UncertifiableError, match="a constant of the whole space to be saved"):
        near.save(tmp_path / "gate.json")


# --- random changes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def claimed(tmp_path_factory):
    """Files with claims of two networks, in radii that are none of the checker's choice, too."""
    torch.manual_seed(2)
    chain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), MaxMin(), nn.Linear(6, 3))
    image = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.Hardtanh(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    found = []
    for model, shape, radius in ((chain, (4,), None), (image, (1, 5, 5), 0.4)):
        x = torch.randn(2, *shape)
        folder = tmp_path_factory.mktemp("claimed")
        found.append(written(folder, model.eval(), x, radius=radius))
    return found


def _refuted(content, arrays) -> list[str]:
    """Claims about balls that an ascent refutes, by PyTorch alone."""
    doubles = {name: value.double() for name, value in arrays.items()}
    found = []
    for claim in content["local"]:
        x = doubles[claim["sample"][0]][None]
        radius = float.fromhex(claim["radius"])

        def model(a):
            return oracle.run(content, doubles, [a])[content["outputs"][0]].flatten(1)

        best, classes = steepest(model, x, radius, 15, 16)
        if best > float.fromhex(claim["secant"]) * (1 + 1e-9):
            found.append("secant")
        if "label" in claim and classes != {claim["label"]}:
            found.append("label")
    return found


def _changes(claimed, count: int, seed: int, all_judged: bool) -> dict[str, int]:
    """No accepted change makes a claim false."""
    rng, tally = random.Random(seed), {"accepted": 0, "rejected": 0, "refuted": 0}
    for content, arrays in claimed:
        assert verdict(copy.deepcopy(content), arrays).local
        assert not all_judged or _refuted(content, arrays) == []
    for index in range(count):
        content, arrays = claimed[index % len(claimed)]
        if rng.random() < 0.6:
            other, values = copy.deepcopy(content), dict(arrays)
            place = rng.randrange(len(other["local"]))
            other["local"][place] = _leaf(rng, other["local"][place], sorted(arrays))
        else:
            other, values, _ = mutate(rng, content, arrays)
        try:
            assert verify(hashed(other, values), store_of(values)).assumed == []
        except Rejected:
            tally["rejected"] += 1
            with contextlib.suppress(*NO_FUNCTION):
                tally["refuted"] += all_judged and bool(_refuted(other, values))
            continue
        tally["accepted"] += 1
        assert _refuted(other, values) == [], (seed, index)
    return tally


def test_changes_that_make_a_claim_false_are_rejected(claimed):
    tally = _changes(claimed, 16, 0, False)
    assert tally["rejected"] > tally["accepted"] > 0


@pytest.mark.slow
def test_a_thousand_changes_of_claims(claimed):
    tally = _changes(claimed, 1000, 1, True)
    assert tally["refuted"] > 100  # the judge sees something
    assert tally["accepted"] > 50  # and the checker does not reject all
