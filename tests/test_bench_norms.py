"""The parts of the CUDA LayerNorm's benchmarks that need no GPU."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tools.programs import REPO, run_program


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return script("bench_norms")


def script(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPO / "scripts")
        return importlib.import_module(name)


@pytest.mark.parametrize(
    ("precision", "bytes_an_element"),
    [("bf16", [4, 8, 6, 8]), ("fp32", [8, 16, 12, 16]), ("autocast", [6, 12, 10, 16])],
)
def test_the_benchmark_s_floors_are_what_must_be_read_and_written(
    bench: ModuleType, precision: str, bytes_an_element: list[int]
) -> None:
    cases = [(d, r) for d in ("forward", "backward") for r in (False, True)]
    assert [bench.bytes_moved(precision, d, r) for d, r in cases] == bytes_an_element


def test_the_benchmark_s_table_and_plot_hold_what_was_measured(
    bench: ModuleType, tmp_path: Path
) -> None:
    rows = [
        {
            "N": N, "C": C, "precision": precision, "residual": True, "direction": direction,
            "state": "cold", "ms": {"ours": 0.05, "native": 0.1},
            "share_of_copy": {"ours": 0.9, "native": 0.45},
            "speedup_over_native": {"ours": 2.0, "native": 1.0},
        }
        for N in bench.ROWS
        for C in bench.WIDTHS
        for precision in bench.PRECISIONS
        for direction in ("forward", "backward")
    ]  # fmt: skip
    assert "ours 50.0µs 0.90 2.00×" in bench.describe(rows[0])
    bench.draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_call_that_the_host_queued_too_late_is_timed_again(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the host's time would count as the device's."""
    log: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None:
            log.append(self)

        def synchronize(self) -> None:
            log.append("waited")

        def query(self) -> bool:
            """Whether the device has passed this event. It passes the first one before the call is
            queued, unless it was held long enough; after waiting it has passed all."""
            held, start, *queued, _ = log[-4:]
            return "waited" in queued or self is not start or held < enough

        def elapsed_time(self, end: Event) -> float:
            return 0.25

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", log.append)
    flush = SimpleNamespace(amax=lambda: log.append("flush"))
    enough = 4_000_000
    assert bench.held(lambda: log.append("call"), flush) == 0.25
    steps = [entry for entry in log if not isinstance(entry, Event)]
    once = ["flush", 1_000_000, "call", "waited"]
    assert steps == [*once, "flush", 4_000_000, "call", "waited"]
    enough = 10**9
    with pytest.raises(RuntimeError, match="queued more slowly than the device runs"):
        bench.held(lambda: log.append("call"))


@pytest.mark.parametrize("name", ["bench_norms", "bench_blocks"])
def test_without_a_gpu_the_benchmarks_say_so_in_one_line(name: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    result = run_program(script=name)
    assert result.returncode == 66
    assert result.stderr == f"error: {name} needs a CUDA device\n"


def test_the_blocks_that_are_timed_run() -> None:
    from gpt.norms.layer import LayerNorm

    script("bench_blocks").block_step(LayerNorm, 1, compiled=False, device="cpu")()
