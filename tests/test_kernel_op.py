"""torch's side of the CUDA LayerNorm: gradients, autocast, compile, with kernels on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.common.errors import MissingInput
from gpt.common.files import flatten
from gpt.kernels import layer_norm as kernels
from gpt.kernels import nvrtc
from gpt.kernels.layer_norm import add_layer_norm, layer_norm
from gpt.norms.cuda_layer import CudaLayerNorm
from gpt.placement import build_model
from gpt.probes import stats
from gpt.training.trainer import train
from tests.tools.configs import make_config, read_rows
from tests.tools.kernels import BF16, F32


def test_torch_accepts_the_ops(kernels_on_host: None) -> None:
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
    for dstream, branch_dtype in ((None, None), (branch, F32), (branch, BF16)):
        arguments = (x, dstream, x, weight, mean, rstd, True, branch_dtype)
        torch.library.opcheck(ops.layer_norm_backward.default, arguments)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_reach_both_summands_and_the_weights(kernels_on_host: None, bias: bool) -> None:
    torch.manual_seed(0)
    x, branch = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    beta = torch.randn(8, requires_grad=True) if bias else None
    inputs = [t for t in (x, branch, weight, beta) if t is not None]
    dy, dstream = torch.randn(2, 2, 3, 8)

    y, stream, *_ = add_layer_norm(x, branch, weight, beta, 1e-5)
    ours = torch.autograd.grad([y, stream], inputs, [dy, dstream])
    total = x + branch
    theirs = torch.autograd.grad(
        [F.layer_norm(total, (8,), weight, beta, 1e-5), total], inputs, [dy, dstream]
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    only_stream = add_layer_norm(x, branch, weight, beta, 1e-5)[1]
    for gradient in torch.autograd.grad(only_stream, [x, branch], dstream):
        torch.testing.assert_close(gradient, dstream)


def test_no_rows_give_no_output_and_zero_gradients(kernels_on_host: None) -> None:
    x, weight = torch.randn(0, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    y = layer_norm(x, weight, bias, 1e-5)
    assert y.shape == (0, 8)
    for gradient in torch.autograd.grad(y.sum(), [weight, bias]):
        assert torch.equal(gradient, torch.zeros(8))


def test_autocast_decides_the_output_s_dtype(kernels_on_host: None) -> None:
    x, weight = torch.randn(2, 8, requires_grad=True), torch.ones(8)
    with torch.autocast("cpu", BF16):
        y = layer_norm(x, weight, None, 1e-5)
    assert y.dtype == BF16
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == F32
    assert layer_norm(x, weight, None, 1e-5).dtype == F32


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's, about autograd.Function
def test_compiles_whole_with_dynamic_shapes(kernels_on_host: None) -> None:
    weight, bias = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)

    def block(x: Tensor, branch: Tensor) -> Tensor:
        y, stream, *_ = add_layer_norm(x, branch, weight, bias, 1e-5)
        return (y * stream).sum()

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 5, 9):
        x, branch = torch.randn(rows, 8), torch.randn(rows, 8)
        torch.testing.assert_close(compiled(x, branch), block(x, branch))


@pytest.fixture
def cuda_layer_on_the_cpu(kernels_on_host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """norm=cuda_layer can be built, and its kernels run on the host."""
    cuda = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True))
    fake = SimpleNamespace(ones=torch.ones, zeros=torch.zeros, **vars(cuda))
    monkeypatch.setattr("gpt.norms.cuda_layer.torch", fake)


@pytest.mark.parametrize("placement", ["pre", "post", "peri", "deepnorm", "parallel", "hybrid"])
def test_a_model_with_fused_residuals_equals_the_plain_one(
    cuda_layer_on_the_cpu: None, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, gradients and statistics are equal, and the norms compute the residual sums."""
    results = []
    fused = 0

    def counted(x, branch, *rest):  # type: ignore[no-untyped-def]
        nonlocal fused
        fused += branch is not None
        return add_layer_norm(x, branch, *rest)

    reused = []

    def watched(x, rows=None, moments=stats.moments):  # type: ignore[no-untyped-def]
        reused.append(rows is not None)
        return moments(x, rows)

    monkeypatch.setattr("gpt.norms.cuda_layer.add_layer_norm", counted)
    monkeypatch.setattr(stats, "moments", watched)
    idx = torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(0))
    for norm in ("layer", "cuda_layer"):
        model = build_model(make_config("data=pydoc", f"norm={norm}", f"placement={placement}"), 61)
        record: stats.Record = {}
        with stats.collect(model, record):
            loss = model(idx, idx)[1]
            loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        numbers = flatten(stats.to_numbers(record), "/")
        results.append((loss, gradients, {k: v for k, v in numbers.items() if "hist" not in k}))
    sites = [norm for norm in model.modules() if isinstance(norm, CudaLayerNorm)]
    assert sum(reused) == len(sites)  # the kernel's means and deviations, once per site
    assert all(norm.rows is None and not norm.keep_rows for norm in sites)
    (loss, gradients, numbers), (loss2, gradients2, numbers2) = results
    torch.testing.assert_close(loss, loss2)
    torch.testing.assert_close(gradients, gradients2, rtol=1e-4, atol=1e-6)
    assert numbers == pytest.approx(numbers2, rel=1e-3, abs=1e-6)
    # Two sums a block, one with `parallel`; the first norm of the model has nothing to add.
    assert fused == {"parallel": 2, "hybrid": 3}.get(placement, 4)


