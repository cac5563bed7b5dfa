"""AdamW and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from gpt.config import OptimConfig
from gpt.norms.base import norms_of


def make_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW. Weight decay applies to matrices only: not to biases, nor to any parameter of a norm
    (γ, β), whatever its shape.

    The update is one fused kernel on CPU and CUDA. On MPS it is not fused, because that kernel
    ignored `found_inf` (pytorch#186360).
    """
    parameters = list(model.parameters())
    of_norms = {p for norm in norms_of(model) for p in norm.parameters()}
    decayed = [p for p in parameters if p.dim() >= 2 and p not in of_norms]
    others = [p for p in parameters if p.dim() < 2 or p in of_norms]
    groups = [
        {"params": decayed, "weight_decay": cfg.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=fused)


def lr_at(step: int, steps: int, cfg: OptimConfig) -> float:
    """The learning rate of update `step`, 1 to `steps`: a linear warm-up to lr, then a cosine down
    to min_lr."""
    if step <= cfg.warmup_steps:
        return cfg.lr * step / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / (steps - cfg.warmup_steps)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
