"""GPT-2: its shape, its init, its causality, and the placement equation."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from gpt.config import ModelConfig
from gpt.model import GPT, Block, BlockPlan, Sublayer
from gpt.norms.base import norms_of
from gpt.placement import build_model
from tests.tools.configs import make_config, mostly_long

VOCAB = 61
NORMS = ["layer", "rms", "dummy", "batch"]
PLACEMENTS = ["none", "pre", "post", "peri", "reordered"]
ALL = list(product(NORMS, PLACEMENTS))
MODELS = mostly_long(ALL, *((n, p) for n, p in ALL if n == "batch" or p == "pre"))


def built(*extra: str) -> GPT:
    return build_model(make_config("data=pydoc", *extra), VOCAB)


def tokens(batch: int = 4, time: int = 16) -> Tensor:
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("norm", "placement"), MODELS)
def test_initial_loss_is_that_of_a_uniform_guess(norm: str, placement: str) -> None:
    """ln V, plus a little: a final norm gives the logits a variance of 0.02²·C."""
    x = tokens(16, 32)
    _, loss = built(f"norm={norm}", f"placement={placement}")(x, x.roll(-1, 1))
    assert abs(loss.item() - math.log(VOCAB)) < 0.05


@pytest.mark.parametrize(("norm", "placement"), MODELS)
def test_a_changed_token_never_changes_earlier_logits(norm: str, placement: str) -> None:
    """Except with batch in training: it must, because its statistics run over time."""
    model, x = built(f"norm={norm}", f"placement={placement}"), tokens()
    other = x.clone()
    other[0, 10] = (other[0, 10] + 1) % VOCAB
    leaks = norm == "batch" and placement != "none"
    for training in (False, True):
        model.train(training)
        a, b = model(x)[0], model(other)[0]
        earlier_equal = torch.equal(a[0, :10], b[0, :10])
        neighbours_equal = torch.equal(a[1:], b[1:])
        assert not torch.equal(a[0, 10:], b[0, 10:])
        assert earlier_equal is not (leaks and training)
        assert neighbours_equal is not (leaks and training)


def drawn(f: Callable[[Tensor], Tensor], x: Tensor, times: int = 2000) -> Tensor:
    """f(x), with dropout drawn anew each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return torch.stack([f(x) for _ in range(times)])


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_a_sublayer_drops_what_it_adds_and_keeps_its_mean(part: str) -> None:
    model = built("model.dropout=0.25").double()
    sublayer, x = getattr(model.h[0], part), torch.randn(1, 5, 32, dtype=torch.float64)
    ys = drawn(sublayer.train().f, x)
    assert (ys == 0).double().mean() == pytest.approx(0.25, abs=0.01)
    exact = sublayer.eval().f(x)
    assert (ys.mean(0) - exact).norm() < 0.1 * exact.norm()


class OneHot(nn.Module):
    """Replaces v's norm: each token's value becomes a feature of its own."""

    def forward(self, v: Tensor) -> Tensor:
        return torch.eye(*v.shape[1:], dtype=v.dtype).expand_as(v)


def test_attention_drops_weights_too() -> None:
    """In addition to its output: a query sees each key in three of four draws."""
    model = built("model.dropout=0.25", "model.n_head=1").double()
    attn = model.h[0].attn
    x = torch.randn(1, 3, 32, dtype=torch.float64)
    with torch.no_grad():  # all keys have equal weight
        attn.c_attn.weight.zero_()
        attn.c_attn.bias.zero_()
        attn.c_proj.weight.copy_(torch.eye(32))
        attn["v"] = OneHot()
    ys = drawn(attn.train().f, x)[:, 0, 2, :3]  # the last token's share of each key
    kept = ys[ys != 0]
    assert (ys == 0).double().mean() == pytest.approx(1 - 0.75**2, abs=0.02)
    assert kept.unique().tolist() == pytest.approx([1 / 3 / 0.75**2])


@pytest.mark.parametrize(
    ("norm", "placement"),
    mostly_long(
        product(NORMS, ("pre", "post")), ("layer", "pre"), ("rms", "post"), ("batch", "pre")
    ),
)
def test_one_batch_overfits(norm: str, placement: str) -> None:
    model, x = built(f"norm={norm}", f"placement={placement}"), tokens()
    y = torch.randint(VOCAB, x.shape, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50)
        _, loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


