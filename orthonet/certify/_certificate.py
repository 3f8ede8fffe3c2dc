"""`certify` and what it returns."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify._bound import Bound, Row
from orthonet.certify._forward_error import forward_error, unit_roundoffs
from orthonet.certify._propagate import Walker
from orthonet.certify._radius import (
    RadiusCurve,
    certified_radius,
    convert_radius,
    correct_within,
    reach,
)
from orthonet.certify._regions import autocast_region
from orthonet.certify.proof import load, save
from orthonet.errors import UncertifiableError

__all__ = ["LipschitzCertificate", "certified_accuracy", "certified_curve"]


@dataclass(frozen=True, eq=False)
class LipschitzCertificate:
    r"""A proved upper bound of the l2 -> l2 Lipschitz constant of a model, for each sample.

    It holds for the function that the model computes in exact arithmetic with its weights as they
    are deployed. The rounding of a forward pass is bounded by `rounding`, and taken off a radius
    where `radius` is given the inputs.

    Attributes:
        constant: The bound, in units of the output per unit of the input. Several inputs count
            as one long vector, and so do several outputs.
        rows: What was found on the way, one operation each, or several affine ones.
        input_shape: The shape of one sample that it was made for; of several inputs, all shapes.
        pairs: For an affine last layer, the upper bounds of the Lipschitz constants of all
            differences of two outputs, (classes, classes); never above sqrt(2) times the constant.
        lower: A bound from below, of kind `"estimate"`, by a secant of the function; None if it
            was not searched for. `constant.value / lower.value` bounds how loose the bound is.
        outputs: The bound of each output by itself.
        autocast: The dtype of `torch.autocast` under which the bound holds; None without.
    """

    constant: Bound
    rows: tuple[Row, ...]
    input_shape: tuple[Any, ...]
    pairs: Tensor | None = field(default=None, repr=False)
    lower: Bound | None = None
    outputs: tuple[Bound, ...] = ()
    autocast: torch.dtype | None = None
    _walker: Walker | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_walker": None}  # the graph stays behind

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """The rows as a text table, the constant of the model in the last line."""
        head = ("module", "operation", "input", "constant", "cumulative", "kind", "s", "method")
        lines = [head] + [
            (
                row.path,
                row.op,
                "x".join(map(str, row.input_shape)),
                f"{row.constant:.7g}",
                f"{row.cumulative:.7g}",
                row.kind,
                f"{row.seconds:.2f}",
                row.method,
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
        text = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[-1]])
            for line in lines
        ]
        text.insert(1, "-" * len(text[0]))
        value, kind = self.constant.value, self.constant.kind
        last = f"Lipschitz constant ({self.constant.norm}, {kind}): {value:.9g}"
        if self.autocast is not None:
            last += f" under {_name(self.autocast)} autocast"
        if self.lower is not None:
            last += f"; at least {self.lower.value:.6g} is reached"
        return "\n".join([*text, last])

    def to_json(self) -> str:
        """The certificate as JSON text; numbers keep every digit."""
        content = {
            "constant": asdict(self.constant),
            "lower": None if self.lower is None else asdict(self.lower),
            "outputs": [asdict(bound) for bound in self.outputs],
            "input_shape": self.input_shape,
            "autocast": None if self.autocast is None else _name(self.autocast),
            "rows": [asdict(row) for row in self.rows],
            "pairs": None if self.pairs is None else self.pairs.tolist(),
            "versions": {
                "orthonet": version("orthonet"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        return json.dumps(content, indent=1)

    def save(self, path: str | Path) -> None:
        """Write the proof for an independent checker, `orthonet-check`.

        `path` gets the graph, the gain of each operation and its witness as JSON, and the file
        with the suffix `.safetensors` next to it the constants. The bound of the file is the one
        that follows from its gains: for networks of orthogonal layers about 1e-6 above `constant`.

        Args:
            path: The file to write, e.g. `"certificate.json"`.

        Raises:
            UncertifiableError: The certificate was pickled or loaded, and has lost the graph.
        """
        save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> LipschitzCertificate:
        """Read a certificate that `save` wrote.

        Its `constant` and `pairs` are those of the file, which the checker verifies. It has no
        graph: `rounding` and `radius(..., inputs=...)` need a new call of `certify`.

        Args:
            path: The JSON file.

        Raises:
            ValueError: The file is no certificate, or its constants are not next to it.
        """
        return load(path)

    def radius(
        self,
        logits: Tensor,
        *,
        norm: str = "l2",
        labels: Tensor | None = None,
        target: Tensor | None = None,
        inputs: Tensor | Sequence[Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        r"""The distance, in units of the input, within which the predicted class cannot change.

        $r = \min_{j \ne y} (f_y - f_j) / K_{yj}$, y the predicted class, with the constant
        $K_{yj}$ of $f_y - f_j$: that of `pairs`, or $\sqrt 2$ times `constant`. A tie has radius 0.
        One output is a binary classifier by its sign, with radius $|f| / L$. As
        $\|\delta\|_2 \le \|\delta\|_1$ and $\|\delta\|_2 \le \sqrt n\,\|\delta\|_\infty$ for n
        entries of the input, this is a radius in l1, and divided by $\sqrt n$ one in l-infinity.

        With `inputs`, the forward pass itself may round: each margin loses $2 \sqrt 2 e$, where e
        is the `rounding` anywhere within that distance of the sample. The class that the *deployed*
        model predicts, in floating point, is then the same at all points that near.

        Args:
            logits: What the model returned, in any floating dtype; evaluated in float64 with
                outward rounding.
            norm: `"l2"`, `"linf"` or `"l1"`.
            labels: The true classes, (N,); with them, a wrong prediction has radius 0.
            target: One class a sample, (N,): only a change to this class counts.
            inputs: What the model was given, to take the rounding of its forward pass off.
            dtype: The dtype in which it was run, see `rounding`.

        Shape:
            logits: (N, classes), or (N,) or (N, 1) for a binary classifier; returns (N,), float64

        Guarantee:
            Lower bound of the distance to the nearest point of another class, for logits that are
            exact, or with `inputs` for those of the deployed forward pass.

        Raises:
            ValueError: The logits are not finite or do not fit the certificate.
            UncertifiableError: With `inputs`, the rounding of an operation is not known.
        """
        constant, pairs = self.constant.value, self.pairs
        found = certified_radius(logits, constant, pairs, labels=labels, target=target)
        if inputs is not None:
            near = torch.where(found.isfinite(), found, 0.0)
            error = self.rounding(inputs, within=near, dtype=dtype)
            less = certified_radius(logits, constant, pairs, error, labels=labels, target=target)
            found = torch.minimum(less, found).clamp_min(0.0)
        return convert_radius(found, norm, self._entries())

    def band(self, radius: float, *, norm: str = "l2") -> float:
        r"""How far the output can move, for regression: $\|f(x') - f(x)\|_2 \le K r$.

        Args:
            radius: The size of the perturbation of the input.
            norm: The norm of the perturbation: `"l2"`, `"linf"` or `"l1"`.

        Returns:
            A proved upper bound, rounded upward, in units of the output.

        Raises:
            ValueError: `radius` is negative or not finite.
        """
        return reach(self.constant.value, radius, norm, self._entries())

    def curve(self, logits: Tensor, labels: Tensor, *, norm: str = "l2") -> RadiusCurve:
        """The certified accuracy as a function of the radius, and the area under it.

        Args:
            logits: As in `radius`.
            labels: The true classes, (N,); for one output, positive for the positive class.
            norm: As in `radius`.
        """
        correct = correct_within(logits, labels, self.radius(logits), [0.0])[0]
        found = self.radius(logits, norm=norm, labels=labels)
        return RadiusCurve(found.sort(descending=True).values, correct, norm)

    def _entries(self) -> int:
        """How many numbers an input has, all inputs together."""
        return sum(math.prod(s) if isinstance(s, tuple) else 0 for s in self.input_shape) or (
            math.prod(self.input_shape)
        )

    def rounding(
        self,
        inputs: Tensor | Sequence[Tensor],
        *,
        within: Tensor | float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        r"""How far the outputs of a forward pass can be from exact arithmetic, in the l2 norm.

        Norm by norm along the graph, with $\gamma_k = k u / (1 - k u)$ for sums of k products and
        the magnitudes that the model takes at the inputs. Weights count as they are stored.

        Args:
            inputs: A batch for the model.
            within: The bound holds for all points within this distance, one for each sample.
            dtype: Of the forward pass; None for what the model was certified in: the dtypes of its
                values, under autocast those that PyTorch gives to each operation. Otherwise one
                dtype for all of it; `torch.bfloat16` and `torch.float16` then also round every
                weight. Sums are accumulated in float32 at least (on CUDA only with
                `torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False`, and
                its twin for fp16).

        Shape:
            inputs: (N, *); returns (N,), float64

        Guarantee:
            Upper bound if every product, sum and quotient is rounded to nearest, in any order,
            with or without fused multiplications (so not TF32), elementary functions are accurate
            to 64 units in the last place, and nothing overflows. In float16 the bound is infinite
            where something might.

        Raises:
            UncertifiableError: The rounding of an operation is not known, or the certificate was
                pickled and has lost the graph.
        """
        _checks.require(
            self._walker is not None,
            "LipschitzCertificate",
            "the graph of the model must be there to bound its rounding",
            "Call certify again: a certificate that was pickled or built by hand has none",
            UncertifiableError,
        )
        _checks.require(
            dtype is None or unit_roundoffs(dtype) is not None,
            "LipschitzCertificate",
            "dtype must be a floating-point dtype",
            "Leave it out, or choose torch.float32, float64, bfloat16 or float16",
            dtype=dtype,
        )
        batch = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        self._check_inputs(batch, within)
        return forward_error(self._walker, batch, within, dtype)  # type: ignore[arg-type]

    def _check_inputs(self, batch: tuple[Any, ...], within: Tensor | float) -> None:
        nested = bool(self.input_shape) and isinstance(self.input_shape[0], tuple)
        shapes = self.input_shape if nested else (self.input_shape,)
        samples = [len(x) if isinstance(x, Tensor) and x.ndim else -1 for x in batch]
        if isinstance(within, Tensor) and within.ndim:
            samples.append(len(within))
        _checks.require(
            all(isinstance(x, Tensor) for x in batch)
            and tuple(tuple(x.shape[1:]) for x in batch) == tuple(shapes)
            and len(set(samples)) == 1,
            "LipschitzCertificate",
            f"inputs must be batches of {shapes}, one sample for each row of the logits",
            "Pass what the model was given",
            inputs=[tuple(getattr(x, "shape", ())) for x in batch],
            samples=samples,
        )

    def certified_accuracy(
        self, logits: Tensor, labels: Tensor, radii: Sequence[float]
    ) -> list[float]:
        """The share of samples that are classified rightly and certified at each radius.

        Args:
            logits: As in `radius`.
            labels: The true classes, (N,); for one output, positive for the positive class.
            radii: Radii in units of the input; 0 gives the clean accuracy.
        """
        counts = correct_within(logits, labels, self.radius(logits), radii)
        return [count / max(1, len(labels)) for count in counts]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def certified_accuracy(
    model: nn.Module,
    certificate: LipschitzCertificate,
    loader: Iterable[Sequence[Tensor]],
    radii: Sequence[float],
    *,
    norm: str = "l2",
) -> list[float]:
    """The certified accuracy of a model on a data set, at each radius.

    Args:
        model: The certified model, in eval mode.
        certificate: What `certify` returned for it.
        loader: Batches (inputs, labels); they are moved to the device of the model.
        radii: Radii in units of the input; 0 gives the clean accuracy.
        norm: The norm of the radii: `"l2"`, `"linf"` or `"l1"`.

    Raises:
        ValueError: The model is in train mode, or the loader is empty.
    """
    curve = certified_curve(model, certificate, loader, norm=norm)
    return [curve.at(radius) for radius in radii]


@torch.no_grad()
def certified_curve(
    model: nn.Module,
    certificate: LipschitzCertificate,
    loader: Iterable[Sequence[Tensor]],
    *,
    norm: str = "l2",
) -> RadiusCurve:
    """The certified accuracy on a data set as a function of the radius, and the area under it.

    Args:
        model: The certified model, in eval mode.
        certificate: What `certify` returned for it.
        loader: Batches (inputs, labels); they are moved to the device of the model.
        norm: The norm of the radii: `"l2"`, `"linf"` or `"l1"`.

    Raises:
        ValueError: The model is in train mode, or the loader is empty.
    """
    _checks.require(
        not model.training, "certified_accuracy", "the model must be in eval mode",
        "Call model.eval() first",
    )  # fmt: skip
    tensor = next(iter((*model.parameters(), *model.buffers())), None)
    curves = []
    for inputs, labels in loader:
        inputs = inputs if tensor is None else inputs.to(tensor.device)
        with autocast_region(inputs.device, certificate.autocast):
            logits = model(inputs)
        curves.append(certificate.curve(logits, labels, norm=norm))
    _checks.require(
        sum(curve.samples for curve in curves) > 0,
        "certified_accuracy",
        "the loader must not be empty",
        "Pass at least one batch",
    )
    radii = torch.cat([curve.radii for curve in curves]).sort(descending=True).values
    return RadiusCurve(radii, sum(curve.correct for curve in curves), norm)
