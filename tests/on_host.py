"""Takes the place of `launch` of gpt/kernels/layer_norm.py: the kernels run on the CPU."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt.kernels import layer_norm
from gpt.kernels.layer_norm import Plan

HARNESS = Path(__file__).parent / "cuda_on_host.cpp"


class Host:
    """layer_norm.cu as host C++ with fibers for threads, built once a plan, in `builds`."""

    def __init__(self, builds: Path, source: Path = Path(layer_norm.__file__).parent) -> None:
        self.builds, self.source = builds, source

    def library(self, plan: Plan) -> ctypes.CDLL:
        path = self.builds / (hashlib.sha256(repr(plan).encode()).hexdigest()[:16] + ".so")
        if not path.exists():
            # As by nvcc, products are added unrounded (0 may then become a rounding error), and
            # integers wrap.
            command = ["g++", "-std=c++17", "-O2", "-march=native", "-ffp-contract=fast", "-fwrapv"]
            command += ["-shared", "-fPIC", "-w", *plan.options()]
            command += [f"-I{self.source}", str(HARNESS), "-o", str(path)]
            subprocess.run(command, check=True)
        return ctypes.CDLL(str(path))

    def launch(
        self,
        plan: Plan,
        name: str,
        grid: tuple[int, int],
        threads: int,
        arguments: tuple[Any, ...],
    ) -> None:
        run = getattr(self.library(plan), name.removeprefix("layer_norm_"))
        run(*grid, threads, *map(as_c, arguments))


def as_c(argument: Any) -> Any:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p(0 if argument is None else argument.data_ptr())
    return (ctypes.c_float if isinstance(argument, float) else ctypes.c_longlong)(argument)
