"""One training step: forward, backward, update; and what it was that was not finite."""

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
from gpt.config import Config
from gpt.data.batches import TrainBatches
from gpt.model import GPT
from gpt.norms.registry import begin_step, commit, norms_of, penalties
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
    micro-batch's statistics. If loss or norm is not finite the weights stay as they are; with fused
    AdamW, from then on.

    forward  the model, or what compiles it or shares its gradients
    """
    model, optimizer, step = state.model, state.optimizer, state.step + 1
    accum = cfg.train.grad_accum
    losses: list[Tensor] = []
    record: stats.Record = {}
    norms = norms_of(model)  # once: the walk takes as long as a dozen small kernels
    begin_step(norms, step, cfg.train.steps)
    remember(state)
    seed_dropout(cfg, step, device)
    for x, y in batches.at(step, device):
        watching: AbstractContextManager[None] = nullcontext()
        if collecting and not losses:
            watching = stats.collect(model, record, accum)
        with watching, gradients_stay(forward, len(losses) < accum - 1):
            with autocast(device, cfg.dtype):
                _, loss = forward(x, y)
            ((loss + penalties(norms)) / accum).backward()
        losses.append(loss.detach())
    loss = mean_over_processes(torch.stack(losses).mean())
    with stats.watch_update(model, record) if collecting else nullcontext():
        limit = cfg.optim.grad_clip or math.inf
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        both_finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        lr = lr_at(step, cfg.train.steps, cfg.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if optimizer.defaults["fused"]:
            # Decided on the device, so that nothing waits. Once it is true it stays so: the steps
            # until the losses are read must not move the weights that the cause is looked for in.
            skip = (~both_finite).float()
            skip = torch.maximum(skip, getattr(optimizer, "found_inf", skip))
            optimizer.found_inf = skip  # type: ignore[attr-defined]
            optimizer.step()
        elif both_finite:
            optimizer.step()
    optimizer.zero_grad()
    commit(norms)
    state.step = step
    return Row(step, lr, loss, grad_norm), record


def remember(state: TrainState) -> None:
    """Keep what the norms remember before this step, or before the first that was not finite: the
    cause is looked for there. Decided on the device, like the update."""
    lost = getattr(state.optimizer, "found_inf", None)  # there from the first fused update on
    for name, kept in state.memory.items():
        buffer = state.model.get_buffer(name)
        state.memory[name] = buffer.clone() if lost is None else torch.where(lost > 0, kept, buffer)


def seed_dropout(cfg: Config, step: int, device: torch.device) -> None:
    """Dropout follows from the seed, the step and the process; nothing else draws in a step."""
    seed_device(device, stream_seed(cfg.seed, f"dropout/{step}/{rank()}"))


def gradients_stay(forward: nn.Module, more_to_come: bool) -> AbstractContextManager[None]:
    """Inside, processes do not exchange gradients yet: further micro-batches will add to them."""
    no_sync: Callable[[], AbstractContextManager[None]] = getattr(forward, "no_sync", nullcontext)
    return no_sync() if more_to_come else nullcontext()


def read(rows: list[Row]) -> list[dict[str, Any]]:
    """The numbers of several steps in one transfer, to the first that are not finite."""
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
    """What was not finite first in step `state.step`.

    The step is taken again, with the weights that it left as they were.
    """
    begin_step(norms_of(state.model), state.step, cfg.train.steps)
    for name, kept in state.memory.items():
        state.model.get_buffer(name).copy_(kept)
    seed_dropout(cfg, state.step, device)
    site = first_not_finite(cfg, state.model, batches.at(state.step, device), device)
    return f"first in {site}" if site else "not finite only in the backward pass"


@torch.no_grad()
def first_not_finite(
    cfg: Config, model: GPT, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> str | None:
    """The first weight, or place in the forward pass, that is not finite on any process."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return name
    for x, y in batches:
        record: stats.Record = {}
        with autocast(device, cfg.dtype), stats.collect(model, record):
            model(x, y)
        site = stats.first_nonfinite(record)
        if site is None and not math.isfinite(penalties(norms_of(model))):
            site = "what the norms add to the loss"
        for found in from_all_processes(site):
            if found:
                return found
    return None
