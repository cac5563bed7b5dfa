"""LayerNorm: each token by its own row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.norms.registry import register


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """γ (x − μ)/√(σ² + ε) + β over the last axis, in fp32 or wider.

    σ² is the biased variance (÷ C, not ÷ C−1): `torch.var` is unbiased by default and would be
    off by √(C/(C−1)). Two passes: E[x²] − μ² in one would cancel where |μ| ≫ σ.
    """
    x32 = x if x.dtype == torch.float64 else x.float()
    centred = x32 - x32.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    y = centred * torch.rsqrt(variance + eps) * weight
    return (y if bias is None else y + bias).to(x.dtype)


@register("layer")
class LayerNorm(nn.Module):
    """y = γ (x − μ)/√(σ² + ε) + β over C, biased σ².  (B, T, C) → (B, T, C)

    γ and β are shared by all tokens: dL/dγ = Σ_bt dy·x̂, dL/dβ = Σ_bt dy.

    n_embd  C
    eps     ε ≥ 0
    bias    whether there is a β
    fast    `F.layer_norm`; otherwise the formula above it in this file

    Ba, Kiros, Hinton 2016, arXiv:1607.06450.
    """

    axes = ("C",)
    causal_in_training = True
    batch_independent = True

    def __init__(
        self, n_embd: int, *, eps: float = 1e-5, bias: bool = True, fast: bool = True
    ) -> None:
        super().__init__()
        if eps < 0:
            raise ValueError(f"norm.eps={eps}: expected a number >= 0")
        self.eps, self.fast = eps, fast
        self.weight = nn.Parameter(torch.ones(n_embd))  # γ
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None  # β

    def forward(self, x: Tensor) -> Tensor:
        if self.fast:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps)
