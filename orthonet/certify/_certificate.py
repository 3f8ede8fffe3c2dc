"""`certify` and what it returns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

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
from orthonet.certify._norms import EFFORTS, Effort
from orthonet.certify._norms import effort as with_effort
from orthonet.certify._propagate import Row, propagate
from orthonet.certify._radius import certified_radius, correct_within, pairwise_constants
from orthonet.errors import UncertifiableError

__all__ = ["LipschitzCertificate", "certified_accuracy", "certify"]


@dataclass(frozen=True, eq=False)
class LipschitzCertificate:
    r"""A proved upper bound of the l2 -> l2 Lipschitz constant of a model, for each sample.

    It holds for the function that the model computes in exact arithmetic with its weights as they
    are deployed; the rounding of a forward pass in float32 is not in it.

    Attributes:
        constant: The bound, in units of the output per unit of the input.
        rows: What was found on the way, one operation each.
        input_shape: The shape of one sample that it was made for.
        pairs: For a linear last layer, the upper bounds of the Lipschitz constants of all
            differences of two outputs, (classes, classes); never above sqrt(2) times the constant.
    """

    constant: Bound
    rows: tuple[Row, ...]
    input_shape: tuple[int, ...]
    pairs: Tensor | None = field(default=None, repr=False)

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
        return "\n".join([*text, f"Lipschitz constant ({self.constant.norm}, {kind}): {value:.9g}"])

    def to_json(self) -> str:
        """The certificate as JSON text; numbers keep every digit."""
        content = {
            "constant": asdict(self.constant),
            "input_shape": self.input_shape,
            "rows": [asdict(row) for row in self.rows],
            "pairs": None if self.pairs is None else self.pairs.tolist(),
            "torch": torch.__version__,
        }
        return json.dumps(content, indent=1)

    def radius(self, logits: Tensor) -> Tensor:
        r"""The l2 distance, in units of the input, within which the predicted class cannot change.

        $r = \min_{j \ne y} (f_y - f_j) / K_{yj}$, y the predicted class, with the constant
        $K_{yj}$ of $f_y - f_j$: that of `pairs`, or $\sqrt 2$ times `constant`. A tie has radius 0.
        One output is a binary classifier by its sign, with radius $|f| / L$.

        Args:
            logits: What the model returned, in any floating dtype; evaluated in float64 with
                outward rounding.

        Shape:
            logits: (N, classes), or (N,) or (N, 1) for a binary classifier; returns (N,), float64

        Guarantee:
            Lower bound of the distance to the nearest point of another class, for logits that are
            exact. To exclude the rounding of the forward pass, evaluate the model in float64.

        Raises:
            ValueError: The logits are not finite or do not fit the certificate.
        """
        return certified_radius(logits, self.constant.value, self.pairs)

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
) -> LipschitzCertificate:
    r"""Prove an upper bound of the l2 Lipschitz constant of a model, for each sample.

    The model is traced with `torch.fx`. Modules and functions with a rule get their constants,
    everything else is looked into; then constants are multiplied along the graph, summed where
    branches meet, and root-sum-squared where they are concatenated. Norms of matrices and
    convolutions are proved (`spectral_norm_bound`, `convolution_norm_bound`), and all arithmetic
    rounds outward.

    Args:
        model: Any module in eval mode that maps one tensor to one tensor.
        example_input: A batch of inputs; its values do not matter, its shape and dtype do.

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
        ['Linear', 'relu']
    """
    examples = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    _check_examples(examples)
    _checks.one_of("certify", tuple(EFFORTS), effort=effort)
    _check_model(model)
    with torch.no_grad(), with_effort(effort):
        walker = propagate(model, examples)
        pairs = None
    shapes = tuple(tuple(x.shape[1:]) for x in examples)
    return LipschitzCertificate(
        walker.bound, walker.rows(), shapes[0] if len(shapes) == 1 else shapes, pairs
    )


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
