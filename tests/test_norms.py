"""The norms against the library, against float64 formulas and by hand; their claims by probing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gpt.norms  # noqa: F401
from gpt.common.errors import ConfigError, MissingInput
from gpt.norms import registry
from gpt.norms.base import Norm
from gpt.norms.batch import BatchNorm, batch_statistics
from gpt.norms.dummy import DummyLayerNorm
from gpt.norms.layer import LayerNorm, layer_norm
from gpt.norms.registry import NORMS, build_norm, register
from gpt.norms.rms import RMSNorm
from tests.tools.configs import BUILDABLE
from tests.tools.conformance import make, pure, randn, trained

ROWS_ABC = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]])  # (B=1, T=3, C=3)
Z = math.sqrt(1.5)  # (3 − 2)/√(2/3), and (9 − 6·1)/√6


def randomised(norm: nn.Module) -> nn.Module:
    """Move γ and β away from 1 and 0, so that a test can see them."""
    torch.manual_seed(1)
    for parameter in norm.parameters():
        parameter.data.normal_()
    return norm


@pytest.mark.parametrize("fast", [True, False])
def test_layer_norm_normalises_rows_of_the_3x3_example(fast: bool) -> None:
    y = LayerNorm(3, eps=0.0, fast=fast)(ROWS_ABC)
    expected = torch.tensor([[-Z, 0.0, Z]] * 3)
    torch.testing.assert_close(y[0], expected)


def test_batch_norm_normalises_columns_of_the_3x3_example() -> None:
    norm = BatchNorm(3, eps=1e-12, momentum=1.0)
    y = norm(ROWS_ABC)
    torch.testing.assert_close(y[0], torch.tensor([[-Z] * 3, [0.0] * 3, [Z] * 3]))
    torch.testing.assert_close(norm.running_mean, torch.tensor([4.0, 5.0, 6.0]))
    torch.testing.assert_close(norm.running_var, torch.tensor([9.0, 9.0, 9.0]))  # unbiased: 18/2


def test_rms_norm_divides_rows_of_the_3x3_example_by_their_root_mean_square() -> None:
    y = RMSNorm(3, eps=0.0)(ROWS_ABC)
    torch.testing.assert_close(y[0, 0], torch.tensor([1.0, 2.0, 3.0]) / math.sqrt(14 / 3))


@given(
    width=st.sampled_from([1, 2, 3, 7, 8, 33, 768]),
    offset=st.sampled_from([0.0, 1.0, -30.0, 1e3, 1e4]),
    scale=st.sampled_from([1e-2, 1.0, 1e2]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=150)
def test_layer_norm_formula_equals_float64_reference(
    width: int, offset: float, scale: float, seed: int
) -> None:
    """A two-pass variance survives a mean far larger than the spread; one pass does not."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(4, width, generator=generator) * scale + offset).float()
    norm = randomised(LayerNorm(width, fast=False))
    x64, w64, b64 = x.double(), norm.weight.double(), norm.bias.double()
    expected = F.layer_norm(x64, (width,), w64, b64, 1e-5)
    # Rounding x's mean to fp32 costs about |mean| · 2⁻²³ / σ per row: allow 4 times that.
    sigma = x64.var(-1, unbiased=False).add(1e-5).sqrt()
    slack = 4 * (x64.abs().amax(-1) * 2**-23 / sigma).amax().item() * w64.abs().max().item()
    torch.testing.assert_close(norm(x).double(), expected, rtol=2e-5, atol=2e-5 + slack)


