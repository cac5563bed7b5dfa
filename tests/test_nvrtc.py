"""CUDA C++ is compiled at run time, cached and passed to the driver. The tests need neither a GPU
nor its driver."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_longlong, c_void_p
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from gpt.common.errors import MissingInput
from gpt.kernels import nvrtc
from tests.tools.programs import REPO

SCALE = 'extern "C" __global__ void scale(float* y, float* x, long long n, float by) {}'


def test_what_does_not_compile_says_where() -> None:
    pytest.importorskip("cuda.bindings")
    with pytest.raises(RuntimeError, match=r"kernel.cu\(1\): error"):
        nvrtc.compile_source("nonsense", (), "sm_90")


def test_a_compiled_kernel_is_kept_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cubin = nvrtc.cached_cubin(SCALE, (), "sm_90")
    monkeypatch.setattr(nvrtc, "compile_source", None)  # not needed again
    assert nvrtc.cached_cubin(SCALE, (), "sm_90") == cubin
    assert len(list((tmp_path / "gpt-norms").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "compile_source", lambda *_: (b"machine code", ""))
    monkeypatch.setattr(nvrtc, "sync", lambda _: os.close(-1))  # an OSError, as for a full disk
    assert nvrtc.cached_cubin(SCALE, (), "sm_90") == b"machine code"
    assert list((tmp_path / "gpt-norms").iterdir()) == []
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert nvrtc.cached_cubin(SCALE, (), "sm_90") == b"machine code"


def test_kernels_are_kept_in_the_home_directory_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert nvrtc.cache_dir() == tmp_path / ".cache" / "gpt-norms"


def test_a_missing_compiler_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda-bindings can be imported without NVRTC; the first call notices that it is missing."""
    bindings = pytest.importorskip("cuda.bindings.nvrtc")

    def fail() -> None:
        raise RuntimeError("Failed to dlopen libnvrtc.so.13")

    monkeypatch.setattr(bindings, "nvrtcVersion", fail)
    nvrtc.bindings.cache_clear()
    with pytest.raises(MissingInput, match="pip install cuda-bindings nvidia-cuda-nvrtc"):
        nvrtc.bindings()
    nvrtc.bindings.cache_clear()


def test_missing_bindings_are_one_line_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    nvrtc.bindings.cache_clear()
    with pytest.raises(MissingInput, match="pip install cuda-bindings nvidia-cuda-nvrtc"):
        nvrtc.bindings()
    nvrtc.bindings.cache_clear()


# What a backward pass does. It is a separate program: a process loads a driver only once.
LAUNCH = f"""
from gpt.kernels import nvrtc
nvrtc.make_current(1)
scale = nvrtc.Kernel(nvrtc.module({SCALE!r}, (), "sm_90", 1), "scale", "3q f4x")
arguments = (0x7F0123456780, 0, 2**40 + 5, 1.5)
scale.launch((3, 4), 128, 0x55, arguments)
try:
    scale.launch((0, 1), 128, 0x55, arguments)
except RuntimeError as error:
    print(error, flush=True)
"""
ASKED = """device 1
context of device 1
current 0x100
module ELF
function scale of 0x200
0x300 in 3 4 1 blocks of 128 1 1 threads, 0 bytes, on 0x55, no extra
0x7f0123456780 (nil) 1099511627781 1.5
cuda.bindings.driver: CUDA_ERROR_INVALID_VALUE
"""


def test_the_driver_is_given_the_kernel_and_its_arguments(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings")
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("no Linux, or no C compiler to build the driver's stand-in with")
    source = Path(__file__).parent / "tools" / "cuda_driver.c"
    library = str(tmp_path / "libcuda.so.1")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, str(source)], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", LAUNCH]
    done = subprocess.run(command, env=environment, cwd=REPO, capture_output=True, text=True)
    assert done.stdout == ASKED, done.stderr


def test_a_kernel_that_two_threads_launch_takes_each_one_s_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second launch comes before the driver has read the values of the first."""
    seen, first_is_in = [], Event()

    def launch(*arguments: Any) -> tuple[int]:
        first_is_in.set()
        time.sleep(0.05)
        values = c_void_p.from_address(arguments[9]).value
        seen.append(c_longlong.from_address(values or 0).value)
        return (0,)

    driver = SimpleNamespace(cuModuleGetFunction=lambda *_: (0, None), cuLaunchKernel=launch)
    monkeypatch.setattr(nvrtc, "bindings", lambda: (driver, None))
    kernel = nvrtc.Kernel(None, "kernel", "q")
    with ThreadPoolExecutor() as threads:
        threads.submit(kernel.launch, (1, 1), 32, 0, [1])
        first_is_in.wait()
        threads.submit(kernel.launch, (1, 1), 32, 0, [2])
    assert seen == [1, 2]
