"""The rules against dense singular values in float64, and against claims just below them."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from orthonet_checker import Rejected, norms, slopes
from orthonet_checker.store import Store
from orthonet_checker.verify import verify
from tests.checker import exact, oracle

SIZE = 60  # random geometries


def _square(value: float) -> Fraction:
    return Fraction(float(value)) ** 2


def _geometry(rng: random.Random) -> tuple[dict, tuple[int, ...], np.ndarray]:
    """A random convolution, its image, and its kernel, seldom of one scale."""
    dims, groups = rng.choice([1, 2, 2, 3]), rng.choice([1, 1, 2])
    circular = rng.random() < 0.3
    side = {1: 12, 2: 6, 3: 4}[dims]
    kernel = [rng.randint(1, 3) for _ in range(dims)]
    stride = [rng.randint(1, 3) for _ in range(dims)]
    dilation = [rng.randint(1, 2) for _ in range(dims)]
    image = [rng.randint(2, side) for _ in range(dims)]
    padding = [[rng.randint(0, 2), rng.randint(0, 2)] for _ in range(dims)]
    if circular:
        image = [s * -(-n // s) for s, n in zip(stride, image, strict=True)]
        padding = [
            [min(a, n), max(0, min(n, d * (k - 1) - a))]
            for (a, _), n, d, k in zip(padding, image, dilation, kernel, strict=True)
        ]
    shape = (groups * rng.randint(1, 3), rng.randint(1, 3), *kernel)
    weight = np.random.default_rng(rng.randrange(2**32)).standard_normal(shape)
    if rng.random() < 0.3:
        weight *= 10.0 ** np.random.default_rng(rng.randrange(2**32)).integers(-12, 1, shape)
    weight *= 2.0 ** rng.choice([0, 0, -60, 40])
    node = {
        "op": "convolution",
        "weight": "w",
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "circular": circular,
    }
    return node, (groups * shape[1], *image), weight.astype(np.float32).astype(np.float64)


def _repeats(node: dict, shape: tuple[int, ...], out: tuple[int, ...]) -> bool:
    """Whether an output pixel of a circular convolution is there twice, or strides do not fit."""
    sizes = zip(shape[1:], node["stride"], out[1:], strict=True)
    return any(n % s or o * s > n for n, s, o in sizes)


def _operation(node: dict, weight: np.ndarray, rule: str, t: float | None = None):
    from orthonet_checker.operations import OPERATIONS

    entries = {k: v for k, v in node.items() if k != "op"}
    return OPERATIONS[node["op"]](
        {**entries, "weight": weight, "rule": rule, "t": None if t is None else Fraction(t)}
    )


def test_convolutions_of_any_geometry():
    """Row sums and torus are never below the dense norm; what they do not take, they refuse."""
    rng, checked, refused, least = random.Random(3), 0, 0, math.inf
    while checked < SIZE:
        node, shape, weight = _geometry(rng)
        array = {"w": torch.from_numpy(weight)}
        scale = float(np.abs(weight).max()) or 1.0
        try:
            unit = torch.zeros(1, *shape, dtype=torch.float64)
            unscaled = {"w": array["w"] / scale}
            true = oracle.slope(lambda x: oracle.apply(node, [x], unscaled), unit)  # noqa: B023
            oracle_shape = tuple(oracle.apply(node, [unit], array).shape[1:])
        except RuntimeError:
            with pytest.raises(Rejected):  # the kernel is larger than the padded image
                _operation(node, weight, "gram").shape(shape)
            continue
        if true == 0.0:  # the taps meet zeros only
            continue
        for rule in ("gram", "gram2"):
            op = _operation(node, weight, rule)
            assert op.shape(shape) == oracle_shape
            if node["circular"] and _repeats(node, shape, oracle_shape):
                with pytest.raises(Rejected, match="circular"):
                    op.square(shape)
                refused += 1
                break
            proved = op.square(shape)
            excess = float(proved / Fraction(scale) ** 2) / true**2
            least = min(least, excess)
            assert excess >= 1 - 1e-12, (node, shape)
        else:
            checked += 1
            margins = (t for t in (1.0001, 1.1, 1.5, 3.0, 30.0, 1e4))
            for margin in margins:
                try:
                    op = _operation(node, weight, "torus", (true * scale) ** 2 * margin)
                    proved = op.square(shape)
                except Rejected:
                    continue
                excess = float(proved / Fraction(scale) ** 2) / true**2
                least = min(least, excess)
                assert excess >= 1 - 1e-12, (node, shape)
                break
    # Row sums attain the norm of kernels of one entry: 1 + 2^-29, the slack of the sums.
    assert 1 <= least < 1.01
    assert refused > 0


def test_the_torus_is_tight_on_circular_convolutions():
    weight = np.random.default_rng(0).standard_normal((5, 3, 3, 2)).astype(np.float32)
    node = {
        "op": "convolution",
        "weight": "w",
        "stride": [2, 1],
        "padding": [[1, 0], [1, 0]],
        "dilation": [1, 1],
        "groups": 1,
        "circular": True,
    }
    array = {"w": torch.from_numpy(weight).double()}
    unit = torch.zeros(1, 3, 6, 5, dtype=torch.float64)
    true = oracle.slope(lambda x: oracle.apply(node, [x], array), unit)
    weight = weight.astype(np.float64)
    proved = _operation(node, weight, "torus", true**2 * (1 + 1e-9)).square((3, 6, 5))
    assert 1 < float(proved / _square(true)) < 1 + 1e-8
    with pytest.raises(Rejected, match="not positive definite"):
        _operation(node, weight, "torus", true**2 * (1 - 1e-6)).square((3, 6, 5))


@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 7), (40, 40), (90, 20)])
def test_matrices(m, n):
    """The Cholesky rule is tight for every matrix, and for none below its norm."""
    rng = np.random.default_rng(m)
    for scale in (1.0, 1e-30, 1e30):
        a = (rng.standard_normal((m, n)) * scale).astype(np.float32).astype(np.float64)
        true = float(np.linalg.norm(a / scale, 2)) * scale
        assert norms.gram(a) >= _square(true * (1 - 1e-14))
        proved = norms.matrix(a, Fraction(true**2 * (1 + 1e-9)))
        assert 1 < float(proved / _square(true)) < 1 + 1e-8
        with pytest.raises(Rejected, match="not positive definite"):
            norms.matrix(a, Fraction(true**2 * (1 - 1e-7)))


def test_orthogonal_matrices_need_no_witness():
    a = torch.linalg.qr(torch.randn(200, 50, dtype=torch.float64)).Q.float().numpy()
    true = float(np.linalg.norm(a.astype(np.float64), 2))
    # float32 rounds each entry by 2^-25 relatively: 50 products that are 1e-8 instead of 0
    assert 1 <= float(norms.gram(a.astype(np.float64)) / _square(true)) < 1 + 2e-6


def test_pieces_are_exact_products():
    """Of float64 entries of any size the pieces lose no more than what is counted as lost."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((4, 30)) * 10.0 ** rng.integers(-9, 1, (4, 30))
    a /= norms.scale_of(a)
    parts = norms.pieces_of(a, 30)
    assert np.all(np.abs(parts[1]) <= 2.0 ** parts[0])
    exact = [
        [sum(Fraction(x) * Fraction(y) for x, y in zip(r, s, strict=True)) for s in a.tolist()]
        for r in a.tolist()
    ]
    pieces = norms.products(parts, parts)
    off = norms.rest_error(a, parts[3])
    for i in range(4):
        for j in range(4):
            total = sum(Fraction(float(p[i, j])) for p in pieces)
            assert abs(total - exact[i][j]) <= off
            assert Fraction(float(norms.size_of(pieces)[i, j])) * Fraction(norms.SLACK) >= abs(
                total
            )
    assert 0 < off < Fraction(1, 2**30)


