"""A stock model in, the same model with orthogonal layers out."""

from __future__ import annotations

import copy
import fnmatch
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from orthonet import _checks
from orthonet._torch import is_hooked
from orthonet.convert._constant import certified
from orthonet.convert._forward_notes import forward_notes
from orthonet.convert._progress import Progress, reporter
from orthonet.convert._replace import (
    CONVERTIBLE,
    Twin,
    UnconvertibleError,
    as_linear,
    attention_twin,
    layer_twin,
)
from orthonet.convert._report import ConversionReport, ConversionRow
from orthonet.convert._residual import GAIN, rewrite_sums
from orthonet.convert._stateless import (
    ACTIVATIONS,
    NORMS,
    POOLS,
    activation_twin,
    is_channel_norm,
    norm_twin,
    pool_twin,
)
from orthonet.convert._sums import BranchGain, ConvexSum
from orthonet.convert._untrained import is_untrained
from orthonet.layers import available
from orthonet.linalg.threads import one_thread
from orthonet.reparametrizers.params import read_params

__all__ = ["Rule", "orthogonalize"]

Rule = bool | str | Mapping[str, Any] | Callable[[nn.Module], nn.Module]
_ADVICE = {
    nn.Embedding: "rows are looked up, which no constraint of the matrix bounds",
    nn.MultiheadAttention: "softmax attention has no Lipschitz constant; the rule "
    "{nn.MultiheadAttention: True} makes its q, k, v and output matrices orthogonal",
}


