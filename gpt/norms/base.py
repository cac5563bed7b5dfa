"""The base class of all norms (its declarations and hooks), and `norm_step`, one training step.

In a training loop of your own:

    model = nn.Sequential(nn.Linear(8, 8), ProgressiveRepBatchNorm(8))
    for step in range(1, steps + 1):
        with norm_step(model, step, steps) as norms:
            loss = model(x).square().mean()
            (loss + norms.extra_loss()).backward()
        optimizer.step()
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Norm(nn.Module):
    """A norm: (B, T, C) → (B, T, C), in x's dtype. Subclasses write `forward`, and set or
    override the following if they need it.

    The constructor takes the number of features, and options by keyword. The options' names, types
    and defaults are the norm's configuration. A norm keeps its state in buffers that the
    constructor registers. Statistics over the batch go through
    `gpt.common.processes.mean_over_processes`, so that all processes share them.

    axes             the axes of (B, T, C) that its statistics run over in training. B: a token's
                     output depends on other samples, T: on later tokens
    evaluation_axes  the same in evaluation; equal to `axes` by default
    invariances      which of "shift" (x + c) and "scale" (c·x) leave its training output unchanged
    divisors         the options that must divide the number of features
    takes_over       {"rms_weight": "weight"}: when it replaces the norm of a trained model, its
                     rms_weight starts as that norm's weight
    defers           training reads the running statistics, so they must not change before the
                     backward pass: `norm_step` calls `end_step`, and `forward` does not
    adds             its forward takes (x, branch, stays) and returns (norm of the sum, sum)
    has_batch_stats  in evaluation it uses the batch's own statistics if `batch_stats` is true
    """

    axes: ClassVar[tuple[str, ...]] = ()
    evaluation_axes: ClassVar[tuple[str, ...]] = ()
    invariances: ClassVar[tuple[str, ...]] = ()
    divisors: ClassVar[tuple[str, ...]] = ()
    takes_over: ClassVar[Mapping[str, str]] = {}
    defers: ClassVar[bool] = False
    adds: ClassVar[bool] = False
    has_batch_stats: ClassVar[bool] = False

    deferred = False  # true: norm_step calls end_step(), and forward does not
    stepping = False  # true inside norm_step
    batch_stats = False
    keep_rows = False  # while statistics are collected: keep each row's moments in `rows`
    rows: tuple[Tensor, Tensor] | None = None  # mean and biased variance
    started: Mapping[str, Tensor] = {}  # its parameters as built; `build_norm` fills it in

    def __init__(self) -> None:
        super().__init__()
        if needs_step(self):
            self.register_forward_pre_hook(warn_outside_step)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "axes" in vars(cls) and "evaluation_axes" not in vars(cls):
            cls.evaluation_axes = cls.axes
        for name in vars(cls):
            close = get_close_matches(name, HOOKS, n=1, cutoff=0.85)
            if close and name not in HOOKS:
                raise TypeError(f"{cls.__name__}.{name} is not a hook of Norm; expected {close[0]}")

    def begin_step(self, step: int, steps: int) -> None:
        """Called before training step `step`, which counts from 1 to `steps`."""

    def extra_loss(self) -> Tensor | None:
        """A scalar of the last forward pass, which is added to the minimised loss."""
        return None

    def end_step(self) -> None:
        """Called after the step's forward passes: update the running statistics."""

    def statistics(self, x: Tensor) -> dict[str, Tensor]:
        """Scalars of this norm for `stats.jsonl`, computed before `x` is normalised."""
        return {}

    def as_affine(self) -> tuple[Tensor, Tensor] | None:
        """(scale, shift), each (C,), if y = x·scale + shift in evaluation; otherwise None."""
        return None

    def extra_repr(self) -> str:
        options = inspect.signature(type(self)).parameters
        return ", ".join(f"{k}={vars(self)[k]}" for k in options if k in vars(self))


HOOKS = (
    "axes", "evaluation_axes", "invariances", "divisors", "takes_over", "defers", "has_batch_stats",
    "begin_step", "extra_loss", "end_step", "statistics", "as_affine",
)  # fmt: skip


@dataclass(frozen=True)
class NormStep:
    """The norms of a model in one training step."""

    norms: list[Norm]

    def extra_loss(self) -> Tensor | float:
        """The term that the norms add to the minimised loss. The logged loss excludes it."""
        terms = [term for norm in self.norms if (term := norm.extra_loss()) is not None]
        return sum(terms, 0.0)


@contextmanager
def norm_step(
    model: nn.Module, step: int, steps: int, micro_batches: int = 1
) -> Iterator[NormStep]:
    """A context for training step `step`, 1 to `steps`, of the norms of `model`.

    It calls `begin_step` on entry. At its end all running statistics are updated; several
    micro-batches count as one batch. Minimise loss + `extra_loss()`.
    """
    norms = norms_of(model)
    for norm in norms:
        norm.stepping, norm.deferred = True, micro_batches > 1 or norm.defers
        norm.begin_step(step, steps)
    try:
        yield NormStep(norms)
        for norm in norms:
            if norm.deferred:
                norm.end_step()
    finally:
        for norm in norms:
            norm.stepping = norm.deferred = False


def norms_of(module: nn.Module) -> list[Norm]:
    """Every norm inside `module`, in order."""
    return [m for m in module.modules() if isinstance(m, Norm)]


def changes(norm: Norm) -> bool:
    """Whether the norm depends on the training step."""
    return type(norm).begin_step is not Norm.begin_step


def needs_step(norm: Norm) -> bool:
    """Whether training without `norm_step` differs from training with it."""
    return changes(norm) or norm.defers or type(norm).extra_loss is not Norm.extra_loss


def warn_outside_step(norm: Norm, inputs: Any) -> None:
    name = type(norm).__name__
    if norm.training and not norm.stepping and name not in WARNED:
        WARNED.add(name)
        text = f"{name} is trained outside norm_step, which drives its schedule, extra loss or "
        text += "running statistics; use `with gpt.norm_step(model, step, steps):`"
        warnings.warn(text, stacklevel=2)


WARNED: set[str] = set()  # the classes that were already warned about


def progress(step: int, steps: int) -> float:
    """The progress of training at `step`: 0 in step 1, 1 in the last step."""
    return (step - 1) / max(1, steps - 1)


def wide(x: Tensor) -> Tensor:
    """x in fp32 or wider, the precision in which statistics are computed."""
    return x if x.dtype == torch.float64 else x.float()


def check_at_least(least: float, **options: float) -> None:
    """Raise ValueError for an option below `least`, named as on the command line."""
    for key, value in options.items():
        if value < least:
            raise ValueError(f"norm.{key}={value}: expected a number >= {least:g}")
