"""SGD, Adam and a Muon-like method for parameters that are semi-orthogonal matrices."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from orthonet import _checks
from orthonet.linalg.matrix import minus_transpose
from orthonet.optim._base import StiefelOptimizer, adam_factor
from orthonet.optim._rotations import EVERY, Turn, Workspace, rotate
from orthonet.optim._stiefel_steps import (
    Block,
    newton_schulz_sign,
    parts,
    symmetric_part,
    tangent,
)

__all__ = ["StiefelAdam", "StiefelMuon", "StiefelSGD"]


def sgd_step(params: list[Tensor], states: Any, group: dict[str, Any]) -> None:
    """Move plain parameters as `torch.optim.SGD` does."""
    buffers = [states[p].get("momentum_buffer") for p in params]
    options = {n: group[n] for n in ("weight_decay", "momentum", "lr", "dampening", "nesterov")}
    sgd(params, [cast(Tensor, p.grad) for p in params], buffers, maximize=False, **options)
    for p, buffer in zip(params, buffers, strict=True):
        if buffer is not None:
            states[p]["momentum_buffer"] = buffer


def adam_step(params: list[Tensor], states: Any, group: dict[str, Any]) -> None:
    """Move plain parameters as `torch.optim.AdamW` does."""
    for p in params:
        if not states[p]:
            step = torch.tensor(0.0, dtype=torch.float32)
            moments = {n: torch.zeros_like(p) for n in ("exp_avg", "exp_avg_sq")}
            states[p].update(step=step, **moments)
    options = {n: group[n] for n in ("lr", "weight_decay", "eps")}
    adamw(
        params,
        [cast(Tensor, p.grad) for p in params],
        [states[p]["exp_avg"] for p in params],
        [states[p]["exp_avg_sq"] for p in params],
        [],
        [states[p]["step"] for p in params],
        amsgrad=False,
        maximize=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        **options,
    )


class StiefelSGD(StiefelOptimizer):
    r"""Riemannian gradient descent with momentum, on matrices with orthonormal columns or rows.

    With the projection \(P_X(V) = V - X\,\mathrm{sym}(X^\top V)\) onto the tangent space
    (wide matrices through their transpose),

    \[ M_t = P_{X_t}(\mu M_{t-1} + (1 - d)\,G_t), \qquad
       X_{t+1} = \mathrm{polar}(X_t - \eta M_t), \]

    which is the Riemannian gradient plus the momentum transported by projection, in one
    projection: two products of the size of X, and two or three more for the retraction of a step
    of spectral norm up to 0.12.

    Args:
        params: Parameters, or groups of them. A group with `stiefel=False` holds plain parameters
            (biases, other layers), which are updated as by `torch.optim.SGD`.
        lr: Learning rate.
        momentum: Factor of the momentum.
        dampening: Dampening of the gradient in the momentum.
        weight_decay: For groups with `stiefel=False` only.
        nesterov: Whether to step along \(P_{X_t}(G_t) + \mu M_t\), where the first term is taken as
            \(M_t - \mu M_{t-1}\): what is left of it in the normal space, the retraction removes.
        process_group: With one (e.g. `torch.distributed.group.WORLD`), each of its processes moves
            its part of the matrices and all receive the results. Gradients must be the same in
            all processes, as they are under DistributedDataParallel.

    Guarantee:
        After each step \(\max|\sigma - 1| \le 2\cdot 10^{-6}\) in float32 and \(10^{-12}\) in
        float64, for every finite gradient and learning rate; errors do not accumulate.

    Raises:
        NotOnManifoldError: A parameter of a group with `stiefel=True` is not semi-orthogonal.
        ValueError: A value is out of range, or a parameter is no matrix of float32 or float64.

    Examples:
        >>> layer = torch.nn.Linear(8, 4)
        >>> _ = torch.nn.init.orthogonal_(layer.weight)
        >>> optimizer = StiefelSGD([layer.weight], lr=0.1, momentum=0.9)
        >>> optimizer.add_param_group({"params": [layer.bias], "stiefel": False})

    References:
        Absil, Mahony & Sepulchre, *Optimization algorithms on matrix manifolds*, 2008: gradient
        (3.37), projection (example 3.6.2), polar retraction (example 4.1.3), transport by
        projection (section 8.1.3).
    """

    _step_plain = staticmethod(sgd_step)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        process_group: Any = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, process_group)

    def _direction(self, block: Block, group: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        grad = block.grad
        if group["momentum"] and group["dampening"]:
            # not at the first step, where the momentum becomes the gradient
            first = (block.steps == 1).to(grad.device)
            grad = torch.where(first, grad, grad * (1.0 - group["dampening"]))
        return _with_momentum(block, grad, group), None


class StiefelAdam(StiefelOptimizer):
    r"""Adam on matrices with orthonormal columns or rows.

    \[ M_t = \beta_1 T(M_{t-1}) + (1 - \beta_1)\,P_{X_t}(G_t), \quad
       v_t = \beta_2 v_{t-1} + (1 - \beta_2)\,\tfrac{1}{mn}\|P_{X_t}(G_t)\|_F^2, \quad
       X_{t+1} = \mathrm{polar}\Big(X_t - \eta\,\frac{\hat M_t}{\sqrt{\hat v_t} + \epsilon}\Big) \]

    with the corrections of bias \(\hat M_t = M_t / (1 - \beta_1^t)\),
    \(\hat v_t = v_t / (1 - \beta_2^t)\). T transports from \(X_{t-1}\) to \(X_t\): by projection,
    or for square matrices by the group, \(X_{t-1} A \mapsto X_t A\) with skew-symmetric A, which
    keeps norms; the state `exp_avg` then holds A. The second moment is one number for each matrix,
    the mean
    square of the entries of the Riemannian gradient: entrywise ones would leave the tangent space
    and depend on the basis. So the method is equivariant: it commutes with orthogonal maps of rows
    and columns. A learning rate means what it does in `torch.optim.Adam`, the root mean square
    change of an entry in a step; a step of a square n x n matrix then has a spectral norm of
    \(2 \eta \sqrt n\) at most, typically.

    A square matrix is turned, not pulled back: with the skew-symmetric step B,
    \(X_{t+1} = X_t (\sqrt{I + B^2} - B)\), the root by a polynomial of degree 1 or 2 in
    \(B^2\) that is proved to reach rounding: 2.6 or 3.3 products of the size of X in float32, as
    long as \(\|B\|_2\) is seen to be below 0.17, about 5 for longer steps. What rounding leaves
    is measured and taken away every sixteenth step, and after a change of the parameter by anybody
    else (through `.data` it is not seen, and lasts until then). Rectangular matrices take five
    products for \(\eta\|D\|_2 \le 0.036\), and six up to 0.12.

    Args:
        params: Parameters, or groups of them. A group with `stiefel=False` holds plain parameters,
            which are updated as by `torch.optim.AdamW`.
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: For groups with `stiefel=False` only.
        process_group: With one, each of its processes moves its part of the matrices, see
            [`StiefelSGD`][orthonet.optim.StiefelSGD].

    Guarantee:
        That of [`StiefelSGD`][orthonet.optim.StiefelSGD].

    Raises:
        NotOnManifoldError: A parameter of a group with `stiefel=True` is not semi-orthogonal.
        ValueError: A value is out of range, or a parameter is no matrix of float32 or float64.

    References:
        Bécigneul & Ganea, *Riemannian adaptive optimization methods*, ICLR 2019 (one second moment
        for each factor of a product of manifolds); Li, Fuxin & Todorovic, *Efficient Riemannian
        optimization on the Stiefel manifold via the Cayley transform*, ICLR 2020 (Cayley Adam).
    """

    _kept = ("exp_avg", "exp_avg_sq")
    _step_plain = staticmethod(adam_step)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        process_group: Any = None,
    ) -> None:
        self._versions: dict[Tensor, int] = {}  # of the parameters, as the last step left them
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, process_group)

    def _direction(self, block: Block, group: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        x, grad, before, beta1 = block.x, block.grad, block.state["exp_avg"], group["betas"][0]
        # P_X is linear: the normal parts of gradient and momentum share one product
        normal = symmetric_part(x.mT @ grad)
        both = symmetric_part(x.mT @ before).mul_(beta1).add_(normal, alpha=1.0 - beta1)
        block.state["exp_avg"] = m = (before * beta1).add_(grad, alpha=1.0 - beta1).sub_(x @ both)
        # ||P(G)||^2 = ||G||^2 - ||sym(X^T G)||^2
        square = _mean_square(grad) - _mean_square(normal) * (x.shape[-1] / x.shape[-2])
        return m, _second_moment(block, square, group)

    def _step_on_manifold(self, params: list[Tensor], group: dict[str, Any]) -> None:
        super()._step_on_manifold(params, group)
        if not torch.compiler.is_compiling():
            self._versions.update((p, p._version) for p in params)

    def _move(self, found: list[Block], group: dict[str, Any]) -> None:
        square = [block for block in found if block.x.shape[-2] == block.x.shape[-1]]
        if not torch.compiler.is_compiling():  # before anything is changed in place
            self._require_finite([block.grad for block in square if block.grad.is_cpu])
        super()._move([b for b in found if b.x.shape[-2] != b.x.shape[-1]], group)
        work = Workspace()
        for part in parts(square):
            turned = rotate([self._turn(block, group, work) for block in part])
            for block, x in zip(part, turned, strict=True):
                block.x = x

    def _turn(self, block: Block, group: dict[str, Any], work: Workspace) -> Turn:
        """The step of square matrices: P_X(G) = X A with A = skew(X^T G), moments of A."""
        x, grad, beta1 = block.x, block.grad, group["betas"][0]
        # 0.5 X^T G: the factor costs nothing inside the product
        product = torch.addmm if x.ndim == 2 else torch.baddbmm
        inner = product(grad, x.mT, grad, beta=0.0, alpha=0.5, out=work.take("moved", x))
        a = minus_transpose(inner, work.take("change", x))
        before = block.state["exp_avg"]
        in_place = before.is_cpu and not torch.compiler.is_compiling()
        m = before.lerp_(a, 1.0 - beta1) if in_place else before.lerp(a, 1.0 - beta1)
        block.state["exp_avg"] = m
        factor = _second_moment(block, _mean_square(a), group) * group["lr"]
        b = torch.mul(m, factor, out=work.take("b", x))
        return Turn(x, b, self._looks(block), work)

    def _looks(self, block: Block) -> bool:
        """Whether it is time to measure the defect, or the points were changed from outside."""
        if torch.compiler.is_compiling():
            return False
        untouched = all(self._versions.get(p) == p._version for p in block.params)
        return not untouched or int(block.steps.amax()) % EVERY == 0

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_versions": {}}


class StiefelMuon(StiefelOptimizer):
    r"""Momentum whose direction is made nearly orthogonal, on the Stiefel manifold.

    \[ M_t = P_{X_t}(\mu M_{t-1} + G_t), \qquad D_t = P_{X_t}(\mathrm{msign}(M_t)), \qquad
       X_{t+1} = \mathrm{polar}(X_t - \eta D_t) \]

    msign sets the singular values of a matrix to about 1 (between 0.7 and 1.2), by the quintic
    Newton-Schulz steps of Muon, and keeps zeros; so a step has spectral norm about \(\eta\), in
    every direction that the momentum has. For square X, msign of a tangent vector is tangent:
    \(X A\) with skew A goes to \(X\,\mathrm{msign}(A)\), which is skew too. For others the second
    projection makes it so, and this is a heuristic, not the steepest descent of the spectral norm.

    Args:
        params: Parameters, or groups of them. A group with `stiefel=False` holds plain parameters,
            which are updated as by `torch.optim.AdamW`; give it a learning rate of its own.
        lr: Learning rate: about the spectral norm of a step.
        momentum: Factor of the momentum.
        nesterov: Whether to look ahead, as in [`StiefelSGD`][orthonet.optim.StiefelSGD].
        ns_steps: Newton-Schulz steps, three products each.
        betas: Of the plain groups: decay of the moments.
        eps: Of the plain groups: added to the root of the second moment.
        weight_decay: For groups with `stiefel=False` only.
        ns_dtype: The dtype of the Newton-Schulz steps for matrices of float32; those of float64
            keep theirs. bfloat16 as in Muon, for an approximate direction needs no more: the
            projections and the retraction around them are of float32.
        process_group: With one, each of its processes moves its part of the matrices, see
            [`StiefelSGD`][orthonet.optim.StiefelSGD].

    Guarantee:
        That of [`StiefelSGD`][orthonet.optim.StiefelSGD].

    Raises:
        NotOnManifoldError: A parameter of a group with `stiefel=True` is not semi-orthogonal.
        ValueError: A value is out of range, or a parameter is no matrix of float32 or float64.

    References:
        Jordan et al., *Muon: an optimizer for hidden layers in neural networks*, 2024 (momentum and
        quintic); Bernstein, *Modular manifolds*, 2025 (the problem of steepest descent on the
        manifold, which this does not solve).
    """

    _step_plain = staticmethod(adam_step)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        ns_dtype: torch.dtype = torch.bfloat16,
        process_group: Any = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, process_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        _checks.positive_int(self, ns_steps=group["ns_steps"])
        _checks.one_of(
            self, (torch.bfloat16, torch.float16, torch.float32), ns_dtype=group["ns_dtype"]
        )

    def _direction(self, block: Block, group: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        d = _with_momentum(block, block.grad, group)
        dtype = group["ns_dtype"] if d.dtype == torch.float32 else d.dtype
        return tangent(block.x, newton_schulz_sign(d, group["ns_steps"], dtype)), None


def _with_momentum(block: Block, grad: Tensor, group: dict[str, Any]) -> Tensor:
    """The new momentum M of `block`, or P(G) + momentum M, with which Nesterov's method steps."""
    momentum = group["momentum"]
    if not momentum:
        return tangent(block.x, grad)
    before = block.state["momentum_buffer"]
    block.state["momentum_buffer"] = m = tangent(block.x, (before * momentum).add_(grad))
    # P(G) = M - momentum M_before up to a normal part
    return (m * (1.0 + momentum)).sub_(before, alpha=momentum) if group["nesterov"] else m


def _second_moment(block: Block, square: Tensor, group: dict[str, Any]) -> Tensor:
    """What the direction of `block` is multiplied by, of the mean `square` of its gradient."""
    beta2 = group["betas"][1]
    v = block.state["exp_avg_sq"] * beta2 + square.clamp_min(0.0) * (1.0 - beta2)
    block.state["exp_avg_sq"] = v
    return adam_factor(v, block.steps, group)


def _mean_square(a: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(a, dim=(-2, -1), keepdim=True)
    return norm.square() / (a.shape[-2] * a.shape[-1])
