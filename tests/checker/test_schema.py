"""The format is strict: what is not exactly as described is rejected, without a traceback."""

import copy
import json
import struct
from fractions import Fraction

import pytest

from orthonet_checker import Rejected, check, schema
from orthonet_checker.store import read_safetensors
from orthonet_checker.verify import verify
from tests.checker import oracle
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
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_as_described_is_rejected(original, name):
    content, arrays = original
    content = copy.deepcopy(content)
    change, value = CHANGES[name]
    change(content, value)
    text = json.dumps(content)
    store = store_of(arrays)
    with pytest.raises(Rejected):
        verify(schema.parse(text), store, store)


@pytest.mark.parametrize("name", ["format", "constants", "nodes", "bound", "each", "outputs"])
def test_what_is_missing_is_noticed(original, name):
    content, arrays = original
    content = {k: v for k, v in content.items() if k != name}
    store = store_of(arrays)
    with pytest.raises(Rejected, match="lacks"):
        verify(content, store, store)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "1", '{"bound": 1.5}', '{"bound": NaN}', '{"bound": Infinity}',
             '{"a": 1, "a": 2}', "[" * 100_000],
)  # fmt: skip
def test_other_texts_are_rejected(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(Rejected):
        check(tmp_path / "c.json")


def test_nodes_that_lead_nowhere_are_rejected(original):
    """Otherwise a certificate could claim to hold what no output depends on."""
    content, arrays = original
    content = copy.deepcopy(content)
    node = {"op": "scale", "path": "", "inputs": [0], "rule": "definition", "factor": (1.0).hex(),
            "gain": (1.0).hex()}  # fmt: skip
    content["nodes"].append(node)
    store = store_of(arrays)
    with pytest.raises(Rejected, match="leads to no output"):
        verify(content, store, store)


def test_margins_and_samples_cannot_lend_weights_to_nodes(original):
    """What nodes read must be in the files of the model, even if a sample is equal to it."""
    content, arrays = original
    content = copy.deepcopy(content)
    content["samples"]["inputs"].append("c0")
    store = store_of(arrays)
    with pytest.raises(Rejected, match="must not be one of the samples"):
        verify(content, store, store)


def _file(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


FILES = {
    "empty": b"",
    "cut off": struct.pack("<Q", 100) + b"{}",
    "no JSON": _file(b"x", b""),
    "a list": _file(b"[]", b""),
    "gap": _file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b"\0" * 8),
    "surplus": _file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 8),
    "overlap": _file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                     b'"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}', b"\0" * 6),
    "outside": _file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400]}}', b"\0" * 8),
    "backwards": _file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', b"\0" * 4),
    "twice": _file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                   b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
    "more keys": _file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}', b"\0" * 4),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_broken_files_of_weights_are_rejected(tmp_path, name):
    (tmp_path / "w.safetensors").write_bytes(FILES[name])
    with pytest.raises(Rejected):
        read_safetensors(tmp_path / "w.safetensors")


def test_files_of_the_safetensors_library_are_read(tmp_path):
    import torch
    from safetensors.torch import save_file

    tensors = {"a": torch.randn(2, 3), "b": torch.zeros(0), "c": torch.randn(2).double(),
               "d": torch.arange(3)}  # fmt: skip
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    found = read_safetensors(tmp_path / "w.safetensors")
    assert {n: (d, s) for n, (d, s, _) in found.items()} == {
        "a": ("F32", (2, 3)), "b": ("F32", (0,)), "c": ("F64", (2,)), "d": ("I64", (3,))
    }  # fmt: skip
    assert found["a"][2] == tensors["a"].numpy().tobytes()


def test_reals_are_exact():
    assert schema.real((0.1).hex(), "") == Fraction(0.1)
    assert schema.real((-0.0).hex(), "") == 0
    for text in ("0.1", "0x1", "nan", "-inf", "0x1.0p+1024", 1, True, None):
        with pytest.raises(Rejected):
            schema.real(text, "")
