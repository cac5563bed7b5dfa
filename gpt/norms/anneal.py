"""A LayerNorm that fades during training into a division by a constant."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt.common.processes import mean_over_processes
from gpt.norms.base import Norm, check_at_least, progress, wide
from gpt.norms.registry import register


@register("anneal")
class AnnealedLayerNorm(Norm):
    """y = γ (x − μ) ((1 − λ)/σ + λ/σ̄) + β, λ rising linearly from 0 to 1.  (B, T, C) → (B, T, C)

    σ = √(biased variance over C + ε). σ̄ is the running mean of σ over tokens; it is constant once
    λ is 1. What remains then is linear: a model without norms.

    n_embd    C
    eps       ε > 0
    start     fraction of training at which λ leaves 0
    end       fraction at which λ reaches 1, 0 < start < end ≤ 1
    momentum  in [0, 1], the weight of the newest batch in σ̄; the first few have equal weights

    Use it with init.from to remove the norms of a model trained with `layer`. The schedule may be
    too fast near its end, when no token keeps its own scale.
    After Heimersheim 2024, "You can remove GPT2's LayerNorm by fine-tuning", arXiv:2409.13710.
    """

    axes = ("C",)
    invariances = ("shift",)
    defers = True
    running_std: Tensor  # σ̄
    updates: Tensor  # the number of updates of σ̄
    fade: Tensor  # λ
    seen: Tensor

    def __init__(
        self,
        n_embd: int,
        *,
        eps: float = 1e-5,
        start: float = 0.2,
        end: float = 0.8,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        check_at_least(1e-30, eps=eps)
        if not 0 < start < end <= 1:
            raise ValueError(f"norm.start={start}, norm.end={end}: expected 0 < start < end <= 1")
        if not 0 <= momentum <= 1:
            raise ValueError(f"norm.momentum={momentum}: expected a number in [0, 1]")
        self.eps, self.start, self.end, self.momentum = eps, start, end, momentum
        self.weight = nn.Parameter(torch.ones(n_embd))  # γ
        self.bias = nn.Parameter(torch.zeros(n_embd))  # β
        self.register_buffer("running_std", torch.ones(()))
        self.register_buffer("updates", torch.zeros(()))
        self.register_buffer("fade", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(2), persistent=False)  # Σ of mean σ, their number

    def begin_step(self, step: int, steps: int) -> None:
        done = (progress(step, steps) - self.start) / (self.end - self.start)
        self.fade.fill_(min(1.0, max(0.0, done)))

    @torch.no_grad()
    def end_step(self) -> None:
        total, count = self.seen
        due = (self.fade < 1) * (count > 0)
        weight = (1 / (self.updates + 1)).clamp_min(self.momentum)  # the first has weight 1
        self.running_std += due * weight * (total / count.clamp_min(1) - self.running_std)
        self.updates += due
        self.seen.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x32 = wide(x)
        centred = x32 - x32.mean(-1, keepdim=True)
        std = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        rstd = (1 - self.fade) / std + self.fade / self.running_std
        if self.training:
            mean_std = mean_over_processes(std.detach().mean())
            self.seen += torch.stack([mean_std, torch.ones_like(mean_std)])
            if not self.deferred:
                self.end_step()
        return (centred * rstd * self.weight + self.bias).to(x.dtype)
