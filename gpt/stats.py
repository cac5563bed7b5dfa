"""What a norm sees and does: moments before and after every norm site and of the residual stream.

Hooks are there only inside `collect`, so that all other steps cost nothing; inside, everything
stays on the device until `table` reads it in one transfer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gpt.norms.registry import NORMS

MOMENTS = ("mean", "std", "rms", "absmax", "kurtosis")
Record = dict[tuple[str, ...], Tensor]  # ("sites", "h.0.attn.in", "before") → its moments


def moments(x: Tensor, rows: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Mean, standard deviation (biased), root mean square, max |x| and kurtosis of all of x.

    Kurtosis is E[(x−μ)⁴]/σ⁴: 3 for a Gaussian, large where a few values are outliers, 0 here
    where x is constant. rows: the mean and the biased variance of each row, where they are known.
    """
    x = x.detach().float()
    if rows is None:
        mean, rms = x.mean(), x.square().mean().sqrt()
        std = (x - mean).square().mean().sqrt()
    else:
        mean, within = rows[0].mean(), rows[1].mean()
        std = (within + (rows[0] - mean).square().mean()).sqrt()
        rms = (within + rows[0].square().mean()).sqrt()
    centred = x - mean
    # Divided first: x⁴ overflows fp32 from 4·10⁹, which a run without norms reaches.
    kurtosis = (centred / std.clamp_min(1e-30)).pow(4).mean()
    return torch.stack([mean, std, rms, x.abs().amax(), kurtosis])


@contextmanager
def collect(
    model: nn.Module, streams: Mapping[str, nn.Module], grad_scale: float = 1.0
) -> Iterator[Record]:
    """Inside, one forward and backward of `model` fills the record that is yielded.

    streams     modules whose output is the residual stream, by name
    grad_scale  what a gradient is multiplied with: grad_accum, where the loss was divided by it
    """
    record: Record = {}
    handles: list[RemovableHandle] = []
    keeping: list[Any] = []

    def watch(group: str, name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
            # A norm that adds the branch gives (y, stream), a block the two summands (x, branch).
            first, second = output if isinstance(output, tuple) else (output, None)
            if group == "sites":
                before = inputs[0] if second is None else second
                record[group, name, "before"] = moments(before, getattr(module, "rows", None))
                record[group, name, "after"] = moments(first)
            else:
                record[group, name, "after"] = moments(first if second is None else first + second)
            # A view of its own: an identity's output is its input, whose gradient holds more.
            first = first.view_as(first)
            if first.requires_grad:
                first.register_hook(keep_gradient)
            return (first, second) if isinstance(output, tuple) else first

        def keep_gradient(gradient: Tensor) -> None:
            record[group, name, "grad_norm"] = gradient.detach().float().norm() * grad_scale

        def compare(norm: Any, inputs: tuple[Tensor, ...]) -> None:
            # Before the running statistics have taken this batch in.
            for key, value in zip(
                ("tid_mean", "tid_std"), norm.discrepancy(inputs[0]), strict=True
            ):
                record[group, name, key] = value

        if hasattr(module, "discrepancy"):
            handles.append(module.register_forward_pre_hook(compare))
        handles.append(module.register_forward_hook(hook))

    for name, module in model.named_modules():
        if type(module) in NORMS.values():
            watch("sites", name, module)
            if hasattr(module, "keep_rows"):  # it has the moments of its rows: they are reused
                module.keep_rows = True
                keeping.append(module)
            for key, parameter in (("gamma_norm", "weight"), ("beta_norm", "bias")):
                value = getattr(module, parameter, None)
                if value is not None:
                    record["sites", name, key] = value.detach().float().norm()
    for name, module in streams.items():
        watch("residual", name, module)
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
        for module in keeping:
            module.keep_rows, module.rows = False, None


def table(record: Record) -> dict[str, dict[str, dict[str, Any]]]:
    """The record as plain numbers: {"sites": {site: {"before": {"mean": …}, "grad_norm": …}}}."""
    numbers = iter(torch.cat([value.flatten() for value in record.values()]).tolist())
    result: dict[str, dict[str, dict[str, Any]]] = {"sites": {}, "residual": {}}
    for (group, name, key), value in record.items():
        entry = result[group].setdefault(name, {})
        entry[key] = dict(zip(MOMENTS, numbers, strict=False)) if value.dim() else next(numbers)
    return result


def first_nonfinite(record: Record) -> str | None:
    """The first place in the order of the forward pass that holds NaN or infinity."""
    for (_, name, key), value in record.items():
        largest = value[MOMENTS.index("absmax")] if value.dim() else value
        if not math.isfinite(largest.item()):
            return f"{name} ({key})"
    return None
