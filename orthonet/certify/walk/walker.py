"""From the input to the output of a model, one bound after the other."""

from __future__ import annotations

import contextlib
import math
import operator
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from orthonet import _checks
from orthonet.certify._bound import Bound, Row
from orthonet.certify._progress import report
from orthonet.certify.graph.batch_size import check_batch_in_shapes
from orthonet.certify.graph.consistency import check_same_function, check_samples_apart, run_once
from orthonet.certify.graph.export import export
from orthonet.certify.graph.fold import check_masks, fill
from orthonet.certify.graph.marks import ROOT, LeafCall, mark_of
from orthonet.certify.graph.pairs import STUCK
from orthonet.certify.graph.program import Program, op_name, path_of, source_of
from orthonet.certify.norms import limits, matrix_norm
from orthonet.certify.ops.advice import ADVICE
from orthonet.certify.rounding.modes import exclusive
from orthonet.certify.rules import (
    REARRANGEMENT,
    BatchDependent,
    Call,
    Operand,
    Step,
    as_step,
    canonical,
    function_rule,
    module_rule,
    record_of,
)
from orthonet.certify.walk.autocast import round_constants
from orthonet.certify.walk.forms import form_bound, form_of
from orthonet.certify.walk.islands import action_of, materialize, moves
from orthonet.certify.walk.perceptrons import Perceptron, perceptron_of
from orthonet.certify.walk.pieces import Pieces
from orthonet.certify.walk.state import Island, State
from orthonet.errors import UncertifiableError
from orthonet.linalg.bounds.rounding import add_up

__all__ = ["Walker", "propagate"]


_IDENTITY = Bound(1.0, kind="exact")
_SMALL_IMAGES = {"fast": -1, "default": 256, "tight": math.inf}
"""Pixels up to which the torus of an island may be much too large, so that the product is tried."""


def propagate(
    model: nn.Module,
    examples: tuple[Tensor, ...],
    prefix: str = "",
    autocast: torch.dtype | None = None,
    in_balls: frozenset[str] = frozenset(),
) -> Walker:
    """Bound the l2 -> l2 constant of `model`, sample by sample, in the shapes of `examples`.

    Operations named in `in_balls` may have no constant: it is infinite then.
    """
    with exclusive():
        run_once(model, examples, autocast)
        program = export(model, examples, autocast)
        if autocast is not None:
            round_constants(program)
        check_same_function(model, program)
    walker = Walker(model, program, prefix, in_balls)
    walker.walk()  # names the operation that mixes samples, where it knows it
    with exclusive():
        check_samples_apart(model, program)
        check_batch_in_shapes(program.needed, program.moving, program.batch)
        program.structure()
    program.structure = _compared  # let the copy of the model go
    return walker


def _compared() -> None:
    """The graph has been compared."""


