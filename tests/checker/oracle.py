"""The truth about a certificate, in float64 by PyTorch, from nothing of the checker or the prover.

Every node is one call of `torch`; its constant is bounded from below by dense singular values of
its Jacobian (for an affine node: the norm itself), and so are joint gains, the whole, and margins.
A claim is false if it is below such a number by more than float64 rounds.
"""

import json
import math
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.func import jacrev, vjp

ROOM = 1e-10
"""Relative rounding of a singular value of a Jacobian in float64: observed below 1e-13."""
CLOSE = 2.0**-10


def real(text: str) -> float:
    return float.fromhex(text)


class Nonsense(Exception):
    """The graph is no function at all: it claims nothing."""


_ACTIVATIONS = {
    "relu": F.relu,
    "abs": torch.abs,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "cos": torch.cos,
    "atan": torch.atan,
    "asinh": torch.asinh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "log_sigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "mish": F.mish,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "selu": F.selu,
    "softshrink": lambda x, a: torch.where(x > a, x - a, torch.where(x < -a, x + a, 0 * x)),
    "leaky_relu": lambda x, a: torch.where(x > 0, x, a * x),
    "elu": lambda x, a: torch.where(x > 0, x, a * torch.expm1(x)),
    "clamp": lambda x, a, b: torch.minimum(torch.maximum(x, _t(a)), _t(b)),
    "clamp_min": lambda x, a: torch.maximum(x, _t(a)),
    "clamp_max": lambda x, a: torch.minimum(x, _t(a)),
}