def test_roots_round_upward():
    for square in (Fraction(2), Fraction(1, 3), Fraction(10**40), Fraction(1, 7**60), Fraction(0)):
        root = norms.root_up(square)
        assert square <= root**2 <= square * (1 + Fraction(1, 2**78)) + Fraction(1, 2**150)


def test_long_numbers_are_shortened_upward():
    rng = random.Random(0)
    for bits in (3, 100, 512):
        short = Fraction(rng.getrandbits(bits) | 1, 2 ** rng.randint(0, 8000))
        assert norms.shorten(short) == short
    assert norms.shorten(Fraction(0)) == 0
    for _ in range(100):
        long = Fraction(rng.getrandbits(3000) | 1, rng.getrandbits(rng.randint(100, 3000)) | 1)
        found = norms.shorten(long)
        assert long <= found <= long * (1 + Fraction(1, 2**500))
        assert found.numerator.bit_length() + found.denominator.bit_length() < 2**14
    assert 0 < norms.shorten(Fraction(1, 2**20000)) <= Fraction(1, 2**8192)
    with pytest.raises(Rejected, match="too large"):
        norms.shorten(Fraction(2**9000))


def test_the_numbers_of_many_nodes_in_a_row_stay_short(monkeypatch):
    """Otherwise some thousand nodes would take minutes."""
    sizes, root_up = [], norms.root_up

    def spy(square):
        sizes.append(square.numerator.bit_length() + square.denominator.bit_length())
        return root_up(square)

    monkeypatch.setattr(norms, "root_up", spy)
    nodes, factors = [exact.INPUT], [1.1, 1 / 1.1, 1.1, 1 / 1.1] * 50
    for i, factor in enumerate(factors):
        nodes.append(exact.node("scale", i, factor, factor=factor.hex()))
    product = math.prod(map(Fraction, factors))
    assert verify(*exact.certificate([[1]], nodes, 1 + 2.0**-40)).bound > product
    with pytest.raises(Rejected, match="above the claimed bound"):
        verify(*exact.certificate([[1]], nodes, 1 - 2.0**-40))
    assert max(sizes) < 3000


