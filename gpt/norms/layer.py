"""LayerNorm: normalises each token over its features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.norms.base import Norm, check_at_least, wide
from gpt.norms.registry import register


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, unbiased: bool = False
) -> Tensor:
    """γ (x − μ)/√(σ² + ε) + β over the last axis, in fp32 or wider.

    σ² is the biased variance (÷ C). `torch.var` is unbiased by default (÷ C−1), which is C/(C−1)
    times as large. It takes two passes: E[x²] − μ² in one pass would cancel if |μ| ≫ σ.
    """
    x32, C = wide(x), x.shape[-1]
    centred = x32 - x32.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (C - 1 if unbiased else C)
    y = centred * torch.rsqrt(variance + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


@register("layer")
class LayerNorm(Norm):
    """y = γ (x − μ)/√(σ² + ε) + β over C, biased σ².  (B, T, C) → (B, T, C)

    γ and β are shared by all tokens: dL/dγ = Σ_bt dy·x̂, dL/dβ = Σ_bt dy, with
    x̂ = (x − μ)/√(σ² + ε).

    n_embd    C
    eps       ε ≥ 0
    bias      whether it has a β
    affine    whether it has γ and β; OLMo's does not
    unbiased  divide by C − 1, as `torch.var` does by default; it shows the classic mistake
    fast      true: `F.layer_norm`; false: the formula in gpt/norms/layer.py

    Use it if a token's output must not depend on other tokens or samples. It is the default.
    Ba, Kiros, Hinton 2016, arXiv:1607.06450.
    """

    axes = ("C",)
    invariances = ("shift", "scale")

    def __init__(
        self,
        n_embd: int,
        *,
        eps: float = 1e-5,
        bias: bool = True,
        affine: bool = True,
        unbiased: bool = False,
        fast: bool = True,
    ) -> None:
        super().__init__()
        check_at_least(0, eps=eps)
        if unbiased and n_embd < 2:
            raise ValueError("norm.unbiased=True: one feature has no unbiased variance")
        self.eps, self.unbiased, self.fast = eps, unbiased, fast and not unbiased
        self.weight = nn.Parameter(torch.ones(n_embd)) if affine else None  # γ
        self.bias = nn.Parameter(torch.zeros(n_embd)) if affine and bias else None  # β

    def forward(self, x: Tensor) -> Tensor:
        if self.fast:
            y = F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
            return y.to(x.dtype)  # under autocast on CUDA y is float32 for any x
        return layer_norm(x, self.weight, self.bias, self.eps, self.unbiased)
