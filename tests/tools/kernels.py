"""Shared by the tests of the CUDA LayerNorm: dtypes, and tolerances against float64."""

from __future__ import annotations

import torch
from torch import Tensor

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# The dtypes of x, branch, y and weights: all fp32; all bf16; all fp16; under autocast, of a norm
# before a sublayer, after it and inside it; an arbitrary mixture.
DTYPES = [
    (F32, F32, F32, F32),
    (BF16, BF16, BF16, BF16),
    (FP16, FP16, FP16, FP16),
    (F32, BF16, BF16, F32),
    (F32, BF16, F32, F32),
    (BF16, BF16, BF16, F32),
    (BF16, FP16, F32, BF16),
]


def ulps(value: Tensor, exact: Tensor) -> float:
    """The largest distance of `value` from the float64 `exact` in units of its dtype's spacing."""
    spacing = torch.finfo(value.dtype).eps * 2.0 ** exact.abs().clamp_min(1e-3).log2().floor()
    return ((value.double() - exact).abs() / spacing).max().item()


def close(value: Tensor, exact: Tensor) -> bool:
    """Within 2e-6·max(1, |y|) of the exact result for fp32, within 1 ulp for other dtypes."""
    if value.dtype == F32:
        return bool(((value.double() - exact).abs() <= 2e-6 * exact.abs().clamp_min(1)).all())
    return ulps(value, exact) <= 1
