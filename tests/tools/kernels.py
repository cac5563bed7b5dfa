"""What tests of the CUDA LayerNorm share: types, and how near to float64 is near enough."""

from __future__ import annotations

import torch
from torch import Tensor

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# x, branch, y, weights: fp32; all bf16; all fp16; under autocast a norm before a sublayer, after
# it, and inside it; mixed at will
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
    """fp32 within 2e-6·max(1, |y|), the others within 1 ulp of the exact result."""
    if value.dtype == F32:
        return bool(((value.double() - exact).abs() <= 2e-6 * exact.abs().clamp_min(1)).all())
    return ulps(value, exact) <= 1
