"""The certificate that `certify` returns."""

from __future__ import annotations

import functools
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify._bound import Bound, Row
from orthonet.certify._radius import (
    FAR,
    RadiusCurve,
    certified_radius,
    convert_radius,
    correct_within,
    longer,
    reach,
)
from orthonet.certify._rows import (
    batch_of,
    check_dtypes,
    check_inputs,
    dtype_name,
    require_l2,
    short_html,
    short_text,
    text_table,
)
from orthonet.certify.graph.identity import data_hashes, hashes
from orthonet.certify.graph.regions import autocast_region
from orthonet.certify.local.certificate import LocalBound, local_certificate
from orthonet.certify.local.radius import enlarged
from orthonet.certify.proof import Claims, load, save
from orthonet.certify.report.figures import Plot, constants_plot
from orthonet.certify.report.guesses import elsewhere
from orthonet.certify.rounding.forward import forward_error, unit_roundoffs
from orthonet.certify.rounding.modes import check_products, check_subnormal
from orthonet.certify.walk.walker import Walker
from orthonet.errors import UncertifiableError

__all__ = ["LipschitzCertificate"]


@dataclass(frozen=True, eq=False, repr=False)
class LipschitzCertificate:
    r"""A proved upper bound of the Lipschitz constant of a model, for each sample.

    It holds for the function that the model computes in exact arithmetic with its deployed weights.
    `rounding` bounds the rounding of a forward pass, and `radius` subtracts it if it gets the
    inputs.

    Attributes:
        constant: The bound, in units of the output per unit of the input, between the norms
            `norm` and `to`. Several inputs count as one long vector, and so do several outputs.
        rows: One `Row` for each operation, or for several affine ones.
        input_shape: The shape of one sample; for several inputs, all shapes.
        pairs: For an affine last layer, the upper bounds of the Lipschitz constants of all
            differences of two outputs, (classes, classes); never above sqrt(2) times the constant
            to l2, 2 times that to l-infinity, and the constant to l1.
        lower: A bound from below, of kind `"estimate"`, by a secant of the function; None without a
            search. `constant.value / lower.value` bounds how loose the bound is.
        outputs: The bound of each output alone.
        autocast: The dtype of `torch.autocast` under which the bound holds; None without.
        output_shapes: The shape of one sample of each output; empty where they are not known.
        output_dtypes: The dtype of each output, as the model computes it.
        hashes: SHA-256 of every parameter and buffer of the model when it was certified, by name.
            The bytes are in row-major order, little-endian. `matches` compares them.
        constants: The same for the constants of the exported graph, in which layers of this library
            store the weights that they compute.
        data: SHA-256 of all other data of the modules, by name.
        roundings: How often a number is rounded on the way to an output; 0 if unknown.
    """

    constant: Bound
    rows: tuple[Row, ...]
    input_shape: tuple[Any, ...]
    pairs: Tensor | None = field(default=None, repr=False)
    lower: Bound | None = None
    outputs: tuple[Bound, ...] = ()
    autocast: torch.dtype | None = None
    _walker: Walker | None = field(default=None, repr=False)
    output_shapes: tuple[tuple[int, ...], ...] = ()
    output_dtypes: tuple[torch.dtype, ...] = ()
    hashes: dict[str, str] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    roundings: float = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_walker": None}  # the graph stays behind

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(elsewhere(name), name=name, obj=self)

    @property
    def lipschitz(self) -> float:
        """`constant.value`, as every layer tells its own constant by this name.

        A proved upper bound; the Lipschitz constant itself where `constant.kind` is `"exact"`.
        """
        return self.constant.value

    @property
    def norm(self) -> str:
        """The norm of the input: `"l2"`, `"linf"` or `"l1"`."""
        return self.constant.ends[0]

    @property
    def to(self) -> str:
        """The norm of the output."""
        return self.constant.ends[1]

    def plot(self, ax: Any = None) -> Plot:
        """Return a figure of the constants of the operations.

        Args:
            ax: Axes of matplotlib to draw into, too. The figure itself needs no package.
        """
        return constants_plot(self.rows, self.constant, ax)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"LipschitzCertificate: {self.summary()}\n{short_text(self.rows)}".rstrip()

    def _repr_html_(self) -> str:
        """The same in a notebook."""
        return f"<p>{escape(self.summary())}</p>{short_html(self.rows)}"

    def summary(self) -> str:
        """Return the constant, and what a search reached from below, in one line."""
        value, kind = self.constant.value, self.constant.kind
        last = f"Lipschitz constant ({self.constant.norm}, {kind}): {value:.9g}"
        if self.autocast is not None:
            last += f" under {dtype_name(self.autocast)} autocast"
        if self.lower is not None:
            last += f"; at least {self.lower.value:.6g} is reached"
        return last

    def table(self) -> str:
        """Return the rows as a text table, with the constant of the model in the last line."""
        return f"{text_table(self.rows)}\n{self.summary()}"

    def to_json(self) -> str:
        """Return the certificate as JSON text; numbers keep every digit."""
        content = {
            "constant": asdict(self.constant),
            "lower": None if self.lower is None else asdict(self.lower),
            "outputs": [asdict(bound) for bound in self.outputs],
            "input_shape": self.input_shape,
            "autocast": None if self.autocast is None else dtype_name(self.autocast),
            "rows": [asdict(row) for row in self.rows],
            "pairs": None if self.pairs is None else self.pairs.tolist(),
            "hashes": self.hashes,
            "constants": self.constants,
            "versions": {
                "orthonet": version("orthonet"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        return json.dumps(content, indent=1)

    def save(
        self,
        path: str | Path,
        *,
        local: Tensor | Sequence[Tensor] | None = None,
        radius: float | Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        r"""Write the proof for an independent checker, `orthonet-check`.

        `path` gets the graph and the gain of each operation as JSON, a `.safetensors` file next to
        it the constants. The bound of the file is about 1e-6 above `constant` for orthogonal nets.
        With samples x as `local`, the file also claims in each ball $\|a - x\| \le r$ a bound of
        $\|f(a) - f(x)\| / \|a - x\|$ and, where it follows, the class, in exact arithmetic. The
        checker repeats a pass like that of `local_radius`, and the radii of both differ.

        Args:
            path: The file to write, e.g. `"certificate.json"`.
            local: A batch, or one batch for each argument of the model.
            radius: Of the balls, one or (N,). None: the largest ones of verified classes, if any.
            labels: The true classes, (N,): of a wrong prediction no class is claimed.

        Raises:
            UncertifiableError: The certificate has lost the graph, or the checker does not follow
                an operation in balls.
            OSError: The disk is full, or the folder is missing; files of an earlier save stay.
        """
        require_l2("save", self.constant)
        save(self, self._walker, path, Claims.of(local, radius, labels, self.input_shape))

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
        return cls(**load(path))

    def radius(
        self,
        logits: Tensor | nn.Module | None = None,
        x: Tensor | Sequence[Tensor] | None = None,
        *,
        norm: str | None = None,
        labels: Tensor | None = None,
        target: Tensor | None = None,
        inputs: Tensor | Sequence[Tensor] | None = None,
        dtype: torch.dtype | None = None,
        model: nn.Module | None = None,
    ) -> Tensor:
        r"""Return the distance within which the predicted class of each sample cannot change.

        `certificate.radius(model, x)` runs the model, checks that it is the certified one, and
        subtracts the rounding of this forward pass: the deployed model predicts the same class in
        floating point at all points that near. With `radius(logits)` the caller runs the forward
        pass.

        $r = \min_{j \ne y} (f_y - f_j) / K_{yj}$, y the predicted class, with the constant
        $K_{yj}$ of $f_y - f_j$: from `pairs`, or a multiple of `constant`: $\sqrt 2$ if the norm of
        the output is l2, 2 for l-infinity, 1 for l1. A tie has radius 0.
        One output is a binary classifier by its sign, with radius $|f| / L$. As $\|\delta\|_2 \le
        \|\delta\|_1$ and $\|\delta\|_2 \le \sqrt n\,\|\delta\|_\infty$ for n entries of the input,
        a radius in l2 is one in l1, and divided by $\sqrt n$ one in l-infinity. A certificate of
        `certify(..., norm="linf")` gives larger ones there, as a rule.

        With the inputs, each margin loses $2 \sqrt 2 e$, where e is the `rounding` anywhere within
        that distance of the sample. Without them, logits lose the rounding of their dtype at the
        sample and at the other point. In float64 that is u relative to each; in lower precision it
        is an estimate, 8 times the root of the number of `roundings`.

        Args:
            logits: The certified model in eval mode; or what it returned, in any floating dtype.
                They are evaluated in float64 with outward rounding.
            x: With a model, a batch for it, or one batch for each of its arguments.
            norm: `"l2"`, `"linf"` or `"l1"`; None for that of the certificate.
            labels: The true classes, (N,); with them, a wrong prediction has radius 0.
            target: One class a sample, (N,): only a change to this class counts.
            inputs: With logits, the inputs of the model: subtracts the rounding of its forward.
            dtype: With `inputs`, the dtype in which the model was run, see `rounding`.
            model: With logits, the model that computed them; it must be the certified one.

        Shape:
            logits: (N, classes), or (N,) or (N, 1) for a binary classifier; returns (N,), float64

        Guarantee:
            Lower bound of the distance to the nearest point of another class: with the inputs, for
            the deployed forward pass. Without them, it holds if the logits are off by no more than
            what is subtracted, which is not proved.

        Raises:
            ValueError: The logits are not finite or do not fit the certificate, or the model is
                not the one that was certified.
            UncertifiableError: With the inputs, the rounding of an operation is not known.
        """
        logits, inputs = self._read(logits, x, inputs, model)
        find = functools.partial(
            certified_radius,
            logits,
            self.constant.value,
            self.pairs,
            labels=labels,
            target=target,
            outputs=self._classes(),
            to=self.to,
        )
        found = find(dtype=self._output_dtype(), roundings=self.roundings)
        if inputs is not None:
            samples = self._walker.program.samples if self._walker is not None else ()
            check_dtypes(logits, inputs, dtype, self._output_dtype(), samples)
            whole = find(torch.zeros(len(logits), dtype=torch.float64))
            proved = torch.zeros_like(whole)
            # Where exact arithmetic never changes the class, floats may do so far away.
            for far in FAR if bool(whole.isinf().any()) else (0.0,):
                near = whole.clamp(max=far) if far else whole
                reached = near * longer(self.norm, "l2", self._entries()) * (1.0 + 2.0**-50)
                error = self.rounding(inputs, within=reached, dtype=dtype)
                within = torch.minimum(find(error), near)
                proved = torch.maximum(proved, within)
            found = torch.minimum(proved, found).clamp_min(0.0)
        return convert_radius(found, norm or self.norm, self._entries(), self.norm)

    def local_radius(
        self,
        model: nn.Module,
        x: Tensor | Sequence[Tensor],
        *,
        norm: str = "l2",
        labels: Tensor | None = None,
        steps: int = 3,
    ) -> Tensor:
        r"""Return the radii of `radius(model, x)`, enlarged by bounds in balls around the samples.

        In a ball of radius r around a sample every unit moves in an interval only, and a chord of
        its activation that starts there has a slope in an interval. With the constants
        $K_{yj}(r)$ that follow, $\min(r, \min_j (f_y - f_j) / K_{yj}(r))$ is a radius.
        Affine operations, pooling, normalizations and activations of entries or pairs are followed
        unit by unit; others count with their gain. Networks that are trained without constraints
        gain a factor of 2 or more; orthogonal networks gain nothing. A pass over the graph has one
        row for each entry of the input and each unit whose slope is not known. A sample whose rows
        do not fit into a gigabyte keeps its radius, as does one whose gradient allows no gain.

        Args:
            model: The certified model in eval mode.
            x: A batch for it, or one batch for each of its arguments.
            norm: As in `radius`.
            labels: The true classes, (N,); with them, a wrong prediction has radius 0.
            steps: Balls that are tried for each sample, besides the one that is proved.

        Shape:
            returns (N,), float64, on the CPU

        Guarantee:
            Lower bound of the distance to the nearest point where the deployed forward pass
            predicts another class; never below `radius(model, x)`.

        Raises:
            ValueError: As for `radius`, or `steps` is not a positive int.
            UncertifiableError: The certificate has lost the graph, or as for `radius`.

        Examples:
            >>> from orthonet.certify import certify
            >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
            >>> x = torch.randn(4, 8)
            >>> certificate = certify(model, x)
            >>> local = certificate.local_radius(model, x)
            >>> bool((local >= certificate.radius(model, x)).all())
            True
        """
        _checks.positive_int("LipschitzCertificate", steps=steps)
        require_l2("local_radius", self.constant)
        walker = self._graph()
        logits, batch = self._read(model, x, None, None)
        radii = self.radius(logits, inputs=batch, labels=labels)
        if logits.ndim != 2 or logits.shape[1] < 2 or len(walker.program.outputs) != 1:
            return convert_radius(radii, norm, self._entries())
        found = enlarged(
            walker, batch, logits, radii, self.constant.value, self.pairs, self.rounding, steps
        )
        return convert_radius(found, norm, self._entries())

    def local_bound(
        self, x: Tensor | Sequence[Tensor], radius: float, *, norm: str = "l2"
    ) -> tuple[LocalBound, ...]:
        r"""Return a bound of the Lipschitz constant in the ball around each sample.

        The `constants` of `certify(model, x, radius=r)`, which needs no global constant, or
        `constant` where that is smaller.

        Args:
            x: A batch of inputs, or one batch for each argument of the model.
            radius: The radius of the balls, in units of the input.
            norm: The shape of the balls: `"l2"`, `"linf"` or `"l1"`. The bound is from l2 to l2.

        Guarantee:
            $\|f(a) - f(b)\|_2 \le K \|a - b\|_2$ for all a, b in the closed ball, in exact
            arithmetic; never above `constant`.

        Raises:
            ValueError: The inputs do not fit, or `radius` is negative or not finite.
            UncertifiableError: The certificate has lost the graph.

        Examples:
            >>> from orthonet.certify import certify
            >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
            >>> certificate = certify(model, torch.ones(1, 8))
            >>> (local,) = certificate.local_bound(torch.ones(1, 8), 0.01)
            >>> local.value < certificate.constant.value
            True
        """
        require_l2("local_bound", self.constant)
        walker = self._graph()
        batch = batch_of(x)
        check_inputs(self.input_shape, batch, 0.0)
        size = reach(1.0, radius, norm, self._entries())
        return local_certificate(walker, batch, size).constants

    def _read(self, logits: Any, x: Any, inputs: Any, model: Any) -> tuple[Tensor, Any]:
        """The logits, and the inputs where they are known."""
        if isinstance(logits, nn.Module):
            logits, model = None, logits
        if model is not None:
            self.require_match(model)
        if logits is not None:
            _checks.require(
                x is None,
                "LipschitzCertificate",
                "the first argument of radius must be the model where a batch follows",
                "Call certificate.radius(model, x), or certificate.radius(logits, inputs=x)",
                first=logits,
            )
            return logits, inputs
        x = inputs if x is None else x
        if x is None or not isinstance(model, nn.Module):
            _checks.fail(
                "LipschitzCertificate",
                "radius needs the model and the batch that it is run on, or logits",
                "Call certificate.radius(model, x)",
                model=type(model).__name__,
                x=x,
            )
        _checks.require(
            not model.training,
            "LipschitzCertificate",
            "the model must be in eval mode",
            "Call model.eval() first",
        )
        batch = batch_of(x)
        check_inputs(self.input_shape, batch, 0.0)
        tensor = next(iter((*model.parameters(), *model.buffers())), batch[0])
        batch = tuple(t.to(tensor.device) for t in batch)
        with torch.no_grad(), autocast_region(tensor.device, self.autocast):
            logits = model(*(t.clone() for t in batch))  # a forward may write to its input
        _checks.require(
            isinstance(logits, Tensor),
            "LipschitzCertificate",
            "the model must return one tensor of logits",
            "Run it, and pass the logits: certificate.radius(logits, inputs=x)",
            output=type(logits).__name__,
        )
        return logits, batch

    def matches(self, model: nn.Module) -> bool:
        """Return whether this is the model that was certified.

        It compares the SHA-256 of every parameter and buffer, and of what else its forward may
        read: attributes, hooks, code, globals, closures and class attributes.
        """
        return not self._changed(model)

    def require_match(self, model: nn.Module) -> None:
        """Raise an error unless the model `matches` the certificate.

        Raises:
            ValueError: The model does not match; the message names what has changed.
        """
        changed = self._changed(model)
        _checks.require(
            not changed,
            "LipschitzCertificate",
            "the model must be the one that was certified",
            "Call certify again: a certificate holds for the weights that it was made for",
            changed=changed[:5],
        )

    def _changed(self, model: nn.Module) -> list[str]:
        _checks.module("LipschitzCertificate", model=model)
        found = {**hashes(model), **data_hashes(model)}
        known = {**self.hashes, **self.data}
        return [name for name in {**known, **found} if known.get(name) != found.get(name)]

    def _classes(self) -> set[int]:
        """The numbers of classes that logits may have; none where they are not known."""
        return {
            n for shape in self.output_shapes for n in ((shape[0], shape[-1]) if shape else (1,))
        }

    def _output_dtype(self) -> torch.dtype | None:
        """The dtype with the fewest bits that an output has."""
        return max(self.output_dtypes, key=lambda d: torch.finfo(d).eps, default=None)

    def band(self, radius: float, *, norm: str | None = None) -> float:
        r"""Bound how far the output can move, for regression: $\|f(x') - f(x)\|_q \le K r$.

        Args:
            radius: The size of the perturbation of the input.
            norm: The norm of the perturbation: `"l2"`, `"linf"` or `"l1"`; None for that of the
                certificate. The band is in the norm of its outputs, `to`.

        Returns:
            A proved upper bound, rounded upward, in units of the output.

        Raises:
            ValueError: `radius` is negative or not finite.
        """
        return reach(self.constant.value, radius, norm or self.norm, self._entries(), self.norm)

    def curve(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        norm: str | None = None,
        inputs: Tensor | Sequence[Tensor] | None = None,
    ) -> RadiusCurve:
        """Return the certified accuracy as a function of the radius, and the area under it.

        Args:
            logits: What the model returned, as in `radius`.
            labels: The true classes, (N,); for one output, positive for the positive class.
            norm: As in `radius`.
            inputs: As in `radius`.
        """
        correct = correct_within(logits, labels, self.radius(logits), [0.0])[0]
        found = self.radius(logits, norm=norm, labels=labels, inputs=inputs)
        return RadiusCurve(found.sort(descending=True).values, correct, norm or self.norm)

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
        r"""Bound how far a forward pass can be from exact arithmetic, in the l2 norm.

        The bound follows the norms along the graph, with $\gamma_k = k u / (1 - k u)$ for sums of k
        products and the magnitudes that the model takes at the inputs. Weights are taken as they
        are stored.

        Args:
            inputs: A batch for the model.
            within: The bound holds for all points within this distance, one for each sample.
            dtype: Of the forward pass; None for what the model was certified in: the dtypes of its
                values, under autocast those that PyTorch gives to each operation. Otherwise one
                dtype for all of it; `torch.bfloat16` and `torch.float16` then also round every
                weight. Sums are accumulated in at least float32 (on CUDA only with
                `torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False`, and its
                twin for fp16).

        Shape:
            inputs: (N, *); returns (N,), float64

        Guarantee:
            Upper bound if every product, sum and quotient is rounded to nearest, in any order,
            with or without fused multiplications (so not TF32), elementary functions are accurate
            to 64 units in the last place, and nothing overflows. In float16 the bound is infinite
            where something might overflow.

        Raises:
            UncertifiableError: The rounding of an operation is not known, a mode is on under which
                products have fewer bits or subnormal numbers are flushed to zero, or the
                certificate was pickled and has lost the graph.
        """
        walker = self._graph()
        _checks.require(
            dtype is None or unit_roundoffs(dtype) is not None,
            "LipschitzCertificate",
            "dtype must be a floating-point dtype",
            "Leave it out, or choose torch.float32, float64, bfloat16 or float16",
            dtype=dtype,
        )
        batch = batch_of(inputs)
        check_inputs(self.input_shape, batch, within)
        program = walker.program
        check_subnormal("LipschitzCertificate")
        dtypes = {dtype} if dtype else {program.dtype_of(node) for node in program.nodes}
        devices = {x.device for x in (*batch, *program.samples)}
        check_products("LipschitzCertificate", devices, dtypes)
        return forward_error(walker, batch, within, dtype)

    def _graph(self) -> Walker:
        if self._walker is None:
            _checks.fail(
                "LipschitzCertificate",
                "the graph of the model must be there to bound its rounding and its moves",
                "Call certify again: a certificate that was pickled or built by hand has none",
                UncertifiableError,
            )
        return self._walker

    def certified_accuracy(
        self, logits: Tensor, labels: Tensor, radii: Sequence[float]
    ) -> list[float]:
        """Return the share of samples that are classified correctly and certified at each radius.

        Args:
            logits: As in `radius`.
            labels: The true classes, (N,); for one output, positive for the positive class.
            radii: Radii in units of the input; 0 gives the clean accuracy.
        """
        counts = correct_within(logits, labels, self.radius(logits), radii)
        return [count / max(1, len(labels)) for count in counts]
