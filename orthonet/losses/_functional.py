"""The losses as functions of logits and targets."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orthonet import _checks

REDUCTIONS = ("none", "mean", "sum")
_POSITIVE = ("lipschitz", "margin", "tau", "temperature")


def offset_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    offset: float,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Return the cross-entropy after `offset` is subtracted from the logit of the true class.

    \(\ell(s, y) = t \cdot \mathrm{CE}\big((s - u\, e_y) / t,\; y\big)
    = t \log\big(1 + \sum_{j \ne y} e^{(u - (s_y - s_j)) / t}\big)\), offset \(u\), temperature
    \(t\). For \(t \to 0\) it is the hinge \(\max(0, u - (s_y - \max_{j \ne y} s_j))\): the loss
    ends where the margin of the logits reaches \(u\). A 1-Lipschitz network whose margin is
    \(u\) has the certified l2 radius \(u / \sqrt 2\), so `offset = math.sqrt(2) * radius` asks for
    `radius`.

    Args:
        logits: (batch, classes).
        target: Classes, (batch,).
        offset: The margin asked for, in units of the logits, >= 0; 0 is the plain cross-entropy.
        temperature: Softness of the maximum, > 0; small values look only at the runner-up.
        reduction: "none", "mean" or "sum" over the batch.

    Shape:
        Output: a scalar, or (batch,) with `reduction="none"`.

    Raises:
        ValueError: An option is out of range, or the shapes do not match.

    Examples:
        >>> logits = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> offset_cross_entropy(logits, torch.tensor([0, 1]), offset=2.0, temperature=0.01)
        tensor(0.5000)

    References:
        Prach & Lampert, *Almost-Orthogonal Layers for Efficient General-Purpose Lipschitz
        Networks*, ECCV 2022, section 5 (there \(u = \sqrt 2, t = 1/4\)), arXiv:2208.03160.
    """
    owner = "offset_cross_entropy"
    check_options(owner, offset=offset, temperature=temperature, reduction=reduction)
    check_classes(owner, logits, target)
    wanted = F.one_hot(target.long(), logits.shape[1]).to(logits.dtype)
    scaled = (logits - offset * wanted) / temperature
    return temperature * F.cross_entropy(scaled, target.long(), reduction=reduction)


