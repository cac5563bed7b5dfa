"""LayerNorm by this project's own CUDA kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt.common.errors import MissingInput
from gpt.kernels.layer_norm import add_layer_norm
from gpt.norms.base import Norm, check_at_least
from gpt.norms.registry import register


@register("cuda_layer")
class CudaLayerNorm(Norm):
    """y = γ (x − μ)/√(σ² + ε) + β over C, biased σ², in one CUDA kernel.  (B, T, C) → (B, T, C)

    Statistics are fp32. Given a branch, it returns (norm of x + branch, x + branch) in the same
    pass. The norm then has the autocast dtype, so that the next matrix product needs no cast. With
    `stays` the norm is the residual stream and keeps x's dtype. There is no silent fallback:
    without a CUDA device it raises MissingInput.

    n_embd  C
    eps     ε > 0
    bias    whether it has a β

    Use it in place of `layer` on an NVIDIA GPU.
    Ba, Kiros, Hinton 2016, arXiv:1607.06450.
    """

    axes = ("C",)
    invariances = ("shift", "scale")
    adds = True  # forward takes the branch and adds it to the residual stream

    def __init__(self, n_embd: int, *, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        if not torch.cuda.is_available():
            raise MissingInput("norm 'cuda_layer' needs a CUDA device; use norm=layer")
        check_at_least(1e-30, eps=eps)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_embd))  # γ
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None  # β

    def forward(
        self, x: Tensor, branch: Tensor | None = None, stays: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        dtype = x.dtype if branch is None or stays else None
        y, stream, mean, rstd = add_layer_norm(x, branch, self.weight, self.bias, self.eps, dtype)
        if self.keep_rows:
            self.rows = mean, (rstd.square().reciprocal() - self.eps).clamp_min(0)
        return y if branch is None else (y, stream)
