"""Proving the constant of a model: from its graph to a certificate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from orthonet import _checks
from orthonet.certify._bound import Bound
from orthonet.certify._certificate import LipschitzCertificate
from orthonet.certify._progress import Progress, report, reporting
from orthonet.certify._radius import NORMS, Norm, pairwise_constants
from orthonet.certify.graph.identity import data_hashes, hashes
from orthonet.certify.graph.outside import digest
from orthonet.certify.graph.regions import HALF
from orthonet.certify.local.certificate import LocalCertificate, is_radius, local_certificate
from orthonet.certify.local.encoders import written_out
from orthonet.certify.local.nonlinear import IN_BALLS
from orthonet.certify.norms import EFFORTS, Effort, limits
from orthonet.certify.norms import effort as with_effort
from orthonet.certify.rounding.modes import check_subnormal, exclusive
from orthonet.certify.rules import Operand
from orthonet.certify.walk.below import lower_bound, lower_mixed
from orthonet.certify.walk.mixed import Mixed, mixed_bound
from orthonet.certify.walk.walker import Walker, propagate
from orthonet.errors import UncertifiableError

__all__ = ["certify", "walker_in_balls"]


@overload
def certify(
    model: nn.Module,
    example_input: Tensor | Sequence[Tensor],
    *,
    norm: Norm = ...,
    to: Norm | None = ...,
    effort: Effort = ...,
    lower: bool = ...,
    autocast: torch.dtype | None = ...,
    progress: Progress | None = ...,
    radius: None = ...,
) -> LipschitzCertificate: ...


@overload
def certify(
    model: nn.Module,
    example_input: Tensor | Sequence[Tensor],
    *,
    effort: Effort = ...,
    lower: bool = ...,
    autocast: torch.dtype | None = ...,
    progress: Progress | None = ...,
    radius: float,
) -> LocalCertificate: ...


def certify(
    model: nn.Module,
    example_input: Tensor | Sequence[Tensor],
    *,
    norm: Norm = "l2",
    to: Norm | None = None,
    effort: Effort = "default",
    lower: bool = True,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
    radius: float | None = None,
) -> LipschitzCertificate | LocalCertificate:
    r"""Prove an upper bound of the Lipschitz constant of a model, for each sample.

    `torch.export` exports the model with a free batch size, and the graph is walked from input to
    output. Whatever does not depend on the input (parametrized weights, batch norm in eval mode) is
    computed first, in the dtype of the model. Constants multiply along the graph and add where
    branches are summed. Where branches are concatenated, the root of the sum of squares is taken.
    Consecutive affine operations are joined into one matrix or one convolution. Norms are proved
    (`spectral_norm_bound`, `convolution_norm_bound`), and all arithmetic rounds outward.

    In l1 and l-infinity, every entry of every node has a bound of its own. Affine operations act on
    these bounds by the moduli of their matrix, several in a row by those of their product: for one
    of them this is the operator norm, the largest sum of a column or a row. Concatenations,
    residual sums and poolings then need no rule. The result is the least of three bounds: of the
    moves of entries from input to output, of the costs of moves from output to input, and of the
    l2 constant by equivalence of norms. The last row of the table says which one it is.

    Args:
        model: Any module in eval mode that maps tensors to tensors.
        example_input: A batch of inputs, or one batch for each argument of the model. The bound
            depends on shape and dtype only; the search from below starts from the values.
        norm: The norm of the input: `"l2"`, `"linf"` or `"l1"`.
        to: The norm of the output; None for the same one. Between different norms, the exact norm
            of a matrix is known from l1 (the largest norm of a column) and to l-infinity (the
            largest dual norm of a row). The others are bounded by equivalence.
        effort: `"fast"`: coarse bounds of large convolutions, islands up to side 128, no search
            from below. `"default"`: islands up to side 1024. `"tight"`: up to 4096, the best of
            several bounds, a longer search. Chains of affine maps and activations anywhere in the
            graph are bounded by [`mlp_bound`][orthonet.certify.mlp_bound], too: by its closed form
            up to width 256 with `"default"`, by its descent up to 1024 with `"tight"`.
        lower: Search for a secant from below, which shows the gap (not with `"fast"`). The search
            ends when the gap is below 1e-4, and is short if every operation has the constant 1.
        autocast: Certify the model as it runs under `torch.autocast` to this dtype, `bfloat16` or
            `float16`: with the weights of each operation rounded where PyTorch rounds them. The
            model runs once under autocast to find where. `radius(logits, inputs=...)` then
            subtracts the rounding of that forward pass, each operation in its dtype.
        progress: Called as `progress(done, total, what)` after each step of the proof. The logger
            `"orthonet.certify"` also gets a line every few seconds at level INFO.
        radius: Bound the model in the l2 balls of this radius around the samples of
            `example_input` only. This returns a `LocalCertificate`, and also works for models
            without a global constant: products of activations, gates, softmax attention,
            normalizations with a small eps. Nothing is searched from below.

    Shape:
        example_input: (N, *), the batch first

    Guarantee:
        $\|f(x) - f(x')\|_q \le L \|x - x'\|_p$ for all single samples, in exact arithmetic with
        the deployed weights, if the rules that users registered are right; p is `norm`, q is `to`.

    Raises:
        UncertifiableError: The model is in train mode, holds NaN or half-precision weights, mixes
            samples, cannot be traced, or does something that no rule covers. The message names
            the operation and the module and says what to do. Under autocast also: weights leave
            the range of float16, or are rounded inside a module that has one rule for all.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()
        >>> [row.op for row in certify(model, torch.ones(1, 2)).rows]
        ['linear', 'relu']
        >>> layer = nn.Linear(2, 1).requires_grad_(False).eval()
        >>> _ = layer.weight.copy_(torch.tensor([[3.0, -4.0]]))
        >>> for norm in ("l2", "linf", "l1"):
        ...     print(round(certify(layer, torch.ones(1, 2), norm=norm).lipschitz, 9))
        5.0
        7.0
        4.0
    """
    _check_is_module(model)
    single = not isinstance(example_input, (tuple, list))
    examples: Any = (example_input,) if single else tuple(example_input)
    _check_examples(examples, example_input)
    _checks.one_of("certify", tuple(EFFORTS), effort=effort)
    _checks.one_of("certify", NORMS, norm=norm)
    _checks.one_of("certify", (None, *NORMS), to=to)
    to = norm if to is None else to
    _checks.one_of("certify", (None, *HALF), autocast=autocast)
    _checks.boolean("certify", lower=lower)
    _checks.require(
        progress is None or callable(progress),
        "certify",
        "progress must be a function progress(done, total, what)",
        "Leave it out: the logger 'orthonet.certify' tells the same at level INFO",
        progress=progress,
    )
    _checks.require(
        radius is None or is_radius(radius),
        "certify",
        "radius must be finite and non-negative",
        "Leave it out for the whole space",
        radius=radius,
    )
    _checks.require(
        radius is None or (norm, to) == ("l2", "l2"),
        "certify",
        "norm and to must be 'l2' where a radius is given",
        "Bounds in balls are in l2: leave norm and to out, or leave radius out",
        norm=norm,
        to=to,
        radius=radius,
    )
    if radius is not None:
        with reporting(progress):
            walker = walker_in_balls(model, examples, effort, autocast)
            with exclusive(), torch.no_grad(), with_effort(effort):
                return local_certificate(walker, examples, float(radius))
    check_subnormal("certify")
    _check_region(examples[0].device)
    _check_model(model)
    with exclusive(), torch.no_grad(), with_effort(effort), reporting(progress):
        walker = propagate(model, examples, autocast=autocast)
        identity = hashes(model), data_hashes(model)
        pairs = _pairs(walker)
        report(len(walker.states), len(walker.states), "search from below")
        if (norm, to) == ("l2", "l2"):
            each = tuple(
                Bound(0.0, kind="exact") if s is None else walker.bound_of(s)
                for s in walker.outputs
            )
            found = Mixed(walker.bound, each, pairs, walker.rows())
            below = lower_bound(walker, examples) if lower else None
        else:
            found = mixed_bound(walker, norm, to, pairs)
            below = lower_mixed(walker, examples, norm, to, found.bound.value) if lower else None
        _checks.require(
            below is None or below.value <= found.bound.value * (1.0 + 1e-9),
            "certify",
            "the bound must not be below what a search has reached",
            "A rule is wrong. If all of them are ours, please report the model",
            UncertifiableError,
            bound=found.bound.value,
            reached=None if below is None else below.value,
        )
        _checks.require(
            math.isfinite(found.bound.value),
            "certify",
            "the constant must be below the range of float64",
            "Rescale the weights; certify(model, x, radius=r) may bound it in balls around samples",
            UncertifiableError,
            bound=found.bound.value,
        )
    shapes = tuple(tuple(x.shape[1:]) for x in examples)
    shape = shapes[0] if len(shapes) == 1 else shapes
    nodes = walker.program.outputs
    return LipschitzCertificate(
        found.bound,
        found.rows,
        shape,
        found.pairs,
        below,
        found.outputs,
        autocast,
        walker,
        tuple(tuple(n.meta["val"].shape[1:]) for n in nodes),
        tuple(walker.program.dtype_of(n) for n in nodes),
        identity[0],
        {name: digest(t) for name, t in walker.program.stored.items()},
        identity[1],
        walker.roundings(),
    )


def walker_in_balls(
    model: nn.Module,
    examples: tuple[Tensor, ...],
    effort: Effort = "default",
    autocast: torch.dtype | None = None,
) -> Walker:
    """The graph of a model that may have constants in balls only, checked like any other."""
    check_subnormal("certify")
    _check_region(examples[0].device)
    _check_model(model, masks=True)
    with exclusive(), torch.no_grad(), with_effort(effort):
        model = written_out(model, examples)
        return propagate(model, examples, autocast=autocast, in_balls=IN_BALLS)


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
    chain = walker.perceptron(state)
    if chain is not None and chain.bound.pairs is not None:
        features = walker.bound_of(chain.start).value
        scaled = chain.bound.pairs * features
        found.append(scaled if features == 1.0 else scaled * (1.0 + 2.0**-51))
    tables = [t for t in found if t is not None]
    return torch.stack(tables).amin(0) if tables else None


def _check_examples(examples: tuple[Tensor, ...], given: Any) -> None:
    _checks.require(
        len(examples) > 0
        and all(
            type(example) in (Tensor, nn.Parameter)
            and example.ndim >= 1
            and example.is_floating_point()
            for example in examples
        ),
        "certify",
        "example_input must be a floating-point tensor whose first dimension is the batch",
        "Pass a batch, e.g. torch.zeros(1, 3, 32, 32); behind an embedding, certify the rest "
        "of the model on embedded tokens, for a lookup by index has no constant",
        example_input=given,
    )
    for example in examples:
        _checks.require(
            not example.is_meta and bool(example.isfinite().all()),
            "certify",
            "example_input must be finite, and on a device with data",
            "Pass zeros, or samples of the data",
            example_input=example,
        )
    _checks.require(
        len({len(x) for x in examples}) == 1,
        "certify",
        "all inputs must have the same batch size",
        "Pass one batch of samples for each argument of the model",
        example_input=examples,
    )


def _check_region(device: torch.device) -> None:
    kind = device.type
    _checks.require(
        not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)),
        "certify",
        "autocast must be off around the call",
        "Pass the dtype as certify(..., autocast=torch.bfloat16) instead",
        UncertifiableError,
        device=kind,
    )


def _check_is_module(model: Any) -> None:
    _checks.require(
        isinstance(model, nn.Module),
        "certify",
        "the model must be a torch.nn.Module",
        "Pass the module itself, first: not its state_dict, its class, or an exported program",
        UncertifiableError,
        model=model,
    )


def _check_model(model: nn.Module, masks: bool = False) -> None:
    _checks.require(
        not isinstance(model, torch.fx.GraphModule) or "train" in vars(model),
        "certify",
        "the model must not be a graph module itself",
        "Put it into a module: certify(torch.nn.Sequential(model).eval(), x)",
        UncertifiableError,
        model=type(model).__name__,
    )
    for path, module in model.named_modules():
        _checks.require(
            "train" not in vars(module) or not isinstance(module, torch.fx.GraphModule),
            "certify",
            "the model must not be the module of an exported program",
            "Pass the module that was exported: an exported one has lost its modules and modes",
            UncertifiableError,
            path=path or type(module).__name__,
        )
        _checks.require(
            not isinstance(module, torch.jit.ScriptModule),
            "certify",
            "no part of the model may be compiled by TorchScript",
            "Pass the module that was traced or scripted",
            UncertifiableError,
            path=path or type(module).__name__,
        )
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
            not nn.parameter.is_lazy(tensor),
            "certify",
            "weights must be initialized",
            "Call the model once: a lazy module makes its weights when it sees an input",
            UncertifiableError,
            path=path,
        )
        _checks.require(
            type(tensor) in (Tensor, nn.Parameter),
            "certify",
            "weights must be of torch.Tensor or torch.nn.Parameter, not of another class",
            "Store tensor.as_subclass(torch.Tensor): a subclass may redefine operations",
            UncertifiableError,
            path=path,
            type=type(tensor),
        )
        _checks.require(
            not (tensor.is_inference() or torch.is_inference_mode_enabled()),
            "certify",
            "neither the call nor the weights may be of inference mode",
            "Make the model and call certify outside of torch.inference_mode()",
            UncertifiableError,
            path=path,
        )
        _checks.require(
            tensor.layout == torch.strided and not tensor.is_quantized,
            "certify",
            "weights must be dense tensors",
            "Store weight.to_dense() in the model: what is not stored counts as zero there, too",
            UncertifiableError,
            path=path,
            layout=tensor.layout,
        )
        _checks.require(
            not tensor.is_meta,
            "certify",
            "weights must be on a device with data",
            "Load the weights first: a model on meta has none",
            UncertifiableError,
            path=path,
        )
        _checks.require(
            tensor.dtype not in (torch.float16, torch.bfloat16),
            "certify",
            "weights must be float32 or float64",
            "Call model.float(), and pass autocast=torch.bfloat16 to certify the rounded weights",
            UncertifiableError,
            path=path,
            dtype=tensor.dtype,
        )
        if _is_finite(tensor):
            continue
        mask = type(tensor) is Tensor and bool((tensor.isfinite() | (tensor == -math.inf)).all())
        _checks.require(
            mask and masks,
            "certify",
            "weights must be finite",
            "A mask with -inf in it needs a radius, certify(model, x, radius=r), as attention has "
            "no global constant; or store booleans and call masked_fill"
            if mask
            else "Look for the step of the training that made a NaN or an infinity",
            UncertifiableError,
            path=path,
        )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_complex():
        return True
    values = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return bool(values.isfinite().all())