def kr(input: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""Return the Kantorovich-Rubinstein loss: minus the gap of the mean scores of two classes.

    \(-\big(\mathbb E_{x \sim P_+} f(x) - \mathbb E_{x \sim P_-} f(x)\big)\). Its infimum over the
    1-Lipschitz functions is \(-W_1(P_+, P_-)\), the Wasserstein distance. The terms of
    `reduction="none"` are weighted so that their mean is the loss; a class without a sample in the
    batch contributes nothing.

    Args:
        input: Scores of a binary classifier: (batch,) or (batch, 1), or (batch, k) of k
            classifiers,
            whose losses are averaged.
        target: Labels in {0, 1} or {-1, 1}, or booleans, in the shape of `input`: positive means
            class +.
        reduction: See [`offset_cross_entropy`][orthonet.losses.offset_cross_entropy].

    Shape:
        Output: a scalar, or (batch,) without a reduction.

    Raises:
        ValueError: The reduction is unknown, or the shapes do not match.

    Examples:
        >>> kr(torch.tensor([2.0, 4.0, 1.0]), torch.tensor([1, 1, 0]))
        tensor(-2.)

    References:
        Serrurier et al., *Achieving robustness in classification using optimal transport with
        hinge regularization*, CVPR 2021, arXiv:2006.06520; Villani, *Optimal Transport*, 2009,
        theorem 5.10.
    """
    check_options("kr", reduction=reduction)
    _check_binary("kr", input, target)
    return reduced(_per_sample(_kr_terms(input, target > 0)), reduction)


def hinge_kr(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.9,
    margin: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Return the binary hinge-Kantorovich-Rubinstein (HKR) loss.

    \((1 - \alpha)\, \mathrm{KR}(f) + \alpha\, \mathbb E \max(0, m - y f(x))\) with
    \(y = \pm 1\); `alpha = 0` is [`kr`][orthonet.losses.kr], `alpha = 1` the hinge alone. For a
    1-Lipschitz f that decides by its sign, \(|f(x)|\) is a certified radius: `margin` is the radius
    that the hinge asks for. (The paper weighs the hinge by \(\lambda\):
    \(\alpha = \lambda / (1 + \lambda)\). deel-torchlip's `min_margin` is twice our `margin`.)

    Args:
        input: See [`kr`][orthonet.losses.kr].
        target: As there.
        alpha: Weight of the hinge, in [0, 1]; the rest is that of the KR term.
        margin: Certified radius that the hinge asks of a 1-Lipschitz classifier, > 0.
        reduction: As there.

    Shape:
        As there.

    Raises:
        ValueError: `alpha`, `margin` or `temperature` is out of range, or the shapes do not match.

    Examples:
        >>> hinge_kr(torch.tensor([2.0, -0.5]), torch.tensor([1, 0]), alpha=0.5)
        tensor(-1.1250)

    References:
        Serrurier et al., CVPR 2021, arXiv:2006.06520.
    """
    check_options("hinge_kr", alpha=alpha, margin=margin, reduction=reduction)
    _check_binary("hinge_kr", input, target)
    positive = target > 0
    hinge = F.relu(margin - torch.where(positive, input, -input))
    terms = (1 - alpha) * _kr_terms(input, positive) + alpha * hinge
    return reduced(_per_sample(terms), reduction)


def hinge_kr_multiclass(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.9,
    margin: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Return the HKR loss of q classes: one binary classifier against the rest for every class.

    \((1 - \alpha)\, \frac1q \sum_k \mathrm{KR}_k(f_k) + \alpha\, \mathbb E \Big[\max(0, m - f_y) +
    \frac{1}{q - 1} \sum_{k \ne y} \max(0, m + f_k)\Big]\), where \(\mathrm{KR}_k\) sets class k
    against all others. Where the hinge is 0 the logits have margin \(2 m\): the certified radius of
    a 1-Lipschitz network is then \(\sqrt 2\, m\).

    Args:
        input: (batch, classes).
        target: Classes, (batch,).
        alpha: See [`hinge_kr`][orthonet.losses.hinge_kr].
        margin: Distance from 0 that the hinge asks of every score, > 0.
        reduction: As there.

    Shape:
        Output: as there.

    Raises:
        ValueError: As there.

    Examples:
        >>> scores = torch.tensor([[2.0, -1.0], [0.5, 0.0]])
        >>> hinge_kr_multiclass(scores, torch.tensor([0, 1]), alpha=1.0)
        tensor(1.2500)

    References:
        Serrurier et al., CVPR 2021, arXiv:2006.06520 (the section on multiclass problems).
    """
    owner = "hinge_kr_multiclass"
    check_options(owner, alpha=alpha, margin=margin, reduction=reduction)
    check_classes(owner, input, target)
    true = F.one_hot(target.long(), input.shape[1]).bool()
    hinge = F.relu(margin - torch.where(true, input, -input))
    hinge = torch.where(true, hinge, hinge / (input.shape[1] - 1)).sum(1)
    return reduced((1 - alpha) * _kr_terms(input, true).mean(1) + alpha * hinge, reduction)


def soft_hinge_kr_multiclass(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.9,
    margin: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Return the HKR loss of q classes in which the likeliest wrong classes weigh most.

    \((1 - \alpha) \big[-f_y + \sum_{k \ne y} p_k f_k\big] + \alpha \big[\max(0, m - f_y) +
    \sum_{k \ne y} p_k \max(0, m + f_k)\big]\) with \(p = \mathrm{softmax}(f_{k \ne y} / t)\).
    Every sample stands for itself: no class frequency of the batch enters, and the function has no
    state. For \(t \to 0\) only the runner-up counts.

    Args:
        input: (batch, classes).
        target: Classes, (batch,).
        alpha: See [`hinge_kr_multiclass`][orthonet.losses.hinge_kr_multiclass].
        margin: As there.
        temperature: Softness of the choice of wrong classes, > 0.
        reduction: As there.

    Shape:
        Output: as there.

    Raises:
        ValueError: As there.

    Examples:
        >>> scores = torch.tensor([[2.0, -1.0], [0.5, 0.0]])
        >>> soft_hinge_kr_multiclass(scores, torch.tensor([0, 1]), alpha=1.0)
        tensor(1.2500)

    References:
        Serrurier et al., *On the explainable properties of 1-Lipschitz neural networks: an optimal
        transport perspective*, NeurIPS 2023, arXiv:2206.06854.
    """
    owner = "soft_hinge_kr_multiclass"
    options = {"alpha": alpha, "margin": margin, "temperature": temperature}
    check_options(owner, **options, reduction=reduction)
    check_classes(owner, input, target)
    true = F.one_hot(target.long(), input.shape[1]).bool()
    wrong = torch.softmax((input / temperature).masked_fill(true, -math.inf), 1)
    weight = torch.where(true, torch.ones_like(wrong), wrong)
    signed = torch.where(true, input, -input)
    terms = alpha * F.relu(margin - signed) - (1 - alpha) * signed
    return reduced((weight * terms).sum(1), reduction)


def lse_hinge_kr_multiclass(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.9,
    margin: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Return the HKR loss of q classes against a smooth maximum of the wrong scores.

    \((1 - \alpha) (L - f_y) + \alpha \big[\max(0, m - f_y) + \max(0, m + L)\big]\) with
    \(L = t \log \sum_{k \ne y} e^{f_k / t}\), which lies between the largest wrong score and
    \(t \log(q - 1)\) above it. Where the hinge is 0 the logits have margin \(2 m\).

    Args:
        input: (batch, classes).
        target: Classes, (batch,).
        alpha: See [`hinge_kr_multiclass`][orthonet.losses.hinge_kr_multiclass].
        margin: Distance from 0 that the hinge asks of the true score and of the maximum, > 0.
        temperature: Softness of the maximum, > 0. `margin / math.log(q - 1)` keeps the smooth
            maximum within `margin` of the largest score.
        reduction: As there.

    Shape:
        Output: as there.

    Raises:
        ValueError: As there.

    Examples:
        >>> scores = torch.tensor([[2.0, -1.0], [0.5, 0.0]])
        >>> lse_hinge_kr_multiclass(scores, torch.tensor([0, 1]), alpha=1.0)
        tensor(1.2500)

    References:
        deel-torchlip's `LseHKRMulticlassLoss`.
    """
    owner = "lse_hinge_kr_multiclass"
    options = {"alpha": alpha, "margin": margin, "temperature": temperature}
    check_options(owner, **options, reduction=reduction)
    check_classes(owner, input, target)
    index = target.long()[:, None]
    right = input.gather(1, index).squeeze(1)
    others = (input / temperature).scatter(1, index, -math.inf)
    largest = temperature * torch.logsumexp(others, 1)
    hinge = F.relu(margin - right) + F.relu(margin + largest)
    return reduced((1 - alpha) * (largest - right) + alpha * hinge, reduction)


def tau_bce_with_logits(
    input: Tensor, target: Tensor, *, tau: float = 1.0, reduction: str = "mean"
) -> Tensor:
    r"""Return the binary cross-entropy of \(\tau f\), divided by \(\tau\).

    \(\log(1 + e^{-\tau y f}) / \tau\) with \(y = \pm 1\): for \(\tau \to \infty\) the hinge
    \(\max(0, -y f)\). A 1-Lipschitz classifier cannot scale its scores, so \(\tau\) trades
    accuracy for margin. The cross-entropy of q classes with this factor is
    [`offset_cross_entropy`][orthonet.losses.offset_cross_entropy] with `offset=0` and
    `temperature=1 / tau`.

    Args:
        input: See [`kr`][orthonet.losses.kr].
        target: As there.
        tau: The factor \(\tau\), > 0.
        reduction: As there.

    Shape:
        As there.

    Raises:
        ValueError: `tau` is not positive, or the shapes do not match.

    Examples:
        >>> tau_bce_with_logits(torch.tensor([0.0, 0.0]), torch.tensor([1, 0]), tau=2.0)
        tensor(0.3466)

    References:
        Béthune et al., *Pay attention to your loss*, NeurIPS 2022, arXiv:2104.05097.
    """
    check_options("tau_bce_with_logits", tau=tau, reduction=reduction)
    _check_binary("tau_bce_with_logits", input, target)
    signed = torch.where(target > 0, input, -input)
    return reduced(_per_sample(-F.logsigmoid(tau * signed) / tau), reduction)


def kr_labels(target: Tensor) -> Tensor:
    r"""Return the weight of each score in the Kantorovich-Rubinstein distance of a whole batch.

    \(n / n_+\) for the positive samples and \(-n / n_-\) for the others; 0 in place of an infinite
    one. Compute the labels from the whole batch, before a scatter to several devices: each
    device then averages `labels * scores` over its share, with no knowledge of the others.

    Args:
        target: Labels in {0, 1} or {-1, 1}, or one-hot: positive means class +.

    Shape:
        (batch,) or (batch, k); the output has the same and is floating-point.

    Examples:
        >>> kr_labels(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor([ 4.0000, -1.3333, -1.3333, -1.3333])
    """
    _check_labels("kr_labels", target)
    dtype = target.dtype if target.is_floating_point() else torch.get_default_dtype()
    return _kr_weights(target.to(dtype))


def _kr_weights(target: Tensor) -> Tensor:
    positive = target > 0
    size, number = target.shape[0], positive.sum(0).to(target.dtype)
    up = torch.where(number > 0, size / number.clamp(min=1), 0.0)
    down = torch.where(number < size, size / (size - number).clamp(min=1), 0.0)
    return torch.where(positive, up, -down)


def check_options(owner: object, /, **options: Any) -> None:
    """Check the options of losses, each by its name."""
    for name, value in options.items():
        if name == "reduction":
            _checks.one_of(owner, REDUCTIONS, reduction=value)
        elif name in _POSITIVE:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            _checks.require(
                number and 0 < value < math.inf,
                owner,
                f"{name} must be a finite number > 0",
                f"Pass a positive {name}",
                **{name: value},
            )
        else:
            _checks.in_range(owner, 0.0, 1.0 if name == "alpha" else 1e6, **{name: value})


def check_classes(owner: str, logits: Tensor, target: Tensor) -> None:
    _checks.floating(owner, logits=logits)
    _checks.tensor(owner, target=target)
    _checks.require(
        logits.dim() == 2 and logits.shape[1] >= 2,
        owner,
        "logits must be (batch, classes) with at least two classes",
        "Use the binary loss for a single score, flatten other dimensions into the batch",
        logits=logits,
    )
    integral = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    _checks.require(
        integral and target.shape == logits.shape[:1],
        owner,
        "target must hold one class index for each row of logits",
        "Pass integers of shape (batch,); of one-hot targets, pass target.argmax(1)",
        target=target,
        logits=logits,
    )
    # On an accelerator the look at the values would wait for the device, whose kernels check them.
    if target.device.type == "cpu" and target.numel() and not torch.compiler.is_compiling():
        low, high = int(target.min()), int(target.max())
        _checks.require(
            low >= 0 and high < logits.shape[1],
            owner,
            f"class indices must lie in 0 ... {logits.shape[1] - 1}",
            "Count the classes from 0, or give the model more outputs",
            smallest=low,
            largest=high,
        )


def _check_binary(owner: str, input: Tensor, target: Tensor) -> None:
    _checks.floating(owner, input=input)
    _checks.tensor(owner, target=target)
    _checks.require(
        input.shape == target.shape and input.dim() in (1, 2),
        owner,
        "input and target must have the same shape, (batch,) or (batch, k)",
        "Reshape one of them, e.g. target.view_as(input)",
        input=input,
        target=target,
    )
    _check_labels(owner, target)


def _check_labels(owner: str, target: Tensor) -> None:
    """The labels of two classes: 0 and 1, -1 and 1, or booleans."""
    _checks.tensor(owner, target=target)
    _checks.require(
        target.ndim >= 1 and not target.is_complex(),
        owner,
        "target must hold one label for each sample",
        "Pass a tensor of shape (batch,)",
        target=target,
    )
    if target.device.type == "cpu" and target.numel() and not torch.compiler.is_compiling():
        labels = set(target.unique().tolist())
        _checks.require(
            labels <= {0, 1} or labels <= {-1, 1},
            owner,
            "target must hold the labels 0 and 1, or -1 and 1",
            "Use a multiclass loss for class indices, e.g. HKRMulticlassLoss",
            labels=sorted(labels),
        )


def _kr_terms(input: Tensor, positive: Tensor) -> Tensor:
    """Terms whose mean over the batch is -(mean over the positive - mean over the negative)."""
    return -_kr_weights(positive.to(input.dtype)) * input


def _per_sample(terms: Tensor) -> Tensor:
    return terms.flatten(1).mean(1) if terms.dim() > 1 else terms


def reduced(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()
