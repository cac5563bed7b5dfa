"""Folding: a norm that is a fixed affine map in evaluation moves into the Linear beside it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from gpt.model import GPT, Block
from gpt.norms.base import Norm


class Affine(nn.Module):
    """y = x·scale + shift: the remainder of a norm that no Linear can absorb."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


@torch.no_grad()
def fold(model: GPT) -> dict[str, int]:
    """Set `model` to evaluation mode and fold, in place, every norm whose `as_affine()` is a map.

    W(x·s + t) + b = (W·s)x + (Wt + b) for `in` and `mid`; (Wx + b)·s + t for `out`, `q`, `k`, `v`.
    At `after`, `embd_norm` and `final_norm` no Linear can absorb a norm (the head's weight is the
    embedding's): a multiply-add remains. The logits are the same up to rounding.

    Returns how many norms were folded into a Linear, became a multiply-add, and stayed unchanged.
    """
    model.eval()
    counts = {"folded": 0, "affine": 0, "kept": 0}
    for block in cast(Iterable[Block], model.h):
        attn, mlp = block.attn, block.mlp
        rows = dict(zip("qkv", attn.c_attn.weight.chunk(3), strict=True))
        biases = dict(zip("qkv", attn.c_attn.bias.chunk(3), strict=True))
        both = [mlp.c_fc] * block.parallel  # there the MLP also reads attention's `in`
        for sublayer, readers in ((attn, [attn.c_attn, *both]), (mlp, [mlp.c_fc])):
            for slot in sublayer.slots:
                map_ = affine_of(sublayer[slot], counts)
                if map_ is None:
                    continue
                scale, shift = map_
                if slot == "after":
                    sublayer[slot] = Affine(scale, shift)
                    counts["affine"] += 1
                    continue
                if slot in ("in", "mid"):
                    factor = sublayer.plan.scale if slot == "in" else 1.0
                    for linear in readers if slot == "in" else [sublayer.c_proj]:
                        linear.bias.add_(linear.weight @ (factor * shift))
                        linear.weight.mul_(scale)
                else:
                    out = (sublayer.c_proj.weight, sublayer.c_proj.bias)
                    weight, bias = out if slot == "out" else (rows[slot], biases[slot])
                    weight *= scale[:, None]
                    bias.mul_(scale).add_(shift)
                sublayer[slot] = nn.Identity()
                counts["folded"] += 1
    for name in ("embd_norm", "final_norm"):
        map_ = affine_of(getattr(model, name), counts)
        if map_ is not None:
            setattr(model, name, Affine(*map_))
            counts["affine"] += 1
    return counts


def affine_of(norm: nn.Module, counts: dict[str, int]) -> tuple[Tensor, Tensor] | None:
    if isinstance(norm, nn.Identity):
        return None
    result = norm.as_affine() if isinstance(norm, Norm) else None
    counts["kept"] += result is None
    return result
