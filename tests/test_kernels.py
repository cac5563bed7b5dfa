"""The CUDA LayerNorm without a GPU: it compiles for every architecture within its registers, its
arithmetic is right to the last thread, and torch's side of it holds under autograd and compile."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.errors import MissingInput
from gpt.kernels import layer_norm as kernels
from gpt.kernels import nvrtc
from gpt.kernels.layer_norm import SOURCE, Kind, Plan, add_norm, layer_norm
from tests.conftest import REPO, run_program

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# x, branch, y, weights: fp32; all bf16; all fp16; GPT-2 under autocast; mixed at will
DTYPES = [
    (F32, F32, F32, F32),
    (BF16, BF16, BF16, BF16),
    (FP16, FP16, FP16, FP16),
    (F32, BF16, BF16, F32),
    (BF16, FP16, F32, BF16),
]
SIZES = [1, 7, 768, 769, 1024, 1280, 1600, 4096, 8192, 50_000]
ARCHITECTURES = ["sm_75", "sm_80", "sm_90", "sm_100"]


def plans(C: int, dtypes: tuple[torch.dtype, ...], branch: bool, bias: bool) -> tuple[Plan, Plan]:
    kind = Kind(C, *dtypes, BRANCH=branch, BIAS=bias)
    return kind.forward(), kind.backward()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("C", SIZES)
def test_every_kernel_compiles_without_spills_and_within_its_registers(C: int, arch: str) -> None:
    """65,536 registers are a multiprocessor's: two blocks at least must fit, or one of 512."""
    pytest.importorskip("cuda.bindings")
    combinations = DTYPES if arch == "sm_90" else DTYPES[:1] + DTYPES[3:4]
    for dtypes in combinations:
        for direction, plan in zip(
            ("forward", "backward"), plans(C, dtypes, True, True), strict=True
        ):
            options = (*plan.options(), "--ptxas-options=-v")
            cubin, log = nvrtc.compile_source(SOURCE, options, arch)
            assert cubin.startswith(b"\x7fELF")
            assert set(re.findall(r"(\d+) bytes (?:stack frame|spill)", log)) == {"0"}, log
            entry = log[log.index(f"'layer_norm_{direction}'") :]
            registers = int(re.search(r"Used (\d+) registers", entry)[1])  # type: ignore[index]
            assert registers * plan.THREADS * plan.ROWS <= 65_536, f"{plan}: {registers}"
            assert registers <= 255


def test_what_does_not_compile_says_where() -> None:
    pytest.importorskip("cuda.bindings")
    with pytest.raises(RuntimeError, match=r"kernel.cu\(1\): error"):
        nvrtc.compile_source("nonsense", (), "sm_90")


def test_a_compiled_kernel_is_kept_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = plans(8, DTYPES[0], False, True)[0].options()
    cubin = nvrtc.cached_cubin(SOURCE, options, "sm_90")
    monkeypatch.setattr(nvrtc, "compile_source", None)  # not needed again
    assert nvrtc.cached_cubin(SOURCE, options, "sm_90") == cubin
    assert len(list((tmp_path / "gpt-norms").iterdir())) == 1


def test_missing_bindings_are_one_line_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    nvrtc.bindings.cache_clear()
    with pytest.raises(MissingInput, match="pip install cuda-bindings nvidia-cuda-nvrtc"):
        nvrtc.bindings()
    nvrtc.bindings.cache_clear()


# --- the arithmetic, on the host ----------------------------------------------------------------


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the host emulation with")
    return tmp_path_factory.mktemp("builds")


