"""Random single changes of a certificate or of its constants."""

import copy
import hashlib
import random
from typing import Any

import torch
from torch import Tensor

from orthonet_checker.store import Store

HEX = ("gain", "t", "factor", "eps", "value")


def store_of(arrays: dict[str, Tensor]) -> Store:
    store = Store()
    for name, value in arrays.items():
        dtype = "F32" if value.dtype == torch.float32 else "F64"
        store.add(name, dtype, value.shape, value.contiguous().numpy().tobytes())
    return store


def hashed(content: dict, arrays: dict[str, Tensor]) -> dict:
    """The certificate with the hashes of changed constants made to fit again."""
    for name, entry in content["constants"].items():
        data = arrays[name].contiguous().numpy().tobytes()
        entry["sha256"] = hashlib.sha256(data).hexdigest()
    return content


def _number(rng: random.Random, text: str) -> str:
    value = float.fromhex(text)
    size = 10.0 ** rng.uniform(-12, -0.5)
    return rng.choice(
        [value * (1 - size), value * (1 + size), value / 2, value * 2, -value, 0.0, 1.0]
    ).hex()


def _integer(rng: random.Random, value: int) -> int:
    return rng.choice([value + 1, value - 1, 0, 1, 2 * value])


def _leaf(rng: random.Random, value: Any, constants: list[str]) -> Any:
    """Another value of the same kind."""
    if type(value) is bool:
        return not value
    if type(value) is int:
        return _integer(rng, value)
    if type(value) is list:
        value = list(value)
        if value and rng.random() < 0.85:
            i = rng.randrange(len(value))
            value[i] = _leaf(rng, value[i], constants)
        elif value and rng.random() < 0.5:
            del value[rng.randrange(len(value))]
        else:
            value.append(copy.deepcopy(value[-1]) if value else 0)
        return value
    if type(value) is dict:
        key = rng.choice(sorted(value))
        return {**value, key: _leaf(rng, value[key], constants)}
    if value in constants:
        return rng.choice(constants)
    if "0x" in value:
        return _number(rng, value)
    return rng.choice(
        [
            "relu",
            "abs",
            "sin",
            "gelu",
            "tanh",
            "wrap",
            "constant",
            "edge",
            "gram",
            "gram2",
            "cholesky",
            "torus",
            "definition",
        ]
    )


def _weight(rng: random.Random, arrays: dict[str, Tensor], names: list[str]) -> str:
    name = rng.choice(names)
    value = arrays[name] = arrays[name].clone()
    flat = value.view(-1)
    i = rng.randrange(flat.numel())
    kind = rng.choice(["ulp", "bit", "set", "relative", "all", "sign"])
    if kind in ("ulp", "bit"):
        bits = flat.view(torch.int32 if value.dtype == torch.float32 else torch.int64)
        bits[i] ^= 1 if kind == "ulp" else 1 << rng.randrange(31)
    elif kind == "set":
        flat[i] = rng.choice([0.0, 1.5, -2.0, 1e30, float("nan"), float("inf")])
    elif kind == "relative":
        flat[i] *= 1 + rng.choice([-1, 1]) * 10.0 ** rng.uniform(-7, -1)
    elif kind == "all":
        value *= 1 + rng.choice([-1, 1]) * 10.0 ** rng.uniform(-7, -1)
    else:
        flat[i] = -flat[i]
    return f"{kind} of {name}"


def _drop(content: dict, place: int) -> None:
    """Take a node out; what read it reads its first operand."""
    nodes = content["nodes"]
    source = nodes[place]["inputs"][0]
    del nodes[place]

    def moved(i: int) -> int:
        i = source if i == place else i
        return i - 1 if i > place else i

    for node in nodes:
        if "inputs" in node:
            node["inputs"] = [moved(i) for i in node["inputs"]]
        if "joint" in node:
            node["joint"]["since"] = moved(node["joint"]["since"])
    content["outputs"] = [moved(i) for i in content["outputs"]]


def mutate(
    rng: random.Random, content: dict, arrays: dict[str, Tensor]
) -> tuple[dict, dict[str, Tensor], str]:
    """One change, and what it is; the hashes fit the changed constants."""
    content, arrays = copy.deepcopy(content), dict(arrays)
    constants = sorted(content["constants"])
    aside = {content.get("pairs")}
    aside |= {name for names in content.get("samples", {}).values() for name in names}
    weights = [n for n in constants if n not in aside]
    inner = [i for i, n in enumerate(content["nodes"]) if n["op"] != "input"]
    kind = rng.choice(
        ["weight"] * 4 + ["gain"] * 3 + ["entry"] * 5 + ["head", "drop", "aside", "wire", "swap"]
    )
    node = content["nodes"][rng.choice(inner)]
    if kind == "weight":
        kind = _weight(rng, arrays, weights)
    elif kind == "aside":
        kind = _weight(rng, arrays, sorted(n for n in aside if n))
    elif kind == "gain":
        holders = [n for n in content["nodes"] if "gain" in n]
        holders += [n[k] for n in content["nodes"] for k in ("joint", "chain") if k in n]
        holder = rng.choice(holders)
        key = rng.choice([k for k in HEX if k in holder])
        holder[key] = _number(rng, holder[key])
        kind = f"{key} of {holder.get('op', 'joint')}"
    elif kind == "entry":
        keys = sorted(k for k in node if k not in ("op", "path", "gain", "inputs"))
        key = rng.choice(keys)
        node[key] = _leaf(rng, node[key], weights)
        kind = f"{key} of {node['op']}"
    elif kind == "head":
        key = rng.choice(["bound", "each", "outputs", "inputs"])
        content[key] = _leaf(rng, content[key], [])
        kind = key
    elif kind == "drop":
        place = rng.choice(inner)
        kind = f"drop {content['nodes'][place]['op']}"
        _drop(content, place)
    elif kind == "wire":
        i = rng.randrange(len(node["inputs"]))
        node["inputs"][i] = rng.randrange(len(content["nodes"]))
        kind = f"wire {node['op']}"
    else:
        other = content["nodes"][rng.choice(inner)]
        node["op"], other["op"] = other["op"], node["op"]
        kind = f"swap {node['op']} {other['op']}"
    return hashed(content, arrays), arrays, kind
