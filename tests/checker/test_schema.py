"""The format is strict: what is not exactly as described is rejected, without a traceback."""

import copy
import json
import resource
import struct
from fractions import Fraction

import numpy as np
import pytest

from orthonet_checker import Rejected, check, schema
from orthonet_checker.__main__ import main
from orthonet_checker.operations import OPERATIONS
from orthonet_checker.store import read_safetensors
from orthonet_checker.verify import verify
from tests.checker import exact, oracle
from tests.checker.mutations import store_of


@pytest.fixture(scope="module")
def original(saved):
    return oracle.load(saved("plain"))


def _set(*path):
    def change(content, value):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


CHANGES = {
    "unknown key": (_set("more"), 1),
    "unknown key of a node": (_set("nodes", 1, "more"), 1),
    "another format": (_set("format"), "orthonet certificate 2"),
    "bool as integer": (_set("nodes", 1, "groups"), True),
    "integer as bool": (_set("nodes", 1, "circular"), 0),
    "float as integer": (_set("nodes", 1, "stride"), [1.0, 1]),
    "string as list": (_set("nodes", 1, "stride"), "11"),
    "negative stride": (_set("nodes", 1, "stride"), [-1, 1]),
    "zero stride": (_set("nodes", 1, "stride"), [0, 1]),
    "number as real": (_set("nodes", 1, "gain"), 2),
    "decimal real": (_set("nodes", 1, "gain"), "2.0"),
    "nan": (_set("nodes", 1, "gain"), "nan"),
    "infinity": (_set("bound"), "inf"),
    "another spelling": (_set("bound"), "0x2p0"),
    "negative gain": (_set("nodes", 1, "gain"), (-2.0).hex()),
    "negative bound": (_set("bound"), (-2.0).hex()),
    "unknown operation": (_set("nodes", 1, "op"), "softmax"),
    "unknown rule": (_set("nodes", 1, "rule"), "assumed"),
    "t without its rule": (_set("nodes", 2, "t"), (1.0).hex()),
    "operand ahead": (_set("nodes", 1, "inputs"), [1]),
    "no operand": (_set("nodes", 1, "inputs"), []),
    "negative operand": (_set("nodes", 1, "inputs"), [-1]),
    "two operands": (_set("nodes", 1, "inputs"), [0, 0]),
    "unknown constant": (_set("nodes", 1, "weight"), "c99"),
    "no string": (_set("nodes", 1, "weight"), None),
    "nodes are no list": (_set("nodes"), {}),
    "a node is no object": (_set("nodes", 1), []),
    "no outputs": (_set("outputs"), []),
    "an output too far": (_set("outputs"), [99]),
    "no each": (_set("each"), []),
    "an input more": (_set("inputs"), [[2, 5, 6], [1]]),
    "no input": (_set("inputs"), []),
    "empty input": (_set("inputs"), [[0, 5, 6]]),
    "constants are no object": (_set("constants"), []),
    "half precision": (_set("constants", "c0", "dtype"), "F16"),
    "another shape": (_set("constants", "c0", "shape"), [4, 2, 9]),
    "a larger shape": (_set("constants", "c0", "shape"), [5, 2, 3, 3]),
    "no such hash": (_set("constants", "c0", "sha256"), "0" * 64),
    "margins that are no constant": (_set("pairs"), "c98"),
    "a weight as margins": (_set("pairs"), "c0"),
    "samples without rows": (_set("samples", "inputs"), []),
    "a weight as sample": (_set("samples", "inputs"), ["c0"]),
    "a far joint": (_set("nodes", 2, "joint", "since"), 7),
    "a joint of nothing": (_set("nodes", 2, "joint"), {}),
    "nodes are a number": (_set("nodes"), 3),
    "nodes are null": (_set("nodes"), None),
    "names are no list": (_set("constants", "c0", "names"), "c0"),
    "a large stride": (_set("nodes", 1, "stride"), [2**17, 1]),
    "a large dilation": (_set("nodes", 1, "dilation"), [2**17, 1]),
    "a large padding": (_set("nodes", 1, "padding"), [[2**17, 0], [0, 0]]),
    "a large input": (_set("inputs"), [[2, 2**12, 2**12]]),
    "a large shape": (_set("constants", "c0", "shape"), [2**30, 2, 3, 3]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_as_described_is_rejected(original, name):
    content, arrays = original
    content = copy.deepcopy(content)
    change, value = CHANGES[name]
    change(content, value)
    text = json.dumps(content)
    store = store_of(arrays)
    with pytest.raises(Rejected):
        verify(schema.parse(text), store)


@pytest.mark.parametrize("name", ["format", "constants", "nodes", "bound", "each", "outputs"])
def test_what_is_missing_is_noticed(original, name):
    content, arrays = original
    content = {k: v for k, v in content.items() if k != name}
    store = store_of(arrays)
    with pytest.raises(Rejected, match="lacks"):
        verify(content, store)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "1",
        '{"bound": 1.5}',
        '{"bound": NaN}',
        '{"bound": Infinity}',
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        '{"nodes": ' + "1" * 5000 + "}",
        '{"weights": "a\\u0000b"}',
        '{"weights": "a\\nb"}',
        '{"weights": "\\ud800"}',
        '\ufeff{"weights": "a"}',
    ],
)
def test_other_texts_are_rejected(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(Rejected):
        check(tmp_path / "c.json")


def test_nodes_that_lead_nowhere_are_rejected(original):
    """Otherwise a certificate could claim to hold what no output depends on."""
    content, arrays = original
    content = copy.deepcopy(content)
    node = {
        "op": "scale",
        "path": "",
        "inputs": [0],
        "rule": "definition",
        "factor": (1.0).hex(),
        "gain": (1.0).hex(),
    }
    content["nodes"].append(node)
    store = store_of(arrays)
    with pytest.raises(Rejected, match="leads to no output"):
        verify(content, store)


def test_margins_and_samples_cannot_lend_weights_to_nodes(original):
    """What nodes read must be in the files of the model, even if a sample is equal to it."""
    content, arrays = original
    content = copy.deepcopy(content)
    content["samples"]["inputs"].append("c0")
    store = store_of(arrays)
    with pytest.raises(Rejected, match="must not be one of the samples"):
        verify(content, store)


def _file(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


FILES = {
    "empty": b"",
    "cut off": struct.pack("<Q", 100) + b"{}",
    "no JSON": _file(b"x", b""),
    "a list": _file(b"[]", b""),
    "gap": _file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b"\0" * 8),
    "surplus": _file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 8),
    "overlap": _file(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}',
        b"\0" * 6,
    ),
    "outside": _file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400]}}', b"\0" * 8),
    "backwards": _file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', b"\0" * 4),
    "twice": _file(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"\0" * 4,
    ),
    "deep": _file(b"[" * 200_000, b""),
    "many digits": _file(b'{"a":' + b"1" * 5000 + b"}", b""),
    "more keys": _file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}', b"\0" * 4),
}


