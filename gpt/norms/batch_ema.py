"""BatchNorm by the past: each feature by the running statistics of the steps before."""

from __future__ import annotations

from torch import Tensor

from gpt.common.processes import world_size
from gpt.norms.batch import BatchNorm, mean_and_variance
from gpt.norms.registry import register


@register("batch_ema")
class PastBatchNorm(BatchNorm):
    """y = γ (x − r_μ)/√(r_σ² + ε) + β, r the running statistics of earlier steps, also in training.

    (B, T, C) → (B, T, C). At first r is 0 and 1. Within a step it is a constant and takes no
    gradient: no token sees a later one or another sample, and training and inference are one map.

    n_embd    C
    eps       ε > 0
    momentum  in [0, 1], the weight of the newest batch

    Use it to see what is left of BatchNorm without its leak. Nothing holds the scale of a step's
    own activations, so that it may diverge where BatchNorm does not.
    This project's; compare Ioffe 2017 (batch renormalization), arXiv:1702.03275.
    """

    axes = ()
    invariances = ()
    defers = True

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_stats:
            return self.normalise(x, *mean_and_variance(x, (0, 1)))
        y = self.normalise(x, self.running_mean, self.running_var)
        if self.training:
            self.observe(
                *mean_and_variance(x.detach(), (0, 1)), x.shape[:-1].numel() * world_size()
            )
        return y
