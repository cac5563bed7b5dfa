"""Placements against their written equations in float64, their constants by number."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.common.errors import ConfigError
from gpt.formula import calculate
from gpt.model import GPT, Block, add_norm
from gpt.norms.base import norms_of
from gpt.placement import build_model
from tests.tools.configs import make_config
from tests.tools.programs import REPO

PLACEMENTS = sorted(p.stem for p in (REPO / "configs/placement").glob("*.yaml"))
L = 4


def built(*extra: str) -> GPT:
    """A model of 4 blocks in float64 whose weights are all far from their initial values."""
    model = build_model(make_config("data=pydoc", f"model.n_layer={L}", *extra), 61).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model


def output(block: Block, x: Tensor) -> Tensor:
    y, branch = block(x, None)
    return y if branch is None else y + branch


class Parts:
    """A block's parts as plain functions, for the equations below."""

    def __init__(self, model: GPT, i: int) -> None:
        self.block, self.n_head = model.h[i], model.h[i].attn.n_head

    def N(self, module: nn.Module, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, 1e-5)

    def attention(self, x: Tensor, norm_qkv: bool = False, norm_mid: bool = False) -> Tensor:
        """softmax(q kᵀ/√hs + mask) v, written out."""
        a, (B, T, C) = self.block.attn, x.shape
        q, k, v = (x @ a.c_attn.weight.T + a.c_attn.bias).split(C, dim=2)
        if norm_qkv:
            q, k, v = self.N(a["q"], q), self.N(a["k"], k), self.N(a["v"], v)
        heads = [t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v)]
        scores = heads[0] @ heads[1].transpose(2, 3) / math.sqrt(C / self.n_head)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        y = (scores.softmax(-1) @ heads[2]).transpose(1, 2).reshape(B, T, C)
        y = self.N(a["mid"], y) if norm_mid else y
        return y @ a.c_proj.weight.T + a.c_proj.bias

    def mlp(self, x: Tensor, norm_mid: bool = False) -> Tensor:
        m = self.block.mlp
        u = x @ m.c_fc.weight.T + m.c_fc.bias
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        u = self.N(m["mid"], u) if norm_mid else u
        return u @ m.c_proj.weight.T + m.c_proj.bias


def equation(placement: str, p: Parts, l: int, x: Tensor) -> Tensor:  # noqa: E741
    """What the paper writes for block l."""
    a, m, N = p.block.attn, p.block.mlp, p.N
    match placement:
        case "none":
            x = x + p.attention(x)
            return x + p.mlp(x)
        case "pre":
            x = x + p.attention(N(a["in"], x))
            return x + p.mlp(N(m["in"], x))
        case "post":
            x = N(a["after"], x + p.attention(x))
            return N(m["after"], x + p.mlp(x))
        case "peri":
            x = x + N(a["out"], p.attention(N(a["in"], x)))
            return x + N(m["out"], p.mlp(N(m["in"], x)))
        case "reordered":
            x = x + N(a["out"], p.attention(x))
            return x + N(m["out"], p.mlp(x))
        case "deepnorm":
            alpha = 8**0.25  # (2·4)^¼
            x = N(a["after"], alpha * x + p.attention(x))
            return N(m["after"], alpha * x + p.mlp(x))
        case "lns":
            x = x + p.attention(N(a["in"], x) / math.sqrt(l))
            return x + p.mlp(N(m["in"], x) / math.sqrt(l))
        case "mix":
            return equation("post" if l <= 1 else "pre", p, l, x)
        case "parallel":
            n = N(a["in"], x)
            return x + p.attention(n) + p.mlp(n)
        case "subln":
            x = x + p.attention(N(a["in"], x), norm_mid=True)
            return x + p.mlp(N(m["in"], x), norm_mid=True)
        case "hybrid":
            z = N(a["after"], x + p.attention(x, norm_qkv=True))
            return z + p.mlp(z)
    raise AssertionError(f"placement {placement} has no written equation in this test")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_block_is_its_placement_s_equation(placement: str) -> None:
    model = built(f"placement={placement}")
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    for i, block in enumerate(model.h):
        expected = equation(placement, Parts(model, i), i + 1, x)
        torch.testing.assert_close(output(block, x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_only_post_like_placements_do_without_a_final_norm(placement: str) -> None:
    has_head = not isinstance(built(f"placement={placement}").final_norm, nn.Identity)
    assert has_head is (placement not in ("none", "post", "deepnorm"))


def test_qk_norm_an_embedding_norm_and_the_final_norm_are_orthogonal_to_the_placement() -> None:
    plain = built()
    model = built(
        "placement.attn.q=true", "placement.attn.k=rms", "placement.embd_norm=true",
        "placement.final_norm=false",
    )  # fmt: skip
    assert len(norms_of(model)) == len(norms_of(plain)) + 2 * L
    assert type(model.h[2].attn["k"]).__name__ == "RMSNorm"
    assert type(model.embd_norm).__name__ == "LayerNorm"
    assert isinstance(model.final_norm, nn.Identity)
    idx = torch.randint(61, (2, 7))
    x = model.embd_norm(model.wte(idx) + model.wpe.weight[:7])
    for block in model.h:
        x = output(block, x)
    torch.testing.assert_close(model(idx)[0], x @ model.wte.weight.T)


def test_a_slot_s_norm_gets_the_sizes_it_needs() -> None:
    model = built("placement.mlp.mid=batch_pos")
    assert model.h[0].mlp["mid"].running_mean.shape == (32, 128)  # block_size, 4C


def test_a_norm_may_differ_by_depth() -> None:
    model = built("placement.attn.in='rms if l > L/2 else l > 1'")
    kinds = [type(block.attn["in"]).__name__ for block in model.h]
    assert kinds == ["Identity", "LayerNorm", "RMSNorm", "RMSNorm"]


def stds(placement: str, n_layer: int) -> dict[str, float]:
    """The standard deviation of each part of the last block's initial weights."""
    cfg = make_config(
        "data=pydoc", f"placement={placement}", f"model.n_layer={n_layer}", "model.n_embd=256"
    )
    block = build_model(cfg, 61).h[-1]
    q, k, v = block.attn.c_attn.weight.chunk(3)
    parts = {"q": q, "k": k, "v": v, "o": block.attn.c_proj.weight}
    parts |= {"fc1": block.mlp.c_fc.weight, "fc2": block.mlp.c_proj.weight}
    return {name: weight.std().item() for name, weight in parts.items()}


XAVIER_SQUARE, XAVIER_MLP = math.sqrt(2 / 512), math.sqrt(2 / 1280)  # C = 256: 2C and 5C


@pytest.mark.parametrize(
    ("placement", "scaled", "gain", "xavier"),
    [
        ("pre", "o fc2", 0.353553, False),  # 1/√(2·4)
        ("lns", "", 1.0, False),
        ("deepnorm", "v o fc1 fc2", 0.420448, True),  # (8·4)^−¼
        ("subln", "v o fc1 fc2", 1.442027, True),  # √ln(2·4)
    ],
)
def test_init_goes_with_the_placement(
    placement: str, scaled: str, gain: float, xavier: bool
) -> None:
    for name, std in stds(placement, 4).items():
        base = (XAVIER_MLP if "fc" in name else XAVIER_SQUARE) if xavier else 0.02
        expected = base * (gain if name in scaled.split() else 1.0)
        assert std == pytest.approx(expected, rel=0.02), name


def test_deepnorm_s_and_magneto_s_constants_by_number() -> None:
    """DeepNet's table at 12 decoder layers: α = 24^¼ = 2.2134, β = 96^−¼ = 0.3195."""
    deepnorm = make_config("data=pydoc", "placement=deepnorm").placement
    assert deepnorm.value("alpha", 5, 12, float) == pytest.approx(2.213364, abs=1e-6)
    assert deepnorm.value("init.o", 5, 12, float) == pytest.approx(0.319472, abs=1e-6)
    magneto = make_config("data=pydoc", "placement=subln").placement
    assert magneto.value("init.fc1", 5, 12, float) == pytest.approx(1.782710, abs=1e-6)


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("(2*L)**(1/4)", 24**0.25),
        ("l**-0.5", 3**-0.5),
        ("sqrt(log(2*L))", math.sqrt(math.log(24))),
        ("l <= L/4", True),
        ("not l % 2 == 0 and l < 3", False),
        ("rms if l > 2 else layer", "rms"),
        (True, True),
        (1.5, 1.5),
        ("layer", "layer"),
    ],
)
def test_formulas_have_the_values_they_say(formula: object, value: object) -> None:
    result = calculate(formula, 3, 12)
    assert type(result) is type(value)
    assert result == value or result == pytest.approx(value)