@pytest.mark.parametrize("placement", ["pre", "post", "peri"])
def test_under_autocast_the_residual_stream_is_float32_as_with_layer(
    cuda_layer_on_the_cpu: None, placement: str
) -> None:
    """Even if the stream is a norm's output; only inputs of products are bfloat16."""
    idx = torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(0))
    streams: dict[str, list[torch.dtype]] = {}
    for norm in ("layer", "cuda_layer"):
        where = [f"norm={norm}", f"placement={placement}", "placement.embd_norm=true"]
        model = build_model(make_config("data=pydoc", *where), 61)
        for block in model.h:
            block.register_forward_hook(
                lambda _, inputs, output, norm=norm: streams.setdefault(norm, []).extend(
                    [inputs[0].dtype, output[0].dtype]
                )
            )
        with torch.autocast("cpu", BF16):
            model(idx)
    assert streams["cuda_layer"] == streams["layer"] == [F32] * 4


def test_tensors_elsewhere_are_refused_in_one_line() -> None:
    """For example with device=cpu on a machine that has a CUDA device."""
    with pytest.raises(MissingInput, match="'cuda_layer' needs device=cuda, not cpu"):
        layer_norm(torch.ones(2, 8), torch.ones(8), None, 1e-5)


def test_the_norm_trains_like_layer_where_the_op_is_there(
    cuda_layer_on_the_cpu: None, corpus: Path, tmp_path: Path
) -> None:
    losses = []
    for norm in ("layer", "cuda_layer"):
        overrides = [
            "data=text",
            f"data.path={corpus}",
            f"norm={norm}",
            f"run_dir={tmp_path}/{norm}",
            "train.steps=3",
            "train.eval_tokens=32",
            "model.block_size=16",
        ]
        train(make_config(*overrides))
        losses.append([row["loss"] for row in read_rows(tmp_path / norm) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_unknown_dtypes_are_refused() -> None:
    x = torch.randn(2, 8, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"x is torch.float64; expected float32, bfloat16 or"):
        kernels.kind_of(x, None, x, torch.ones(8), True, ())


def test_what_a_call_does_not_have_does_not_narrow_its_accesses() -> None:
    x = torch.ones(2, 8)
    assert kernels.kind_of(x, None, x, torch.ones(8), False, (None, None)).vec() == 4


def test_kernels_are_queued_on_their_device_and_torch_s_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensors are passed as pointers, None as a null pointer."""
    done: list[Any] = []

    @contextmanager
    def device(device: torch.device) -> Iterator[None]:
        done.append(device)
        yield
        done.append("back")

    monkeypatch.setattr(torch.cuda, "device", device)
    streams = {torch.device("cuda", 99): SimpleNamespace(cuda_stream=0x55)}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.get)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device - 99))
    monkeypatch.setattr(nvrtc, "make_current", done.append)
    monkeypatch.setattr(nvrtc, "module", lambda *a: a)
    monkeypatch.setattr(
        nvrtc, "Kernel", lambda *a: SimpleNamespace(launch=lambda *b: done.append((*a, *b)))
    )
    plan = kernels.Kind(24, F32, F32, F32, F32, False, True).forward()
    x, name = torch.ones(2, 24), "layer_norm_forward"
    launch = kernels.Launch(name, (3, 1), 128, (None, x, 7, 0.5))
    kernels.queue(plan, torch.device("cuda", 99), launch, launch)
    module = (kernels.SOURCE, plan.options(), "sm_90", 99)
    launched = (module, name, "9q f4x", (3, 1), 128, 0x55, [0, x.data_ptr(), 7, 0.5])
    assert done == [torch.device("cuda", 99), 99, launched, launched, "back"]
