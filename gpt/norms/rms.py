"""RMSNorm: each token by its own row's root mean square."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt.norms.registry import register


@register("rms")
class RMSNorm(nn.Module):
    """y = γ x/√(mean x² + ε) over C, in fp32 or wider.  (B, T, C) → (B, T, C)

    No mean is taken away and there is no β: half of LayerNorm's parameters.

    n_embd  C
    eps     ε ≥ 0

    Zhang, Sennrich 2019, arXiv:1910.07467.
    """

    axes = ("C",)
    causal_in_training = True
    batch_independent = True

    def __init__(self, n_embd: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        if eps < 0:
            raise ValueError(f"norm.eps={eps}: expected a number >= 0")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_embd))  # γ

    def forward(self, x: Tensor) -> Tensor:
        x32 = x if x.dtype == torch.float64 else x.float()
        rms = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (x32 * rms * self.weight).to(x.dtype)
