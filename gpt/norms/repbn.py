"""RepBN: BatchNorm plus a learned multiple of its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt.norms.base import wide
from gpt.norms.batch import BatchNorm
from gpt.norms.registry import register


@register("repbn")
class RepBatchNorm(BatchNorm):
    """y = BatchNorm(x) + η x, with a learned scalar η, initially 1.  (B, T, C) → (B, T, C)

    n_embd         C
    eps, momentum  as in BatchNorm

    Use it like `batch`: it also folds into the next Linear as one affine map.
    Guo, Chen, Tang, Wang 2024 (SLAB), arXiv:2405.11582; in their LLaMA η and γ start at 0.
    """

    invariances = ()

    def __init__(self, n_embd: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(n_embd, eps=eps, momentum=momentum)
        self.eta = nn.Parameter(torch.ones(1))  # η

    def forward(self, x: Tensor) -> Tensor:
        x32 = wide(x)  # rounded once, at the end
        return (super().forward(x32) + self.eta * x32).to(x.dtype)

    @torch.no_grad()
    def affine(self) -> tuple[Tensor, Tensor]:
        scale, shift = super().affine()
        return scale + self.eta, shift
