"""The properties that every registered norm must have. For one norm: pytest --norm NAME

Nothing here depends on a particular norm, except `references.py`: registering a norm is enough.
For a norm of your own: pytest --norm-module=my_norms.py --norm NAME
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn

from gpt.norms.base import norm_step
from gpt.norms.layer import LayerNorm
from gpt.norms.registry import NORMS, build_norm
from gpt.training.optimizer import make_optimizer
from tests.tools.configs import make_config, mostly_long
from tests.tools.conformance import (
    Make,
    T,
    check_affine_gradients,
    check_invariances,
    check_precision,
    check_sight,
    make,
    pure,
    randn,
    trained,
)
from tests.tools.programs import REPO
from tests.tools.references import REFERENCES

# --- the suite ----------------------------------------------------------------------------------

WIDTHS = [1, 2, 3, 7, 8, 33, 768]


@given(
    width=st.sampled_from(WIDTHS),
    offset=st.sampled_from([0.0, 1.0, -30.0, 1e3, 1e4]),
    scale=st.sampled_from([1e-3, 1e-2, 1.0, 1e2]),
    constant_row=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_it_is_its_formula_to_the_last_digits(
    norm_name: str, width: int, offset: float, scale: float, constant_row: bool, seed: int
) -> None:
    x = randn(3, T, width, seed=seed) * scale + offset
    if constant_row:
        x[1, 2] = offset
    check_precision(make(norm_name), REFERENCES.get(norm_name), x)


def test_its_eps_is_the_one_that_it_was_given(norm_name: str) -> None:
    """On rows so small that ε matters, the output changes and still follows the formula."""
    build, x = make(norm_name), 0.1 * randn(3, T, 8)
    if not hasattr(build(8), "eps"):
        return
    check_precision(partial(build, eps=0.3), REFERENCES.get(norm_name), x)
    for training in (True, False):
        norms = [trained(build(8, eps=eps)).train(training) for eps in (1e-5, 0.3)]
        default, larger = (pure(norm, x) for norm in norms)
        assert (default - larger).abs().max() > 0.01 * default.abs().max(), training


@pytest.mark.parametrize("training", [True, False])
def test_its_gradient_is_right_in_float64(norm_name: str, training: bool) -> None:
    norm = trained(make(norm_name)(5), 5).double().train(training)
    x = (randn(2, 3, 5, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pure(norm, x), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_its_output_has_its_input_s_dtype_and_half_precision_is_only_rounded(
    norm_name: str, dtype: torch.dtype, training: bool
) -> None:
    norm = trained(make(norm_name)(33), 33).train(training)
    norm = norm.double() if dtype == torch.float64 else norm
    x = randn(3, T, 33).to(dtype)
    y = pure(norm, x)
    assert y.dtype == dtype
    exact = pure(norm.double(), x.double())
    tolerance = 2 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


def test_it_runs_under_autocast(norm_name: str) -> None:
    norm, x = make(norm_name)(8), randn(3, T, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype in (torch.float32, torch.bfloat16)
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_never_covered_up(norm_name: str, bad: float, training: bool) -> None:
    """It raises ValueError, shows in the output, or (infinity) gives the formula's limit."""
    norm, x = trained(make(norm_name)(8)).train(training), randn(3, T, 8)
    x[1, 2, 3] = bad
    try:
        y = pure(norm, x)[1, 2]
    except ValueError:
        return
    if y.isfinite().all():
        assert bad == bad, "NaN has no limit"
        x[1, 2, 3] = 1e30 if bad > 0 else -1e30
        torch.testing.assert_close(pure(norm, x)[1, 2], y)


def test_gamma_s_and_beta_s_gradients_are_shared_sums(norm_name: str) -> None:
    check_affine_gradients(make(norm_name))


def test_it_sees_along_its_declared_axes_only(norm_name: str) -> None:
    cls: Any = NORMS[norm_name]
    check_sight(make(norm_name), cls.axes, cls.evaluation_axes)


def test_its_invariances_are_the_declared_ones(norm_name: str) -> None:
    cls: Any = NORMS[norm_name]
    check_invariances(make(norm_name), cls.invariances)


def test_its_state_survives_saving_and_loading(norm_name: str) -> None:
    norm, other, x = trained(make(norm_name)(8)), make(norm_name)(8).eval(), randn(3, T, 8)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), other(x))


def test_its_input_is_left_as_it_was_and_the_result_repeats(norm_name: str) -> None:
    norm, x = trained(make(norm_name)(8)), randn(3, T, 8)
    for training in (True, False):
        before = x.clone()
        assert torch.equal(pure(norm.train(training), x), pure(norm, x))
        assert torch.equal(x, before)


