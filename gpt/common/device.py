"""Where and in which precision a model runs."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

from gpt.common.errors import MissingInput
from gpt.common.processes import world_size


def resolve_device(name: str) -> torch.device:
    """`auto` is the first of CUDA, MPS and CPU that is there; a device that is not is an error.

    `cuda:N` becomes torch's current device: it is the one asked whether it has bfloat16.
    """
    available = ["cpu"]
    # Several processes could not exchange MPS's tensors.
    if torch.backends.mps.is_available() and world_size() == 1:
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    device = torch.device(available[0] if name == "auto" else name)
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type not in available or (device.index or 0) >= count:
        raise MissingInput(f"device={name}: not on this machine; it has {', '.join(available)}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def reset_peak_memory(device: torch.device) -> None:
    """Forget what earlier runs of this process took, where the system lets us: not on macOS."""
    if device.type == "cuda":
        torch.cuda.init()  # before it there are no statistics to reset
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on CUDA; else the process's largest size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, IndexError):  # Linux alone has it, and not everywhere
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def precision(device: torch.device, dtype: str) -> str:
    """`auto` is bfloat16 where CUDA computes in it, float32 elsewhere."""
    if dtype == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if bf16 else "float32"
    return dtype


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Matrix products in bfloat16 where `precision` says so; the rest as autocast has it."""
    enabled = precision(device, dtype) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the CPU's generator and the device's.

    `torch.manual_seed` seeds every kind of device, which takes it 0.3 to 1 ms.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def make_deterministic(device: torch.device) -> None:
    """Let a resumed run on CUDA repeat the same bits; CPU kernels do so by themselves.

    An operation that cannot raises RuntimeError and says so.
    """
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
