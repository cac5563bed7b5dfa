"""GroupNorm, per token: LayerNorm over each of several groups of features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt.norms.base import Norm, check_at_least, wide
from gpt.norms.layer import layer_norm
from gpt.norms.registry import register


@register("group")
class GroupNorm(Norm):
    """y = γ (x − μ)/√(σ² + ε) + β, μ and σ² over C/G features of a token.  (B, T, C) → (B, T, C)

    `nn.GroupNorm` on (B, C, T) would also average over T, and so see the future.

    n_embd  C, a multiple of groups
    groups  G; 1 is LayerNorm
    eps     ε ≥ 0

    Use it if groups of features, such as heads, have different scales.
    Wu, He 2018, arXiv:1803.08494.
    """

    axes = ("C",)
    invariances = ("shift", "scale")
    divisors = ("groups",)

    def __init__(self, n_embd: int, *, groups: int = 4, eps: float = 1e-5) -> None:
        super().__init__()
        check_at_least(0, eps=eps)
        check_at_least(1, groups=groups)
        if n_embd % groups:
            raise ValueError(f"norm.groups={groups}: expected a divisor of {n_embd} features")
        if groups == n_embd > 1:
            raise ValueError(f"norm.groups={groups}: a group of one feature has variance 0")
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(n_embd))  # γ
        self.bias = nn.Parameter(torch.zeros(n_embd))  # β

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (self.groups, -1))  # (B, T, G, C/G)
        y = layer_norm(wide(groups), None, None, self.eps).flatten(-2)
        return (y * self.weight + self.bias).to(x.dtype)
