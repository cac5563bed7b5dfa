"""Each norm's training output in float64, from a library function or its written formula.

A norm that is not listed here is compared with itself in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def batch(x: Tensor, n: Any) -> Tensor:
    rows = x.flatten(0, 1)
    return F.batch_norm(rows, None, None, n.weight, n.bias, True, 0.0, n.eps).view_as(x)


def rms(x: Tensor, n: Any, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, n.eps)


def position(x: Tensor, n: Any) -> Tensor:
    variance = x.var(0, unbiased=False)
    return n.weight * (x - x.mean(0)) / (variance + n.eps).sqrt() + n.bias


def group(x: Tensor, n: Any) -> Tensor:
    tokens = x.flatten(0, 1)  # nn.GroupNorm must not see T
    return F.group_norm(tokens, n.groups, n.weight, n.bias, n.eps).view_as(x)


def instance(x: Tensor, n: Any) -> Tensor:
    if x.shape[1] == 1:  # the library refuses one value
        return n.bias.expand(x.shape)
    return F.instance_norm(x.mT, weight=n.weight, bias=n.bias, eps=n.eps).mT


def past(x: Tensor, n: Any) -> Tensor:
    return n.weight * (x - n.running_mean) / (n.running_var + n.eps).sqrt() + n.bias


def scale(x: Tensor, n: Any) -> Tensor:
    return n.weight * F.normalize(x, dim=-1, eps=n.eps)


def anneal(x: Tensor, n: Any) -> Tensor:
    std = (x.var(-1, unbiased=False, keepdim=True) + n.eps).sqrt()
    share = (1 - n.fade) / std + n.fade / n.running_std
    return n.weight * (x - x.mean(-1, keepdim=True)) * share + n.bias


def prepbn(x: Tensor, n: Any) -> Tensor:
    return n.share * rms(x, n, n.rms_weight) + (1 - n.share) * (batch(x, n) + n.eta * x)


REFERENCES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "layer": lambda x, n: F.layer_norm(x, x.shape[-1:], n.weight, n.bias, n.eps),
    "anneal": anneal,
    "dummy": lambda x, n: x,
    "rms": lambda x, n: rms(x, n, n.weight),
    "scale": scale,
    "l2": lambda x, n: F.normalize(x, dim=-1, eps=n.eps),
    "dyt": lambda x, n: n.weight * torch.tanh(n.alpha * x) + n.bias,
    "derf": lambda x, n: n.weight * torch.special.erf(n.alpha * x + n.shift) + n.bias,
    "group": group,
    "instance": instance,
    "batch": batch,
    "batch_pos": position,
    "batch_ema": past,
    "rbn": batch,
    "repbn": lambda x, n: batch(x, n) + n.eta * x,
    "prepbn": prepbn,
    "power": lambda x, n: n.weight * x / (x.square().mean((0, 1)) + n.eps).sqrt() + n.bias,
}