def orthogonalize(
    model: nn.Module,
    *,
    weights: str = "project",
    rules: Mapping[str | type[nn.Module], Rule] | None = None,
    downsample: str | None = "space_to_depth",
    fallback: str | None = None,
    norm: str | None = None,
    activation: str | None = None,
    pool: str | None = None,
    residual: str | None = None,
    example_input: Tensor | Sequence[Tensor] | None = None,
    progress: bool | Progress | None = None,
    return_report: bool = False,
) -> Any:
    r"""Return a new model whose linear, convolutional and recurrent layers are orthogonal.

    `nn.Linear`, `nn.Conv1d/2d/3d`, `nn.ConvTranspose1d/2d/3d`, `nn.RNN`, `nn.GRU`, `nn.LSTM` and
    their cells, and the `Conv1D` of Hugging Face's GPT-2, are replaced by ours, with the same
    arguments, device, dtype, mode and frozen parameters. The given model is not changed and shares
    no tensor with the result. A layer used at several places stays one layer. Left alone, with a
    reason in the report, are: subclasses of these layers (their `forward` is their own), layers
    whose weight belongs to another module too (tied weights) or is computed (parametrized, weight
    norm), layers with hooks, and convolutions that no kernel makes orthogonal, such as those with
    one channel a group.

    The outputs differ from those of `model`: all singular values become 1. Project and fine-tune,
    or reset and train. The sums of residual connections, functional activations and attention are
    in the code of `forward`: they are noted in the report, where `torch.fx` can read the code, and
    stay, but for the sums with `residual`.

    **To constant 1.** With `residual="convex"`, `norm="centering"`, `pool="l2"` and
    `activation="max_min"` the residual networks and ConvNeXts of torchvision and timm become
    1-Lipschitz by construction: every layer is, and so is every combination of two. Depthwise
    convolutions need `fallback="aol"`.

    Args:
        model: Any module.
        weights: "project" takes the nearest orthogonal weight that each layer finds and keeps
            biases; "reset" draws new ones. A warning says so, before the work begins, where
            nobody has trained the weights that are to be projected.
        rules: What to do with modules by name, a pattern of `fnmatch` such as `"layer4.*"`, or by
            class. The first rule that matches decides: False leaves the module alone; True converts
            it by default; a string names a method of the registry, see
            [`available`][orthonet.layers.available]; a mapping gives keywords for our layer, such
            as `{"ortho_params": orthonet.QR_ORTHO_PARAMS}`; a function takes the module and
            returns the new one.
        downsample: What becomes of a convolution without padding whose kernel is smaller than its
            stride, such as the 1x1 shortcut with stride 2 of a residual network:
            "space_to_depth", all pixels of a block become channels of a 1x1 convolution;
            "average", scaled averages come first; None, it is converted only where some kernel
            is orthogonal as it stands.
        fallback: A method of the registry for layers that have no orthogonal twin, for example
            "aol" for depthwise convolutions; None leaves them.
        norm: "centering" (batch, layer and instance norm only subtract means), "lip" (batch norm is
            divided by its largest gain, layer norm centers), or None to keep normalizations.
        activation: "max_min" or "abs" in place of activation modules, None to keep them.
        pool: "l2" or "average" in place of pooling modules, with constant 1; None to keep them.
        residual: What becomes of sums of two activations in the code of `forward`: "convex", a
            learnable convex combination, see [`ConvexSum`][orthonet.convert.ConvexSum];
            "prescaled", a learnable gain in front of the branch and a division behind the sum, see
            [`PrescaledSum`][orthonet.convert.PrescaledSum]; None keeps them. The operand with more
            calls of its own is the branch. A parameter that multiplies an activation (a "layer
            scale") is divided by its largest magnitude. Every module keeps its class, but `forward`
            becomes the code that `torch.fx` read; other methods stay as they are written. The new
            parameters are `residual.logit` and `residual.before.log_gain` of the module whose code
            has the sum; all other names in `state_dict` stay.
        example_input: What [`certify`][orthonet.certify.certify] takes; with it the report ends
            with the constant of the new model in eval mode and its largest causes. That can take
            minutes.
        progress: True shows a bar on stderr; a function is called as `progress(done, total, what)`
            before each layer and at the end, as that of [`certify`][orthonet.certify.certify]. A
            line every few seconds goes to the logger `"orthonet.convert"` at level INFO anyway.
        return_report: Return the report as well; without it, a warning tells how many layers
            stayed as they were.

    Returns:
        The new model, or a pair of it and the report.

    Guarantee:
        Each layer listed as changed keeps the promise of its class, such as that of
        [`OrthoLinear`][orthonet.layers.OrthoLinear].
        The constant of the whole model is what [`certify`][orthonet.certify.certify] proves.

    Raises:
        ValueError: An unknown option, a rule that matches no module, one of another kind or with
            keywords that the layer does not have, or weights that are not finite. With `residual`:
            a sum with keywords such as `alpha=`, or a module with sub-modules whose code
            `torch.fx` cannot read.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))
        >>> new, report = orthogonalize(net, activation="abs", return_report=True)
        >>> [(row.name, row.before, row.after) for row in report.changed][1:]
        [('1', 'ReLU', 'Abs'), ('3', 'Linear', 'OrthoLinear')]

    References:
        Projection: Higham, *Computing the polar decomposition*, SIAM J. Sci. Stat. Comput. 1986.
    """
    owner = "orthogonalize"
    _checks.require(
        isinstance(model, nn.Module),
        owner,
        "model must be a torch.nn.Module",
        "Pass a module",
        model=type(model),
    )
    _checks.one_of(owner, ("project", "reset"), weights=weights)
    _checks.boolean(owner, return_report=return_report)
    _checks.one_of(owner, ("space_to_depth", "average", None), downsample=downsample)
    _checks.one_of(owner, ("centering", "lip", None), norm=norm)
    _checks.one_of(owner, ("max_min", "abs", None), activation=activation)
    _checks.one_of(owner, ("l2", "average", None), pool=pool)
    _checks.one_of(owner, ("convex", "prescaled", None), residual=residual)
    _checks.one_of(owner, (*available(), None), fallback=fallback)
    _checks.require(
        rules is None or isinstance(rules, Mapping),
        owner,
        "rules must be a mapping from names or classes of modules to what becomes of them",
        "Pass e.g. rules={'layer4.*': False}",
        rules=rules,
    )
    tell = reporter(progress)
    rules = dict(rules or {})
    _check_rules(model, rules)
    if weights == "project":
        _check_finite(model)
        if is_untrained(model):
            sentence = _checks.message(
                owner,
                "the model is at its random initialization, of which a projection keeps nothing",
                "Pass weights='reset', which draws orthogonal weights at once, or load the trained "
                "weights first",
                model=type(model).__name__,
                weights=weights,
            )
            warnings.warn(sentence, UserWarning, stacklevel=2)
    options = {
        "weights": weights,
        "downsample": downsample,
        "fallback": fallback,
        "norm": norm,
        "activation": activation,
        "pool": pool,
    }

    def left_alone(name: str, module: nn.Module) -> bool:
        return _rule([name], module, rules) is False

    sums: list[ConversionRow] = []
    if residual is not None:  # first, since it may refuse
        model = copy.deepcopy(model)
        sums = [
            ConversionRow(name, "changed", what, now, why)
            for name, what, now, why in rewrite_sums(model, residual, left_alone)
        ]
    memo: dict[int, object] = {}
    with one_thread():
        rows = _exchange(model, memo, rules, options, tell)
    # deepcopy's own memo puts the twin wherever the layer is referenced, shared uses included
    new = copy.deepcopy(model, memo)
    gains = {row.name for row in sums if row.after == GAIN}
    rows = [row for row in rows if row.action != "skipped" or row.name not in gains] + sums
    rows += [
        ConversionRow(where, "noted", what, reason=why) for where, what, why in forward_notes(new)
    ]
    report = ConversionReport(tuple(rows))
    if example_input is not None:
        report = ConversionReport(tuple(rows), *certified(new, example_input, tell))
    if return_report:
        return new, report
    _warn_of([row for row in report.skipped if row.reason != _BY_RULE])
    return new