_POINTS = np.linspace(-15.0, 15.0, 400_001)


@pytest.mark.parametrize("name", slopes.NAMES)
def test_slopes_hold_and_are_tight(name):
    """Chords reach the proved slope within 1e-4, and none is steeper."""
    parameters = {
        "leaky_relu": (-2.5,),
        "elu": (1.75,),
        "softshrink": (0.5,),
        "clamp": (-1.0, 2.0),
        "clamp_min": (0.25,),
        "clamp_max": (0.25,),
    }.get(name, ())
    exact = tuple(Fraction(p) for p in parameters)
    y = slopes.apply(name, _POINTS, exact)
    steepest = float(np.abs(np.diff(y) / np.diff(_POINTS)).max())
    claim = Fraction(steepest * (1 + 1e-6))
    proved = slopes.prove(name, exact, claim)
    assert steepest * (1 - 1e-9) <= float(proved) <= steepest * (1 + 1e-4)
    true = oracle._ACTIVATIONS[name](torch.from_numpy(_POINTS[::100].copy()), *parameters)
    assert np.abs(y[::100] - true.numpy()).max() < 1e-12
    if name in slopes.ENCLOSED:
        with pytest.raises(Rejected, match="above the claim"):
            slopes.prove(name, exact, Fraction(steepest * (1 - 1e-5)))


def test_roots_of_unity():
    table = norms.roots_of_unity(12)
    assert abs(table[3] - 1j) <= 2**-53
    assert np.abs(table**12 - 1).max() < 1e-14