class Scale(nn.Module):
    """Replaces a norm in a test that must see which slot it is in."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_sublayer_is_the_placement_equation(alpha: float) -> None:
    """y = after(α·x + out(f(in(x)))), each slot with a factor of its own."""
    factors = {"h.0.mlp.in": 2.0, "h.0.mlp.out": 3.0, "h.0.mlp.after": 5.0}
    f = nn.Linear(4, 4).double()

    class Linear(Sublayer):
        slots: ClassVar = {"in": 1, "out": 1, "after": 1}

        def f(self, x: Tensor) -> Tensor:
            return f(x)

    plan = BlockPlan(alpha=alpha, scale=0.5)
    config = ModelConfig(1, 1, 4, 8, 0.0)
    sublayer = Linear(config, "h.0.mlp", lambda site, width: Scale(factors[site]), plan)
    x, branch = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    for pending in (None, branch):
        stream = x if pending is None else x + pending
        y, rest = sublayer(x, pending)
        expected = 5 * (alpha * stream + 3 * f(0.5 * 2 * stream))
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
        assert rest is None


@pytest.mark.parametrize(("placement", "norm_first"), [("pre", True), ("post", False)])
def test_a_block_equals_the_library_s_transformer_layer(placement: str, norm_first: bool) -> None:
    cfg = make_config("data=pydoc", f"placement={placement}")
    model = build_model(cfg, VOCAB).double()
    C, nh = cfg.model.n_embd, cfg.model.n_head
    theirs = nn.TransformerEncoderLayer(
        C,
        nh,
        4 * C,
        dropout=0.0,
        activation=nn.GELU(approximate="tanh"),
        batch_first=True,
        norm_first=norm_first,
        dtype=torch.float64,
    )
    block = model.h[0]
    torch.manual_seed(0)
    for p in block.parameters():
        p.data.normal_(0, 0.3)
    slot = "in" if norm_first else "after"
    attn, mlp = block.attn, block.mlp
    for ours, parameter in (
        (attn.c_attn.weight, theirs.self_attn.in_proj_weight),
        (attn.c_attn.bias, theirs.self_attn.in_proj_bias),
        (attn.c_proj.weight, theirs.self_attn.out_proj.weight),
        (attn.c_proj.bias, theirs.self_attn.out_proj.bias),
        (mlp.c_fc.weight, theirs.linear1.weight),
        (mlp.c_fc.bias, theirs.linear1.bias),
        (mlp.c_proj.weight, theirs.linear2.weight),
        (mlp.c_proj.bias, theirs.linear2.bias),
        (block.attn[slot].weight, theirs.norm1.weight),
        (block.attn[slot].bias, theirs.norm1.bias),
        (block.mlp[slot].weight, theirs.norm2.weight),
        (block.mlp[slot].bias, theirs.norm2.bias),
    ):
        parameter.data.copy_(ours.data)
    x = torch.randn(2, 9, C, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    y, branch = block(x, None)
    y = y if branch is None else y + branch
    torch.testing.assert_close(y, theirs(x, src_mask=mask), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("placement", "sites"),
    [
        ("none", []),
        ("pre", ["h.0.attn.in", "h.0.mlp.in", "h.1.attn.in", "h.1.mlp.in", "final_norm"]),
        ("post", ["h.0.attn.after", "h.0.mlp.after", "h.1.attn.after", "h.1.mlp.after"]),
        ("reordered", ["h.0.attn.out", "h.0.mlp.out", "h.1.attn.out", "h.1.mlp.out", "final_norm"]),
    ],
)
def test_norms_stand_where_the_placement_says(placement: str, sites: list[str]) -> None:
    model = built(f"placement={placement}")
    norms = norms_of(model)
    assert [name for name, module in model.named_modules() if module in norms] == sites


def test_a_slot_may_name_another_norm() -> None:
    model = built("norm=layer", "placement.attn.out=rms", "placement.final_norm=batch")
    assert type(model.h[1].attn["out"]).__name__ == "RMSNorm"
    assert type(model.final_norm).__name__ == "BatchNorm"
    assert type(model.h[1].attn["in"]).__name__ == "LayerNorm"


@pytest.mark.parametrize("other", ["norm=batch", "norm=dummy", "placement=peri", "placement=none"])
def test_models_that_differ_in_norms_share_all_other_weights(other: str) -> None:
    a, b = built().state_dict(), built(other).state_dict()
    shared = [k for k in a if k in b and ("c_" in k or k.startswith("w"))]
    assert len(shared) == 2 + 2 * 8
    assert all(torch.equal(a[k], b[k]) for k in shared)


def test_init_is_gpt2_s() -> None:
    model = built("model.n_layer=8", "model.n_embd=128")
    residual = model.h[3].mlp.c_proj.weight.std().item()
    assert residual == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    assert model.h[3].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.h[3].mlp.c_fc.bias.abs().max() == 0
    assert built("seed=2").wte.weight.ne(built("seed=1").wte.weight).all()


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("gpt2", 124.44), ("gpt2_medium", 354.82), ("gpt2_large", 774.03), ("gpt2_xl", 1557.61)],
)
def test_presets_have_the_published_sizes(preset: str, millions: float) -> None:
    """Calculated from one block: building 1.5B parameters would take too much memory."""
    m: ModelConfig = make_preset(preset)
    C, L = m.n_embd, m.n_layer
    block = sum(p.numel() for p in Block(tiny(m), "h.0", norm_of, BlockPlan()).parameters())
    total = 50257 * C + m.block_size * C + L * block + 2 * C
    assert total / 1e6 == pytest.approx(millions, abs=0.01)


def make_preset(name: str) -> ModelConfig:
    from hydra import compose, initialize_config_dir

    from gpt.config import typed
    from tests.tools.programs import REPO

    with initialize_config_dir(str(REPO / "configs"), version_base="1.3"):
        return typed(compose("train", [f"model={name}"])).model


def tiny(m: ModelConfig) -> ModelConfig:
    return ModelConfig(1, m.n_head, m.n_embd, 8, 0.0)


def norm_of(site: str, width: int) -> nn.Module:
    return nn.LayerNorm(width) if site.endswith(".in") else nn.Identity()


def test_compiles_whole() -> None:
    model, x = built("norm=batch", "placement=peri"), tokens()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, x)[1], model(x, x)[1])


def test_accumulated_micro_batches_give_one_batch_s_gradient() -> None:
    model, x = built().double(), tokens()
    y = x.roll(-1, 1)
    model(x, y)[1].backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for i in range(4):
        (model(x[i : i + 1], y[i : i + 1])[1] / 4).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-9, atol=1e-14)
