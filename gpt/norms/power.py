"""PowerNorm: divides each feature by a running root mean square; custom backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpt.common.processes import mean_over_processes, world_size
from gpt.norms.base import check_at_least, wide
from gpt.norms.batch import BatchNorm
from gpt.norms.registry import register


class Divide(torch.autograd.Function):
    """x̂ = x/√ψ, ψ from earlier steps. Backward treats ψ as this batch's, through a running ν.

    dx = (dx̂ − ν x̂)/√ψ. `seen` sums Γ = mean x̂², Λ = mean dx̂·x̂ and the number of passes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, psi: Tensor, nu: Tensor, seen: Tensor) -> Tensor:
        rstd = psi.rsqrt()
        x_hat = x * rstd
        ctx.save_for_backward(x_hat, rstd)
        ctx.nu, ctx.seen = nu, seen
        return x_hat

    @staticmethod
    def backward(ctx: Any, dx_hat: Tensor) -> tuple[Tensor, None, None, None]:
        x_hat, rstd = ctx.saved_tensors
        dx = (dx_hat - ctx.nu * x_hat) * rstd
        gamma = mean_over_processes(x_hat.square().mean((0, 1)))
        lam = mean_over_processes((dx_hat * x_hat).mean((0, 1)))
        ctx.seen.add_(torch.stack([gamma, lam, torch.ones_like(lam)]))
        return dx, None, None, None


@register("power")
class PowerNorm(BatchNorm):
    """y = γ x/√(ψ + ε) + β, ψ the mean of x² over B and T, a running mean after warm-up.

    (B, T, C) → (B, T, C). In the first `warmup_steps` ψ is the batch's own, so a token sees later
    tokens and other samples. After that ψ is the running mean of earlier steps, as it is in
    evaluation. The gradient is then the paper's approximation, with a running ν for ψ's part:
    ν ← ν (1 − (1 − α) Γ) + (1 − α) Λ, Γ = mean x̂², Λ = mean dx̂·x̂.

    n_embd        C
    eps           ε > 0
    momentum      1 − α, in [0, 1], the weight of the newest batch
    warmup_steps  ≥ 0

    Use it if BatchNorm's statistics fluctuate too much. It does not subtract the mean.
    Shen, Yao, Gholami, Mahoney, Keutzer 2020, arXiv:2003.07845. Their code also divides each
    token by its own root mean square first, and warms up for 10,000 steps.
    """

    invariances = ("scale",)
    correction = 0
    defers = True
    nu: Tensor
    seen_backward: Tensor

    def __init__(
        self, n_embd: int, *, eps: float = 1e-5, momentum: float = 0.1, warmup_steps: int = 100
    ) -> None:
        super().__init__(n_embd, eps=eps, momentum=momentum)
        check_at_least(0, warmup_steps=warmup_steps)
        self.warmup_steps, self.warming = warmup_steps, warmup_steps > 0
        self.register_buffer("nu", torch.zeros(n_embd))
        self.register_buffer("seen_backward", torch.zeros(3, n_embd), persistent=False)

    def begin_step(self, step: int, steps: int) -> None:
        self.warming = step <= self.warmup_steps

    @torch.no_grad()
    def end_step(self) -> None:
        super().end_step()
        gamma, lam, times = self.seen_backward
        momentum = self.momentum * times.clamp_max(1)
        gamma, lam = gamma / times.clamp_min(1), lam / times.clamp_min(1)
        self.nu.mul_(1 - momentum * gamma).add_(momentum * lam)
        self.seen_backward.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x32, psi = wide(x), self.running_var + self.eps  # ψ: a variance around a mean of 0
        if self.training or self.batch_stats:
            square = mean_over_processes(x32.square().mean((0, 1)))
            if self.training:
                count = x.shape[:-1].numel() * world_size()
                self.observe(torch.zeros_like(square), square.detach(), count)
            if self.batch_stats or self.warming:
                x_hat = x32 * torch.rsqrt(square + self.eps)
            else:
                x_hat = Divide.apply(x32, psi, self.nu, self.seen_backward)
        else:
            x_hat = x32 * torch.rsqrt(psi)
        return (self.weight * x_hat + self.bias).to(x.dtype)

    @torch.no_grad()
    def statistics(self, x: Tensor) -> dict[str, Tensor]:
        """`tid_mean` is 0, since there is no mean; `tid_std` is mean |√(ψ_run/ψ_B) − 1|."""
        square = mean_over_processes(wide(x).square().mean((0, 1))) + self.eps
        off = ((self.running_var + self.eps) / square).sqrt() - 1
        return {"tid_mean": torch.zeros_like(off[0]), "tid_std": off.abs().mean()}
