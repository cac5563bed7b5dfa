"""One run on several processes: `torchrun --nproc-per-node=2 scripts/train.py …`.

Each takes an equal share of every batch, so that the run is the same whatever their number is, up
to rounding and to dropout, where there is any.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gpt.common.errors import ConfigError, ProcessLost

Value = TypeVar("Value")
TORCHRUN = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # which it sets beside WORLD_SIZE


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def processes(device: str) -> Iterator[None]:
    """Inside, the processes that torchrun has started know one another; alone, nothing happens.

    device  what the run was asked for: of `cuda` each process takes one of its own
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if missing := [key for key in TORCHRUN if key not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {missing[0]}: start with torchrun, "
            "which sets both, or unset WORLD_SIZE"
        )
    if ":" in device:
        raise ConfigError(f"device={device}: each of several processes has its own; say cuda")
    if device == "mps":
        raise ConfigError("device=mps: one process alone can use it; say device=cpu")
    on_cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if on_cuda:
        here, devices = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > devices:
            raise ConfigError(
                f"device={device}: {here} processes, but {devices} CUDA devices; start as many, or "
                "say device=cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_cuda else "gloo")
    signal.signal(signal.SIGTERM, leave_unless_failing)
    try:
        yield
    except BaseException as error:
        # The frames hold the model's Reducer, which as the group's last owner would wait, with the
        # interpreter locked, for a thread of gloo's that waits for the interpreter.
        traceback.clear_frames(error.__traceback__)
        if not isinstance(error, RuntimeError) or "onnection" not in str(error):  # gloo's, NCCL's
            raise
        raise ProcessLost(
            "another process of this run has ended; unless its own line names another cause, the "
            "same command resumes the run"
        ) from error
    finally:
        dist.destroy_process_group()


def leave_unless_failing(number: int, _: object) -> None:
    """Exit, but let an error that is on its way be printed first.

    torchrun sends SIGTERM to all other processes once one is gone.
    """
    if sys.exc_info()[0] is None:
        raise SystemExit(128 + number)


def share(rows: np.ndarray) -> np.ndarray:
    """This process's part of the rows, as many as every other's."""
    return rows.reshape(world_size(), -1)[rank()]


def from_all_processes(value: Value) -> list[Value]:
    """What each process has for `value`; all must ask, and so wait for one another."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def on_any_process(flag: bool) -> bool:
    """Whether `flag` holds on one of the processes; all must ask, as above."""
    return any(from_all_processes(flag))


def wait_for_all() -> None:
    from_all_processes(None)


class MeanOverProcesses(torch.autograd.Function):
    """The mean of a tensor over all processes, whose gradient is the mean of theirs."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total / world_size()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return MeanOverProcesses.forward(ctx, gradient)


def mean_over_processes(x: Tensor) -> Tensor:
    """x where there is one process; else the mean of all of theirs, which all must ask for."""
    return MeanOverProcesses.apply(x) if world_size() > 1 else x
