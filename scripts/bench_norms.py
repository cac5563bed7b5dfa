"""Compares LayerNorm kernels on this GPU: python scripts/bench_norms.py [OUT_DIR]

It times this project's kernel and every installed peer in turns: forward and backward of N rows of
C features, with and without the residual add, cold (the L2 cache is flushed before each call) and
warm. It prints medians: time, bandwidth as a share of a copy measured in the same run, and the
ratio to F.layer_norm. Only ours and the compiled one fuse the residual add and autocast's cast; the
other kernels need separate torch kernels for these. It writes bench_norms.json and bench_norms.png.
bench_blocks.py times whole blocks.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.cli.errors import run
from gpt.common.errors import MissingInput
from gpt.kernels.layer_norm import add_layer_norm, output_dtype

ROWS = (8192, 65536)
WIDTHS = (768, 1024, 1280, 1600, 4096)
PRECISIONS = ("bf16", "fp32", "autocast")  # autocast: fp32 stream and weights, bf16 branch and y
REPEATS = 25
Norm = Callable[[Tensor, Tensor | None, Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(x: Tensor, branch: Tensor | None, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    y, stream, *_ = add_layer_norm(x, branch, w, b, 1e-5)
    return y, x if branch is None else stream


def native(x: Tensor, branch: Tensor | None, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    stream = x if branch is None else x + branch
    # The next matrix product needs this cast: under autocast F.layer_norm returns fp32.
    return F.layer_norm(stream, w.shape, w, b, 1e-5).to(output_dtype(stream)), stream


@cache
def weights_as(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights in a kernel's dtype; cached, since a model would keep them in that dtype."""
    same = weights.dtype == dtype
    return weights if same else weights.detach().to(dtype).requires_grad_()