def _exchange(
    model: nn.Module,
    memo: dict[int, object],
    rules: Mapping[Any, Rule],
    options: dict[str, Any],
    tell: Progress,
) -> list[ConversionRow]:
    """Put the twin of each module into `memo`, and tell of it."""
    rows: list[ConversionRow] = []
    ties, previous = _ties(model), None
    layers = {id(m) for m in model.modules() if isinstance(m, CONVERTIBLE)}
    seen: set[int] = set()
    for names, module in _visit(model, memo):
        rule = _rule(names, module, rules)
        name, kind = ", ".join(names), type(module).__name__
        if id(module) in layers:
            tell(len(seen), len(layers), name)
            seen.add(id(module))
        try:
            twin = _twin(module, rule, ties, previous, **options)
        except UnconvertibleError as reason:
            rows.append(ConversionRow(name, "skipped", kind, reason=str(reason)))
            twin = None
        if twin is not None:
            memo[id(module)] = twin.module.train(module.training)
            after = type(twin.module).__name__
            if isinstance(twin.module, nn.Sequential):
                after = " + ".join(type(part).__name__ for part in twin.module)
            rows.append(ConversionRow(name, "changed", kind, after, twin.remark, twin.moved))
        if isinstance(module, CONVERTIBLE) and not isinstance(module, nn.RNNBase | nn.RNNCellBase):
            previous = module
    tell(len(layers), len(layers), "done")
    return rows


def _warn_of(left: list[ConversionRow]) -> None:
    if left:
        shown = [f"{row.name or '<root>'} ({row.before}): {row.reason}" for row in left[:3]]
        if len(left) > 3:
            shown.append(f"and {len(left) - 3} more")
        warnings.warn(
            f"orthogonalize: {len(left)} modules with parameters stayed as they were: "
            f"{'; '.join(shown)}. Pass return_report=True for the whole list, or a rule for each.",
            UserWarning,
            stacklevel=3,
        )


_BY_RULE = "stays as it is, by rule"


def _visit(model: nn.Module, memo: Mapping[int, object]) -> Iterator[tuple[list[str], nn.Module]]:
    """Each module once with all its names, without the parts of those replaced meanwhile."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    seen: set[int] = set()

    def walk(module: nn.Module) -> Iterator[tuple[list[str], nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield names[id(module)], module
        if id(module) not in memo and not hasattr(module, "to_plain"):
            for child in module.children():
                yield from walk(child)

    return walk(model)


def _ties(model: nn.Module) -> dict[int, str]:
    """Parameters that several modules hold, with the names under which they do."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}".lstrip("."))
    return {key: " = ".join(found) for key, found in owners.items() if len(found) > 1}


def _rule(names: list[str], module: nn.Module, rules: Mapping[Any, Rule]) -> Rule | None:
    for key, value in rules.items():
        if any(_matches(key, name, module) for name in names):
            return value
    return None


def _matches(key: str | type[nn.Module], name: str, module: nn.Module) -> bool:
    return fnmatch.fnmatchcase(name, key) if isinstance(key, str) else isinstance(module, key)


