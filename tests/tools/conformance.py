"""Checks that every norm must pass: functions, so that tests can run them on planted faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gpt.norms.base import Norm
from gpt.norms.registry import build_norm, fitting, sizes

Make = Callable[..., Any]  # width, options → norm
T = 6  # the largest time in these tests


def make(name: str) -> Make:
    """The norm at its defaults, halfway through a training of 100 steps; γ, β and all other
    parameters away from where they start."""

    def build(width: int, **options: Any) -> Norm:
        norm = build_norm(name, width, **sizes(name, T), **fitting(name, width), **options)
        generator = torch.Generator().manual_seed(1)
        for parameter in norm.parameters():
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
        norm.begin_step(50, 100)
        return norm

    return build


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pure(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x) without side effects: the norm's buffers stay as they are."""
    state = {**dict(norm.named_parameters()), **{k: b.clone() for k, b in norm.named_buffers()}}
    return functional_call(norm, state, (x,))


def trained(norm: nn.Module, width: int = 8) -> Any:
    """The norm in evaluation after a few training batches, so that its buffers hold something."""
    norm.train()
    for seed in range(3):
        norm(randn(4, T, width, seed=seed) * 2 + 1)
    return norm.eval()


# --- the checks ---------------------------------------------------------------------------------


def check_precision(build: Make, reference: Any, x: Tensor) -> None:
    """In fp32 its error is no larger than rounding its input, or a mean of it, explains."""
    norm, exactly = build(x.shape[-1]), build(x.shape[-1]).double()
    reference = reference or (lambda x, n: pure(n, x))
    x64 = x.double()
    expected = reference(x64, exactly)
    noise = [1 + 2.0**-23 * randn(*x.shape, seed=s, dtype=torch.float64) for s in (1, 2, 3)]
    changes = [(reference(x64 * n, exactly) - expected).abs() for n in noise]
    rounded_input = torch.stack(changes).amax(0).amax(-1, keepdim=True)
    # A mean is off by 2⁻²³ of the largest value, and is divided by a deviation over C or its
    # groups, over T, over B, or over B and T.
    grouped = x64.unflatten(
        -1, (max([getattr(exactly, key) for key in exactly.divisors] or [1]), -1)
    )
    variances = [x64.var(dims, unbiased=False, keepdim=True) for dims in ((1,), (0,), (0, 1))]
    variances += [grouped.var(-1, unbiased=False, keepdim=True).expand_as(grouped).flatten(-2)]
    least = torch.stack([v.expand(x.shape) for v in variances]).amin(0).add(1e-5).sqrt()
    rounded_mean = 2.0**-23 * x64.abs().max() / least
    allowed = 32 * rounded_input + 8 * rounded_mean + 4e-6 * expected.abs().max().clamp_min(1)
    error = (pure(norm, x).double() - expected).abs()
    assert bool((error <= allowed).all()), f"{error.max()}, {(error / allowed).max()} × too much"


def check_sight(build: Make, axes: tuple[str, ...], evaluation_axes: tuple[str, ...]) -> None:
    """An output depends on other entries along the declared axes, and along these only."""
    norm, x = build(8), randn(3, T, 8)
    trained(norm)
    for training, declared in ((True, axes), (False, evaluation_axes)):
        norm.train(training)
        y = pure(norm, x)

        def moves(*at: int | slice, y: Tensor = y) -> Tensor:
            other = x.clone()
            other[at] += 3 * randn(*other[at].shape, seed=5)
            changes: Tensor = (pure(norm, other) - y).abs() > 0  # (B, T, C)
            return changes

        future = [moves(1, slice(t, None))[1, :t].any() for t in range(1, T)]
        assert bool(torch.stack(future).any()) is ("T" in declared), f"future, {training=}"
        assert bool(moves(0)[1:].any()) is ("B" in declared), f"neighbours, {training=}"
        features = torch.stack([moves(1, T - 1, slice(c, c + 1))[1, T - 1] for c in range(8)])
        others = features & ~torch.eye(8, dtype=torch.bool)
        assert bool(others.any()) is ("C" in declared), f"features, {training=}"


def check_invariances(build: Make, declared: tuple[str, ...]) -> None:
    """x + c and c·x leave the training output unchanged if that is declared, and only then."""
    norm, x = build(8).double(), 100 * randn(3, T, 8, dtype=torch.float64)
    y = pure(norm, x)
    for name, other in (("shift", x + 7.0), ("scale", 3.0 * x)):
        close = bool(((pure(norm, other) - y).abs().max() < 1e-4 * y.abs().max()).item())
        assert close is (name in declared), name


def check_affine_gradients(build: Make) -> None:
    """dγ = Σ dy·x̂ and dβ = Σ dy over all tokens: one γ and β serve them all."""
    norm = build(6).double()
    x, dy = randn(2, 3, 6, dtype=torch.float64), randn(2, 3, 6, seed=1, dtype=torch.float64)
    parameters = {key: getattr(norm, key, None) for key in ("weight", "bias")}
    parameters = {key: p for key, p in parameters.items() if p is not None}
    if not parameters:
        return
    pure(norm, x).backward(dy)
    for key, parameter in parameters.items():
        with torch.no_grad():  # y is linear in both: adding 1 to γ adds x̂, to β adds 1
            y = pure(norm, x)
            parameter += 1
            per_token = pure(norm, x) - y
            parameter -= 1
        total = (dy * per_token).sum((0, 1))
        expected = total if parameter.numel() > 1 else total.sum()[None]
        torch.testing.assert_close(parameter.grad, expected, msg=f"the gradient of {key}")