def test_products_that_underflow_prove_nothing():
    """Six factors of 2^-190, then six of 2^190: the identity, whose matrix in floats is zero."""
    small, nodes = [2.0**-190] * 6 + [2.0**190] * 6, [{"op": "input", "path": ""}]
    for i, factor in enumerate(small):
        nodes.append(
            {
                "op": "scale",
                "path": "",
                "inputs": [i],
                "rule": "definition",
                "factor": factor.hex(),
                "gain": factor.hex(),
            }
        )
    content = {
        "format": "orthonet certificate 1",
        "weights": "w",
        "inputs": [[2]],
        "constants": {},
        "nodes": nodes,
        "outputs": [12],
        "bound": (1.0).hex(),
        "each": [(1.0).hex()],
        "prover": {},
    }
    assert verify(content, Store()).bound == 1
    nodes[12]["joint"] = {"since": 0, "gain": (0.5).hex(), "t": (0.2).hex()}
    content["bound"] = content["each"][0] = (0.5).hex()
    with pytest.raises(Rejected, match="too large or too small"):
        verify(content, Store())


BITS = 4
WIDTH = 2**BITS
SHRINKS = {
    "mean": [
        ("pad", {"amounts": [[0, WIDTH - 1]], "mode": "constant", "value": (0.0).hex()}, 1),
        ("mean", {"dims": [0], "sum": False}, 2.0 ** (-BITS // 2)),
        ("reshape", {"into": [1]}, 1),
    ],
    "average_pool": [
        (
            "average_pool",
            {"window": [WIDTH], "stride": [1], "count_padding": True, "padding": [[0, WIDTH - 1]]},
            2.0**-BITS,
        )
    ],
    "adaptive_average_pool": [
        ("pad", {"amounts": [[0, WIDTH - 1]], "mode": "constant", "value": (0.0).hex()}, 1),
        ("adaptive_average_pool", {"outputs": [1]}, 2.0 ** (-BITS // 2)),
    ],
}


def _row(nodes: list[dict], *steps) -> None:
    for op, entries, gain in steps:
        nodes.append(exact.node(op, len(nodes) - 1, gain, **entries))


def _there_and_back(shrink: str, times: int) -> list[dict]:
    """The identity on R, by numbers as small as 2^(-BITS times), without any constant."""
    nodes = [exact.INPUT]
    for _ in range(times):
        _row(nodes, *SHRINKS[shrink])
    for _ in range(times):
        last = len(nodes) - 1
        nodes.append(exact.node("add", [last] * WIDTH, factors=[(1.0).hex()] * WIDTH))
    return nodes


@pytest.mark.parametrize("rule", ["joint", "chain"])
@pytest.mark.parametrize("shrink", SHRINKS)
def test_what_underflows_without_constants_proves_nothing(shrink, rule):
    """Pools and sums of many terms move values out of the range of floats: the matrix is 0."""
    for exponent, holds in ((200, True), (1096, False)):
        nodes = _there_and_back(shrink, exponent // BITS)
        arrays = {}
        if rule == "chain":
            _row(
                nodes,
                ("activation", {"function": "relu", "parameters": []}, 1),
                ("scale", {"factor": (1.0).hex()}, 1),
            )
            arrays["m"] = np.array([2.0])
        assert exact.run(nodes, [Fraction(3)]) == [3]

        def claimed(gain, nodes=nodes, arrays=arrays):
            witness = (
                {"multipliers": ["m"]}
                if rule == "chain"
                else {"t": (gain**2 * (1 - 2.0**-20)).hex()}
            )
            nodes[-1][rule] = {"since": 0, "gain": gain.hex(), **witness}
            return exact.certificate([[1]], nodes, gain, arrays)

        if holds:
            assert verify(*claimed(1 + 2.0**-9)).bound == Fraction(1 + 2.0**-9)
        for gain in (2.0**-24, 1 - 2.0**-9) if holds else (2.0**-24, 1 + 2.0**-9):
            with pytest.raises(Rejected):
                verify(*claimed(gain))


@pytest.mark.parametrize("factors", [["scale"] * 6, ["add"] * 6, ["scale", "add"] * 3])
@pytest.mark.parametrize("power", [-1000, -310, -180, -60, 60, 180, 310, 1000])
def test_factors_of_any_size_prove_nothing_false(factors, power):
    """Times 2^power and back: a joint bound is refused, or above the exact slope."""
    nodes = [exact.INPUT]
    for i, op in enumerate(factors):
        value = 2.0 ** (power if i < 3 else -power)
        entries = {"factors": [value.hex()]} if op == "add" else {"factor": value.hex()}
        nodes.append(exact.node(op, i, value if op == "scale" else None, **entries))
    assert exact.run(nodes, [Fraction(1)]) == [1]
    nodes[-1]["joint"] = {"since": 0, "gain": (0.5).hex(), "t": (0.25).hex()}
    with pytest.raises(Rejected):
        verify(*exact.certificate([[1]], nodes, 0.5))
    nodes[-1]["joint"] = {"since": 0, "gain": (1.0 + 2.0**-30).hex(), "t": (1.0 + 2.0**-32).hex()}
    content, store = exact.certificate([[1]], nodes, 1.0 + 2.0**-30)
    if abs(power) == 60:
        assert verify(content, store).bound == 1 + Fraction(1, 2**30)
    else:
        with pytest.raises(Rejected, match="too large or too small"):
            verify(content, store)


@pytest.mark.parametrize("count", [1000, 20_000])
def test_sums_of_many_terms_round_as_often(count):
    """1 + 2^-53 + 2^-53 + ... is 1 in floats."""
    nodes = [exact.INPUT]
    factors = [(1.0).hex(), *[(2.0**-53).hex()] * count]
    nodes.append(exact.node("add", [0] * (count + 1), factors=factors))
    (true,) = exact.run(nodes, [Fraction(1)])
    below, above = 1 + 2.0**-46, 1 + 3 * 2.0**-53 * count
    assert below < true < above
    for gain, holds in ((below, False), (above, True)):
        nodes[1]["joint"] = {"since": 0, "gain": gain.hex(), "t": (1 + 2.0**-48).hex()}
        content, store = exact.certificate([[1]], nodes, gain)
        if holds:
            assert verify(content, store).bound == Fraction(gain)
        else:
            with pytest.raises(Rejected, match="above the joint gain"):
                verify(content, store)


ROUNDINGS = {
    "affine": ({"weight": np.ones((3, 50))}, (50,)),
    "convolution": (
        {
            "weight": np.ones((2, 5, 3, 3)),
            "stride": (1, 1),
            "groups": 1,
            "padding": ((0, 0), (0, 0)),
            "dilation": (1, 1),
            "circular": False,
        },
        (5, 4, 4),
    ),
    "scale": ({"factor": Fraction(1)}, (1,)),
    "diagonal": ({"factors": np.ones(3), "divide": True}, (3,)),
    "batch_norm": ({"mean": np.ones(2), "variance": np.ones(2), "eps": Fraction(1)}, (2, 3)),
    "mean": ({"dims": (0, 1), "sum": False}, (6, 7)),
    "average_pool": (
        {"window": (3, 4), "stride": (1, 1), "padding": ((0, 0), (0, 0)), "count_padding": True},
        (6, 7),
    ),
    "adaptive_average_pool": ({"outputs": (2, 3)}, (9, 7)),
    "add": ({"factors": (Fraction(1),) * 40}, (2,)),
}
LEAST = {
    "affine": 50,
    "convolution": 45,
    "scale": 1,
    "diagonal": 1,
    "batch_norm": 5,
    "mean": 42,
    "average_pool": 3 + 1 + 4 + 1,
    "adaptive_average_pool": 5 + 1 + 4 + 1,
    "add": 40,
}


def test_every_linear_operation_counts_its_roundings():
    """At least as many as its longest sum has terms, and 2 to spare; moves have none."""
    from orthonet_checker.operations import OPERATIONS

    moves = {"reshape", "permute", "flip", "roll", "slice", "pad", "concatenate", "shift"}
    assert moves | set(ROUNDINGS) == {n for n, kind in OPERATIONS.items() if kind.linear}
    for name, (entries, shape) in ROUNDINGS.items():
        op = OPERATIONS[name](entries)
        op.shape(*[shape] * (40 if name == "add" else 1))
        assert op.terms >= LEAST[name] + 2, name
    assert all(OPERATIONS[name].terms == 0 for name in moves)
