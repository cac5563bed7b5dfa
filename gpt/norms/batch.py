"""BatchNorm: normalises each feature over batch and time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.common.processes import mean_over_processes, world_size
from gpt.norms.base import Norm, check_at_least, norms_of, wide
from gpt.norms.registry import register


def mean_and_variance(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of x over `dims` and all processes: two passes, fp32 or wider."""
    x32 = wide(x)
    mean = mean_over_processes(x32.mean(dims))
    return mean, mean_over_processes((x32 - mean).square().mean(dims))


@register("batch")
class BatchNorm(Norm):
    """y = γ (x − μ)/√(σ² + ε) + β, one μ and σ² for each of C features.  (B, T, C) → (B, T, C)

    In training μ and σ² (biased) run over B and T: a token sees later tokens and other samples.
    In evaluation they are the running statistics, r ← (1 − momentum) r + momentum·batch. The
    running variance is unbiased (÷ BT−1), as in torch. The norm is then a fixed affine map: it is
    causal, and the only choice for one sample.
    The running statistics treat all micro-batches and processes of a step as one batch. Processes
    also share μ and σ².

    n_embd    C
    eps       ε > 0
    momentum  in [0, 1], the weight of the newest batch

    Use it to see what a norm over the batch does, or if inference must cost nothing: it folds into
    the next Linear. Do not use it if the training loss must be meaningful. The statistics of a
    small batch are noisy.
    Training on a single value per feature (B·T = 1) raises ValueError: its variance is 0.
    Ioffe, Szegedy 2015, arXiv:1502.03167.
    """

    axes: ClassVar[tuple[str, ...]] = ("B", "T")
    evaluation_axes: ClassVar[tuple[str, ...]] = ()
    invariances: ClassVar[tuple[str, ...]] = ("shift", "scale")
    has_batch_stats = True
    correction = 1  # the running variance is unbiased: ÷ n − 1

    running_mean: Tensor
    running_var: Tensor
    seen_mean: Tensor
    seen_m2: Tensor
    seen_count: Tensor

    def __init__(self, n_embd: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        check_at_least(1e-30, eps=eps)
        if not 0 <= momentum <= 1:
            raise ValueError(f"norm.momentum={momentum}: expected a number in [0, 1]")
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(n_embd))  # γ
        self.bias = nn.Parameter(torch.zeros(n_embd))  # β
        self.make_buffers(n_embd)

    def make_buffers(self, *shape: int) -> None:
        """Register the running statistics and those of the current step: the mean, Σ (x − mean)²
        and the number of values seen per feature."""
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))
        for name in ("seen_mean", "seen_m2"):
            self.register_buffer(name, torch.zeros(shape), persistent=False)
        self.register_buffer("seen_count", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training or self.batch_stats):
            return self.normalise(x, self.running_mean, self.running_var)
        count = x.shape[:-1].numel() * world_size()
        if count == 1 and self.training:
            raise ValueError("BatchNorm in training needs more than 1 value per feature (B·T > 1)")
        if self.training and not self.deferred and world_size() == 1:  # the same in one kernel
            rows, running = x.flatten(0, -2), (self.running_mean, self.running_var)
            affine = (self.weight, self.bias)
            return F.batch_norm(rows, *running, *affine, True, self.momentum, self.eps).view_as(x)
        mean, variance = mean_and_variance(x, (0, 1))
        if self.training:
            self.observe(mean.detach(), variance.detach(), count)
        return self.normalise(x, mean, variance)

    def normalise(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """γ (x − mean)/√(variance + ε) + β."""
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return ((wide(x) - mean) * scale + self.bias).to(x.dtype)

    @torch.no_grad()
    def observe(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Add `count` values, by their mean and biased variance, to those seen (Chan's formula)."""
        total = self.seen_count + count
        delta = mean - self.seen_mean
        self.seen_mean += delta * (count / total)
        self.seen_m2 += variance * count + delta.square() * (self.seen_count * count / total)
        self.seen_count.copy_(total)
        if not self.deferred:
            self.end_step()

    @torch.no_grad()
    def end_step(self) -> None:
        """Update the running statistics with those seen since the last update."""
        weight = self.momentum * self.seen_count.clamp_max(1)  # 0 if nothing was seen
        unbiased = self.seen_m2 / (self.seen_count - self.correction).clamp_min(1)
        self.running_mean += weight * (self.seen_mean - self.running_mean)
        self.running_var += weight * (unbiased - self.running_var)
        for seen in (self.seen_mean, self.seen_m2, self.seen_count):
            seen.zero_()

    @torch.no_grad()
    def statistics(self, x: Tensor) -> dict[str, Tensor]:
        """Training-inference discrepancy (RBN): mean |μ_run − μ_B|/σ_B, mean |σ_run/σ_B − 1|."""
        return self.discrepancy(*mean_and_variance(x, (0, 1)), self.running_mean, self.running_var)

    def discrepancy(
        self, mean: Tensor, variance: Tensor, running_mean: Tensor, running_var: Tensor
    ) -> dict[str, Tensor]:
        std, running_std = ((v + self.eps).sqrt() for v in (variance, running_var))
        return {
            "tid_mean": ((running_mean - mean).abs() / std).mean(),
            "tid_std": (running_std / std - 1).abs().mean(),
        }

    def as_affine(self) -> tuple[Tensor, Tensor] | None:
        return self.affine()

    @torch.no_grad()
    def affine(self) -> tuple[Tensor, Tensor]:
        """(scale, shift), each (C,): y = x·scale + shift with the running statistics."""
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, every norm of `model` with running statistics uses those of its batch instead.

    Training did so. Generation cannot: the statistics of one sample are not those of a batch, and
    they change with every added token.
    """
    norms = norms_with_batch_stats(model)
    for norm in norms:
        norm.batch_stats = True
    try:
        yield
    finally:
        for norm in norms:
            norm.batch_stats = False


def norms_with_batch_stats(model: nn.Module) -> list[Norm]:
    """The norms of `model` that can use a batch's own statistics in evaluation."""
    return [norm for norm in norms_of(model) if norm.has_batch_stats]
