"""The CUDA LayerNorm without a GPU: ptx.py runs the compiled kernels instruction by instruction,
and the tests check the results and what each thread does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.kernels import layer_norm
from gpt.kernels.layer_norm import SOURCE, Launch, Plan, backward_cuda, forward_cuda
from tests.tools import ptx
from tests.tools.configs import mostly_long
from tests.tools.kernels import BF16, DTYPES, F32, FP16, close

SHAPES = [(70, 1), (1, 7), (70, 33), (23, 768), (17, 769), (9, 1600)]
KINDS = [*((d, True) for d in DTYPES), (DTYPES[0], False), (DTYPES[1], False)]


def check_arithmetic(shape: tuple[int, int], branch: bool, dtypes: tuple[torch.dtype, ...]) -> None:
    """Compare forward and backward with float64."""
    torch.manual_seed(0)
    C = shape[1]
    X, B, Y, W = dtypes
    x, added = (torch.randn(shape) * 2 + 3).to(X), torch.randn(shape).to(B) if branch else None
    weight, bias = torch.randn(C).to(W), torch.randn(C).to(W)
    y, stream, mean, rstd = forward_cuda(x, added, weight, bias, 1e-5, Y)
    if added is None:
        stream = x
    else:
        assert torch.equal(stream, (x.float() + added.float()).to(X))
    exact = [t.double().requires_grad_() for t in (stream, weight, bias)]
    reference = F.layer_norm(exact[0], (C,), exact[1], exact[2], 1e-5)
    assert close(y, reference.detach())

    dy, dstream = torch.randn(shape).to(Y), torch.randn(shape).to(X) if branch else None
    reference.backward(dy.double())
    dx, dbranch, dweight, dbias = backward_cuda(
        dy, dstream, stream, weight, mean, rstd, True, B if branch else None
    )
    if branch and B != X:  # the branch's gradient is the stream's, rounded once
        assert dbranch.dtype == B
        assert torch.equal(dbranch, dx.to(B)) or X != F32
    else:
        assert dbranch.numel() == 0
    wanted = exact[0].grad if dstream is None else exact[0].grad + dstream.double()
    for value, exactly in ((dx, wanted), (dweight, exact[1].grad), (dbias, exact[2].grad)):
        scale = max(1.0, exactly.abs().max().item())
        assert (value.double() - exactly).abs().max() <= torch.finfo(value.dtype).eps * 8 * scale


@pytest.mark.parametrize(
    ("shape", "dtypes", "branch"),
    mostly_long(
        [(shape, *kind) for shape, kind in product(SHAPES, KINDS)],
        *((shape, *KINDS[i]) for i, shape in enumerate(SHAPES)),
        *((SHAPES[2], *kind) for kind in KINDS),
    ),
)
def test_the_arithmetic_equals_float64(
    kernels_on_host: None, shape: tuple[int, int], branch: bool, dtypes: tuple[torch.dtype, ...]
) -> None:
    check_arithmetic(shape, branch, dtypes)


def test_architectures_without_instructions_for_bf16_compute_the_same(
    kernels_on_host: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_norm, "queue", partial(ptx.queue, arch="compute_75"))
    check_arithmetic((23, 768), True, DTYPES[1])


@pytest.mark.parametrize(
    ("C", "branch"),
    mostly_long(product((8192, 40_000), (True, False)), (8192, True)),
)
def test_rows_past_a_warp_and_past_the_registers_are_right(
    kernels_on_host: None, C: int, branch: bool
) -> None:
    check_arithmetic((5, C), branch, dtypes=DTYPES[3])


@pytest.mark.parametrize("offset", [1e3, 1e5])
@pytest.mark.parametrize("C", [33, 768])
def test_data_far_from_zero_lose_nothing(kernels_on_host: None, C: int, offset: float) -> None:
    x = torch.randn(4, C, generator=torch.Generator().manual_seed(0)) + offset
    y, _, mean, rstd = forward_cuda(x, None, torch.ones(C), None, 1e-5, F32)
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean(-1), rtol=6e-8, atol=0)
    variance = exact.var(-1, unbiased=False)
    torch.testing.assert_close(rstd.double(), (variance + 1e-5).rsqrt(), rtol=1e-6, atol=0)
    assert close(y, F.layer_norm(exact, (C,), None, None, 1e-5))


def test_a_row_without_spread_far_from_zero_stays_finite(kernels_on_host: None) -> None:
    """The computed variance is only rounding error, and may be below 0."""
    x = torch.logspace(4, 18, 60)[:, None].expand(60, 100)
    y, _, _, rstd = forward_cuda(x, None, torch.ones(100), None, 1e-5, F32)
    assert y.isfinite().all()
    assert rstd.isfinite().all()


@pytest.mark.parametrize("C", [1024, 50_000])
def test_rows_past_two_billion_elements_are_found(C: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run only the last block, which has the last row; the rest of the memory is never touched."""
    pytest.importorskip("cuda.bindings")
    sums = []  # Σ dy x̂ and Σ dy over that block's rows

    def queue(plan: Plan, _: torch.device, *launches: Launch) -> None:
        for launch in launches:
            if launch.name == "layer_norm_finalise":
                sums.extend(launch.arguments[0][-1])
            else:
                ptx.run(plan, launch, only_last_block=True)

    monkeypatch.setattr(layer_norm, "queue", queue)
    monkeypatch.setattr(layer_norm, "multiprocessors", lambda _: 1 << 30)  # as many as wanted
    torch.manual_seed(0)
    N = 2**31 // C + 1001  # one row in the last block
    x, branch, dy = (torch.empty(N, C, dtype=BF16) for _ in range(3))
    for t in (x, branch, dy):
        t[-1] = torch.randn(C)
    weight = torch.ones(C, dtype=BF16)
    y, stream, mean, rstd = forward_cuda(x, branch, weight, None, 1e-5, BF16)
    dx, *_ = backward_cuda(dy, None, stream, weight, mean, rstd, False, BF16)
    assert torch.equal(stream[-1], x[-1] + branch[-1])
    exact, gamma = stream[-1].double().requires_grad_(), torch.ones(C).double().requires_grad_()
    reference = F.layer_norm(exact, (C,), gamma, None, 1e-5)
    reference.backward(dy[-1].double())
    assert close(y[-1], reference.detach())
    assert close(dx[-1], exact.grad)
    last = slice(-(C % 256 or C), None)  # long rows: the last block of columns
    torch.testing.assert_close(sums[0][last].double(), gamma.grad[last], rtol=1e-5, atol=1e-5)
    assert torch.equal(sums[1][last], dy[-1, last].float())