def _t(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _padded(x: Tensor, amounts: list[list[int]], mode: str, value: float = 0.0) -> Tensor:
    """By indices, dim by dim, so that every mode works for every dim."""
    for dim, (a, b) in enumerate(amounts, 1):
        n = x.shape[dim]
        where = torch.arange(-a, n + b)
        if mode == "wrap":
            x = x.index_select(dim, where % n)
        elif mode == "edge":
            x = x.index_select(dim, where.clamp(0, n - 1))
        elif mode == "reflect":
            x = x.index_select(dim, (n - 1) - ((where % max(1, 2 * n - 2)) - (n - 1)).abs())
        else:
            shape = [*x.shape]
            shape[dim] = a
            before = torch.full(shape, value, dtype=x.dtype)
            shape[dim] = b
            x = torch.cat([before, x, torch.full(shape, value, dtype=x.dtype)], dim)
    return x


def _windows(x: Tensor, node: dict, dilation: list[int], fill: float) -> Tensor:
    """(..., outputs of each dim, taps of each dim)."""
    dims = len(node["window"])
    lead = x.ndim - 1 - dims
    x = _padded(x, [[0, 0]] * lead + node["padding"], "constant", fill)
    for i in range(dims):
        dim, reach = x.ndim - dims - i + i, dilation[i] * (node["window"][i] - 1) + 1
        dim = 1 + lead + i
        x = x.unfold(dim, reach, node["stride"][i])[..., :: dilation[i]]
    return x


def apply(node: dict, xs: list[Tensor], arrays: dict[str, Tensor]) -> Tensor:
    """One node on a batch of samples."""
    op, x = node["op"], xs[0]

    def array(key: str) -> Tensor | None:
        return arrays[node[key]] if key in node else None

    if op == "affine":
        return F.linear(x, array("weight"), array("bias"))
    if op == "convolution":
        mode = "wrap" if node["circular"] else "constant"
        x = _padded(x, [[0, 0], *node["padding"]], mode)
        conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[array("weight").ndim]
        return conv(
            x, array("weight"), array("bias"), node["stride"], 0, node["dilation"], node["groups"]
        )
    if op == "reshape":
        return x.reshape(len(x), *node["into"])
    if op == "permute":
        return x.permute(0, *(d + 1 for d in node["dims"]))
    if op == "flip":
        return x.flip(node["dim"] + 1)
    if op == "roll":
        return x.roll(node["shift"], node["dim"] + 1)
    if op == "slice":
        index = torch.arange(node["start"], node["stop"], node["step"])
        return x.index_select(node["dim"] + 1, index)
    if op == "pad":
        return _padded(x, node["amounts"], node["mode"], real(node.get("value", "0x0.0p+0")))
    if op == "concatenate":
        return torch.cat(xs, node["dim"] + 1)
    if op == "add":
        if len(xs) != len(node["factors"]):
            raise Nonsense("factors")
        return sum(real(f) * y for f, y in zip(node["factors"], xs, strict=True))
    if op == "extremum":
        return (torch.maximum if node["largest"] else torch.minimum)(*xs)
    if op == "scale":
        return real(node["factor"]) * x
    if op == "shift":
        return x + array("offset")
    if op == "diagonal":
        return x / array("factors") if node["divide"] else x * array("factors")
    if op == "batch_norm":
        return F.batch_norm(
            x,
            array("mean"),
            array("variance"),
            array("weight"),
            array("bias"),
            eps=real(node["eps"]),
        )
    if op == "mean":
        dims = [d + 1 for d in node["dims"]]
        return x.sum(dims) if node["sum"] else x.mean(dims)
    if op == "center":
        return x - x.mean([d + 1 for d in node["dims"]], keepdim=True)
    if op == "average_pool":
        dims = len(node["window"])
        taps = tuple(range(-dims, 0))
        total = _windows(x, node, [1] * dims, 0.0).sum(taps)
        if node["count_padding"]:
            return total / math.prod(node["window"])
        return total / _windows(torch.ones_like(x), node, [1] * dims, 0.0).sum(taps)
    if op == "adaptive_average_pool":
        pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
        return pool[len(node["outputs"])](x, node["outputs"])
    if op == "max_pool":
        dims = len(node["window"])
        return _windows(x, node, node["dilation"], -math.inf).amax(tuple(range(-dims, 0)))
    if op == "activation":
        return _ACTIVATIONS[node["function"]](x, *map(real, node["parameters"]))
    if op == "descent":

        def inner(v: Tensor) -> Tensor:
            mode = "wrap" if node["circular"] else "constant"
            v = _padded(v, [[0, 0], *node["padding"]], mode)
            conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[array("weight").ndim]
            return conv(
                v, array("weight"), None, node["stride"], 0, node["dilation"], node["groups"]
            )

        hidden, pull = vjp(inner, x)
        column = (slice(None), *[None] * (hidden.ndim - 2))
        hidden = hidden if array("bias") is None else hidden + array("bias")[column]
        hidden = _ACTIVATIONS[node["function"]](hidden, *map(real, node["parameters"]))
        return x - pull(hidden * array("scales")[column])[0]
    if op == "fourier":
        groups, count, rows, columns = array("real").shape
        symbol = torch.complex(array("real"), array("imag"))
        spectrum = torch.fft.rfft2(x).reshape(len(x), groups, columns, count)
        y = torch.einsum("gfrc,ngcf->ngrf", symbol, spectrum)
        size = x.shape[-2:]
        return torch.fft.irfft2(y.reshape(len(x), groups * rows, size[0], -1), s=size)
    if op == "prelu":
        return F.prelu(x, array("slopes"))
    if op == "sort":
        dim, size = node["dim"] + 1, node["size"]
        y = x.movedim(dim, -1)
        y = y.unflatten(-1, (size, -1)).mT if node["halves"] else y.unflatten(-1, (-1, size))
        y = y.sort(-1, descending=node["descending"]).values
        y = y.mT.flatten(-2) if node["halves"] else y.flatten(-2)
        return y.movedim(-1, dim)
    raise Nonsense(f"no function: {op}")


def run(content: dict, arrays: dict[str, Tensor], inputs: list[Tensor], first: int = 0) -> list:
    """The values of all nodes from the node `first` on, given the values of those before."""
    values: list = list(inputs[:first]) if first else []
    left = list(inputs)
    for place, node in enumerate(content["nodes"]):
        if place < len(values):
            continue
        if node["op"] == "input":
            values.append(left.pop(0))
            continue
        sources = node["inputs"]
        if any(i >= place for i in sources):
            raise Nonsense("order")
        values.append(apply(node, [values[i] for i in sources], arrays))
    return values


def slope(function, point: Tensor) -> float:
    """The largest singular value of a Jacobian at a point (1, ...)."""
    jacobian = jacrev(lambda x: function(x[None])[0].flatten())(point[0])
    matrix = jacobian.reshape(-1, point.numel())
    if not bool(matrix.isfinite().all()):
        return math.inf
    return float(torch.linalg.matrix_norm(matrix, 2)) if matrix.numel() else 0.0


def load(path: Path) -> tuple[dict, dict[str, Tensor]]:
    content = json.loads(path.read_text())
    return content, load_file(path.with_name(content["weights"]))


def false_claims(content: dict, stored: dict[str, Tensor], points: int = 2) -> list[str]:
    """What is claimed and not true, as far as a few points show it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of functorch: a batching rule is slow
        return _false_claims(content, stored, points)


def _false_claims(content: dict, stored: dict[str, Tensor], points: int) -> list[str]:
    arrays = {name: value.double() for name, value in stored.items()}
    found = []
    for entry, name in ((content["constants"][n], n) for n in content["constants"]):
        if list(stored[name].shape) != entry["shape"]:
            arrays[name] = arrays[name].reshape(entry["shape"])
    generator = torch.Generator().manual_seed(5)
    for trial in range(points):
        inputs = [
            torch.randn(1, *shape, generator=generator).double() for shape in content["inputs"]
        ]
        values = run(content, arrays, inputs)
        for place, node in enumerate(content["nodes"]):
            if "gain" not in node or node["op"] == "input":
                continue
            linear = node["op"] in (
                "affine",
                "convolution",
                "scale",
                "diagonal",
                "batch_norm",
                "mean",
                "pad",
                "average_pool",
                "reshape",
                "permute",
                "slice",
                "flip",
                "roll",
                "shift",
                "adaptive_average_pool",
            )
            if not (linear and trial):
                before = values[node["inputs"][0]]
                true = _constant(node, before, arrays)
                if true > real(node["gain"]) * (1.0 + ROOM):
                    found.append(f"node {place} {node['op']}: {true!r} above {node['gain']}")
            for key in ("joint", "chain"):
                if key in node and not (key == "joint" and trial):
                    true = _between(content, arrays, values, node[key]["since"], place)
                    if true > real(node[key]["gain"]) * (1.0 + ROOM):
                        found.append(f"{key} {place}: {true!r} above {node[key]['gain']}")
        found += _whole(content, arrays, inputs)
    if "samples" in content:
        samples = content["samples"]
        values = run(content, arrays, [arrays[n] for n in samples["inputs"]])
        for place, name in zip(content["outputs"], samples["outputs"], strict=True):
            y, z = values[place], arrays[name]
            if y.shape != z.shape or float((y - z).abs().max()) > 2 * CLOSE * float(
                torch.maximum(y.abs().max(), z.abs().max())
            ):
                found.append("samples: the graph is another function")
    return found


def _constant(node: dict, x: Tensor, arrays: dict[str, Tensor]) -> float:
    """A lower bound of the constant of one node: its norm, or slopes where they are steep."""
    if node["op"] == "activation":
        points = torch.linspace(-12, 12, 4801, dtype=torch.float64)[None]
        y = apply(node, [points], arrays)
        return float(((y[:, 1:] - y[:, :-1]) / (points[:, 1:] - points[:, :-1])).abs().max())
    if node["op"] == "prelu":
        return max(1.0, float(arrays[node["slopes"]].abs().max()))
    return slope(lambda v: apply(node, [v], arrays), x)


def _between(content: dict, arrays: dict, values: list, since: int, place: int) -> float:
    def function(x: Tensor) -> Tensor:
        env = {since: x}
        for i, node in enumerate(content["nodes"][: place + 1]):
            if i > since and node["op"] != "input":
                sources = [env.get(j, values[j]) for j in node["inputs"]]
                env[i] = apply(node, sources, arrays)
        return env[place]

    return slope(function, values[since])


def _whole(content: dict, arrays: dict[str, Tensor], inputs: list[Tensor]) -> list[str]:
    found = []
    sizes = [x.numel() for x in inputs]

    def outputs(flat: Tensor) -> list[Tensor]:
        parts = flat.split(sizes)
        shaped = [p.reshape(1, *s) for p, s in zip(parts, content["inputs"], strict=True)]
        values = run(content, arrays, shaped)
        return [values[i].flatten() for i in content["outputs"]]

    flat = torch.cat([x.flatten() for x in inputs])
    jacobians = jacrev(lambda v: tuple(outputs(v)))(flat)
    norms = [float(torch.linalg.matrix_norm(j, 2)) for j in jacobians]
    for claim, true in zip(content["each"], norms, strict=True):
        if true > real(claim) * (1.0 + ROOM):
            found.append(f"an output: {true!r} above {claim}")
    true = float(torch.linalg.matrix_norm(torch.cat(jacobians), 2))
    if true > real(content["bound"]) * (1.0 + ROOM):
        found.append(f"the whole: {true!r} above {content['bound']}")
    if "pairs" in content:
        rows = jacobians[0]
        near = torch.linalg.vector_norm(rows[:, None] - rows[None], dim=-1)
        if bool((near > arrays[content["pairs"]] * (1.0 + ROOM) + 1e-12).any()):
            found.append("a margin")
    return found
