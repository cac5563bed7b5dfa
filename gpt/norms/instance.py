"""InstanceNorm: normalises each feature of a sample over time. It sees the future."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt.norms.base import Norm, check_at_least, wide
from gpt.norms.layer import layer_norm
from gpt.norms.registry import register


@register("instance")
class InstanceNorm(Norm):
    """y = γ (x − μ)/√(σ² + ε) + β, μ and σ² over T, for each sample and feature.

    (B, T, C) → (B, T, C). The statistics include later tokens, also in evaluation. A single token
    gives β.

    n_embd  C
    eps     ε > 0

    Use it as a negative control: neither its training loss nor its validation loss is a result.
    Ulyanov, Vedaldi, Lempitsky 2016, arXiv:1607.08022.
    """

    axes = ("T",)
    invariances = ("shift", "scale")

    def __init__(self, n_embd: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        check_at_least(1e-30, eps=eps)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_embd))  # γ
        self.bias = nn.Parameter(torch.zeros(n_embd))  # β

    def forward(self, x: Tensor) -> Tensor:
        columns = layer_norm(wide(x).transpose(-1, -2), None, None, self.eps)  # (B, C, T)
        return (columns.transpose(-1, -2) * self.weight + self.bias).to(x.dtype)
