"""The CUDA LayerNorm on a device: accuracy against float64, repeatability, graphs, compile."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("no CUDA device on this machine", allow_module_level=True)

from gpt.kernels import layer_norm as kernels
from gpt.kernels.layer_norm import add_layer_norm, layer_norm, warmup
from gpt.placement import build_model
from tests.tools.configs import make_config
from tests.tools.kernels import BF16, DTYPES, F32, close

# A hint from torch about the device must not fail a test.
pytestmark = pytest.mark.filterwarnings("default")
POWERS = [2**k + d for k in range(3, 14) for d in (-1, 0, 1)]
WIDTHS = [1, 760, 769, 1128, 1280, 1600, 50_000, *POWERS]


def randn(*shape: int, dtype: torch.dtype = F32, requires_grad: bool = False) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_(requires_grad)


def distances(C: int, N: int, dtypes: tuple[torch.dtype, ...], branch: bool, offset: float = 0.0):  # type: ignore[no-untyped-def]
    """Check y, and that the gradients' error is at most twice the native kernel's."""
    torch.manual_seed(0)
    X, B, Y, W = dtypes
    x = (randn(N, C) + offset).to(X).requires_grad_()
    added = randn(N, C, dtype=B, requires_grad=True) if branch else None
    weight, bias = randn(C, dtype=W, requires_grad=True), randn(C, dtype=W, requires_grad=True)
    with torch.autocast("cuda", Y, enabled=Y != X):
        if added is None:
            y, stream = layer_norm(x, weight, bias, 1e-5), x
        else:
            y, stream, *_ = add_layer_norm(x, added, weight, bias, 1e-5)
    exact = [t.detach().double().requires_grad_() for t in (stream, weight, bias)]
    reference = F.layer_norm(exact[0], (C,), exact[1], exact[2], 1e-5)
    assert close(y.detach(), reference.detach()), (C, N, dtypes)

    dy, dstream = randn(N, C, dtype=Y), randn(N, C, dtype=X)
    native = [t.detach().clone().requires_grad_() for t in (stream, weight, bias)]
    widened = [t.float() for t in native]
    theirs = F.layer_norm(widened[0], (C,), widened[1], widened[2], 1e-5)
    for outputs, gradients in (
        ([y, stream], [dy, dstream]),
        ([theirs, widened[0]], [dy.float(), dstream.float()]),
        ([reference, exact[0]], [dy.double(), dstream.double()]),
    ):
        torch.autograd.backward(outputs[: 1 + branch], gradients[: 1 + branch])
    compared = [*zip((x, weight, bias), native, exact, (1, N, N), strict=True)]
    if added is not None:
        compared.append((added, native[0], exact[0], 1))
    for ours, native_, exactly, summed in compared:
        error = (ours.grad.double() - exactly.grad).abs().max().item()
        allowed = (native_.grad.to(ours.dtype).double() - exactly.grad).abs().max().item()
        # With few rows the largest error of either kernel is a matter of chance: allow a few units
        # in the last place, also of intermediate sums.
        largest = max(summed**0.5, exactly.grad.abs().max().item())
        floor = 4 * torch.finfo(ours.dtype).eps * largest
        assert error <= 2 * allowed + floor, (C, N, dtypes)


@pytest.mark.parametrize("C", WIDTHS)
def test_every_width_is_right_in_every_dtype(C: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: 1)  # each block takes many rows
    for dtypes in DTYPES[:-1]:
        for branch in (False, True):
            distances(C, 37, dtypes, branch)


@pytest.mark.parametrize("N", [1, 37, 199, 4096])
def test_every_number_of_rows_is_right(N: int) -> None:
    distances(768, N, DTYPES[3], True)


def test_data_far_from_zero_lose_nothing() -> None:
    distances(768, 37, DTYPES[0], False, offset=1000.0)


def test_a_thread_whose_first_kernel_it_is_can_launch_it() -> None:
    """A backward pass can begin with it, in a thread to which torch has bound no context."""
    x, weight = randn(8, 768), randn(768)
    expected = layer_norm(x, weight, None, 1e-5)
    with ThreadPoolExecutor(1) as thread:
        y = thread.submit(layer_norm, x, weight, None, 1e-5).result()
    assert torch.equal(y, expected)


def test_no_rows_give_no_output_and_zero_gradients() -> None:
    x, weight = randn(0, 768, requires_grad=True), randn(768, requires_grad=True)
    layer_norm(x, weight, None, 1e-5).sum().backward()
    assert weight.grad is not None
    assert weight.grad.count_nonzero() == 0


def test_strided_and_misaligned_rows_are_right() -> None:
    weight = randn(768)
    for x in (randn(8, 800)[:, :768], randn(768, 8).t(), randn(8 * 768 + 1)[1:].view(8, 768)):
        expected = F.layer_norm(x.double(), (768,), weight.double(), None, 1e-5)
        assert close(layer_norm(x, weight, None, 1e-5), expected)


def test_runs_agree_to_the_bit() -> None:
    x, weight, bias = randn(5000, 768), randn(768), randn(768)
    results = []
    for _ in range(3):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        layer_norm(*leaves, 1e-5).square().sum().backward()
        results.append([t.grad for t in leaves])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_more_than_two_billion_elements_are_addressed() -> None:
    N, C = 2_100_000, 1024
    x = torch.empty(N, C, dtype=BF16, device="cuda")
    x[-3:] = randn(3, C, dtype=BF16)
    weight = torch.ones(C, dtype=BF16, device="cuda")
    y = layer_norm(x, weight, None, 1e-5)
    assert close(y[-3:], F.layer_norm(x[-3:].double(), (C,), None, None, 1e-5))


def test_a_cuda_graph_replays_it() -> None:
    warmup(768, F32, F32, F32)
    x, branch, weight, bias = randn(64, 768), randn(64, 768), randn(768), randn(768)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, stream, *_ = add_layer_norm(x, branch, weight, bias, 1e-5)
    x.normal_()
    graph.replay()
    torch.testing.assert_close(stream, x + branch)
    expected = F.layer_norm(stream.double(), (768,), weight.double(), bias.double(), 1e-5)
    assert close(y, expected)


def test_a_model_compiles_whole_and_equals_the_native_one() -> None:
    ours = build_model(make_config("data=pydoc", "norm=cuda_layer"), 64).cuda()
    theirs = build_model(make_config("data=pydoc", "norm=layer"), 64).cuda()
    x = torch.randint(64, (4, 16), device="cuda")
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True)
    loss, native = compiled(x, x)[1], theirs(x, x)[1]
    torch.testing.assert_close(loss, native, rtol=1e-5, atol=1e-5)
    loss.backward(), native.backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_nothing_waits_for_the_device() -> None:
    x, weight, bias = randn(64, 768, requires_grad=True), randn(768), randn(768)
    layer_norm(x, weight, bias, 1e-5).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer_norm(x, weight, bias, 1e-5).backward(torch.ones_like(x))
    finally:
        torch.cuda.set_sync_debug_mode("default")
