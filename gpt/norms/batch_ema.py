"""BatchNorm that uses the running statistics of earlier steps, also in training."""

from __future__ import annotations

from torch import Tensor

from gpt.common.processes import world_size
from gpt.norms.batch import BatchNorm, mean_and_variance
from gpt.norms.registry import register


@register("batch_ema")
class PastBatchNorm(BatchNorm):
    """y = γ (x − r_μ)/√(r_σ² + ε) + β, r the running statistics of earlier steps, also in training.

    (B, T, C) → (B, T, C). At first r_μ is 0 and r_σ² is 1. Within a step both are constants
    without a gradient: no token sees later tokens or other samples, and training and inference
    compute the same map.

    n_embd    C
    eps       ε > 0
    momentum  in [0, 1], the weight of the newest batch

    Use it to see what remains of BatchNorm without its leak. Nothing bounds the scale of the
    current step's activations, so it may diverge when BatchNorm does not.
    Defined by this project; compare Ioffe 2017 (batch renormalization), arXiv:1702.03275.
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