@pytest.mark.parametrize("name", FILES)
def test_broken_files_of_weights_are_rejected(tmp_path, name):
    (tmp_path / "w.safetensors").write_bytes(FILES[name])
    with pytest.raises(Rejected):
        read_safetensors(tmp_path / "w.safetensors")


def test_files_of_the_safetensors_library_are_read(tmp_path):
    import torch
    from safetensors.torch import save_file

    tensors = {
        "a": torch.randn(2, 3),
        "b": torch.zeros(0),
        "c": torch.randn(2).double(),
        "d": torch.arange(3),
    }
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    found = read_safetensors(tmp_path / "w.safetensors")
    assert {n: (d, s) for n, (d, s, _) in found.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("F32", (0,)),
        "c": ("F64", (2,)),
        "d": ("I64", (3,)),
    }
    assert found["a"][2] == tensors["a"].numpy().tobytes()


def test_reals_are_exact():
    assert schema.real((0.1).hex(), "") == Fraction(0.1)
    assert schema.real((-0.0).hex(), "") == 0
    for text in ("0.1", "0x1", "nan", "-inf", "0x1.0p+1024", 1, True, None):
        with pytest.raises(Rejected):
            schema.real(text, "")


def _scale(*factors: float) -> list[dict]:
    nodes = [exact.INPUT]
    for i, factor in enumerate(factors):
        nodes.append(exact.node("scale", i, factor, factor=float(factor).hex()))
    return nodes


