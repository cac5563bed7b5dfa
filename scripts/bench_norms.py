"""LayerNorm kernels side by side on this GPU: python scripts/bench_norms.py [OUT_DIR]

Forward and backward of N rows of C features, with and without the residual add, cold (the L2 cache
flushed before each call) and warm, by this project's kernel and every peer that imports, in turns.
Prints medians: time, bandwidth as a share of a copy measured in the same run, and the ratio to
F.layer_norm. Only ours and the compiled one fuse the residual add and autocast's cast; the others
have torch's beside them, as their public functions need. Writes bench_norms.json and
bench_norms.png. What whole blocks gain: bench_blocks.py.
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
    # As the product after a norm needs it: F.layer_norm, under autocast, returns fp32.
    return F.layer_norm(stream, w.shape, w, b, 1e-5).to(output_dtype(stream)), stream


@cache
def weights_as(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """As a kernel wants its weights; made once, for they would be parameters of that type."""
    same = weights.dtype == dtype
    return weights if same else weights.detach().to(dtype).requires_grad_()


def peers() -> dict[str, Norm]:
    """The kernels of other packages that are installed, by name, over a stream made by torch."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        found["liger"] = lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, 1e-5)
    except ImportError:
        pass
    try:
        from quack.rmsnorm import layernorm_bwd, layernorm_fwd

        class Quack(torch.autograd.Function):  # which the package has for RMSNorm only
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
            # Its output has the type of its weights.
            dtype = output_dtype(w)
            with torch.autocast("cuda", enabled=False):  # else it would cast x as well
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
    """The least that one element costs: what must be read and written once."""
    stream, other = {"bf16": (2, 2), "fp32": (4, 4), "autocast": (4, 2)}[precision]
    if direction == "forward":
        return stream + other + residual * (stream + other)
    # Where the branch has another type than the stream, its gradient is written beside dx.
    return 2 * stream + other + residual * (stream + (other if other != stream else 0))


HOLDS = (1_000_000, 4_000_000, 16_000_000)  # clock cycles: half a millisecond and more


def held(call: Callable[[], Any], flush: Tensor | None = None) -> float:
    """Milliseconds that a call takes on the device; where `flush` is given, with a cold cache.

    The device is held while the host queues the call, which for a kernel of 10 µs takes Python 50
    and more: longer, where the host was not in time. RuntimeError where it never is, as with a call
    that waits for the device by itself: its time would be the host's.
    """
    for cycles in HOLDS:
        if flush is not None:
            flush.amax()  # read, not written: what is written goes to memory while others are timed
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
    """The median time of each call, taken in turns, in another order each: what ran before leaves
    its lines in the cache."""
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
    """Bytes a millisecond that a copy of 1 GiB reads and writes."""
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
    torch._dynamo.reset()  # each case has a graph of its own, of fixed sizes
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
            # Some peers have weights of their own.
            back = partial(
                torch.autograd.grad,
                *(outputs, inputs, gradients),
                retain_graph=True,
                allow_unused=True,
            )
            held(run), held(back)
        except Exception as error:  # a peer that cannot do this case is left out of it
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
    parser.add_argument("out", nargs="?", default=".", type=Path, help="a folder, made if need be")
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        raise MissingInput("bench_norms needs a CUDA device")
    out.mkdir(parents=True, exist_ok=True)
    flush = torch.zeros(64 << 20, device="cuda")  # 256 MiB: past any L2 cache
    copy = copy_bandwidth()
    where = {**machine(), "copy_tb_per_s": copy / 1e9}
    print(json.dumps(where))
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else "compiled" would be eager
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
            # As it goes: a later failure loses nothing.
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
    """The share of the copy bandwidth by width, cold, with the residual: a panel for each case."""
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
