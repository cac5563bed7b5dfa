"""A KV cache changes the speed of generation, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpt.config import compose
from gpt.model import GPT
from gpt.norms.base import Norm
from gpt.norms.batch import batch_statistics
from gpt.norms.registry import NORMS
from gpt.placement import build_model
from gpt.sampling.cache import cacheable, next_logits
from tests.tools.configs import REPO

PLACEMENTS = sorted(path.stem for path in (REPO / "configs" / "placement").glob("*.yaml"))
UNCACHED = {"instance", "batch_pos"}  # these look along T, or at the position


def model_of(*overrides: str) -> GPT:
    """A model in float64 whose weights and running statistics are not the initial ones."""
    sizes = ["model.n_layer=2", "model.n_embd=32", "model.n_head=4", "model.block_size=12"]
    model = build_model(compose(*sizes, *overrides), 61).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.rpartition(".")[2] in ("running_mean", "running_var"):
                buffer.add_(torch.rand(buffer.shape, generator=generator))
    return model


@torch.no_grad()
def compare(model: GPT, prompt: int = 3, n: int = 14) -> list[int]:
    """Check the logits after every token; returns how many tokens each forward pass computed."""
    idx = torch.randint(61, (2, prompt + n), generator=torch.Generator().manual_seed(1))
    computed: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, given: computed.append(given[0].shape[1]))
    with next_logits(model) as logits_after:
        cached = [logits_after(idx[:, :T]) for T in range(prompt, prompt + n)]
    hook.remove()
    for T, logits in zip(range(prompt, prompt + n), cached, strict=True):
        right = model(idx[:, max(0, T - model.block_size) : T])[0][:, -1]
        assert (logits - right).abs().max() < 1e-12 * right.abs().max().clamp_min(1)
    return computed


@pytest.mark.parametrize("name", sorted(set(NORMS) - {"cuda_layer"}))
def test_cached_logits_are_those_of_the_whole_window_for_every_norm(name: str) -> None:
    """Also past block_size, where positions move."""
    computed = compare(model_of(f"norm={name}"))
    if name in UNCACHED:  # what `batch_pos` needs is found out by its first cached logits
        assert computed.count(1) == (name == "batch_pos")
    else:
        assert computed.count(1) == 9  # up to block_size


@pytest.mark.parametrize("name", PLACEMENTS)
def test_cached_logits_are_those_of_the_whole_window_at_every_placement(name: str) -> None:
    assert compare(model_of(f"placement={name}")).count(1) == 9


def test_a_batch_s_own_statistics_are_not_cached() -> None:
    model = model_of("norm=batch")
    assert cacheable(model)
    with batch_statistics(model):
        assert not cacheable(model)
        assert 1 not in compare(model)


def test_a_norm_that_depends_on_the_position_is_found_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class ByPosition(Norm):
        axes = ()

        def __init__(self, n_embd: int) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]

    monkeypatch.setitem(NORMS, "by_position", ByPosition)
    compare(model_of("placement.final_norm=by_position"))
    assert "generation without a cache" in capsys.readouterr().err


def test_after_generation_the_model_is_as_before() -> None:
    model = model_of()
    idx = torch.randint(61, (2, 12))
    before = model(idx)[0]
    with next_logits(model) as logits_after:
        logits_after(idx[:, :5])
        logits_after(idx[:, :6])
    assert torch.equal(model(idx)[0], before)


def test_another_text_is_not_read_with_the_cache_of_the_one_before() -> None:
    model, (a, b) = model_of(), torch.randint(61, (2, 1, 12))
    with next_logits(model) as logits_after:
        for idx in (a[:, :5], a[:, :6], a[:, :6], b[:, :8], b[:, :9], a[:, :4]):
            logits = logits_after(idx)
            right = next_logits_of(model, idx)
            assert (logits - right).abs().max() < 1e-12 * right.abs().max()


def next_logits_of(model: GPT, idx: Tensor) -> Tensor:
    with next_logits(model) as logits_after:
        return logits_after(idx)


def test_registered_norms_declare_what_the_cache_needs() -> None:
    assert {n for n, cls in NORMS.items() if set(cls.evaluation_axes) & {"B", "T"}} <= UNCACHED