class Walker:
    """Visits the nodes of a program in order; bounds are computed where they are needed."""

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        prefix: str = "",
        in_balls: frozenset[str] = frozenset(),
    ) -> None:
        self.model, self.program, self.prefix = model, program, prefix
        self.in_balls = in_balls
        self.states: dict[fx.Node, State] = {}
        self.extra: list[Row] = []
        self.nested = 0.0  # seconds that were spent in bounds of earlier nodes
        self.pieces = Pieces(self)
        self.forms: dict[Any, Any] = {}
        self.matrices: dict[State, Island | None] = {}
        self.chains: dict[State, Perceptron | None] = {}
        self.bound = Bound(0.0, kind="exact")
        self.outputs: list[State | None] = []

    def walk(self) -> None:
        """Bound every node, in the order of the graph."""
        for node in self.program.nodes:
            if self.in_balls:
                check_masks(node, self.program.constants)
            shape = self._shape(node, node.meta.get("val"))
            if node in self.program.inputs:
                call = Call("input", ROOT, (), {}, shape)
                self.states[node] = State(node, call, shape, {}, bound=_IDENTITY)
            else:
                self._visit(node, shape)
        self.outputs = [self.states.get(n) for n in self.program.outputs]
        found = [s for s in self.outputs if s is not None]  # one that is returned twice, twice
        bounds = [self.bound_of(s) for s in found]
        if len(bounds) == 1:
            self.bound = bounds[0]
        elif bounds:
            joint = None
            if len(set(found)) == len(found):
                joint = self.pieces.side_by_side(found)
            total = Bound.hypot(*bounds)
            self.bound = total if joint is None or joint.value >= total.value else joint

    def rows(self) -> tuple[Row, ...]:
        """The steps that the bound of the outputs was made from, in the order of the graph."""
        seen: set[State] = set()
        stack = [s for s in self.outputs if s is not None]
        while stack:
            state = stack.pop()
            if state not in seen:
                seen.add(state)
                stack += state.used
        order = {node: i for i, node in enumerate(self.program.nodes)}
        states = sorted(seen, key=lambda s: order[s.node])
        return (*self.extra, *(s.row for s in states if s.row is not None))

    def roundings(self) -> float:
        """How often a number is rounded on its way through: the terms of all sums, and more."""
        total = 0.0
        for state in self.states.values():
            weights = [w for w in state.call.args if isinstance(w, Tensor) and w.ndim > 1]
            terms = max((w.numel() // max(1, len(w)) for w in weights), default=0)
            total += terms + 2.0
        return total

    # what a node is ---------------------------------------------------------------------------

    def path(self, node: fx.Node) -> str:
        """The module that a node was called in, as messages name it."""
        name = path_of(node)
        return ".".join(p for p in (self.prefix, name) if p not in (ROOT, "")) or ROOT

    def _refuse(self, node: fx.Node, requirement: str, advice: str) -> NoReturn:
        mark, name = mark_of(node), op_name(node)
        if mark is not None:  # a tensor that goes into what has a rule as a whole, or comes out
            target = self.program.calls[mark[0]].target
            name = getattr(target, "__name__", type(target).__name__)
            if mark[1] < -1:
                name = f"output {-1 - mark[1]} of {name}"
        details = {"operation": name, "path": self.path(node)}
        details |= {"source": source_of(node)} if source_of(node) else {}
        _checks.fail("certify", requirement, advice, UncertifiableError, **details)

    def _shape(self, node: fx.Node, value: Any) -> tuple[int, ...]:
        """The shape of one sample, if the tensor holds one sample per row, each on its own."""
        if isinstance(value, (tuple, list)):  # the parts are checked where they are read
            return tuple(value[0].shape[1:]) if isinstance(value[0], Tensor) else ()
        if not isinstance(value, Tensor):
            self._refuse(
                node,
                "a number that depends on the input cannot be followed",
                "Keep the computation in tensors",
            )
        rest = value.shape[1:]
        whole = value.ndim >= 1 and str(value.shape[0]) == self.program.batch
        if not whole or not all(isinstance(size, int) for size in rest):
            self._refuse_attention()
            if any(str(size).startswith("u") for size in value.shape):
                self._refuse(
                    node,
                    "a shape must not depend on values, such as those of a mask",
                    "Index with a buffer of the model, or with integers: self.index = "
                    "mask.nonzero()[:, 0] in __init__",
                )
            if op_name(node) == "_add_batch_dim":
                self._refuse(node, "dim 0 must stay the batch", ADVICE["vmap"])
            self._refuse(
                node,
                "dim 0 must stay the batch, neither moved, merged, nor mixed into other dims",
                "A certificate is given for each sample on its own; reshape with "
                "x.flatten(1) or x.reshape(x.shape[0], ...). Of a recurrent layer with "
                "batch_first=True, return the first output alone, or its last step, output[:, -1]",
            )
        if value.dtype not in (torch.float32, torch.float64, self.program.autocast):
            stuck = (n for n in self.program.nodes if n.meta.get(STUCK) and value.is_complex())
            self._refuse(
                next(stuck, node),
                "a value that depends on the input must be float32 or float64",
                "Complex values may be transformed by torch.fft, moved, added, and multiplied "
                "by constants; return abs(), .real or torch.view_as_real of them"
                if value.is_complex()
                else "Comparisons, indices and casts to fewer bits jump",
            )
        before = [n.meta.get("val") for n in node.all_input_nodes if n in self.states]
        if value.dtype == torch.float32 and any(
            isinstance(v, Tensor) and v.dtype == torch.float64 for v in before
        ):
            self._refuse(
                node,
                "a float64 value that depends on the input must not be cast to float32",
                "Casts to fewer bits jump: pass a float32 example_input, or call model.double()",
            )
        return tuple(rest)

    def _refuse_attention(self) -> None:
        """Name a product of two values of the input, where there is one: no reshaping helps it."""
        moving = self.program.moving
        for node in self.program.nodes:
            name = op_name(node)
            values = [n.meta.get("val") for n in node.all_input_nodes if n in moving]
            both = sum(isinstance(v, Tensor) and v.ndim > 2 for v in values) >= 2
            if both and name in ("scaled_dot_product_attention", "bmm", "matmul", "einsum"):
                advice = ADVICE["scaled_dot_product_attention" if name[0] == "s" else "bmm"]
                self._refuse(
                    node,
                    "every operation on the input must have a Lipschitz rule",
                    f"{advice}; or register a rule for the class of the module at this path with "
                    "@register_rule",
                )

    # visiting ---------------------------------------------------------------------------------

    def _visit(self, node: fx.Node, shape: tuple[int, ...]) -> None:
        mark = mark_of(node)
        parents = [self.states[n] for n in self.program.parents(node) if n in self.states]
        if mark is not None and mark[1] < 0:
            leaf = self.program.calls[mark[0]]
            entries = self.program.entries.get(mark[0], {})
            values = {place: self._argument(n) for place, n in entries.items()}
            path = ".".join(p for p in (self.prefix, leaf.path) if p not in (ROOT, "")) or ROOT
            name = getattr(leaf.target, "__name__", type(leaf.target).__name__)
            call = Call(
                name,
                path,
                fill(leaf.args, values),
                {k: fill(v, values) for k, v in leaf.kwargs.items()},
                shape,
                source_of(node),
                leaf.target,
            )
            state = State(node, call, shape, self.program.constants, parents)
            state.step = self._leaf_step(state, leaf)
        else:
            args = self._argument(node.args)
            kwargs = self._argument(node.kwargs)
            name = canonical(node.target)
            name = name if isinstance(name, str) else op_name(node)
            call = Call(name, self.path(node), args, kwargs, shape, source_of(node), node.target)
            state = State(node, call, shape, self.program.constants, parents)
            action = action_of(state)
            sources = {p.start for p in parents}
            if action is not None and len(sources) == 1:
                state.source = sources.pop()
                order = dict.fromkeys(s for p in parents for s in p.island)
                state.island = [*order, state]
            if action is None or not action.heavy:
                state.step = self._operation_step(state)
        self.states[node] = state

    def _argument(self, argument: Any) -> Any:
        """The argument with an `Operand` or a constant in place of every node."""
        if isinstance(argument, fx.Node):
            state = self.states.get(argument)
            if state is None:
                found = self.program.constants[argument]
                varies = isinstance(found, BatchDependent) and not found.rows
                if varies and isinstance(found.value, Tensor):
                    self._refuse(
                        argument,
                        "a constant must be the same for every sample",
                        "A certificate is given for each sample, wherever in the batch it lies",
                    )
                return found
            return Operand(state.shape, lambda: self.bound_of(state), state)
        if isinstance(argument, (tuple, list)):
            return tuple(self._argument(a) for a in argument)
        if isinstance(argument, dict):
            return {key: self._argument(a) for key, a in argument.items()}
        if isinstance(argument, slice):
            return slice(*map(self._argument, (argument.start, argument.stop, argument.step)))
        return argument

    def step_of(self, state: State) -> Step:
        """The gains of a node over its operands."""
        if state.step is None:
            state.step = self._operation_step(state)
        return state.step

    def _operation_step(self, state: State) -> Step:
        node = state.node
        if node.target is operator.getitem or mark_of(node) is not None:
            return Step((_IDENTITY,), REARRANGEMENT, roundings=0.0)
        rule = function_rule(node.target)
        if state.call.op in self.in_balls:
            record = record_of(node.target)
            if record is not None:  # what makes another map of it does so in balls, too
                record.check(state.call)
            with contextlib.suppress(UncertifiableError):
                if rule is not None:
                    return as_step(rule(state.call), state.call)
            gains = tuple(Bound(math.inf) for _ in state.call.operands)
            return Step(gains, "has a constant in balls only")
        if rule is None:
            advice = ADVICE.get(state.call.op, f"There is none for {state.call.op!r}")
            self._refuse(
                node,
                "every operation on the input must have a Lipschitz rule",
                f"{advice}; or register a rule for this operation, or for the class of the module "
                "at this path, with @register_rule",
            )
        return as_step(rule(state.call), state.call)

    def _leaf_step(self, state: State, leaf: LeafCall) -> Step:
        start, call, target = time.perf_counter(), state.call, leaf.target
        if not isinstance(target, nn.Module):
            rule = function_rule(target)
            return as_step(rule(call) if rule else None, call)
        entry = module_rule(target)
        if entry is None:
            call.refuse("a leaf must have a rule", "Do not change rules meanwhile")
        shapes = tuple(operand.shape for operand in call.operands)
        shape: Any = shapes[0] if len(shapes) == 1 else shapes
        try:
            result = (
                entry.rule(target, shape, self._child(call, target, state))
                if entry.nested
                else entry.rule(target, shape)
            )
        except UncertifiableError:
            raise
        except ValueError as error:
            call.refuse(f"its bound could not be computed ({error})", "Correct it")
        state.seconds = time.perf_counter() - start
        return as_step(result, call)

    def _child(self, call: Call, module: nn.Module, state: State) -> Callable[..., Bound]:
        """The function that certifies a child of `module`, and adds its rows to the table."""
        value = state.parents[0].node.meta["val"]

        def bound_of(child: nn.Module, input_shape: tuple[int, ...]) -> Bound:
            name = next((n for n, m in module.named_modules() if m is child), "")
            example = torch.zeros(1, *input_shape, dtype=value.dtype, device=value.device)
            path = ".".join(part for part in (call.path, name) if part not in (ROOT, ""))
            walker = propagate(child, (example,), path, self.program.autocast_at(state.node))
            self.extra.extend(walker.rows())
            return walker.bound

        return bound_of

    # bounds -----------------------------------------------------------------------------------

    def bound_of(self, state: State) -> Bound:
        """The smallest bound of a node that is found, from the input of the model to it."""
        if state.bound is None:
            state.bound = self._best(state)
            done = sum(s.bound is not None for s in self.states.values())
            report(done, len(self.states), f"{state.call.op} of {state.call.path}")
        return state.bound

    def _best(self, state: State) -> Bound:
        """The island or the product, whichever is smaller, and its row of the table.

        The product is left out where the island gives the norm itself, and, unless the effort is
        tight, for convolutions of large images: it costs as much again and hardly ever wins. A
        chain of affine maps and activations that ends here is bounded as a perceptron, too.
        """
        start, outer = time.perf_counter(), self.nested
        self.nested = 0.0
        best = self._island(state)
        small = math.prod(state.start.shape[1:]) <= _SMALL_IMAGES[limits().name]
        free = all(moves(s) for s in state.island)
        if best is None or free or (best[2][3].kind != "exact" and small):
            product = self._product(state)
            if best is None or product[0].value <= best[0].value:
                best = product
        chain = self.perceptron(state)
        if chain is not None:
            whole = chain.whole(state, self.bound_of(chain.start), _IDENTITY)
            if whole[0].value < best[0].value:
                best = whole
        bound, state.used, row = best
        seconds = time.perf_counter() - start
        seconds, self.nested = seconds - self.nested + state.seconds, outer + seconds
        if row is not None:
            path, op, shape, gain, method = row
            state.row = Row(path, op, shape, gain.value, bound.value, method, gain.kind, seconds)
        return bound

    def perceptron(self, state: State) -> Perceptron | None:
        """The chain of affine maps and activations that ends in a node, if it is tried."""
        if state not in self.chains:
            self.chains[state] = perceptron_of(self, state)
        return self.chains[state]

    def _island(self, state: State) -> Any:
        """The bound of a node by all affine operations since the last other one, joined."""
        source, states = state.source, state.island
        if source is None or not isinstance(state.node.meta.get("val"), Tensor):
            return None
        weighty = [s for s in states if not moves(s)]
        still = all(
            s.step is not None and s.step.method == REARRANGEMENT
            for s in states
            if s not in weighty
        )
        if len(states) == 1 or (len(weighty) <= 1 and still):
            return None
        before = self.bound_of(source)  # first, so that the progress is told in order
        found = self._joined(state)
        if found is None:
            return None
        gain, method = found
        bound = gain if before is _IDENTITY else before * gain
        named = (s.call for s in states if not (s.step and s.step.method == REARRANGEMENT))
        ops = list(dict.fromkeys(call.op.removeprefix("_native_") for call in named))
        name = "+".join(ops[:3]) + ("+..." if len(ops) > 3 else "")
        return bound, [source], (states[0].call.path, name, source.shape, gain, method)

    def _joined(self, state: State) -> tuple[Bound, str] | None:
        inside, outside = math.prod(state.start.shape), math.prod(state.shape)
        allowed = limits()
        if min(inside, outside) <= allowed.side and inside * outside <= allowed.entries:
            island = self.matrix_of(state)
            if island is not None:
                norm = matrix_norm(island.matrix)
                kind = "exact" if island.error <= 1e-9 * norm else "upper"
                text = f"{len(state.island)} affine operations, matrix {outside}x{inside}"
                return Bound(add_up(norm, island.error), kind=kind), text
        form = form_of(state, self.forms)
        found = None if form is None else form_bound(form, state.island)
        if found is None:
            return None
        return found[0], f"{len(state.island)} affine operations, {found[1]}"

    def matrix_of(self, state: State) -> Island | None:
        """The matrix from the start of the island of a node to it."""
        if state not in self.matrices:
            self.matrices[state] = materialize(state)
        return self.matrices[state]

    def _product(self, state: State) -> Any:
        call = state.call
        _ = [operand.bound for operand in call.operands]  # first, as the progress is told in order
        step = self.step_of(state)
        if len(call.operands) == 1:
            before, gain = call.operands[0].bound, step.gains[0]
            if before is _IDENTITY:
                bound = _IDENTITY if step.method == REARRANGEMENT else gain
            else:
                bound = before * gain
        else:
            terms = [g * x.bound for g, x in zip(step.gains, call.operands, strict=True)]
            bound = Bound.hypot(*terms) if step.combine == "hypot" else sum(terms[1:], terms[0])
            refined = self.pieces.refined(state)
            if refined is not None and refined.value < bound.value:
                bound, step = refined, step._replace(method=f"{step.method}, matrix of constants")
        gain = step.gains[0] if len(step.gains) == 1 else Bound(step.gains[0].value)
        row = (call.path, call.op, call.operands[0].shape, gain, step.method)
        silent = mark_of(state.node) is not None and step.method == REARRANGEMENT
        return bound, state.parents, None if silent else row
