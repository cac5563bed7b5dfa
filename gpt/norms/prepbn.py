"""Progressive RepBN: RMSNorm at first, a BatchNorm that folds away at last."""

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
    """y = λ RMSNorm(x) + (1 − λ) RepBN(x), λ from 1 to 0 by a straight line.  (B, T, C) → (B, T, C)

    As training begins it is RMSNorm alone, with a γ of its own, and RepBN's γ and β have no
    gradient yet. In evaluation RMSNorm's statistics are taken until λ is 0, and then none.

    n_embd         C
    eps, momentum  as BatchNorm's
    fraction       of the training after which λ is 0, in (0, 1]

    Use it where a norm must cost nothing at inference and BatchNorm alone trains badly.
    Guo, Chen, Tang, Wang 2024 (SLAB), arXiv:2405.11582: with LayerNorm in RMSNorm's place but for
    its LLaMA, where RMSNorm is alone for the first 10,000 steps and η and RepBN's γ begin at 0. The
    authors' code evaluates by RepBN alone, whatever λ is.
    """

    axes = ("B", "T", "C")
    evaluation_axes = ("C",)  # RMSNorm's, until λ is 0
    takes_over: ClassVar[dict[str, str]] = {"rms_weight": "weight"}  # it is an RMSNorm at first
    share: Tensor  # λ, that of RMSNorm

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
        """None as long as there is a share of RMSNorm."""
        return None if self.share > 0 else self.affine()
