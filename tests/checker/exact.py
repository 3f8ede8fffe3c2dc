"""Certificates by hand, and their functions in exact arithmetic, which loses nothing."""

from fractions import Fraction

import numpy as np

from orthonet_checker.store import Store

INPUT = {"op": "input", "path": "x"}


def node(op: str, inputs: int | list[int], gain: float | None = None, **entries) -> dict:
    """A node with the rule `definition`, unless another is given."""
    inputs = inputs if isinstance(inputs, list) else [inputs]
    found = {"op": op, "path": "p", "inputs": inputs, "rule": "definition", **entries}
    return found if gain is None else {**found, "gain": float(gain).hex()}


def certificate(
    inputs: list,
    nodes: list[dict],
    bound: float,
    arrays: dict[str, np.ndarray] | None = None,
    **entries,
) -> tuple[dict, Store]:
    """A certificate of the last node, and the store of its float64 constants."""
    constants, store = {}, Store()
    for name, value in (arrays or {}).items():
        key = store.add(name, "F64", value.shape, value.tobytes())
        constants[name] = {"names": [name], **key._asdict(), "shape": list(key.shape)}
    content = {
        "format": "orthonet certificate 1",
        "weights": "w.safetensors",
        "inputs": inputs,
        "constants": constants,
        "nodes": nodes,
        "outputs": [len(nodes) - 1],
        "bound": float(bound).hex(),
        "each": [float(bound).hex()],
        "prover": {},
        **entries,
    }
    return content, store


def run(nodes: list[dict], x: list[Fraction]) -> list[Fraction]:
    """The value of the last node, all of them vectors."""
    values = [x]
    for entry in nodes[1:]:
        (first, *_) = found = [values[i] for i in entry["inputs"]]
        op = entry["op"]
        if op == "add":
            factors = [Fraction(float.fromhex(f)) for f in entry["factors"]]
            # equal operands are added at once
            weights = {i: Fraction(0) for i in entry["inputs"]}
            for i, f in zip(entry["inputs"], factors, strict=True):
                weights[i] += f
            y = [sum(w * values[i][j] for i, w in weights.items()) for j in range(len(first))]
        elif op == "scale":
            y = [Fraction(float.fromhex(entry["factor"])) * v for v in first]
        elif op == "pad":
            before, behind = entry["amounts"][0]
            edge = entry["mode"] == "edge"
            y = [first[0] if edge else Fraction(0)] * before + first
            y += [first[-1] if edge else Fraction(0)] * behind
        elif op == "mean":
            y = [sum(first, Fraction(0)) / (1 if entry["sum"] else len(first))]
        elif op in ("average_pool", "adaptive_average_pool"):  # with one window that holds all
            size = entry["window"][0] if op == "average_pool" else len(first)
            y = [sum(first, Fraction(0)) / size]
        elif op == "reshape" or (op == "activation" and entry["function"] == "relu"):
            y = [max(v, Fraction(0)) for v in first] if op == "activation" else first
        else:
            raise NotImplementedError(op)
        assert len(found) == 1 or op == "add"
        values.append(y)
    return values[-1]