def peers() -> dict[str, Norm]:
    """The kernels of other installed packages, by name; torch does the residual add."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        found["liger"] = lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, 1e-5)
    except ImportError:
        pass
    try:
        from quack.rmsnorm import layernorm_bwd, layernorm_fwd

        class Quack(torch.autograd.Function):  # the package has this for RMSNorm only
            @staticmethod
            def forward(ctx, x, w, b):  # type: ignore[no-untyped-def]
                y, rstd, mean = layernorm_fwd(x, w, b, 1e-5, return_rstd=True, return_mean=True)
                ctx.save_for_backward(x, w, rstd, mean)
                return y

            @staticmethod
            def backward(ctx, dy):  # type: ignore[no-untyped-def]
                x, w, rstd, mean = ctx.saved_tensors
                return layernorm_bwd(x, w, dy, rstd, mean)

        found["quack"] = lambda x, w, b: Quack.apply(
            x, weights_as(w, torch.float32), weights_as(b, torch.float32)
        )
    except ImportError:
        pass
    try:
        from apex.contrib.layer_norm.layer_norm import FastLayerNormFN

        def apex(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            # Its output has the dtype of its weights.
            dtype = output_dtype(w)
            with torch.autocast("cuda", enabled=False):  # otherwise autocast would also cast x
                w, b = weights_as(w, dtype), weights_as(b, dtype)
                return FastLayerNormFN.apply(x, w, b, 1e-5, False)

        found["apex"] = apex
    except ImportError:
        pass
    try:
        from transformer_engine.pytorch import LayerNorm

        modules: dict[Any, Any] = {}

        def transformer_engine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            key = (w.shape, w.dtype)
            if key not in modules:
                modules[key] = LayerNorm(w.shape[0], eps=1e-5).to("cuda", w.dtype)
            return modules[key](x)

        found["transformer_engine"] = transformer_engine
    except ImportError:
        pass

    def over_a_sum(norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Norm:
        def run(x: Tensor, branch: Tensor | None, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            stream = x if branch is None else x + branch
            return norm(stream, w, b).to(output_dtype(stream)), stream

        return run

    return {name: over_a_sum(norm) for name, norm in found.items()}


def bytes_moved(precision: str, direction: str, residual: bool) -> int:
    """Minimum bytes moved per element, each value being read or written once."""
    stream, other = {"bf16": (2, 2), "fp32": (4, 4), "autocast": (4, 2)}[precision]
    if direction == "forward":
        return stream + other + residual * (stream + other)
    # If the branch's dtype differs from the stream's, its gradient is written in addition to dx.
    return 2 * stream + other + residual * (stream + (other if other != stream else 0))


HOLDS = (1_000_000, 4_000_000, 16_000_000)  # clock cycles: half a millisecond or more


def held(call: Callable[[], Any], flush: Tensor | None = None) -> float:
    """Milliseconds that a call takes on the device, with a cold cache if `flush` is given.

    The device is held while the host queues the call: for a kernel of 10 µs Python needs 50 µs or
    more. If the host is late, the device is held longer. RuntimeError if the host is always late,
    as for a call that itself waits for the device: the time would be the host's.
    """
    for cycles in HOLDS:
        if flush is not None:
            flush.amax()  # read only: written data would go to memory while the call is timed
        torch.cuda._sleep(cycles)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        late = start.query()
        end.synchronize()
        if not late:
            return start.elapsed_time(end)
    raise RuntimeError("is queued more slowly than the device runs")


def medians(
    calls: dict[str, Callable[[], Any]], timed: Callable[[Callable[[], Any]], float]
) -> dict[str, float]:
    """The median time of each call. Calls take turns in random order, because the previous call
    leaves its data in the cache."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, rng = list(calls), random.Random(0)
    for _ in range(5):
        for call in calls.values():
            call()
    for _ in range(REPEATS):
        rng.shuffle(order)
        for name in order:
            times[name].append(timed(calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth() -> float:
    """Bytes per millisecond that a copy of 1 GiB reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / medians({"copy": lambda: target.copy_(source)}, held)["copy"]


def machine() -> dict[str, str | None]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = shutil.which(query[0]) is not None
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": subprocess.check_output(query, text=True).split("\n")[0] if found else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def measure(
    norms: dict[str, Norm], N: int, C: int, precision: str, residual: bool, flush: Tensor
) -> dict[tuple[str, str], dict[str, float]]:
    """(direction, cold or warm) → milliseconds by kernel."""
    stream = torch.bfloat16 if precision == "bf16" else torch.float32
    other = torch.float32 if precision == "fp32" else torch.bfloat16
    x = torch.randn(N, C, device="cuda").to(stream).requires_grad_()
    branch = torch.randn(N, C, device="cuda").to(other).requires_grad_() if residual else None
    w = torch.randn(C, device="cuda").to(stream).requires_grad_()
    b = torch.randn(C, device="cuda").to(stream).requires_grad_()
    inputs = [t for t in (x, branch, w, b) if t is not None]
    torch._dynamo.reset()  # each case has its own graph with fixed sizes
    norms = {**norms, "compiled": torch.compile(native, dynamic=False)}
    forward: dict[str, Callable[[], Any]] = {}
    backward: dict[str, Callable[[], Any]] = {}
    for name, norm in norms.items():

        def run(norm: Norm = norm) -> tuple[Tensor, Tensor]:
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"):
                return norm(x, branch, w, b)

        try:
            y, total = run()
            outputs = [y] if branch is None else [y, total]
            gradients = [torch.randn_like(t) for t in outputs]
            # Some peers have their own weights.
            back = partial(
                torch.autograd.grad,
                *(outputs, inputs, gradients),
                retain_graph=True,
                allow_unused=True,
            )
            held(run), held(back)
        except Exception as error:  # a peer that cannot run this case is skipped
            print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        forward[name] = run
        backward[name] = back
    return {
        (direction, state): medians(calls, timed)
        for direction, calls in (("forward", forward), ("backward", backward))
        for state, timed in (("cold", partial(held, flush=flush)), ("warm", held))
    }


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "out", nargs="?", default=".", type=Path, help="the output folder, created if missing"
    )
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        raise MissingInput("bench_norms needs a CUDA device")
    out.mkdir(parents=True, exist_ok=True)
    flush = torch.zeros(64 << 20, device="cuda")  # 256 MiB, larger than any L2 cache
    copy = copy_bandwidth()
    where = {**machine(), "copy_tb_per_s": copy / 1e9}
    print(json.dumps(where))
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # otherwise "compiled" would be eager
    norms = {"ours": ours, "native": native, **peers()}
    results: list[dict[str, Any]] = []
    report: dict[str, Any] = {"machine": where, "rows": results}
    for N in ROWS:
        for C in WIDTHS:
            for precision in PRECISIONS:
                for residual in (False, True):
                    case = {"N": N, "C": C, "precision": precision, "residual": residual}
                    measured = measure(norms, N, C, precision, residual, flush)
                    for (direction, state), times in measured.items():
                        floor = N * C * bytes_moved(precision, direction, residual) / copy
                        row = {
                            **case,
                            "direction": direction,
                            "state": state,
                            "ms": times,
                            "share_of_copy": {k: floor / t for k, t in times.items()},
                            "speedup_over_native": {
                                k: times["native"] / t for k, t in times.items()
                            },
                        }
                        results.append(row)
                        print(describe(row))
            # Saved after each width, so that a later failure loses nothing.
            (out / "bench_norms.json").write_text(json.dumps(report, indent=1))
    draw(results, out / "bench_norms.png")


def describe(row: dict[str, Any]) -> str:
    head = f"N={row['N']:<6} C={row['C']:<5} {row['precision']:<8} "
    head += f"{'residual' if row['residual'] else '':<8} {row['direction']:<8} {row['state']:<4}"
    cells = (
        f"{name} {ms * 1e3:.1f}µs {row['share_of_copy'][name]:.2f} "
        f"{row['speedup_over_native'][name]:.2f}×"
        for name, ms in row["ms"].items()
    )
    return f"{head}  {'  |  '.join(cells)}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the share of the copy bandwidth by width (cold, with residual), a panel per case."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    columns = [(d, N) for d in ("forward", "backward") for N in ROWS]
    figure, axes = plt.subplots(
        len(PRECISIONS), len(columns), figsize=(14, 8), sharey=True, layout="constrained"
    )
    for i, precision in enumerate(PRECISIONS):
        for j, (direction, N) in enumerate(columns):
            want = {"precision": precision, "direction": direction, "N": N, "state": "cold"}
            chosen = [r for r in rows if r["residual"] and want.items() <= r.items()]
            for name in chosen[0]["ms"] if chosen else []:
                points = [(r["C"], r["share_of_copy"].get(name)) for r in chosen]
                axes[i, j].plot(*zip(*points, strict=True), "o-", label=name)
            axes[i, j].set_title(f"{direction}, N={N}, {precision}", fontsize=9)
            axes[i, j].grid(alpha=0.25)
    lines = axes[0, 0].get_legend_handles_labels()
    figure.legend(*lines, frameon=False, loc="outside right center")
    figure.supxlabel("features a row")
    figure.supylabel("share of the copy bandwidth")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(main)