@pytest.mark.parametrize(
    "formula",
    ["__import__('os')", "l.real", "[l for l in L]", "print(l)", "lambda: l", "l(", "'text'",
     "9**9**9**9", "1/(l-l)", "(l := 3)", "open('x')", "-" * 5000 + "l", "rms*99999999999",
     "lay+er", "-rms", "rms < layer", "9" * 400, "sqrt(rms)"],
)  # fmt: skip
def test_nothing_but_arithmetic_is_ever_run(formula: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        calculate(formula, 1, 2)


def test_the_first_norm_that_reads_the_stream_adds_the_branch() -> None:
    """A norm that adds by itself gets both summands; any other norm gets their sum."""

    class Adding(nn.Module):
        adds = True

        def forward(self, x, branch=None, stays=False):  # type: ignore[no-untyped-def]
            return x if branch is None else ((10 + stays) * (x + branch), x + branch)

    x, branch = torch.ones(2), torch.full((2,), 2.0)
    y, stream = add_norm(Adding(), x, branch)
    assert y.tolist() == [30, 30]
    assert stream.tolist() == [3, 3]
    assert add_norm(Adding(), x, branch, stays=True)[0].tolist() == [33, 33]
    assert add_norm(nn.Identity(), x, branch)[0].tolist() == [3, 3]
    assert add_norm(Adding(), x, None)[0] is x


@pytest.mark.parametrize(
    "override",
    [
        "placement.attn.in=l/0",
        "placement.final_norm=l+1",
        "placement.alpha=rms",
        "placement.alpha='1/(l-2)'",
    ],
)
def test_a_formula_of_the_wrong_kind_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="or a formula in l and L"):
        make_config("data=pydoc", override)


def test_a_formula_need_only_hold_in_the_blocks_that_there_are() -> None:
    cfg = make_config("data=pydoc", "placement.alpha='1+1/(L-2)'", "model.n_layer=4")
    assert build_model(cfg, 61).h[0].attn.plan.alpha == 1.5


def test_the_run_s_norm_named_in_a_slot_keeps_its_options() -> None:
    by_depth = "placement.attn.in='rms if l > L/2 else layer'"
    model = build_model(make_config("data=pydoc", "norm.eps=0.1", by_depth), 61)
    assert [block.attn["in"].eps for block in model.h] == [0.1, 1e-5]  # rms has its own eps