def _sampled(x, y, claim=1.0, factors=(1.0,)):
    samples = {"inputs": ["x"], "outputs": ["y"]}
    arrays = {"x": np.asarray(x, dtype=float), "y": np.asarray(y, dtype=float)}
    return exact.certificate([[1]], _scale(*factors), claim, arrays, samples=samples)


def test_samples_on_which_the_graph_is_not_finite_are_rejected():
    """Of NaN every comparison is false, also that with the largest difference."""
    with pytest.raises(Rejected, match="not finite"):
        verify(*_sampled([[2.0**199]], [[-7.0]], 1.0, (2.0**900, 2.0**-900)))
    with pytest.raises(Rejected, match="rows"):
        verify(*_sampled(1.0, 1.0))
    with pytest.raises(Rejected, match="off by 2"):
        verify(*_sampled([[1.0]], [[-1.0]]))
    assert verify(*_sampled([[1.0], [-1.0]], [[1.0], [-1.0]])).bound == 1


def test_samples_that_move_too_far_apart_refute_a_bound(monkeypatch):
    """As a last resort: a checker that proves too little is caught by two points."""
    content, store = _sampled([[1.0], [-1.0]], [[3.0], [-3.0]], 3.0, (3.0,))
    assert verify(content, store).bound == 3
    scale = type(OPERATIONS["scale"]({"factor": Fraction(1)}))
    monkeypatch.setattr(scale, "square", lambda self, *shapes: Fraction(0))
    content["nodes"][1]["gain"] = content["bound"] = content["each"][0] = (2.9).hex()
    with pytest.raises(Rejected, match=r"two samples refute the claimed bound 2\.9"):
        verify(content, store)


def test_the_shape_of_a_constant_is_that_of_the_file():
    weight = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    nodes = [exact.INPUT, exact.node("affine", 0, 1.5, rule="gram", weight="w")]
    content, store = exact.certificate([[3]], nodes, 1.5, {"w": weight})
    assert verify(content, store).bound == Fraction(3, 2)
    content["constants"]["w"]["shape"], content["inputs"] = [3, 2], [[2]]
    with pytest.raises(Rejected, match=r"the tensor of that name is not F64 \[3, 2\]"):
        verify(content, store)


def _large_window(window):
    return exact.node(
        "average_pool",
        0,
        1.0,
        window=window,
        stride=[1] * len(window),
        padding=[[w - 1, 0] for w in window],
        count_padding=True,
    )


