"""One training step: forward, backward, update; and the site where a step stopped being finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpt.common.device import autocast, seed_device
from gpt.common.processes import from_all_processes, mean_over_processes, rank
from gpt.common.seeds import stream_seed
from gpt.config import Config, OptimConfig
from gpt.data.batches import TrainBatches
from gpt.model import GPT
from gpt.norms.base import NormStep, norm_step, norms_of
from gpt.probes import stats
from gpt.training.checkpoint import TrainState
from gpt.training.optimizer import lr_at


@dataclass(frozen=True)
class Row:
    """A step's numbers, still on the device."""

    step: int
    lr: float
    loss: Tensor
    grad_norm: Tensor


def update(
    cfg: Config,
    state: TrainState,
    forward: nn.Module,
    batches: TrainBatches,
    device: torch.device,
    collecting: bool,
) -> tuple[Row, stats.Record]:
    """The step after `state.step`, on the mean loss of its micro-batches.

    Returns the loss and the gradient's norm before clipping; and, if `collecting`, the first
    micro-batch's statistics. If loss or norm is not finite, the update is skipped (fused AdamW: all
    later ones too).

    forward  the model, or its `torch.compile` or DDP wrapper
    """
    step = state.step + 1
    record: stats.Record = {}
    with norm_step(state.model, step, cfg.train.steps, cfg.train.grad_accum) as norms:
        remember(state)
        seed_dropout(cfg, step, device)
        micro_batches = batches.at(step, device)
        loss = backward(cfg, state.model, forward, micro_batches, norms, device, record, collecting)
        with stats.watch_update(state.model, record) if collecting else nullcontext():
            lr = lr_at(step, cfg.train.steps, cfg.optim)
            grad_norm = optimise(cfg.optim, state.model, state.optimizer, lr, loss)
        state.optimizer.zero_grad()
    state.step = step
    return Row(step, lr, loss, grad_norm), record


def backward(
    cfg: Config,
    model: GPT,
    forward: nn.Module,
    micro_batches: Iterable[tuple[Tensor, Tensor]],
    norms: NormStep,
    device: torch.device,
    record: stats.Record,
    collecting: bool,
) -> Tensor:
    """Add the gradients of the micro-batches' mean loss. Returns that loss, over all processes."""
    accum = cfg.train.grad_accum
    losses: list[Tensor] = []
    for x, y in micro_batches:
        watching: AbstractContextManager[object] = nullcontext()
        if collecting and not losses:
            watching = stats.collect(model, record, accum)
        with watching, gradients_stay(forward, len(losses) < accum - 1):
            with autocast(device, cfg.dtype):
                _, loss = forward(x, y)
            ((loss + norms.extra_loss()) / accum).backward()
        losses.append(loss.detach())
    return mean_over_processes(torch.stack(losses).mean())


def optimise(
    cfg: OptimConfig, model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, loss: Tensor
) -> Tensor:
    """Clip the gradients and update the weights, if all is finite. Returns the gradients' norm."""
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
    both_finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if optimizer.defaults["fused"]:
        # Decided on the device, so that nothing waits. Once set, it stays set: until the losses are
        # read, later steps must not change the weights in which the cause is searched.
        skip = (~both_finite).float()
        skip = torch.maximum(skip, getattr(optimizer, "found_inf", skip))
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        optimizer.step()
    elif both_finite:
        optimizer.step()
    return grad_norm


def remember(state: TrainState) -> None:
    """Snapshot the model's buffers, so that a step that is not finite can be replayed with the
    running statistics it had. After such a step the snapshot stays. Only norms with running
    statistics have buffers; for them this costs under 0.5% of a step on a CPU."""
    lost = getattr(state.optimizer, "found_inf", None)  # set by the first fused update
    for name, kept in state.memory.items():
        buffer = state.model.get_buffer(name)
        state.memory[name] = buffer.clone() if lost is None else torch.where(lost > 0, kept, buffer)


def seed_dropout(cfg: Config, step: int, device: torch.device) -> None:
    """Dropout follows from the seed, the step and the process. Nothing else in a step is random."""
    seed_device(device, stream_seed(cfg.seed, f"dropout/{step}/{rank()}"))


def gradients_stay(forward: nn.Module, more_to_come: bool) -> AbstractContextManager[None]:
    """Inside, processes keep their gradients if more micro-batches will add to them."""
    no_sync: Callable[[], AbstractContextManager[None]] = getattr(forward, "no_sync", nullcontext)
    return no_sync() if more_to_come else nullcontext()


def read(rows: list[Row]) -> list[dict[str, Any]]:
    """The numbers of several steps, in one transfer, up to the first that are not finite."""
    numbers = torch.stack([torch.stack([row.loss, row.grad_norm]) for row in rows]).tolist()
    result = []
    for row, (loss, grad_norm) in zip(rows, numbers, strict=True):
        result.append({"step": row.step, "loss": loss, "grad_norm": grad_norm, "lr": row.lr})
        if not is_finite(result[-1]):
            break
    return result


def is_finite(row: dict[str, Any]) -> bool:
    return math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])


@torch.no_grad()
def where_not_finite(
    cfg: Config, state: TrainState, batches: TrainBatches, device: torch.device
) -> str:
    """The first site that was not finite in step `state.step`. The step is replayed: its update was
    skipped, so the weights are still those it had."""
    with norm_step(state.model, state.step, cfg.train.steps, cfg.train.grad_accum):
        for name, kept in state.memory.items():
            state.model.get_buffer(name).copy_(kept)
        seed_dropout(cfg, state.step, device)
        site = first_not_finite(cfg, state.model, batches.at(state.step, device), device)
    return f"first in {site}" if site else "not finite only in the backward pass"


@torch.no_grad()
def first_not_finite(
    cfg: Config, model: GPT, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> str | None:
    """The first weight, or site in the forward pass, that is not finite on any process."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return name
    for x, y in batches:
        record: stats.Record = {}
        with autocast(device, cfg.dtype), stats.collect(model, record):
            model(x, y)
        site = stats.first_nonfinite(record)
        if site is None and not math.isfinite(NormStep(norms_of(model)).extra_loss()):
            site = "what the norms add to the loss"
        for found in from_all_processes(site):
            if found:
                return found
    return None