def _check_finite(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for key, tensor in module.named_parameters(recurse=False):
            _checks.require(
                not isinstance(module, CONVERTIBLE)
                or tensor.is_meta
                or is_lazy(tensor)
                or bool(tensor.isfinite().all()),
                "orthogonalize",
                "weights must be finite to be projected",
                "Look for the step of the training that made a NaN or an infinity, or pass "
                "weights='reset'",
                parameter=f"{name}.{key}".lstrip("."),
            )


def _check_rules(model: nn.Module, rules: Mapping[Any, Rule]) -> None:
    named = list(model.named_modules(remove_duplicate=False))
    for key, value in rules.items():
        _checks.require(
            (isinstance(key, str) or (isinstance(key, type) and issubclass(key, nn.Module)))
            and any(_matches(key, name, module) for name, module in named),
            "orthogonalize",
            "every rule must match a module, by a pattern of its name or by its class",
            "See dict(model.named_modules())",
            rule=key,
        )
        if isinstance(value, str):
            _checks.one_of("orthogonalize", available(), rule=value)
        if isinstance(value, Mapping) and "ortho_params" in value:
            read_params("orthogonalize", value["ortho_params"])
        _checks.require(
            isinstance(value, (bool, str, Mapping)) or callable(value),
            "orthogonalize",
            "a rule must be a bool, the name of a method, keywords or a function of the module",
            "Pass False to leave the module alone",
            rule=value,
        )


def _twin(
    module: nn.Module,
    rule: Rule | None,
    ties: Mapping[int, str],
    previous: nn.Module | None,
    *,
    weights: str,
    downsample: str | None,
    fallback: str | None,
    norm: str | None,
    activation: str | None,
    pool: str | None,
) -> Twin | None:
    """The twin of one module; None where there is nothing to say about it."""
    own = next(module.parameters(recurse=False), None)
    kind = type(module)
    if rule is False:
        if own is None and kind not in CONVERTIBLE:
            return None
        raise UnconvertibleError(_BY_RULE)
    if callable(rule):
        return Twin(_made(rule, module), "by rule")
    if norm is not None and (kind in NORMS or is_channel_norm(module)):
        return norm_twin(module, norm, weights)
    if kind in ACTIVATIONS and activation is not None:
        return activation_twin(activation, previous)
    if kind in POOLS and pool is not None:
        return pool_twin(module, pool)
    if hasattr(module, "to_plain"):
        raise UnconvertibleError("stays as it is, for it is constrained already")
    if kind is nn.MultiheadAttention and rule is True:
        return attention_twin(module, weights)  # type: ignore[arg-type]
    linear = as_linear(module)
    if linear is not None:
        _check_own(module, ties)
        method, keywords = _method(rule)
        twin = layer_twin(linear, weights, downsample, method, keywords)
        return twin._replace(remark=twin.remark or "its weight (in, out) is transposed now")
    if kind not in CONVERTIBLE:
        if own is None or kind in (ConvexSum, BranchGain):
            return None
        raise UnconvertibleError(_why_not(module))
    _check_own(module, ties)
    method, keywords = _method(rule)
    try:
        return layer_twin(module, weights, downsample, method, keywords)
    except UnconvertibleError as reason:
        if fallback is None or rule is not None:
            raise
        try:
            twin = layer_twin(module, weights, downsample, fallback)
        except UnconvertibleError:
            raise reason from None
        return Twin(twin.module, f"by {fallback!r}: {reason}", twin.moved)


def _method(rule: Rule | None) -> tuple[str, dict[str, Any]]:
    """The method of the registry that a rule names, and the keywords that it gives."""
    method = rule if isinstance(rule, str) else "ortho"
    return method, dict(rule) if isinstance(rule, Mapping) else {}


def _made(rule: Callable[[nn.Module], nn.Module], module: nn.Module) -> nn.Module:
    made = rule(copy.deepcopy(module))
    _checks.require(
        isinstance(made, nn.Module),
        "orthogonalize",
        "a rule must return a torch.nn.Module",
        "Return the new module",
        returned=type(made),
    )
    return made


def _why_not(module: nn.Module) -> str:
    for base in CONVERTIBLE:
        if isinstance(module, base):
            if is_parametrized(module):
                return "its weight is computed by a parametrization; remove that first"
            return f"a subclass of nn.{base.__name__}, whose forward is its own"
    for base, advice in _ADVICE.items():
        if isinstance(module, base):
            return advice
    for base in NORMS:
        if type(module) is base:
            return "a normalization; pass norm, or give a rule"
        if isinstance(module, base):
            return f"a subclass of nn.{base.__name__}, whose forward is its own; give a rule"
    names = ", ".join(name for name, _ in module.named_parameters(recurse=False))
    return f"its own parameters ({names}) are used in its forward"


def _check_own(module: nn.Module, ties: Mapping[int, str]) -> None:
    """Refuse a layer whose weight is tied, computed or frozen into hooks."""
    for parameter in module.parameters(recurse=False):
        if id(parameter) in ties:
            raise UnconvertibleError(f"tied: {ties[id(parameter)]}")
    if not any(name.startswith("weight") for name in module._parameters):
        raise UnconvertibleError("its weight is computed (weight norm?); remove that first")
    if is_hooked(module, backward=True):
        raise UnconvertibleError("it has hooks, which would be lost; remove them first")
