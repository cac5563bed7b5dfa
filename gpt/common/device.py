"""The device and the precision that a model runs in."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

from gpt.common.errors import MissingInput
from gpt.common.processes import world_size


def resolve_device(name: str) -> torch.device:
    """The device; `auto` is the first available of CUDA, MPS and CPU. MissingInput if unavailable.

    `cuda:N` becomes torch's current device, which torch then asks for bfloat16 support.
    """
    available = ["cpu"]
    # Several processes cannot exchange MPS tensors.
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
    """Exclude earlier runs of this process from the peak memory; impossible on macOS."""
    if device.type == "cuda":
        torch.cuda.init()  # otherwise there are no statistics to reset
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)


def peak_memory(device: torch.device) -> int:
    """The peak memory in bytes: of tensors on CUDA, otherwise of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, IndexError):  # only on Linux, and not on every system
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def precision(device: torch.device, dtype: str) -> str:
    """The dtype; `auto` is bfloat16 if CUDA supports it natively, otherwise float32."""
    if dtype == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if bf16 else "float32"
    return dtype


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Autocast to bfloat16 if that is what `precision` returns; otherwise it does nothing."""
    enabled = precision(device, dtype) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the CPU's generator and the device's.

    `torch.manual_seed` would seed every kind of device, which takes 0.3 to 1 ms.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def make_deterministic(device: torch.device) -> None:
    """Use deterministic kernels on CUDA, so that a resumed run repeats the same bits.

    CPU kernels already do. An operation without a deterministic kernel raises RuntimeError.
    """
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
