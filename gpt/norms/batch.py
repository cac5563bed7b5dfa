"""BatchNorm: each feature by its column over batch and time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.norms.registry import register


@register("batch")
class BatchNorm(nn.Module):
    """y = γ (x − μ)/√(σ² + ε) + β, a μ and σ² for each of the C features.  (B, T, C) → (B, T, C)

    In training μ and σ² (biased) run over B and T: a token sees later tokens and other samples.
    In evaluation they are the running statistics, r ← (1 − momentum) r + momentum·batch, whose
    variance is unbiased (÷ BT−1): a fixed affine map, causal, and the only choice for one sample.

    n_embd    C
    eps       ε > 0
    momentum  in [0, 1], the weight of the newest batch

    Training on a single value per feature (B·T = 1) raises ValueError: its variance is 0.
    Ioffe, Szegedy 2015, arXiv:1502.03167.
    """

    axes = ("B", "T")
    causal_in_training = False
    batch_independent = False

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, n_embd: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        if eps <= 0:
            raise ValueError(f"norm.eps={eps}: expected a number > 0")
        if not 0 <= momentum <= 1:
            raise ValueError(f"norm.momentum={momentum}: expected a number in [0, 1]")
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(n_embd))  # γ
        self.bias = nn.Parameter(torch.zeros(n_embd))  # β
        self.register_buffer("running_mean", torch.zeros(n_embd))
        self.register_buffer("running_var", torch.ones(n_embd))
        self.batch_stats = False  # evaluate with the batch's own statistics, see batch_statistics

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (B·T, C): a feature is a column
        mean, variance = self.running_mean, self.running_var
        if self.batch_stats:  # of this batch, and nothing is remembered; one row alone gives y = β
            variance, mean = torch.var_mean(rows.detach().to(mean.dtype), 0, unbiased=False)
        training = self.training and not self.batch_stats
        y = F.batch_norm(
            rows, mean, variance, self.weight, self.bias, training, self.momentum, self.eps
        )
        return y.view_as(x)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, every norm of `model` that has running statistics uses those of its batch instead.

    That is what training did and what generation cannot do: one sample's statistics are not the
    batch's, and they change with every token that is added.
    """
    norms = with_batch_stats(model)
    for norm in norms:
        norm.batch_stats = True
    try:
        yield
    finally:
        for norm in norms:
            norm.batch_stats = False


def with_batch_stats(model: nn.Module) -> list[Any]:
    """The norms of `model` that can use a batch's own statistics in evaluation."""
    return [m for m in model.modules() if hasattr(m, "batch_stats")]