@pytest.mark.parametrize("width", [1, 2, 3, 8, 33, 768])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_equals_the_library_in_value_and_gradient(width: int, bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(width, dtype=torch.float64, requires_grad=True)
    beta = torch.randn(width, dtype=torch.float64, requires_grad=True) if bias else None
    inputs = [t for t in (x, weight, beta) if t is not None]
    ours = layer_norm(x, weight, beta, 1e-5)
    theirs = F.layer_norm(x, (width,), weight, beta, 1e-5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-14)
    dy = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(theirs, inputs, dy), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_unbiased_variance_does_not_reproduce_layer_norm() -> None:
    """The classic mismatch: `torch.var` divides by C − 1. At C = 8 it is off by √(8/7)."""
    x = torch.randn(3, 8, dtype=torch.float64)
    classic = (x - x.mean(-1, keepdim=True)) / x.var(-1, keepdim=True).add(1e-5).sqrt()
    ratio = layer_norm(x, torch.ones(8).double(), None, 1e-5) / classic
    torch.testing.assert_close(ratio, torch.full_like(x, math.sqrt(8 / 7)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_equals_the_library(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 33)
    norm = randomised(RMSNorm(33))
    expected = F.rms_norm(x.to(dtype).double(), (33,), norm.weight.double(), 1e-5)
    y = norm(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected.to(dtype).double(), rtol=1e-2, atol=1e-2)
    if dtype == torch.float32:
        torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)


def test_batch_norm_equals_the_library_over_several_steps() -> None:
    torch.manual_seed(0)
    ours, theirs = BatchNorm(7), nn.BatchNorm1d(7)
    for _ in range(3):
        x = torch.randn(4, 5, 7) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x.flatten(0, 1)).view_as(x))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x.flatten(0, 1)).view_as(x))


