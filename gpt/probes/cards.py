"""A table of all norms, and a card for each norm; the numbers come from running it."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from gpt.common.errors import MissingInput
from gpt.norms.base import norm_step
from gpt.norms.registry import NORMS, build_norm, fitting, norm_class, sizes

SHAPE = (16, 128, 128)  # of the timed input, as in the default run
DIMS = {"B": 0, "T": 1, "C": 2}


def example(name: str, width: int, block_size: int = SHAPE[1]) -> Any:
    """The norm with its default options, except for those that follow from the sizes."""
    options = sizes(name, block_size) | fitting(name, width)
    return build_norm(name, width, **options).to(home(name))


def home(name: str) -> str:
    """The device of its example: CUDA for `cuda_layer`, otherwise the CPU."""
    return "cuda" if name == "cuda_layer" else "cpu"


def parameters(name: str) -> str:
    """The number of parameters in terms of C, such as `2C + 1`."""
    a, b = (sum(p.numel() for p in example(name, width).parameters()) for width in (100, 200))
    slope, rest = (b - a) // 100, a - (b - a)
    terms = [f"{slope if slope > 1 else ''}C"] * bool(slope) + [str(rest)] * bool(rest)
    return " + ".join(terms) or "0"


def bytes_moved(name: str) -> int:
    """Minimum bytes moved per element in forward, fp32. One token's row fits on the chip;
    statistics over several tokens read x twice."""
    return 12 if {"B", "T"} & set(norm_class(name).axes) else 8


def measure(names: list[str]) -> dict[str, float]:
    """Median milliseconds of forward and backward on SHAPE in fp32 here, taken in turns."""
    norms = {name: example(name, SHAPE[2]) for name in names}
    inputs = {name: torch.randn(SHAPE, device=home(name), requires_grad=True) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(7):
        for name, norm in norms.items():
            start = time.perf_counter()
            with norm_step(norm, 1, 1):
                (norm(inputs[name]) * 1.0).sum().backward()
            if home(name) == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def overview() -> Table:
    """All norms that this machine can build, one per line."""
    names = [n for n in sorted(NORMS) if n != "cuda_layer" or torch.cuda.is_available()]
    milliseconds = measure(names)
    result = Table()
    result.add_column("norm", no_wrap=True)
    for heading in ("statistics over", "sees later tokens", "sees other samples", "parameters",
                    "bytes", "ms", "ratio to layer"):  # fmt: skip
        result.add_column(heading, overflow="fold")
    for name in names:
        cls: Any = NORMS[name]
        axes, after = "".join(cls.axes), "".join(cls.evaluation_axes)
        cells = [name, (axes or "–") + (f", then {after or 'none'}" if after != axes else "")]
        for axis in "TB":
            where = [m for m, a in (("training", axes), ("evaluation", after)) if axis in a]
            cells.append(" and ".join(where) or "no")
        ratio = milliseconds[name] / milliseconds["layer"]
        cells += [parameters(name), str(bytes_moved(name)), f"{milliseconds[name]:.1f}"]
        result.add_row(*cells, f"{ratio:.2f}")
    B, T, C = SHAPE
    missing = "" if "cuda_layer" in names else "cuda_layer: needs a CUDA device · "
    result.caption = (
        f"{missing}bytes: the least that forward reads and writes per fp32 element · ms: forward "
        f"and backward of ({B}, {T}, {C}) in fp32 here, on {torch.get_num_threads()} thread(s), "
        "medians taken in turns; layer and batch are torch's fused kernels, cuda_layer is ours, "
        "all other norms are plain PyTorch"
    )
    return result


def card(name: str) -> list[list[str]]:
    """The card of `name` in four parts, each a list of lines: its docstring, a drawing of its
    statistics in training, one in evaluation if that differs, and the 3×3 example."""
    cls = norm_class(name)
    differs = cls.evaluation_axes != cls.axes
    groups = 2 if cls.divisors else 1
    try:
        example = list(worked_example(name))
    except MissingInput as error:
        example = [str(error)]
    return [
        [f"{name}: {cls.__name__}", "", *(inspect.getdoc(cls) or "").splitlines(), ""],
        list(drawing("in training", cls.axes, groups)),
        list(drawing("in evaluation", cls.evaluation_axes, groups)) if differs else [],
        example,
    ]


def drawing(when: str, axes: tuple[str, ...], groups: int) -> Iterator[str]:
    """Draw a (2, 3, 4) input and mark the numbers that share their statistics with ◆."""
    if not axes:
        yield f"{when}: no statistics of this input; each number is transformed alone"
        yield ""
        return
    over = ", ".join([*axes, f"in {groups} groups"] if groups > 1 else axes)
    yield f"{when}: the statistics of ◆ are taken over it and every ■ ({over})"
    yield "            sample 1    sample 2"
    yield "  feature   1 2 3 4     1 2 3 4"
    here = {"B": 0, "T": 1, "C": 1}
    for t in range(3):
        cells = []
        for b in range(2):
            row = []
            for c in range(4):
                place = {"B": b, "T": t, "C": c}
                moved = {axis for axis in place if place[axis] != here[axis]}
                # prepbn's row and column belong to two norms; no norm runs over both.
                shared = moved <= set(axes) and not (moved > {"C"}) and c < 4 // groups
                row.append("◆" if place == here else "■" if shared else "·")
            cells.append(" ".join(row))
        yield f"  token {t + 1}   {'     '.join(cells)}"
    yield ""


def aligned(values: Tensor) -> str:
    rounded = values.detach().round(decimals=3) + 0.0  # no -0.000
    return "  ".join(f"{value:8.3f}" for value in rounded.flatten().tolist())


def lettered(values: Tensor) -> list[str]:
    return [f"  {letter:<18}{aligned(row)}" for letter, row in zip("ABC", values, strict=True)]


def worked_example(name: str) -> Iterator[str]:
    """Rows A (1 2 3), B (4 5 6), C (7 8 9): statistics, output, and the gradients of γ and β."""
    cls, norm = norm_class(name), example(name, 3, block_size=3)
    one_by_one = "B" in cls.axes and "T" not in cls.axes  # three samples of one token
    x = torch.arange(1.0, 10.0).view((3, 1, 3) if one_by_one else (1, 3, 3)).to(home(name))
    what = "samples of one token" if one_by_one else "tokens of one sample"
    grouped = ", in one group" if cls.divisors else ""
    yield f"three {what}, three features{grouped}"
    yield from lettered(x.view(3, 3))
    if cls.axes and set(cls.axes) != set(DIMS):
        dims = [DIMS[axis] for axis in cls.axes]
        mean, variance = x.mean(dims, keepdim=True), x.var(dims, unbiased=False, keepdim=True)
        yield "over each row: A, B and C" if cls.axes == ("C",) else "over each column"
        yield f"  mean              {aligned(mean)}"
        yield f"  biased variance   {aligned(variance)}"
        yield f"  unbiased variance {aligned(x.var(dims))}   torch.var's"
        yield f"  root mean square  {aligned(x.square().mean(dims).sqrt())}"
        if "shift" in cls.invariances:
            yield "minus the mean"
            yield from lettered((x - mean).view(3, 3))
            yield "and divided by the root of the biased variance"
            yield from lettered(((x - mean) / variance.sqrt()).view(3, 3))
    if cls.evaluation_axes != cls.axes:
        norm.momentum = 1.0  # the running statistics are this batch's
    with norm_step(norm, 1, 100):
        y = norm(x)
    yield "the norm's output at the start of training"
    yield from lettered(y.view(3, 3))
    yield from gradients(norm, y)
    if cls.evaluation_axes != cls.axes:
        yield from alone(norm, x)


def gradients(norm: Any, y: Tensor) -> Iterator[str]:
    """γ and β are shared by all tokens: their gradients are sums over the tokens."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is None or not y.requires_grad:
        yield "no γ and no β"
        return
    dy = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [2.0, 0.0, 1.0]]).view(y.shape).to(y)
    y.backward(dy)
    name, x_hat = ("γ", "x̂") if weight.numel() > 1 else ("g", "y/g")
    both = f"{name} and β have" if bias is not None else f"{name} has"
    shared = "one number per feature" if weight.numel() > 1 else "one number in all"
    yield f"{both} {shared}, shared by all tokens; with dL/dy ="
    yield from lettered(dy.view(3, 3))
    # If γ and β belong to only a part of the norm, as in prepbn, this is not the sum.
    whole = bias is None or torch.allclose(bias.grad, dy.sum((0, 1)))
    yield f"  dL/d{name}{f' = Σ dy·{x_hat}' * whole}  {aligned(weight.grad)}"
    if bias is not None:
        yield f"  dL/dβ{' = Σ dy  ' * whole}  {aligned(bias.grad)}"


def alone(norm: Any, x: Tensor) -> Iterator[str]:
    """The output for one sample without a batch, as when generating text."""
    norm.eval()
    yield "token C alone, in evaluation"
    token = x.reshape(3, 1, 3)[2:]
    yield f"  with running statistics, here of the batch above  {aligned(norm(token))}"
    norm.batch_stats = True
    yield f"  with its own, a batch of one                      {aligned(norm(token))}"
