"""AdamW and its schedule."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from gpt.config import OptimConfig
from gpt.norms.base import Norm
from gpt.placement import build_model
from gpt.training.optimizer import lr_at, make_optimizer
from tests.tools.configs import make_config

CFG = OptimConfig(
    lr=1.0, min_lr=0.1, warmup_steps=10, weight_decay=0.1, beta1=0.9, beta2=0.99, grad_clip=1.0
)


def test_the_learning_rate_warms_up_peaks_and_ends_at_min_lr() -> None:
    rates = [lr_at(step, 100, CFG) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[-1] == pytest.approx(0.1)
    assert rates[54] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert all(a > b for a, b in pairwise(rates[9:]))


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 5), (5, 5), (9, 5)])
def test_short_runs_have_finite_rates(warmup: int, steps: int) -> None:
    cfg = OptimConfig(1.0, 0.1, warmup, 0.1, 0.9, 0.99, 1.0)
    assert all(0 < lr_at(step, steps, cfg) <= 1 for step in range(1, steps + 1))


@pytest.mark.parametrize("norm", ["layer", "batch", "dummy"])
def test_matrices_are_decayed_and_nothing_else(norm: str) -> None:
    model = build_model(make_config("data=pydoc", f"norm={norm}"), 50)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, CFG)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        expected = before[name] * (1 - 0.1) if p.dim() >= 2 else before[name]
        torch.testing.assert_close(p.detach(), expected)


def test_updates_are_adamw_with_the_configured_betas() -> None:
    """m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², w ← w − lr m̂/(√v̂ + 1e-8), written out."""
    cfg = OptimConfig(0.1, 0.1, 0, 0.0, beta1=0.7, beta2=0.6, grad_clip=1.0)
    model = nn.Linear(1, 1, bias=False).double()
    w, m, v = model.weight.item(), 0.0, 0.0
    optimizer = make_optimizer(model, cfg)
    for step, g in enumerate((3.0, -1.0, 0.5), start=1):
        model.weight.grad = torch.full((1, 1), g, dtype=torch.float64)
        optimizer.step()
        m, v = 0.7 * m + 0.3 * g, 0.6 * v + 0.4 * g * g
        w -= 0.1 * (m / (1 - 0.7**step)) / (math.sqrt(v / (1 - 0.6**step)) + 1e-8)
        assert model.weight.item() == pytest.approx(w, rel=1e-12)


def test_a_norms_parameters_are_not_decayed_whatever_their_shape() -> None:
    """This includes a norm that is not registered."""

    class Whitening(Norm):
        """A norm whose γ is a matrix."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3))

    model = nn.Sequential(nn.Linear(3, 3), Whitening())
    decay = {
        p: g["weight_decay"] for g in make_optimizer(model, CFG).param_groups for p in g["params"]
    }
    linear, norm = model
    assert [decay[p] for p in (linear.weight, linear.bias, norm.weight)] == [0.1, 0.0, 0.0]
