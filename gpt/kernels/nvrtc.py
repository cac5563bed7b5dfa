"""Compile CUDA C++ at run time and launch it, by NVRTC and the driver through `cuda.bindings`.

torch's CUDA wheels already require both, so that a user needs no toolkit and no compiler. A
compiled kernel is kept in the user's cache directory under a hash of source, options and
architecture.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from ctypes import addressof, c_void_p, create_string_buffer
from functools import cache
from pathlib import Path
from struct import Struct
from threading import Lock
from typing import Any

from gpt.common.errors import MissingInput
from gpt.common.files import sync


@cache
def bindings() -> tuple[Any, Any]:
    """`cuda.bindings`' driver and nvrtc, or the one line that says what to install."""
    try:
        from cuda.bindings import driver, nvrtc

        check(nvrtc, nvrtc.nvrtcVersion())
    except (ImportError, RuntimeError) as error:
        raise MissingInput(
            "CUDA kernels need NVRTC and cuda-bindings, which torch's CUDA wheels bring along; "
            f"pip install cuda-bindings nvidia-cuda-nvrtc ({error})"
        ) from error
    return driver, nvrtc


def check(module: Any, result: tuple[Any, ...]) -> Any:
    """The value of a call to `cuda.bindings`; RuntimeError where its status is not success."""
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"{module.__name__}: {status.name}")
    return values[0] if values else None


def compile_source(source: str, options: tuple[str, ...], arch: str) -> tuple[bytes, str]:
    """CUDA C++ as machine code for `arch` (`sm_90`), or PTX (`compute_90`); the compiler's log.

    RuntimeError with the log where it does not compile.
    """
    _, nvrtc = bindings()
    program = check(nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    arguments = [f"--gpu-architecture={arch}", "--std=c++17", *options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(arguments), [a.encode() for a in arguments])
    log = bytes(check(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
    check(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
    text = log.decode().strip("\0 ")
    if int(status) != 0:
        raise RuntimeError(f"{' '.join(arguments)}:\n{text}")
    form = "CUBIN" if arch.startswith("sm_") else "PTX"
    code = bytes(check(nvrtc, getattr(nvrtc, f"nvrtcGet{form}Size")(program)))
    check(nvrtc, getattr(nvrtc, f"nvrtcGet{form}")(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return code, text


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gpt-norms"


def cached_cubin(source: str, options: tuple[str, ...], arch: str) -> bytes:
    """`compile_source`, remembered on disk; a cache that cannot be written is done without."""
    _, nvrtc = bindings()
    version = repr(nvrtc.nvrtcVersion())  # an older driver may not load what a newer one made
    key = hashlib.sha256("\0".join([source, arch, version, *options]).encode()).hexdigest()
    path = cache_dir() / f"{key}.cubin"
    if path.exists():
        return path.read_bytes()
    cubin, _ = compile_source(source, options, arch)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder, path.name)
            part.write_bytes(cubin)
            sync(part)
            os.replace(part, path)  # whole or not there, whoever else writes it
    return cubin


def make_current(device: int) -> None:
    """Bind torch's context on `device` to this thread, as the driver wants it: the thread in which
    torch runs a backward pass has none before a kernel is launched there through the runtime."""
    driver, _ = bindings()
    check(driver, driver.cuCtxSetCurrent(primary_context(device)))


@cache
def primary_context(device: int) -> Any:
    driver, _ = bindings()
    return check(driver, driver.cuDevicePrimaryCtxRetain(check(driver, driver.cuDeviceGet(device))))


@cache
def module(source: str, options: tuple[str, ...], arch: str, device: int) -> Any:
    """A compiled source, loaded on `device`, whose context is current."""
    driver, _ = bindings()
    return check(driver, driver.cuModuleLoadData(cached_cubin(source, options, arch)))


class Kernel:
    """The function `name` of a loaded module, with room for its arguments.

    layout  of the arguments, in the language of `struct`, each filling 8 bytes: q is a pointer or
            a long long, f4x a float
    """

    def __init__(self, module: Any, name: str, layout: str) -> None:
        driver, _ = bindings()
        self.function = check(driver, driver.cuModuleGetFunction(module, name.encode()))
        self.layout = Struct(layout)
        self.values = create_string_buffer(self.layout.size)
        start, size = addressof(self.values), self.layout.size
        self.pointers = (c_void_p * (size // 8))(*range(start, start + size, 8))
        self.lock = Lock()  # another thread's values must wait until the driver has these

    def launch(
        self, grid: tuple[int, int], threads: int, stream: int, values: Sequence[int | float]
    ) -> None:
        """Queue it on `stream` with `threads` threads a block; nothing is waited for."""
        driver, _ = bindings()
        with self.lock:
            self.layout.pack_into(self.values, 0, *values)
            pointers = addressof(self.pointers)
            check(
                driver,
                driver.cuLaunchKernel(
                    self.function, *grid, 1, threads, 1, 1, 0, stream, pointers, 0
                ),
            )
