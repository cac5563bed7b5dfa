"""Regularised BatchNorm: the loss penalises the gap between batch and running statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt.common.processes import world_size
from gpt.norms.base import check_at_least
from gpt.norms.batch import BatchNorm, mean_and_variance
from gpt.norms.registry import register


@register("rbn")
class RegularisedBatchNorm(BatchNorm):
    """BatchNorm, with λ₁ ‖μ_run − μ_B‖² + λ₂ Σ|σ²_run − σ²_B| added to the loss.

    (B, T, C) → (B, T, C). The logged loss does not include this penalty.

    n_embd         C
    eps, momentum  as in BatchNorm
    mean_weight    λ₁ ≥ 0
    var_weight     λ₂ ≥ 0

    Use it if BatchNorm validates far worse than it trains: the penalty reduces the discrepancy
    between training and inference. It does not remove the leak.
    Wang, Wu, Huang 2022, arXiv:2210.05153.
    """

    defers = True
    penalty: Tensor

    def __init__(
        self,
        n_embd: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        mean_weight: float = 0.01,
        var_weight: float = 0.01,
    ) -> None:
        super().__init__(n_embd, eps=eps, momentum=momentum)
        check_at_least(0, mean_weight=mean_weight, var_weight=var_weight)
        self.mean_weight, self.var_weight = mean_weight, var_weight
        self.penalty = torch.zeros(())

    def extra_loss(self) -> Tensor:
        return self.penalty

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean, variance = mean_and_variance(x, (0, 1))
        off_mean = (self.running_mean - mean).square().sum()
        off_var = (self.running_var - variance).abs().sum()
        self.penalty = self.mean_weight * off_mean + self.var_weight * off_var
        self.observe(mean.detach(), variance.detach(), x.shape[:-1].numel() * world_size())
        return self.normalise(x, mean, variance)
