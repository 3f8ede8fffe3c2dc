"""`certify` and what it returns."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify import (  # noqa: F401
    _function_rules,
    _matrix_rules,
    _module_rules,
    _spatial_rules,
)
from orthonet.certify._bound import Bound
from orthonet.certify._forward_error import forward_error, unit_roundoffs
from orthonet.certify._lower import lower_bound
from orthonet.certify._norms import EFFORTS, Effort, limits
from orthonet.certify._norms import effort as with_effort
from orthonet.certify._propagate import Row, Walker, propagate
from orthonet.certify._radius import certified_radius, correct_within, pairwise_constants
from orthonet.certify._rules import Operand
from orthonet.errors import UncertifiableError

__all__ = ["LipschitzCertificate", "certified_accuracy", "certify"]


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
    """

    constant: Bound
    rows: tuple[Row, ...]
    input_shape: tuple[Any, ...]
    pairs: Tensor | None = field(default=None, repr=False)
    lower: Bound | None = None
    outputs: tuple[Bound, ...] = ()
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
            "rows": [asdict(row) for row in self.rows],
            "pairs": None if self.pairs is None else self.pairs.tolist(),
            "torch": torch.__version__,
        }
        return json.dumps(content, indent=1)

    def radius(
        self,
        logits: Tensor,
        *,
        inputs: Tensor | Sequence[Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        r"""The l2 distance, in units of the input, within which the predicted class cannot change.

        $r = \min_{j \ne y} (f_y - f_j) / K_{yj}$, y the predicted class, with the constant
        $K_{yj}$ of $f_y - f_j$: that of `pairs`, or $\sqrt 2$ times `constant`. A tie has radius 0.
        One output is a binary classifier by its sign, with radius $|f| / L$.

        With `inputs`, the forward pass itself may round: each margin loses $2 \sqrt 2 e$, where e
        is the `rounding` anywhere within that distance of the sample. The class that the *deployed*
        model predicts, in floating point, is then the same at all points that near.

        Args:
            logits: What the model returned, in any floating dtype; evaluated in float64 with
                outward rounding.
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
        found = certified_radius(logits, self.constant.value, self.pairs)
        if inputs is None:
            return found
        near = torch.where(found.isfinite(), found, 0.0)
        error = self.rounding(inputs, within=near, dtype=dtype)
        less = certified_radius(logits, self.constant.value, self.pairs, error)
        return torch.minimum(less, found).clamp_min(0.0)

    def rounding(
        self,
        inputs: Tensor | Sequence[Tensor],
        *,
        within: Tensor | float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        r"""How far the outputs of a forward pass can be from exact arithmetic, in the l2 norm.

        Norm by norm along the graph, with $\gamma_k = k u / (1 - k u)$ for sums of k products and
        the magnitudes that the model takes at the inputs. Weights count as they are stored.

        Args:
            inputs: A batch for the model.
            within: The bound holds for all points within this distance, one for each sample.
            dtype: Of the forward pass. `torch.bfloat16` and `torch.float16` stand for autocast:
                weights and activations are rounded to it, sums are accumulated in float32.

        Shape:
            inputs: (N, *); returns (N,), float64

        Guarantee:
            Upper bound if every product, sum and quotient is rounded to nearest, in any order,
            with or without fused multiplications (so not TF32), elementary functions are accurate
            to 64 units in the last place, and nothing overflows.

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
            unit_roundoffs(dtype) is not None,
            "LipschitzCertificate",
            "dtype must be a floating-point dtype",
            "Choose torch.float32, float64, bfloat16 or float16",
            dtype=dtype,
        )
        batch = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        return forward_error(self._walker, batch, within, dtype)  # type: ignore[arg-type]

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


def certify(
    model: nn.Module,
    example_input: Tensor | Sequence[Tensor],
    *,
    effort: Effort = "default",
    lower: bool = True,
) -> LipschitzCertificate:
    r"""Prove an upper bound of the l2 Lipschitz constant of a model, for each sample.

    The graph that `torch.export` gives, with a free batch size, is walked from input to output;
    whatever does not depend on the input (parametrized weights, batch norm in eval mode) is
    computed first, in the dtype of the model. Constants are multiplied along the graph, summed
    where branches meet, and root-sum-squared where they are concatenated. Affine operations in a
    row are joined into one matrix or one convolution. Norms are proved (`spectral_norm_bound`,
    `convolution_norm_bound`), and all arithmetic rounds outward.

    Args:
        model: Any module in eval mode that maps tensors to tensors.
        example_input: A batch of inputs, or one batch for each argument of the model; the values
            do not matter, shape and dtype do.
        effort: `"fast"`: coarse bounds of large convolutions, islands up to side 128, no search
            from below. `"default"`: islands up to side 1024. `"tight"`: up to 4096, the best of
            several bounds, a longer search.
        lower: Search for a secant from below, so that the gap is seen (not with `"fast"`).

    Shape:
        example_input: (N, *), the batch first

    Guarantee:
        $\|f(x) - f(x')\|_2 \le L \|x - x'\|_2$ for all single samples, in exact arithmetic with
        the deployed weights, if the rules that users registered are right.

    Raises:
        UncertifiableError: The model is in train mode, holds NaN or half-precision weights, mixes
            samples, cannot be traced, or does something that no rule covers. The message names
            the operation and the module and says what to do.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()
        >>> [row.op for row in certify(model, torch.ones(1, 2)).rows]
        ['linear', 'relu']
    """
    examples = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    _check_examples(examples)
    _checks.one_of("certify", tuple(EFFORTS), effort=effort)
    _check_model(model)
    with torch.no_grad(), with_effort(effort):
        walker = propagate(model, examples)
        pairs = _pairs(walker)
        below = lower_bound(walker, examples) if lower else None
        each = tuple(Bound(0.0, kind="exact") if s is None else walker.bound_of(s)
                     for s in walker.outputs)  # fmt: skip
    shapes = tuple(tuple(x.shape[1:]) for x in examples)
    shape = shapes[0] if len(shapes) == 1 else shapes
    return LipschitzCertificate(walker.bound, walker.rows(), shape, pairs, below, each, walker)


def _pairs(walker: Walker) -> Tensor | None:
    """The constants of differences of outputs, by the last matrix and by the last island."""
    state = walker.outputs[0] if len(walker.outputs) == 1 else None
    if state is None or len(state.shape) != 1 or state.source is None:
        return None
    found: list[Tensor | None] = []
    call, whole = state.call, walker.bound.value
    if call.op == "linear" and isinstance(call.args[0], Operand):
        weight = call.constant(1, "weight")
        found.append(pairwise_constants(weight, call.args[0].bound.value, whole))
    inside = math.prod(state.start.shape)
    if len(state.island) > 1 and state.shape[0] * inside <= limits().entries:
        island = walker.matrix_of(state)
        if island is not None:
            features = walker.bound_of(state.start).value
            found.append(pairwise_constants(island.matrix, features, whole, island.error))
    tables = [t for t in found if t is not None]
    if len(tables) == 2:
        return torch.minimum(*tables)
    return tables[0] if tables else None


def _check_examples(examples: tuple[Tensor, ...]) -> None:
    for example in examples:
        _checks.require(
            isinstance(example, Tensor) and example.ndim >= 1 and example.is_floating_point(),
            "certify",
            "example_input must be a floating-point tensor whose first dimension is the batch",
            "Pass a batch, e.g. torch.zeros(1, 3, 32, 32); behind an embedding, certify the rest "
            "of the model on embedded tokens, for a lookup by index has no constant",
            example_input=example,
        )
    _checks.require(
        len({len(x) for x in examples}) == 1,
        "certify",
        "all inputs must have the same batch size",
        "Pass one batch of samples for each argument of the model",
        example_input=examples,
    )


def _check_model(model: nn.Module) -> None:
    for path, module in model.named_modules():
        _checks.require(
            not module.training,
            "certify",
            "every module must be in eval mode",
            "Call model.eval() first: dropout and batch statistics make another function of it",
            UncertifiableError,
            path=path or type(module).__name__,
        )
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        _checks.require(
            tensor.dtype not in (torch.float16, torch.bfloat16),
            "certify",
            "weights must be float32 or float64",
            "Call model.float(): the rounding of half precision would exceed most margins",
            UncertifiableError,
            path=path,
            dtype=tensor.dtype,
        )
        _checks.require(
            not tensor.is_meta and (tensor.is_complex() or bool(tensor.isfinite().all())),
            "certify",
            "weights must be finite",
            "Look for the step of the training that made a NaN or an infinity",
            UncertifiableError,
            path=path,
        )


@torch.no_grad()
def certified_accuracy(
    model: nn.Module,
    certificate: LipschitzCertificate,
    loader: Iterable[Sequence[Tensor]],
    radii: Sequence[float],
) -> list[float]:
    """The certified accuracy of a model on a data set, at each radius.

    Args:
        model: The certified model, in eval mode.
        certificate: What `certify` returned for it.
        loader: Batches (inputs, labels); they are moved to the device of the model.
        radii: Radii in units of the input; 0 gives the clean accuracy.

    Raises:
        ValueError: The model is in train mode, or the loader is empty.
    """
    _checks.require(
        not model.training, "certified_accuracy", "the model must be in eval mode",
        "Call model.eval() first",
    )  # fmt: skip
    tensor = next(iter((*model.parameters(), *model.buffers())), None)
    counts, total = [0] * len(radii), 0
    for inputs, labels in loader:
        logits = model(inputs if tensor is None else inputs.to(tensor.device))
        found = correct_within(logits, labels, certificate.radius(logits), radii)
        counts = [a + b for a, b in zip(counts, found, strict=True)]
        total += len(labels)
    _checks.require(
        total > 0, "certified_accuracy", "the loader must not be empty", "Pass at least one batch"
    )
    return [count / total for count in counts]
