"""The compiled CUDA LayerNorm fits the registers of every architecture and needs the fewest memory
accesses possible. No GPU is needed."""

from __future__ import annotations

import re
import subprocess
from importlib import metadata
from itertools import product
from pathlib import Path

import pytest
import torch

from gpt.kernels import nvrtc
from gpt.kernels.layer_norm import BACKWARD, LONGEST, SOURCE, Kind, Plan
from tests.tools.configs import mostly_long
from tests.tools.kernels import DTYPES

SIZES = [1, 7, 768, 769, 1024, 1280, 1600, 4096, 8192, 50_000]
ARCHITECTURES = ["sm_75", "sm_80", "sm_90", "sm_100"]


def plans(C: int, dtypes: tuple[torch.dtype, ...], branch: bool, bias: bool) -> tuple[Plan, Plan]:
    kind = Kind(C, *dtypes, BRANCH=branch, BIAS=bias)
    return kind.forward(), kind.backward()


@pytest.mark.parametrize(
    ("C", "arch"),
    mostly_long(
        product(SIZES, ARCHITECTURES),
        (1600, "sm_80"), (769, "sm_75"), (50_000, "sm_100"),
    ),
)  # fmt: skip
def test_every_kernel_compiles_without_spills_and_within_its_registers(C: int, arch: str) -> None:
    """A multiprocessor has 65,536 registers. It needs about 24 kB of rows in flight to use the full
    bandwidth: the registers must suffice for enough blocks to read that much."""
    pytest.importorskip("cuda.bindings")
    combinations = DTYPES if arch == "sm_90" else DTYPES[:1] + DTYPES[3:4]
    for dtypes, branch in product(combinations, (True, False)):
        X, B, Y, _ = (t.itemsize for t in dtypes)
        forward, backward = plans(C, dtypes, branch, True)
        for plan, element in (
            (forward, X + B * branch),
            (backward, X + Y + X * branch),
        ):
            options = (*plan.options(), "--ptxas-options=-v")
            cubin, log = nvrtc.compile_source(SOURCE, options, arch)
            assert cubin.startswith(b"\x7fELF")
            assert set(re.findall(r"(\d+) bytes (?:stack frame|spill)", log)) == {"0"}, log
            direction = "forward" if plan.FORWARD else "backward"
            entry = log[log.index(f"'layer_norm_{direction}'") :]
            registers = int(re.search(r"Used (\d+) registers", entry)[1])  # type: ignore[index]
            threads = plan.THREADS * plan.ROWS
            warps = 65_536 // (-(-registers // 8) * 8 * 32) // 4 * 4  # as registers allow
            blocks = min(32 * warps, 2048) // threads
            assert blocks >= plan.BLOCKS, f"{plan}: {registers} registers"
            if direction == "backward":  # the number launched
                blocks = plan.BLOCKS
            if 768 <= C <= 8192:
                on_their_way = blocks * plan.ROWS * C * element
                assert on_their_way >= 24_000, f"{plan}: {registers} registers, {on_their_way} B"


@pytest.mark.parametrize("C", [1, 7, 33, 768, 1023, 2000, 4096, 8192, 8193, 50_000])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t)[6:] for t in d))
def test_plans_are_valid(C: int, dtypes: tuple[torch.dtype, ...]) -> None:
    for alignment in (16, 8, 4, 2):
        kind = Kind(C, *dtypes, BRANCH=True, BIAS=True, alignment=alignment)
        for plan in (kind.forward(), kind.backward()):
            assert C % plan.VEC == 0
            assert plan.VEC == 1 or plan.VEC * max(d.itemsize for d in dtypes) <= alignment
            assert plan.THREADS % 32 == 0
            assert plan.ROWS == 1 or plan.THREADS == 32 or not plan.FORWARD
            assert plan.THREADS * plan.ROWS * plan.BLOCKS <= 1024
            assert plan.ROWS <= 15 or plan.THREADS == 32  # one of the 16 barriers is for all
            assert plan.BLOCKS <= 4  # each takes all 16 barriers; a multiprocessor has 64
            assert plan.ROWS * C * 4 < 48_000 or plan.ROWS == 1  # bytes of shared memory
            assert (C <= LONGEST) == plan.CACHED  # else rows are read twice
            if plan.CACHED:
                assert max(BACKWARD)[0] >= -(-C // (plan.THREADS * plan.VEC)) * plan.VEC


@pytest.mark.parametrize(
    ("branch", "dtypes"),
    mostly_long(product((True, False), DTYPES), *((True, d) for d in DTYPES[:1] + DTYPES[4:6])),
)
def test_memory_is_read_and_written_in_the_widest_accesses(
    dtypes: tuple[torch.dtype, ...], branch: bool, tmp_path: Path
) -> None:
    """16 bytes of the widest dtype and as many elements of the others, except for a row's single
    numbers. Without our help the compiler split one store into four."""
    pytest.importorskip("cuda.bindings")
    files = metadata.files("nvidia-cuda-nvdisasm") or []
    program = next(str(f.locate()) for f in files if f.name in ("nvdisasm", "nvdisasm.exe"))
    X, B, Y, W = (t.itemsize for t in dtypes)
    for plan in plans(768, dtypes, branch, True):
        cubin, _ = nvrtc.compile_source(SOURCE, plan.options(), "sm_90")
        (tmp_path / "kernel.cubin").write_bytes(cubin)
        command = [program, "-c", str(tmp_path / "kernel.cubin")]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        kernel = "layer_norm_forward" if plan.FORWARD else "layer_norm_backward"
        code = listing[listing.index(f".text.{kernel}:") :]
        code = code[: code.index(".text.", 10)] if ".text." in code[10:] else code
        accesses = set(re.findall(r"(?:LDG|STG)\.E(?:\.\d+)?", code))
        x, b, y, w = (f"E.{8 * size * plan.VEC}" for size in (X, B, Y, W))
        if plan.FORWARD:  # reads x, branch, γ, β; writes y, stream; mean and rstd
            expected = {f"LDG.{x}", f"LDG.{w}", f"STG.{y}", "STG.E"}
            expected |= {f"LDG.{b}", f"STG.{x}"} if branch else set()
        else:  # reads x, dy, γ, dstream, mean, rstd; writes dx, dbranch, and a block's Σ dγ, Σ dβ
            expected = {f"LDG.{x}", f"LDG.{y}", f"LDG.{w}", "LDG.E"}
            expected |= {f"STG.{x}", f"STG.{b}", "STG.E"}
        assert accesses == expected, plan