def test_batch_norm_is_biased_forward_and_unbiased_in_its_running_variance() -> None:
    x = torch.tensor([0.0, 2.0]).view(1, 2, 1)  # biased variance 1, unbiased 2
    norm = BatchNorm(1, eps=1e-12, momentum=0.1)
    torch.testing.assert_close(norm(x).flatten(), torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(norm.running_var, torch.tensor([0.9 * 1 + 0.1 * 2]))
    torch.testing.assert_close(norm.running_mean, torch.tensor([0.1]))


def test_batch_norm_of_one_value_refuses_training_and_forgets_its_input_with_batch_stats() -> None:
    norm = randomised(BatchNorm(5))
    with pytest.raises(ValueError, match="more than 1 value"):
        norm(torch.randn(1, 1, 5))
    norm.eval()
    before = norm.running_mean.clone()
    with batch_statistics(norm):
        y = norm(torch.randn(1, 1, 5))
    torch.testing.assert_close(y.flatten(), norm.bias)  # β, whatever the token was
    torch.testing.assert_close(norm.running_mean, before)
    assert not norm.batch_stats


@pytest.mark.parametrize("name", ["batch", "batch_ema", "batch_pos", "rbn", "power"])
def test_batch_statistics_in_evaluation_are_those_of_the_batch(name: str) -> None:
    norm, x = make(name)(5), randn(3, 4, 5) * 2 + 1
    norm.running_mean += 1  # these must not be used
    norm.running_var += 1
    over = 0 if name == "batch_pos" else (0, 1)
    mean = 0 if name == "power" else x.mean(over)
    variance = (x - mean).square().mean(over)
    expected = norm.weight * (x - mean) / (variance + norm.eps).sqrt() + norm.bias
    with batch_statistics(norm.eval()):
        torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize(("norm", "edge"), [("dyt", 3.664), ("derf", 2.772)])
def test_saturation_is_the_share_beyond_95_percent(norm: str, edge: float) -> None:
    """tanh(3.664 / 2) and erf(2.772 / 2) are 0.95, and α begins at 1/2."""
    x = torch.tensor([[[0.0, edge - 0.01], [edge + 0.01, -9.0]]])
    assert build_norm(norm, 2).statistics(x) == {"saturation": 0.5}


def test_layer_norm_does_without_gamma_and_beta_and_refuses_a_spread_of_one_value() -> None:
    norm = LayerNorm(3, affine=False)
    assert not list(norm.parameters())
    torch.testing.assert_close(norm(ROWS_ABC), F.layer_norm(ROWS_ABC, (3,)))
    assert LayerNorm(2, unbiased=True).unbiased
    with pytest.raises(ValueError, match="one feature has no unbiased variance"):
        LayerNorm(1, unbiased=True)


def test_dummy_is_the_identity_and_has_no_parameters() -> None:
    norm, x = DummyLayerNorm(4, eps=1e-3), torch.randn(2, 3, 4)
    assert norm(x) is x
    assert list(norm.parameters()) == []


def test_a_constant_row_gives_beta() -> None:
    norm = randomised(LayerNorm(7))
    torch.testing.assert_close(norm(torch.full((1, 1, 7), 3.0)).flatten(), norm.bias)


def test_cuda_layer_never_falls_back_silently() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(MissingInput, match="needs a CUDA device; use norm=layer"):
        build_norm("cuda_layer", 8)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("layr", {}, "did you mean 'layer'"),
        ("layer", {"epz": 1}, "did you mean 'eps'"),
        ("layer", {"eps": "small"}, "expected a finite number"),
        ("layer", {"eps": float("inf")}, "expected a finite number"),
        ("layer", {"eps": -1.0}, "expected a number >= 0"),
        ("layer", {"bias": 1}, "expected bool"),
        ("batch_pos", {}, "norm.block_size is not given"),
        ("group", {"groups": 3}, "expected a divisor of 8 features"),
        ("anneal", {"start": 0.9, "end": 0.8}, "expected 0 < start < end <= 1"),
        ("rms", {"partial": 0.0}, r"expected a number in \(0, 1\]"),
        ("batch", {"momentum": 2.0}, r"expected a number in \[0, 1\]"),
        ("anneal", {"momentum": 2.0}, r"expected a number in \[0, 1\]"),
        ("prepbn", {"fraction": 0.0}, r"expected a number in \(0, 1\]"),
        ("batch_pos", {"block_size": 0}, "expected a number >= 1"),
        ("group", {"groups": 0}, "expected a number >= 1"),
        ("group", {"groups": 8}, "norm.groups=8: a group of one feature has variance 0"),
        ("power", {"warmup_steps": -1}, "expected a number >= 0"),
    ],
)
def test_a_wrong_norm_is_refused_in_one_line(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        build_norm(name, 8, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted({*BUILDABLE} - {"dummy", "dyt", "derf"}))  # these have no ε
def test_no_norm_takes_a_negative_eps(name: str) -> None:
    with pytest.raises(ConfigError, match="eps=-1e-05: expected a number >="):
        build_norm(name, 8, eps=-1e-5, **{"block_size": 8} if name == "batch_pos" else {})


@pytest.mark.parametrize(("name", "option"), [("dyt", "alpha"), ("derf", "shift")])
def test_a_whole_number_is_a_float_too(name: str, option: str) -> None:
    assert getattr(build_norm(name, 4, **{option: 1}), option).dtype == torch.float32


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_are_of_neighbouring_features(groups: int) -> None:
    norm, x = build_norm("group", 8, groups=groups), torch.randn(2, 3, 8)
    parts = [F.layer_norm(part, part.shape[-1:]) for part in x.chunk(groups, dim=-1)]
    torch.testing.assert_close(norm(x), torch.cat(parts, dim=-1))


def test_partial_rms_norm_sees_the_first_features_only() -> None:
    norm, x = build_norm("rms", 100, partial=0.07), torch.randn(1, 1, 100)
    expected = x / (x[..., :7].square().mean() + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected)


def test_a_norm_registers_once_and_says_what_it_is() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        register("layer")(LayerNorm)
    with pytest.raises(ValueError, match="Identity is not a subclass of"):
        register("unheard_of")(nn.Identity)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="does not declare axes"):
        register("unheard_of")(type("Silent", (Norm,), {}))
    assert "unheard_of" not in NORMS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BUILDABLE)
def test_half_precision_is_rounded_once(name: str, training: bool, dtype: torch.dtype) -> None:
    """Rounding twice misses the nearest number in a quarter of all cases."""
    norm, x = trained(make(name)(33), 33).train(training), randn(3, 6, 33).to(dtype)
    y = pure(norm, x)
    exact = pure(norm.double(), x.double())
    assert (y != exact.to(dtype)).float().mean() < 0.02


HALF = """
from torch import nn
from gpt.norms import Norm, register

@register("half")
class Half(Norm):
    axes = ()

    def __init__(self, n_embd: int) -> None:
        super().__init__()

    def forward(self, x):
        return x / 2
"""


def test_an_installed_package_brings_its_norms_or_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_norm.py").write_text(HALF)
    package = tmp_path / "half_norm-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: half-norm\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[gpt_norms]\nhalf = half_norm\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "NORMS", dict(NORMS))
    registry.load_entry_points()
    assert (build_norm("half", 2)(ROWS_ABC) == ROWS_ABC / 2).all()
    (package / "entry_points.txt").write_text("[gpt_norms]\nhalf = no_such_module\n")
    with pytest.raises(ConfigError, match="entry point half = no_such_module: ModuleNotFoundError"):
        registry.load_entry_points()
