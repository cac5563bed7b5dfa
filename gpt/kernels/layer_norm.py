"""LayerNorm by `layer_norm.cu`: how a kernel is chosen and launched, the torch op, its gradient.

    y, stream, mean, rstd = add_layer_norm(x, branch, weight, bias, eps)    stream = x + branch

Shapes: x, branch, y and stream (..., C); weight and bias (C); mean and rstd (rows), fp32. x, y and
the weights may be float32, bfloat16 or float16, independently.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt.common.errors import MissingInput
from gpt.kernels import nvrtc

SOURCE = (Path(__file__).parent / "layer_norm.cu").read_text(encoding="utf-8")
TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
ARGUMENTS = {  # what a kernel takes: pointers and numbers, see `nvrtc.Kernel`
    "layer_norm_forward": "9q f4x",
    "layer_norm_backward": "10q",
    "layer_norm_columns": "6q",
    "layer_norm_finalise": "4q",
}
LONGEST = 8192  # features of a row that is held in registers; a longer one is read twice
# Backward, in order of choice: elements of a row that a thread holds, with gradients and sums;
# threads of a block at most; blocks of a multiprocessor. As many as there are registers for.
BACKWARD = ((8, 384, 2), (8, 480, 2), (16, 256, 2), (16, 512, 1), (24, 256, 2), (32, 128, 3))
ON_THEIR_WAY = 40_000  # bytes of rows that a multiprocessor must have asked for to be kept busy


class Plan(NamedTuple):
    """One compilation of the source: its macros, see there."""

    C: int
    VEC: int
    THREADS: int
    ROWS: int
    BLOCKS: int
    CACHED: bool
    X_T: torch.dtype
    B_T: torch.dtype
    Y_T: torch.dtype
    W_T: torch.dtype
    BRANCH: bool
    BIAS: bool
    FORWARD: bool

    def options(self) -> tuple[str, ...]:
        return tuple(
            f"-D{name}={TYPES[value] if isinstance(value, torch.dtype) else int(value)}"
            for name, value in self._asdict().items()
        )


class Kind(NamedTuple):
    """What of a call decides about its kernel; `alignment` in bytes, of all its pointers."""

    C: int
    X_T: torch.dtype
    B_T: torch.dtype
    Y_T: torch.dtype
    W_T: torch.dtype
    BRANCH: bool
    BIAS: bool
    alignment: int = 16

    def vec(self) -> int:
        """The most elements whose accesses are at most 16 bytes of the wider type, and aligned."""
        sizes = [t.itemsize for t in (self.X_T, self.B_T, self.Y_T, self.W_T)]
        vec = 16 // max(sizes)
        while vec > 1 and (self.C % vec or max(sizes) * vec > self.alignment):
            vec //= 2
        return vec

    def plan(self, threads: int, rows: int, blocks: int, cached: bool, forward: bool) -> Plan:
        types = (self.X_T, self.B_T, self.Y_T, self.W_T)
        flags = (self.BRANCH, self.BIAS, forward)
        return Plan(self.C, self.vec(), threads, rows, blocks, cached, *types, *flags)

    def threads(self, held: int) -> int:
        """As many, in whole warps, as hold a row with `held` elements each."""
        return -(-self.C // (32 * held)) * 32

    def forward(self) -> Plan:
        """A thread makes four accesses to a row: with more, too few threads wait at once."""
        threads = min(512, self.threads(max(8, 4 * self.vec())))
        rows = 2 if threads == 32 else 1
        blocks = 2 if threads > 256 else 1
        return self.plan(threads, rows, blocks, self.C <= LONGEST, forward=True)

    def backward(self) -> Plan:
        """The first of BACKWARD with enough bytes on their way, or else the one with most."""
        if self.C > LONGEST:
            return self.plan(512, 1, 2, False, forward=False)
        X, dy = self.X_T.itemsize, self.Y_T.itemsize
        row = self.C * (X + dy + X * self.BRANCH)

        def on_their_way(plan: Plan) -> int:
            return plan.BLOCKS * plan.ROWS * row

        plans = [
            self.plan(threads, block // threads, blocks, True, forward=False)
            for held, block, blocks in BACKWARD
            if (threads := self.threads(held)) <= block
        ]
        enough = (plan for plan in plans if on_their_way(plan) >= ON_THEIR_WAY)
        return next(enough, max(plans, key=on_their_way))


@cache
def choose(kind: Kind, forward: bool) -> Plan:
    return kind.forward() if forward else kind.backward()


class Launch(NamedTuple):
    """One kernel of a plan at work; its arguments are tensors, None and numbers."""

    name: str
    grid: tuple[int, int]
    threads: int
    arguments: tuple[Any, ...]


@cache
def kernel(plan: Plan, device: int, name: str) -> nvrtc.Kernel:
    module = nvrtc.module(SOURCE, plan.options(), architecture(device), device)
    return nvrtc.Kernel(module, name, ARGUMENTS[name])


def forward_cuda(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y in `dtype`, stream (empty where there is no branch), mean and rstd."""
    C = x.shape[-1]
    for name, tensor, expected in (
        ("branch", branch, x.shape),
        ("weight", weight, (C,)),
        ("bias", bias, (C,)),
    ):
        if tensor is not None and tensor.shape != expected:
            raise ValueError(
                f"layer_norm: {name} is {tuple(tensor.shape)}; expected {tuple(expected)}"
            )
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"layer_norm: {name} is on {tensor.device}; expected {x.device}, as x")
    x, weight = x.contiguous(), weight.contiguous()
    branch = None if branch is None else branch.contiguous()
    bias = None if bias is None else bias.to(weight.dtype).contiguous()
    y, stream, mean, rstd = forward_outputs(x, branch, dtype)
    n_rows = mean.numel()
    if n_rows:
        kind = kind_of(x, branch, y, weight, bias is not None, (branch, y, stream, bias))
        plan = choose(kind, forward=True)
        grid, threads = (-(-n_rows // plan.ROWS), 1), plan.THREADS * plan.ROWS
        arguments = (x, branch, weight, bias, y, stream, mean, rstd, n_rows, eps)
        queue(plan, x.device, Launch("layer_norm_forward", grid, threads, arguments))
    return y, stream, mean, rstd


def forward_outputs(
    x: Tensor, branch: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What forward writes to, empty: all that `torch.compile` needs to know of it."""
    rows = x.shape[:-1].numel()
    y = empty_like(x, dtype)
    stream = x.new_empty(0) if branch is None else empty_like(x)
    mean = x.new_empty(rows, dtype=torch.float32)
    return y, stream, mean, torch.empty_like(mean)


def backward_cuda(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, the same in the branch's dtype (empty where that is x's, or there is no branch), dweight,
    dbias (empty without a bias)."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dstream = None if dstream is None else dstream.contiguous()
    dx, dbranch, dweight, dbias = backward_outputs(x, weight, has_bias, branch_dtype)
    n_rows, C = mean.numel(), x.shape[-1]
    if n_rows == 0:
        return dx, dbranch, dweight.zero_(), dbias.zero_()
    second = dbranch if dbranch.numel() else None
    kind = kind_of(x, second, dy, weight, has_bias, (dstream, dx, second))
    kind = kind._replace(BRANCH=dstream is not None)
    plan = choose(kind, forward=False)
    # As many as run at once: each goes on to further rows, and leaves partial sums only once.
    blocks = min(-(-n_rows // plan.ROWS), plan.BLOCKS * multiprocessors(x.device.index))
    partial = x.new_empty(blocks, 2, C, dtype=torch.float32)
    rows = (dy, dstream, x, weight, mean, rstd, dx, second, partial, n_rows)
    columns = (dy, x, mean, rstd, partial, n_rows)
    sums = (partial, dweight, dbias, blocks)
    launches = [Launch("layer_norm_backward", (blocks, 1), plan.THREADS * plan.ROWS, rows)]
    if not plan.CACHED:
        launches += [Launch("layer_norm_columns", (-(-C // 256), blocks), 256, columns)]
    launches += [Launch("layer_norm_finalise", (-(-2 * C // 32), 1), 1024, sums)]
    queue(plan, x.device, *launches)
    return dx, dbranch, dweight, dbias


def backward_outputs(
    x: Tensor, weight: Tensor, has_bias: bool, branch_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What backward writes to, empty."""
    another = branch_dtype not in (None, x.dtype)
    dbranch = empty_like(x, branch_dtype) if another else x.new_empty(0, dtype=branch_dtype)
    dweight = empty_like(weight)
    dbias = empty_like(weight) if has_bias else weight.new_empty(0)
    return empty_like(x), dbranch, dweight, dbias


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous, whatever x is. Half the time of `new_empty`, and these calls wait for Python."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def kind_of(
    x: Tensor,
    branch: Tensor | None,
    y: Tensor,
    weight: Tensor,
    has_bias: bool,
    others: tuple[Tensor | None, ...],
) -> Kind:
    """The kind of a call on these tensors; `others` are pointers that must be aligned as well."""
    for name, tensor in (("x", x), ("branch", branch), ("y", y), ("weight", weight)):
        if tensor is not None and tensor.dtype not in TYPES:
            raise TypeError(
                f"layer_norm: {name} is {tensor.dtype}; expected float32, bfloat16 or float16"
            )
    bits = 16
    for tensor in (x, y, weight, *others):
        bits |= 0 if tensor is None else tensor.data_ptr()
    alignment = bits & -bits  # the lowest bit that any of them has
    B_T = x.dtype if branch is None else branch.dtype
    return Kind(
        x.shape[-1], x.dtype, B_T, y.dtype, weight.dtype, branch is not None, has_bias, alignment
    )


@cache
def architecture(device: int) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def queue(plan: Plan, device: torch.device, *launches: Launch) -> None:
    """Put kernels on torch's current stream of the device; nothing is waited for."""
    with torch.cuda.device(device):
        nvrtc.make_current(device.index)
        stream = torch.cuda.current_stream(device).cuda_stream
        for name, grid, threads, arguments in launches:
            values = as_numbers(arguments)
            kernel(plan, device.index, name).launch(grid, threads, stream, values)


def as_numbers(arguments: tuple[Any, ...]) -> list[int | float]:
    """Tensors as pointers, None as a null pointer."""
    return [a.data_ptr() if isinstance(a, Tensor) else a or 0 for a in arguments]


def refuse(x: Tensor, *_: Any) -> None:
    raise MissingInput(f"norm 'cuda_layer' needs device=cuda, not {x.device}; use norm=layer")


LIBRARY = torch.library.Library("gpt_norms", "DEF")
LIBRARY.define(
    "layer_norm(Tensor x, Tensor? branch, Tensor weight, Tensor? bias, float eps, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "layer_norm_backward(Tensor dy, Tensor? dstream, Tensor x, Tensor weight, Tensor mean,"
    " Tensor rstd, bool has_bias, ScalarType? branch_dtype) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.impl("layer_norm", forward_cuda, "CUDA")
LIBRARY.impl("layer_norm", refuse, "CPU")
LIBRARY.impl("layer_norm_backward", backward_cuda, "CUDA")
torch.library.register_fake(
    "gpt_norms::layer_norm",
    lambda x, branch, weight, bias, eps, dtype: forward_outputs(x, branch, dtype),
    lib=LIBRARY,
)
torch.library.register_fake(
    "gpt_norms::layer_norm_backward",
    lambda dy, dstream, x, weight, mean, rstd, has_bias, branch_dtype: backward_outputs(
        x, weight, has_bias, branch_dtype
    ),
    lib=LIBRARY,
)


class AddNorm(torch.autograd.Function):
    """The op with its gradient. A plain Function costs a third of `register_autograd` a call."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, dtype):  # type: ignore[no-untyped-def]
        y, stream, mean, rstd = torch.ops.gpt_norms.layer_norm.default(
            x, branch, weight, bias, eps, dtype
        )
        ctx.save_for_backward(x if branch is None else stream, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return y, stream, mean, rstd

    @staticmethod
    def backward(ctx, dy, dstream, *_):  # type: ignore[no-untyped-def]
        x, weight, mean, rstd = ctx.saved_tensors
        if ctx.branch_dtype is None:
            dstream = None
        if dy is None:
            dbranch = None if dstream is None else dstream.to(ctx.branch_dtype)
            return dstream, dbranch, None, None, None, None
        dx, dbranch, dweight, dbias = torch.ops.gpt_norms.layer_norm_backward.default(
            dy, dstream, x, weight, mean, rstd, ctx.bias_dtype is not None, ctx.branch_dtype
        )
        if ctx.branch_dtype is None:
            dbranch = None
        elif ctx.branch_dtype == x.dtype:
            dbranch = dx
        dbias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
        return dx, dbranch, dweight, dbias, None, None


def warmup(
    C: int, stream: torch.dtype, branch: torch.dtype, weight: torch.dtype, bias: bool = True
) -> None:
    """Compile and load the kernels for rows of C features on the current device, forward and
    backward, with and without a branch: before a CUDA graph is captured, or a clock is started."""
    x = torch.zeros(1, C, dtype=stream, device="cuda", requires_grad=True)
    gamma = torch.ones(C, dtype=weight, device="cuda", requires_grad=True)
    beta = torch.zeros(C, dtype=weight, device="cuda", requires_grad=True) if bias else None
    for dtype in {stream, branch}:
        y, *_ = AddNorm.apply(x, None, gamma, beta, 1e-5, dtype)
        y.sum().backward()
        added = torch.zeros_like(x, dtype=branch).requires_grad_()
        y, total, *_ = AddNorm.apply(x, added, gamma, beta, 1e-5, dtype)
        (y.sum() + total.sum()).backward()


def output_dtype(x: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on, so that the next product need not cast; else x's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """γ (x − μ)/√(σ² + ε) + β over the last axis, biased σ²."""
    return add_layer_norm(x, None, weight, bias, eps)[0]


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the LayerNorm of x + branch; x + branch; and each row's mean and 1/√(σ² + ε), fp32.

    All in one pass over memory, in two from 8,193 features on. Without a branch the second is
    empty: it would be x. y has `dtype`, or else that of autocast, see `output_dtype`.
    """
    return AddNorm.apply(x, branch, weight, bias, eps, dtype or output_dtype(x))
