"""Progressive RepBN: starts as RMSNorm and ends as a BatchNorm that folds away."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from gpt.norms.base import progress, wide
from gpt.norms.registry import register
from gpt.norms.repbn import RepBatchNorm
from gpt.norms.rms import rms_norm


@register("prepbn")
class ProgressiveRepBatchNorm(RepBatchNorm):
    """y = λ RMSNorm(x) + (1 − λ) RepBN(x), λ falling linearly from 1 to 0.  (B, T, C) → (B, T, C)

    At the start it is RMSNorm alone, with its own γ, and RepBN's γ and β have no gradient yet. In
    evaluation it computes RMSNorm's statistics until λ is 0, and no statistics after that.

    n_embd         C
    eps, momentum  as in BatchNorm
    fraction       in (0, 1], the fraction of training after which λ is 0

    Use it if a norm must cost nothing at inference and BatchNorm alone trains badly.
    Guo, Chen, Tang, Wang 2024 (SLAB), arXiv:2405.11582. They use LayerNorm in place of RMSNorm.
    Only their LLaMA uses RMSNorm: alone for the first 10,000 steps, and with η and RepBN's γ
    starting at 0. The authors' code evaluates with RepBN alone, for any λ.
    """

    axes = ("B", "T", "C")
    evaluation_axes = ("C",)  # RMSNorm's, until λ is 0
    takes_over: ClassVar[dict[str, str]] = {"rms_weight": "weight"}  # it is an RMSNorm at first
    share: Tensor  # λ, RMSNorm's share

    def __init__(
        self, n_embd: int, *, eps: float = 1e-5, momentum: float = 0.1, fraction: float = 0.5
    ) -> None:
        super().__init__(n_embd, eps=eps, momentum=momentum)
        if not 0 < fraction <= 1:
            raise ValueError(f"norm.fraction={fraction}: expected a number in (0, 1]")
        self.fraction = fraction
        self.rms_weight = nn.Parameter(torch.ones(n_embd))  # RMSNorm's γ
        self.register_buffer("share", torch.ones(()))

    def begin_step(self, step: int, steps: int) -> None:
        self.share.fill_(max(0.0, 1 - progress(step, steps) / self.fraction))

    def forward(self, x: Tensor) -> Tensor:
        x32 = wide(x)  # rounded once, at the end
        rms, repbn = rms_norm(x32, self.rms_weight, self.eps), super().forward(x32)
        return (self.share * rms + (1 - self.share) * repbn).to(x.dtype)

    def as_affine(self) -> tuple[Tensor, Tensor] | None:
        """None while λ > 0, since RMSNorm is not an affine map."""
        return None if self.share > 0 else self.affine()