def test_a_branch_off_by_two_bytes_beside_fp32_is_right(kernels_on_host: None) -> None:
    x, weight = torch.randn(5, 768), torch.randn(768)
    branch = torch.randn(5 * 768 + 1).bfloat16()[1:].view(5, 768)
    y, stream, *_ = forward_cuda(x, branch, weight, None, 1e-5, F32)
    assert torch.equal(stream, x + branch)
    assert close(y, F.layer_norm(stream.double(), (768,), weight.double(), None, 1e-5))


@pytest.mark.parametrize("dtype", [F32, BF16, FP16])
@pytest.mark.parametrize("C", [33, 768])
@pytest.mark.parametrize("bad", ["nan", "inf", "1e30"])
def test_what_is_not_finite_is_never_covered_up(
    kernels_on_host: None, bad: str, C: int, dtype: torch.dtype
) -> None:
    """This includes a square that overflows, which would give a row of finite but wrong numbers."""
    x = torch.randn(2, C)
    # A NaN from a GPU has all bits set; rounding it like a number would make it -0.
    x[0, :9] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(F32) if bad == "nan" else float(bad)
    y, _, _, rstd = forward_cuda(x, None, torch.ones(C), None, 1e-5, dtype)
    assert not y[0].isfinite().any() or rstd[0] == 0
    assert y[1].isfinite().all()


def test_a_tensor_on_another_device_is_refused() -> None:
    """The device could not use its pointer."""
    with pytest.raises(ValueError, match="layer_norm: weight is on cpu; expected meta, as x"):
        forward_cuda(torch.ones(4, 64, device="meta"), None, torch.ones(64), None, 1e-5, F32)


@pytest.mark.parametrize(("branch", "width"), [((1, 64), 64), ((4, 64), 16)])
def test_shapes_that_do_not_fit_are_refused(
    kernels_on_host: None, branch: tuple[int, int], width: int
) -> None:
    with pytest.raises(ValueError, match=r"layer_norm: (branch|weight) is .*; expected \("):
        forward_cuda(torch.ones(4, 64), torch.ones(branch), torch.ones(width), None, 1e-5, F32)


