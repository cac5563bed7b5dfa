"""One run on several processes: `torchrun --nproc-per-node=2 scripts/train.py …`.

Each process takes an equal share of every batch. The run is the same for any number of processes,
up to rounding and dropout.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gpt.common.errors import ConfigError, ProcessLost

Value = TypeVar("Value")
TORCHRUN = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them and WORLD_SIZE


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def processes(device: str, timeout: float = 5) -> Iterator[None]:
    """Inside, the processes started by torchrun are connected; a single one changes nothing.

    device   the run's `device` setting; on CUDA each process takes a device of its own
    timeout  minutes after which a process that does not answer is given up
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
        raise ConfigError(f"device={device}: each process needs its own device; use device=cuda")
    if device == "mps":
        raise ConfigError("device=mps: only one process can use it; use device=cpu")
    on_cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if on_cuda:
        here, devices = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > devices:
            raise ConfigError(
                f"device={device}: {here} processes, but {devices} CUDA devices; start at most "
                f"{devices} processes, or use device=cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=timedelta(minutes=timeout))
    signal.signal(signal.SIGTERM, leave_unless_failing)
    try:
        yield
    except BaseException as error:
        # The frames hold the model's Reducer. As the group's last owner it would deadlock: it waits
        # for a gloo thread with the interpreter locked, and that thread waits for the interpreter.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, RuntimeError) and "imed out" in str(error):
            raise ProcessLost(
                f"another process of this run did not answer for distributed.timeout={timeout:g} "
                "minutes; the same command resumes the run"
            ) from error
        if isinstance(error, RuntimeError) and "onnection" in str(error):  # gloo's, NCCL's
            raise ProcessLost(
                "another process of this run has ended; the same command resumes the run, unless "
                "that process reported another cause"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def leave_unless_failing(number: int, _: object) -> None:
    """Exit, unless an error is being raised: that error is printed first.

    torchrun sends SIGTERM to all other processes when one has ended.
    """
    if sys.exc_info()[0] is None:
        raise SystemExit(128 + number)


def share(rows: np.ndarray) -> np.ndarray:
    """This process's share of the rows; all shares are equal."""
    return rows.reshape(world_size(), -1)[rank()]


def from_all_processes(value: Value) -> list[Value]:
    """The `value` of each process. All processes must call it and wait for one another."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def on_any_process(flag: bool) -> bool:
    """Whether `flag` is true on any process. All processes must call it."""
    return any(from_all_processes(flag))


def wait_for_all() -> None:
    from_all_processes(None)


class MeanOverProcesses(torch.autograd.Function):
    """The mean of a tensor over all processes; its gradient is the mean of their gradients."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total / world_size()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return MeanOverProcesses.forward(ctx, gradient)


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of x over all processes, which must all call it; with one process, x."""
    return MeanOverProcesses.apply(x) if world_size() > 1 else x