MALFORMED = {
    "a norm of numbers": (
        [[]],
        [exact.node("batch_norm", 0, 2.0, mean="s", variance="s", eps=(1.0).hex())],
    ),
    "slopes of numbers": ([[]], [exact.node("prelu", 0, 2.0, slopes="s")]),
    "huge factors": ([[3]], _scale(2.0**1000, 2.0**1000, 2.0**1000)[1:]),
    "a huge input": ([[2**20, 2**20]], [exact.node("scale", 0, 1.0, factor=(1.0).hex())]),
    "a huge pad": ([[2**20]], [exact.node("pad", 0, 9.0, amounts=[[0, 2**30]], mode="edge")]),
    "many pads": (
        [[1] * 8],
        [exact.node("pad", 0, 2.0**60, mode="edge", amounts=[[0, 2**16]] * 8)],
    ),
    "many windows": ([[1] * 60], [_large_window([2**16] * 60)]),
    "a huge window": ([[2**16]], [_large_window([2**16])]),
    "many outputs": (
        [[1, 1]],
        [exact.node("adaptive_average_pool", 0, 2.0**60, outputs=[2**16] * 2)],
    ),
    "a huge value": (
        [[1]],
        [
            {
                **exact.node(
                    "opaque", 0, into=[2**23, 2**23], gains=[(1.0).hex()], hypot=False, reason=""
                ),
                "rule": "assumed",
            }
        ],
    ),
    "zeros between taps": (
        [[1, 2**8, 2**8, 2**8]],
        [
            exact.node(
                "convolution",
                0,
                9.0,
                rule="gram",
                weight="w",
                stride=[1] * 3,
                padding=[[2**9, 2**9]] * 3,
                dilation=[2**9] * 3,
                groups=1,
                circular=False,
            )
        ],
    ),
    "large strides": (
        [[1, 2, 2]],
        [
            exact.node(
                "convolution",
                0,
                9.0,
                rule="gram",
                weight="v",
                stride=[2**16] * 2,
                padding=[[0, 0]] * 2,
                dilation=[1] * 2,
                groups=1,
                circular=False,
            )
        ],
    ),
}
ARRAYS = {"s": np.array(2.0), "w": np.ones((1, 1, 2, 2, 2)), "v": np.ones((1, 1, 1, 1))}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_cannot_be_computed_has_one_sentence(name, tmp_path, capsys):
    """Status 1, whatever the numbers of the file are, and no memory is asked for."""
    inputs, nodes = MALFORMED[name]
    used = {v for n in nodes for v in n.values() if type(v) is str and v in ARRAYS}
    arrays = {k: ARRAYS[k] for k in sorted(used)}
    content, _ = exact.certificate(inputs, [exact.INPUT, *nodes], 2.0**1000, arrays)
    (tmp_path / "c.json").write_text(json.dumps(content))
    _save(tmp_path / "w.safetensors", arrays)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = main([str(tmp_path / "c.json"), "--quiet"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
    shown = capsys.readouterr()
    assert "cannot be computed" not in shown.err  # which is what is said of a lack of memory
    if name == "huge factors":  # the bound is true, if it is a number
        assert "above the claimed bound" in shown.err
    assert (status, shown.err.count("\n"), shown.err[:9]) == (1, 1, "rejected:")


def _save(path, arrays):
    from safetensors.numpy import save_file

    save_file(arrays, path)


LIE = "x\nverified: constant <= 0 for the weights"


def test_texts_of_a_file_cannot_write_a_line_of_the_verdict(tmp_path, capsys):
    gain = [(0.5).hex()]
    nodes = [
        exact.INPUT,
        {
            **exact.node("opaque", 0, into=[1], gains=gain, hypot=False, reason=LIE),
            "rule": "assumed",
            "path": LIE,
        },
    ]
    content, _ = exact.certificate([[1]], nodes, 0.5)
    _save(tmp_path / "w.safetensors", {})
    (tmp_path / "c.json").write_text(json.dumps(content))
    assert main([str(tmp_path / "c.json")]) == 2
    shown = capsys.readouterr()
    assert "verified: constant <= 0 for" in shown.out  # quoted
    assert not any(line.startswith("verified:") for line in shown.out.splitlines())
    content["constants"] = {LIE: {"names": [LIE], "dtype": "F32", "shape": [], "sha256": LIE}}
    (tmp_path / "c.json").write_text(json.dumps(content))
    assert main([str(tmp_path / "c.json")]) == 1
    content["constants"][LIE]["sha256"] = "0" * 64
    (tmp_path / "c.json").write_text(json.dumps(content))
    assert main([str(tmp_path / "c.json")]) == 1
    content["constants"] = {LIE: {LIE: 1}}
    (tmp_path / "c.json").write_text(json.dumps(content))
    assert main([str(tmp_path / "c.json")]) == 1
    header = json.dumps({LIE: {"dtype": LIE, "shape": [0], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(_file(header, b""))
    assert main([str(tmp_path / "c.json")]) == 1
    shown = capsys.readouterr()
    assert shown.err.count("rejected:") == 4
    assert not any(line.startswith("verified:") for line in (shown.out + shown.err).splitlines())


def test_bytes_that_no_node_reads_are_listed_like_floats():
    from orthonet_checker.store import Store, unread

    model = Store()
    for name, dtype in (("a", "F32"), ("b", "I8"), ("c", "U8"), ("d", "BF16"), ("e", "C64")):
        model.add(name, dtype, (2,), b"")
    for name, dtype in (("mask", "BOOL"), ("steps", "I64"), ("places", "I32")):
        model.add(name, dtype, (2,), b"")
    assert unread(model, []) == ["a", "b", "c", "d", "e"]