def test_weights_may_be_strided_and_a_bias_of_another_type(kernels_on_host: None) -> None:
    x, weight, bias = torch.randn(5, 768), torch.randn(768, 2)[:, 0], torch.randn(768).bfloat16()
    y, *_ = forward_cuda(x, None, weight, bias, 1e-5, F32)
    assert close(y, F.layer_norm(x.double(), (768,), weight.double(), bias.double(), 1e-5))


def test_strided_and_misaligned_rows_are_right(kernels_on_host: None) -> None:
    weight, dense = torch.randn(768), torch.randn(5, 768)
    for strided in (
        torch.randn(5, 800)[:, :768],
        torch.randn(768, 5).t(),
        torch.randn(5 * 768 + 1)[1:].view(5, 768),  # 4 bytes off
    ):
        for x, branch in ((strided, dense), (dense, strided)):
            y, stream, mean, rstd = forward_cuda(x, branch, weight, None, 1e-5, F32)
            exact = (x + branch).double().requires_grad_()
            reference = F.layer_norm(exact, (768,), weight.double(), None, 1e-5)
            assert close(y, reference.detach())
            for dy, dstream in ((strided, dense), (dense, strided)):
                dx, *_ = backward_cuda(dy, dstream, stream, weight, mean, rstd, False, F32)
                (wanted,) = torch.autograd.grad(reference, exact, dy.double(), retain_graph=True)
                assert close(dx, wanted + dstream.double())


def test_the_gradient_sums_have_one_order_whatever_the_number_of_blocks_is(
    kernels_on_host: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs give the same bits, and any number of blocks counts every row once."""
    torch.manual_seed(0)
    x, dy, weight = torch.randn(1100, 33), torch.randn(1100, 33), torch.randn(33)
    _, _, mean, rstd = forward_cuda(x, None, weight, None, 1e-5, F32)

    def gradients(blocks: int) -> tuple[Tensor, ...]:
        monkeypatch.setattr(layer_norm, "multiprocessors", lambda _: blocks)
        return backward_cuda(dy, None, x, weight, mean, rstd, True, None)

    first = gradients(4)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(4), strict=True))
    for blocks in (1, 11, 40):
        torch.testing.assert_close(gradients(blocks), first, rtol=1e-5, atol=1e-5)


def mutants() -> Iterator[Any]:
    """The source once for each comment `// mutant name (fault at C): old → new`, with `old`
    replaced by `new` in the line of code above the comment."""
    lines = SOURCE.splitlines()
    for i, line in enumerate(lines):
        if line.lstrip().startswith("// mutant"):
            mark = re.fullmatch(r" *// mutant (.+?) \((.+) at (\d+)\): (.+) → (.+)", line)
            assert mark, f"expected `// mutant name (fault at C): old → new`: {line}"
            name, fault, C, old, new = mark.groups()
            at = max(j for j in range(i) if not lines[j].lstrip().startswith("//"))
            assert lines[at].count(old) == 1, f"no single {old!r} in {lines[at]!r}"
            changed = [*lines[:at], lines[at].replace(old, new), *lines[at + 1 :]]
            yield pytest.param("\n".join(changed), int(C), fault, id=name)


@pytest.mark.parametrize(("source", "C", "fault"), list(mutants()))
def test_an_error_in_the_kernel_is_seen(
    source: str, C: int, fault: str, kernels_on_host: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_norm, "SOURCE", source)
    if fault == "wrong":  # results; the interpreter reports any other fault itself
        seen = pytest.raises(AssertionError)
    else:
        seen = pytest.raises(ptx.Fault, match=fault)
    with seen:
        check_arithmetic((23, C), True, DTYPES[3])


@pytest.mark.parametrize("unknown", ["sqrtf(variance + eps)", "__fmul_rz(variance, eps)"])
def test_an_instruction_that_the_interpreter_does_not_know_is_refused(
    unknown: str, kernels_on_host: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SOURCE.replace("rsqrtf(variance + eps)", unknown)
    monkeypatch.setattr(layer_norm, "SOURCE", source)
    with pytest.raises(ValueError, match=r"unknown to this interpreter: (sqrt.rn|mul.rz)"):
        check_arithmetic((1, 7), True, DTYPES[0])
    with pytest.raises(ValueError, match=r"unknown to this interpreter: \.local"):
        ptx.parse("f()\n.maxntid 32, 1, 1\n{\n.local .align 4 .b8 spilled[8];\n}")
