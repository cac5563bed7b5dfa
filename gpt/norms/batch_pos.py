"""BatchNorm by position: normalises each feature at each position over the batch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt.common.processes import world_size
from gpt.norms.base import check_at_least
from gpt.norms.batch import BatchNorm, mean_and_variance
from gpt.norms.registry import register


@register("batch_pos")
class PositionBatchNorm(BatchNorm):
    """y = γ (x − μ_t)/√(σ_t² + ε) + β, one μ and σ² for each position and feature.

    (B, T, C) → (B, T, C). In training they run over B alone: a token sees other samples at its own
    position, but no later tokens. In evaluation they are T·C running statistics.

    n_embd      C
    block_size  the largest T
    eps         ε > 0
    momentum    in [0, 1], the weight of the newest batch

    Use it to separate BatchNorm's two leaks: it sees neighbours, not the future. Training with
    B = 1 raises ValueError. It needs large batches, since each statistic comes from B values only.
    Defined by this project; the formula is Ioffe, Szegedy 2015, arXiv:1502.03167.
    """

    axes = ("B",)
    evaluation_axes = ()

    def __init__(
        self, n_embd: int, *, block_size: int, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__(n_embd, eps=eps, momentum=momentum)
        check_at_least(1, block_size=block_size)
        self.make_buffers(block_size, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        if not (self.training or self.batch_stats):
            return self.normalise(x, self.running_mean[:T], self.running_var[:T])
        count = x.shape[0] * world_size()
        if count == 1 and self.training:
            raise ValueError(
                "norm=batch_pos in training needs more than 1 sample per batch (B > 1)"
            )
        mean, variance = mean_and_variance(x, (0,))
        if self.training:
            # Positions after this batch's T keep their statistics: `end_step` turns this biased
            # variance into the unbiased one that they had.
            later = self.running_var[T:] * (1 - (self.seen_count == 0) / count)
            self.observe(
                torch.cat([mean.detach(), self.running_mean[T:]]),
                torch.cat([variance.detach(), later]),
                count,
            )
        return self.normalise(x, mean, variance)

    @torch.no_grad()
    def statistics(self, x: Tensor) -> dict[str, Tensor]:
        """As in BatchNorm, but over positions and features."""
        running = self.running_mean[: x.shape[1]], self.running_var[: x.shape[1]]
        return self.discrepancy(*mean_and_variance(x, (0,)), *running)

    def as_affine(self) -> tuple[Tensor, Tensor] | None:
        """None: it has one map per position, which no Linear can absorb."""
        return None