def test_one_token_of_one_sample_can_be_evaluated(norm_name: str) -> None:
    norm = trained(make(norm_name)(8))
    assert norm(randn(1, 1, 8)).isfinite().all()
    whole = randn(1, T, 8)
    if "T" not in NORMS[norm_name].evaluation_axes:  # type: ignore[attr-defined]
        torch.testing.assert_close(norm(whole)[:, :2], norm(whole[:, :2]))


@pytest.mark.parametrize("training", mostly_long([True, False], True))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_compiles_without_a_graph_break(norm_name: str, training: bool) -> None:
    """Values, gradients and running statistics equal the eager norm's over several steps."""
    torch._dynamo.reset()
    results = []
    for compiling in (False, True):
        norm = trained(make(norm_name)(8)).train(training)
        run = torch.compile(norm, fullgraph=True, backend="aot_eager") if compiling else norm
        found = []
        for seed in range(3):
            x, dy = 2 * randn(3, T, 8, seed=seed), randn(3, T, 8, seed=seed + 9)
            x.requires_grad_()
            with norm_step(norm, 50, 100):
                y = run(x)
                y.backward(dy)
            found += [y.detach(), x.grad]
        parameters = [p.grad for p in norm.parameters()]
        results.append([*found, *parameters, *(b.clone() for b in norm.buffers())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_no_parameter_of_it_would_be_decayed(norm_name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), make(norm_name)(8))
    decayed = make_optimizer(model, make_config().optim).param_groups[0]["params"]
    assert [id(p) for p in decayed] == [id(model[0].weight)]


def test_in_evaluation_it_is_the_affine_map_that_it_says(norm_name: str) -> None:
    norm, x = trained(make(norm_name)(8)), randn(3, T, 8)
    map_ = norm.as_affine()
    if map_ is None:
        return
    torch.testing.assert_close(norm(x), x * map_[0] + map_[1], rtol=1e-5, atol=1e-5)


def test_its_yaml_builds_it_and_its_docstring_says_what_it_is(norm_name: str) -> None:
    cls = NORMS[norm_name]
    doc = inspect.getdoc(cls) or ""
    if not cls.__module__.startswith("gpt.norms."):
        return  # a norm of your own needs no yaml and no card
    raw = OmegaConf.load(REPO / "configs" / "norm" / f"{norm_name}.yaml")
    raw = OmegaConf.merge({"model": {"block_size": T}}, {"norm": raw})
    options = OmegaConf.to_container(raw.norm, resolve=True)
    assert isinstance(options, dict)
    build_norm(n_embd=8, **options)  # type: ignore[misc]
    parameters = inspect.signature(cls).parameters
    required = {k for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert set(options) - {"name"} == required, "the yaml lists every option"
    defaults = {k: parameters[k].default for k in required}
    for key, default in defaults.items():
        assert default in (inspect.Parameter.empty, options[key]), key
    assert "y = " in doc or "BatchNorm, with" in doc
    assert "Use it " in doc
    assert "arXiv:" in doc or "Raschka" in doc


# --- planted faults are caught ------------------------------------------------------------------


class OnePass(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = x.square().mean(-1, keepdim=True) - mean.square()
        return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias


class Unbiased(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (x.var(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


class EpsOutside(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        std = centred.square().mean(-1, keepdim=True).sqrt() + self.eps
        return centred / std * self.weight + self.bias


class BatchMean(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean((0, 1))
        variance = centred.square().mean(-1, keepdim=True)
        return centred / (variance + self.eps).sqrt() * self.weight + self.bias


class GammaTwice(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight


def mutant(cls: type[LayerNorm]) -> Make:
    return lambda width: cls(width)


@pytest.mark.parametrize(
    ("cls", "offset", "scale"),
    [(OnePass, 1e3, 1.0), (Unbiased, 0.0, 1.0), (EpsOutside, 0.0, 1e-2), (BatchMean, 0.0, 1.0)],
)
def test_a_planted_fault_in_the_formula_is_caught(
    cls: type[LayerNorm], offset: float, scale: float
) -> None:
    x = randn(3, T, 33) * scale + offset
    check_precision(mutant(LayerNorm), REFERENCES["layer"], x)
    with pytest.raises(AssertionError):
        check_precision(mutant(cls), REFERENCES["layer"], x)


def test_a_false_claim_is_caught() -> None:
    check_sight(mutant(LayerNorm), ("C",), ("C",))
    with pytest.raises(AssertionError, match="future, training=True"):
        check_sight(mutant(BatchMean), ("C",), ("C",))
    with pytest.raises(AssertionError, match="neighbours"):
        check_sight(make("batch_pos"), ("C",), ())
    with pytest.raises(AssertionError, match="training=False"):
        check_sight(make("instance"), ("T",), ())
    with pytest.raises(AssertionError, match="shift"):
        check_invariances(make("rms"), ("shift", "scale"))
    with pytest.raises(AssertionError, match="scale"):
        check_invariances(make("layer"), ("shift",))
    with pytest.raises(AssertionError):
        check_affine_gradients(mutant(GammaTwice))
