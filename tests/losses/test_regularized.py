"""The losses beside the cross-entropy, against their formulas and limits."""

import math

import pytest
import torch
import torch.nn.functional as F

from orthonet import losses

LOGITS = torch.tensor([[3.0, 0.5, -1.0], [0.0, 1.0, 0.9], [-2.0, 0.0, 5.0]], dtype=torch.float64)
TARGET = torch.tensor([0, 2, 2])


def test_limits_are_the_cross_entropy():
    plain = F.cross_entropy(LOGITS, TARGET)
    torch.testing.assert_close(losses.emma(LOGITS, TARGET, radius=0.0), plain)
    torch.testing.assert_close(losses.trades(LOGITS, LOGITS, TARGET), plain)
    torch.testing.assert_close(losses.certificate_regularization(LOGITS, TARGET, weight=0.0), plain)
    offset = losses.offset_cross_entropy(LOGITS, TARGET, offset=1.2, temperature=0.5)
    annealed = losses.logit_annealing(LOGITS, TARGET, offset=1.2, temperature=0.5, beta=0.0)
    torch.testing.assert_close(annealed, offset)


def test_emma_raises_to_a_tie_at_most():
    loss = losses.emma(LOGITS, TARGET, radius=1.0, lipschitz=2.0, reduction="none")
    step = 2 * math.sqrt(2)
    rows = torch.tensor(
        [[3.0, 3.0, -1.0 + step], [0.9, 1.0, 0.9], [-2.0 + step, 2.828427124746190, 5.0]],
        dtype=torch.float64,
    )
    torch.testing.assert_close(loss, F.cross_entropy(rows, TARGET, reduction="none"))


def test_margin_losses():
    margins = torch.tensor([2.5, -0.1, 5.0], dtype=torch.float64)
    hinge = losses.multi_margin(LOGITS, TARGET, margin=3.0, reduction="none")
    torch.testing.assert_close(hinge, (3 - margins).clamp_min(0))
    loss = losses.certificate_regularization(LOGITS, TARGET, weight=2.0, reduction="none")
    expected = F.cross_entropy(LOGITS, TARGET, reduction="none") - 2 * margins.clamp_min(0)
    torch.testing.assert_close(loss, expected)


def test_annealing_fades_out_large_margins():
    strong, weak = (
        losses.logit_annealing(LOGITS, TARGET, beta=b, reduction="none") for b in (5.0, 0.0)
    )
    ratio = strong / weak
    assert float(ratio[2]) < 0.1 < float(ratio[1])


@pytest.mark.parametrize(
    "name", ["emma", "logit_annealing", "multi_margin", "trades", "certificate_regularization"]
)
def test_gradients_and_reductions(name):
    function = getattr(losses, name)
    extra = {"emma": {"radius": 0.5}}.get(name, {})
    for scale in (1.0, 1e4):
        logits = (scale * LOGITS).requires_grad_()
        first = (logits, logits.detach() + 0.1) if name == "trades" else (logits,)
        loss = function(*first, TARGET, **extra)
        loss.backward()
        assert bool(logits.grad.isfinite().all())
        each = function(*first, TARGET, reduction="none", **extra)
        torch.testing.assert_close(each.mean(), loss)
    with pytest.raises(ValueError, match="reduction must be one of"):
        function(*first, TARGET, reduction="max", **extra)