def host(plan: Plan, builds: Path) -> ctypes.CDLL:
    """layer_norm.cu for `plan`, compiled as host C++ with fibers for threads."""
    library = builds / (hashlib.sha256(repr(plan).encode()).hexdigest()[:16] + ".so")
    if not library.exists():
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", *plan.options()]
        command += [f"-I{REPO / 'gpt' / 'kernels'}", str(REPO / "tests" / "cuda_on_host.cpp")]
        subprocess.run([*command, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def unwritten(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def host_forward(
    builds: Path, x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None,
    dtype: torch.dtype, eps: float = 1e-5, alignment: int = 16,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (N, C), B_T = x.shape, x.dtype if branch is None else branch.dtype
    plan = Kind(
        C, x.dtype, B_T, dtype, weight.dtype, branch is not None, bias is not None, alignment
    ).forward()
    y, mean, rstd = unwritten(N, C, dtype=dtype), unwritten(N), unwritten(N)
    stream = x if branch is None else unwritten(N, C, dtype=x.dtype)
    host(plan, builds).forward(
        -(-N // plan.ROWS), *map(pointer, (x, branch, weight, bias, y, stream, mean, rstd)),
        ctypes.c_longlong(N), ctypes.c_float(eps),
    )  # fmt: skip
    return y, stream, mean, rstd


def host_backward(
    builds: Path, dy: Tensor, dstream: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor,
    rstd: Tensor, blocks: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    N, C = x.shape
    plan = Kind(
        C, x.dtype, x.dtype, dy.dtype, weight.dtype, dstream is not None, BIAS=True
    ).backward()
    library, n_rows = host(plan, builds), ctypes.c_longlong(N)
    dx, partial = unwritten(N, C, dtype=x.dtype), unwritten(blocks, 2, C)
    dweight, dbias = unwritten(C, dtype=weight.dtype), unwritten(C, dtype=weight.dtype)
    library.backward(
        blocks, *map(pointer, (dy, dstream, x, weight, mean, rstd, dx, partial)), n_rows
    )
    if not plan.CACHED:
        library.columns(blocks, *map(pointer, (dy, x, mean, rstd, partial)), n_rows)
    library.finalise(pointer(partial), pointer(dweight), pointer(dbias), blocks)
    return dx, dweight, dbias


def ulps(value: Tensor, exact: Tensor) -> float:
    """The largest distance of `value` from the float64 `exact` in units of its dtype's spacing."""
    spacing = torch.finfo(value.dtype).eps * 2.0 ** exact.abs().clamp_min(1e-3).log2().floor()
    return ((value.double() - exact).abs() / spacing).max().item()


def close(value: Tensor, exact: Tensor) -> bool:
    """fp32 within 2e-6·max(1, |y|), the others within 1 ulp of the exact result."""
    if value.dtype == F32:
        return bool(((value.double() - exact).abs() <= 2e-6 * exact.abs().clamp_min(1)).all())
    return ulps(value, exact) <= 1


@pytest.mark.parametrize(
    ("dtypes", "branch"), [*((d, True) for d in DTYPES), (DTYPES[0], False), (DTYPES[1], False)]
)
@pytest.mark.parametrize("shape", [(37, 1), (5, 7), (9, 33), (5, 768), (3, 769), (2, 1600)])
def test_the_arithmetic_equals_float64(
    builds: Path, shape: tuple[int, int], branch: bool, dtypes: tuple[torch.dtype, ...]
) -> None:
    torch.manual_seed(0)
    C = shape[1]
    X, B, Y, W = dtypes
    x, added = (torch.randn(shape) * 2 + 3).to(X), torch.randn(shape).to(B) if branch else None
    weight, bias = torch.randn(C).to(W), torch.randn(C).to(W)
    y, stream, mean, rstd = host_forward(builds, x, added, weight, bias, Y)
    if added is not None:
        assert torch.equal(stream, (x.float() + added.float()).to(X))
    exact = [t.double().requires_grad_() for t in (stream, weight, bias)]
    reference = F.layer_norm(exact[0], (C,), exact[1], exact[2], 1e-5)
    assert close(y, reference.detach())

    dy, dstream = torch.randn(shape).to(Y), torch.randn(shape).to(X) if branch else None
    reference.backward(dy.double())
    dx, dweight, dbias = host_backward(builds, dy, dstream, stream, weight, mean, rstd)
    wanted = exact[0].grad if dstream is None else exact[0].grad + dstream.double()
    for value, exactly in ((dx, wanted), (dweight, exact[1].grad), (dbias, exact[2].grad)):
        scale = max(1.0, exactly.abs().max().item())
        assert (value.double() - exactly).abs().max() <= torch.finfo(value.dtype).eps * 8 * scale


@pytest.mark.parametrize("C", [8192, 40_000])
def test_rows_past_a_warp_and_past_the_registers_are_right(builds: Path, C: int) -> None:
    test_the_arithmetic_equals_float64(builds, (2, C), branch=True, dtypes=DTYPES[3])


@pytest.mark.parametrize("C", [33, 768])
def test_data_far_from_zero_lose_nothing(builds: Path, C: int) -> None:
    x = torch.randn(4, C, generator=torch.Generator().manual_seed(0)) + 1000
    y, _, _, rstd = host_forward(builds, x, None, torch.ones(C), None, F32)
    variance = x.double().var(-1, unbiased=False)
    torch.testing.assert_close(rstd.double(), (variance + 1e-5).rsqrt(), rtol=1e-6, atol=0)
    assert close(y, F.layer_norm(x.double(), (C,), None, None, 1e-5))


def test_no_bias_and_unaligned_rows_are_right(builds: Path) -> None:
    storage = torch.randn(5 * 768 + 1)
    x = storage[1:].view(5, 768)  # 4 bytes off
    y, *_ = host_forward(builds, x, None, torch.ones(768), None, F32, alignment=4)
    assert close(y, F.layer_norm(x.double(), (768,), None, None, 1e-5))


def test_the_gradient_sums_have_one_order_whatever_the_number_of_blocks_is(builds: Path) -> None:
    """Bitwise the same from run to run; and every row counted once with any number of blocks."""
    torch.manual_seed(0)
    x, dy, weight = torch.randn(11, 33), torch.randn(11, 33), torch.randn(33)
    _, _, mean, rstd = host_forward(builds, x, None, weight, None, F32)
    first = host_backward(builds, dy, None, x, weight, mean, rstd, blocks=4)
    again = host_backward(builds, dy, None, x, weight, mean, rstd, blocks=4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for blocks in (1, 11, 40):
        other = host_backward(builds, dy, None, x, weight, mean, rstd, blocks=blocks)
        torch.testing.assert_close(other, first, rtol=1e-5, atol=1e-5)


def test_an_error_in_the_kernel_is_seen(builds: Path, tmp_path: Path) -> None:
    """Planted: unbiased variance, a missing barrier's effect, a lane that is left out."""
    torch.manual_seed(0)
    x = torch.randn(3, 768)
    mutants = {
        "square / C -": "square / (C - 1) -",
        "step > 0; step /= 2": "step > 1; step /= 2",
        "w < WARPS; w++": "w < WARPS - 1; w++",
    }
    for old, new in mutants.items():
        assert old in SOURCE
        folder = tmp_path / hashlib.sha256(old.encode()).hexdigest()[:8]
        folder.mkdir()
        (folder / "layer_norm.cu").write_text(SOURCE.replace(old, new))
        wide = Plan(768, 4, 192, 1, True, F32, F32, F32, F32, False, True, FORWARD=True)
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", *wide.options()]
        command += [f"-I{folder}", str(REPO / "tests" / "cuda_on_host.cpp")]
        subprocess.run([*command, "-o", str(folder / "mutant.so")], check=True)
        y, mean, rstd = unwritten(3, 768), unwritten(3), unwritten(3)
        ctypes.CDLL(str(folder / "mutant.so")).forward(
            3, *map(pointer, (x, None, torch.ones(768), torch.zeros(768), y, x, mean, rstd)),
            ctypes.c_longlong(3), ctypes.c_float(1e-5),
        )  # fmt: skip
        assert not close(y, F.layer_norm(x.double(), (768,), None, None, 1e-5)), new


# --- torch's side -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cpu_reference() -> Iterator[None]:
    """The op on the CPU, by formula, so that everything around the kernels runs without a GPU."""

    def forward(x, branch, weight, bias, eps, dtype):  # type: ignore[no-untyped-def]
        y, stream, mean, rstd = kernels.forward_fake(x, branch, weight, bias, eps, dtype)
        added = x if branch is None else (x.float() + branch.float()).to(x.dtype)
        if branch is not None:
            stream.copy_(added)
        rows = added.float().flatten(0, -2) if x.dim() > 1 else added.float()[None]
        variance, mu = torch.var_mean(rows, -1, unbiased=False)
        mean.copy_(mu), rstd.copy_((variance + eps).rsqrt())
        y.copy_(F.layer_norm(added.float(), x.shape[-1:], weight.float(), None, eps))
        if bias is not None:
            y.copy_(y.float() + bias.float())
        return y, stream, mean, rstd

    def backward(dy, dstream, x, weight, mean, rstd, has_bias):  # type: ignore[no-untyped-def]
        dx, dweight, dbias = kernels.backward_fake(dy, dstream, x, weight, mean, rstd, has_bias)
        x_hat = (x.float() - mean.view(*x.shape[:-1], 1)) * rstd.view(*x.shape[:-1], 1)
        g = dy.float() * weight.float()
        value = g - g.mean(-1, keepdim=True) - x_hat * (g * x_hat).mean(-1, keepdim=True)
        value = value * rstd.view(*x.shape[:-1], 1)
        dx.copy_(value if dstream is None else value + dstream.float())
        dweight.copy_((dy.float() * x_hat).flatten(0, -2).sum(0))
        if has_bias:
            dbias.copy_(dy.float().flatten(0, -2).sum(0))
        return dx, dweight, dbias

    library = torch.library.Library("gpt_norms", "IMPL")
    library.impl("layer_norm", forward, "CPU")
    library.impl("layer_norm_backward", backward, "CPU")
    yield
    library._destroy()


def test_torch_accepts_the_ops(cpu_reference: None) -> None:
    x, branch, weight, bias = (
        torch.randn(2, 3, 8),
        torch.randn(2, 3, 8),
        torch.ones(8),
        torch.ones(8),
    )
    ops = torch.ops.gpt_norms
    for added in (None, branch):
        torch.library.opcheck(ops.layer_norm.default, (x, added, weight, bias, 1e-5, BF16))
    mean, rstd = torch.zeros(6), torch.ones(6)
    for dstream in (None, branch):
        arguments = (x, dstream, x, weight, mean, rstd, True)
        torch.library.opcheck(ops.layer_norm_backward.default, arguments)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_reach_both_summands_and_the_weights(cpu_reference: None, bias: bool) -> None:
    torch.manual_seed(0)
    x, branch = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    beta = torch.randn(8, requires_grad=True) if bias else None
    inputs = [t for t in (x, branch, weight, beta) if t is not None]
    dy, dstream = torch.randn(2, 2, 3, 8)

    y, stream = add_norm(x, branch, weight, beta, 1e-5)
    ours = torch.autograd.grad([y, stream], inputs, [dy, dstream])
    total = x + branch
    theirs = torch.autograd.grad(
        [F.layer_norm(total, (8,), weight, beta, 1e-5), total], inputs, [dy, dstream]
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    only_stream = torch.autograd.grad(add_norm(x, branch, weight, beta, 1e-5)[1], x, dstream)
    torch.testing.assert_close(only_stream[0], dstream)


def test_autocast_decides_the_output_s_dtype(cpu_reference: None) -> None:
    x, weight = torch.randn(2, 8, requires_grad=True), torch.ones(8)
    with torch.autocast("cpu", BF16):
        y = layer_norm(x, weight, None, 1e-5)
    assert y.dtype == BF16
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == F32
    assert layer_norm(x, weight, None, 1e-5).dtype == F32


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's own, of autograd.Function
def test_compiles_whole_with_dynamic_shapes(cpu_reference: None) -> None:
    weight, bias = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)

    def block(x: Tensor, branch: Tensor) -> Tensor:
        y, stream = add_norm(x, branch, weight, bias, 1e-5)
        return (y * stream).sum()

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 5, 9):
        x, branch = torch.randn(rows, 8), torch.randn(rows, 8)
        torch.testing.assert_close(compiled(x, branch), block(x, branch))


@pytest.mark.parametrize("C", [1, 7, 33, 768, 1023, 8192, 8193, 50_000])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t)[6:] for t in d))
def test_plans_are_valid(C: int, dtypes: tuple[torch.dtype, ...]) -> None:
    for alignment in (16, 8, 4, 2):
        if alignment < max(d.itemsize for d in dtypes):
            continue
        kind = Kind(C, *dtypes, BRANCH=True, BIAS=True, alignment=alignment)
        for plan in (kind.forward(), kind.backward()):
            assert C % plan.VEC == 0
            assert plan.VEC * max(d.itemsize for d in dtypes) <= alignment
            assert plan.THREADS % 32 == 0
            assert plan.ROWS == 1 or plan.THREADS == 32
            assert plan.THREADS * plan.ROWS <= 1024
            if plan.CACHED:
                assert -(-C // (plan.THREADS * plan.VEC)) * plan.VEC <= 56


def test_choosing_the_norm_without_a_device_is_the_design_s_error() -> None:
    from gpt.norms.registry import build_norm

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(MissingInput, match="needs a CUDA device; use norm=layer"):
        build_norm("cuda_layer", 8)


def test_the_norm_trains_like_layer_where_the_op_is_there(
    cpu_reference: None, monkeypatch: pytest.MonkeyPatch, corpus: Path, tmp_path: Path
) -> None:
    from gpt.trainer import train
    from tests.conftest import make_config, read_rows

    losses = []
    for norm in ("layer", "cuda_layer"):
        cfg = make_config("data=text", f"data.path={corpus}", f"norm={norm}",
                          f"run_dir={tmp_path}/{norm}")  # fmt: skip
        with monkeypatch.context() as patch:
            if norm == "cuda_layer":
                patch.setattr("gpt.norms.cuda_layer.torch.cuda.is_available", lambda: True)
            patch.setattr("gpt.device.resolve_device", lambda name: torch.device("cpu"))
            patch.setattr("gpt.trainer.resolve_device", lambda name: torch.device("cpu"))
            train(cfg)
        losses.append([row["loss"] for row in read_rows(tmp_path / norm) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_unknown_dtypes_are_refused() -> None:
    x = torch.randn(2, 8, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"x is torch.float64; expected float32, bfloat16 or"):
        kernels.kind_of(x, None, x, torch.ones(8), True, ())


# --- the benchmark ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench", REPO / "scripts" / "bench_norms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("precision", "bytes_an_element"),
    [("bf16", [4, 8, 6, 8]), ("fp32", [8, 16, 12, 16]), ("autocast", [6, 12, 10, 14])],
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


def test_without_a_gpu_the_benchmark_says_so_in_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    result = run_program(script="bench_norms")
    assert result.returncode == 66
    assert result.stderr == "error: bench_norms needs a CUDA device\n"
