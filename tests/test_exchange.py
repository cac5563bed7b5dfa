"""GPT-2's weights in and out: equal to `transformers` in value and gradient, both ways."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt.common.errors import ConfigError, DataError, MissingInput
from gpt.config import compose
from gpt.data.hf_tokenizer import read_hf_tokenizer
from gpt.data.tokenizer import fingerprint, load_tokenizer
from gpt.model import GPT
from gpt.placement import build_model
from gpt.sampling.exchange import read_gpt2, write_folder
from gpt.training.checkpoint import load_model
from tests.tools.configs import mostly_long, overrides
from tests.tools.hub_server import hub_server
from tests.tools.programs import run_program

transformers = pytest.importorskip("transformers")
SHAPES = {  # n_layer, n_head, n_embd, block_size, vocab_size: presets at depth 1, and odd ones
    "gpt2": (1, 12, 768, 1024, 50257),
    "medium": (1, 16, 1024, 1024, 50257),
    "large": (1, 20, 1280, 1024, 50257),
    "xl": (1, 25, 1600, 1024, 50257),
    "odd": (3, 5, 65, 37, 211),
    "tiny": (1, 1, 1, 1, 1),
}


@pytest.fixture(params=mostly_long(SHAPES, "odd", "tiny"))
def shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return SHAPES[request.param]


def theirs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """A random model of `transformers`, with γ, β and biases that are not 1 and 0."""
    n_layer, n_head, n_embd, block_size, vocab_size = shape
    config = transformers.GPT2Config(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=block_size,
        vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0,
        resid_pdrop=0.0, layer_norm_epsilon=1e-4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def compare(ours: GPT, model: torch.nn.Module, shape: tuple[int, ...], tolerance: float) -> None:
    """Logits, loss and the gradients of all weights."""
    *_, block_size, vocab_size = shape
    T = min(block_size, 64)
    idx = torch.randint(vocab_size, (2, T), generator=torch.Generator().manual_seed(1))
    logits, _ = ours(idx)
    expected = model(idx).logits
    assert (logits - expected).abs().max() < tolerance * expected.abs().max()
    weight = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    pairs = [
        (ours.wte.weight, model.transformer.wte.weight),
        (ours.wpe.weight, model.transformer.wpe.weight),
        (ours.final_norm.weight, model.transformer.ln_f.weight),
        (ours.h[0].attn["in"].bias, model.transformer.h[0].ln_1.bias),
        (ours.h[-1].mlp["in"].weight, model.transformer.h[-1].ln_2.weight),
        (ours.h[-1].attn.c_attn.weight.T, model.transformer.h[-1].attn.c_attn.weight),
        (ours.h[0].mlp.c_proj.weight.T, model.transformer.h[0].mlp.c_proj.weight),
    ]
    for a, b in pairs:
        leaf = a if a.is_leaf else None
        gradient = leaf.grad if leaf is not None else a._base.grad.T
        scale = b.grad.abs().max() + 1e-300
        assert (gradient - b.grad).abs().max() <= tolerance * scale


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_weights_in_give_the_logits_and_gradients_of_transformers(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    model = theirs(shape, dtype)
    model.save_pretrained(tmp_path)
    compare(read_gpt2(tmp_path).build(), model, shape, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_weights_out_give_the_same_logits_and_gradients_in_transformers(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    n_layer, n_head, n_embd, block_size, vocab_size = shape
    sizes = f"n_layer={n_layer} n_head={n_head} n_embd={n_embd} block_size={block_size}".split()
    cfg = compose("norm.eps=1e-3", *(f"model.{size}" for size in sizes))
    ours = build_model(cfg, vocab_size).to(dtype).eval()
    with torch.no_grad():
        for i, parameter in enumerate(ours.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.add_(0.1 * noise)
    write_folder(ours, cfg, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    compare(ours, model, shape, tolerance)
    back, weights = read_gpt2(tmp_path).build().state_dict(), ours.state_dict()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    theirs(SHAPES["odd"]).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_the_hub_s_own_names_and_masks_are_read(folder: Path) -> None:
    """OpenAI's files there leave the prefix out and carry the causal masks."""
    right = read_gpt2(folder)
    tensors = {
        k.removeprefix("transformer."): v
        for k, v in load_file(folder / "model.safetensors").items()
    }
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 37, 37).tril() for i in range(3)}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    found = read_gpt2(folder)
    assert found.weights.keys() == right.weights.keys()
    assert all(torch.equal(found.weights[name], right.weights[name]) for name in right.weights)


def test_a_pickled_file_is_read_without_running_it(folder: Path, tmp_path: Path) -> None:
    right = read_gpt2(folder).weights
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    found = read_gpt2(folder).weights
    assert all(torch.equal(found[name], right[name]) for name in right)

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "canary"),)

    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="not a file of weights"):
        read_gpt2(folder)
    assert not (tmp_path / "canary").exists()


def test_a_larger_block_size_than_the_weights_have_is_one_line(folder: Path) -> None:
    with pytest.raises(ConfigError, match="its weights have 37 positions"):
        read_gpt2(folder).build(block_size=38)


def test_files_in_shards_are_read(folder: Path) -> None:
    right = read_gpt2(folder).weights
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(names.values()):
        save_file({k: v for k, v in tensors.items() if names[k] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert read_gpt2(folder).weights.keys() == right.keys()
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(DataError, match="outside its folder"):
        read_gpt2(folder)


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt_gives_its_logits(bias: bool, tmp_path: Path) -> None:
    """Its names with Linear's layout; a compiled model's have a prefix."""
    ours = build_model(compose("model.n_layer=2", f"norm.bias={str(bias).lower()}"), 65).eval()
    with torch.no_grad():
        for i, parameter in enumerate(ours.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.add_(0.1 * noise)
        if not bias:
            for name, parameter in ours.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
    named = {"attn.in": "ln_1", "mlp.in": "ln_2", "final_norm": "ln_f"}
    weights = {}
    for name, tensor in ours.state_dict().items():
        if bias or not name.endswith("bias"):
            for old, new in named.items():
                name = name.replace(old, new)
            weights[f"_orig_mod.transformer.{name}"] = tensor
    weights["_orig_mod.lm_head.weight"] = ours.wte.weight.detach()
    args = {"n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 128, "bias": bias}
    torch.save({"model": weights, "model_args": args}, tmp_path / "ckpt.pt")
    found = read_gpt2(tmp_path / "ckpt.pt")
    assert "GELU is exact" in found.note
    idx = torch.randint(65, (2, 128))
    assert torch.equal(found.build()(idx)[0], ours(idx)[0])
    assert torch.equal(found.build(block_size=32)(idx[:, :32])[0], found.build()(idx[:, :32])[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type=llama; expected gpt2"),
        ({"activation_function": "gelu"}, "activation_function=gelu; expected gelu_new or"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False; expected True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "expected False"),
        ({"n_inner": 100}, "n_inner=100; expected 260"),
        ({"n_layer": 4}, r"h\.3\..* has the shape nothing; expected"),
        ({"n_embd": 70}, "has the shape"),
        ({"n_head": 4}, r"model\.n_embd=65: expected a multiple of model\.n_head=4"),
    ],
)
def test_what_is_not_a_gpt2_is_one_line(
    folder: Path, change: dict[str, object], message: str
) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(DataError, match=message) as error:
        read_gpt2(folder)
    assert "\n" not in str(error.value)


def test_a_head_of_its_own_and_a_missing_file_are_one_line(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros_like(tensors["transformer.wte.weight"])
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataError, match="its output head is not tied"):
        read_gpt2(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingInput, match=r"no model\.safetensors and no pytorch_model\.bin"):
        read_gpt2(folder)
    with pytest.raises(MissingInput, match=r"no config\.json of a GPT-2"):
        read_gpt2(tmp_path / "none")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["norm=rms"], r"h\.0\.attn\.in has RMSNorm\(eps=1e-05\); GPT-2 has only LayerNorms"),
        (["norm.unbiased=true"], r"h\.0\.attn\.in has LayerNorm\(.*unbiased=True"),
        (["placement=post"], r"h\.0\.attn\.in has no norm"),
        (["placement=peri"], r"h\.0\.attn\.out has LayerNorm"),
        (["placement=parallel"], r"h\.0 runs attention and MLP in parallel"),
        (["placement=lns"], r"h\.1\.attn has factors"),
        (["placement.final_norm=false"], "final_norm has no norm"),
        (["placement.embd_norm=true"], "embd_norm has LayerNorm"),
    ],
)
def test_a_model_that_gpt2_cannot_express_names_the_slot(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    cfg = compose("model.n_layer=2", "model.n_embd=32", *overrides)
    with pytest.raises(ConfigError, match=message):
        write_folder(build_model(cfg, 61), cfg, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["norm.bias=false", "norm.affine=false"])
def test_layer_norms_without_beta_or_gamma_are_written_out(option: str, tmp_path: Path) -> None:
    cfg = compose("model.n_layer=2", "model.n_embd=32", "model.block_size=16", option)
    ours = build_model(cfg, 61).double().eval()
    write_folder(ours, cfg, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    idx = torch.randint(61, (2, 16))
    assert torch.allclose(model.eval()(idx).logits, ours(idx)[0], rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Path, Path]:
    """A run with a BPE, and its export."""
    place = tmp_path_factory.mktemp("exported")
    args = overrides("data=text", f"data.path={corpus}", f"run_dir={place}/run", "tokenizer=bpe")
    assert run_program(*args).returncode == 0
    result = run_program(f"run_dir={place}/run", f"to={place}/out", script="export")
    assert result.returncode == 0, result.stderr
    return place / "run", place / "out"


def test_an_exported_run_is_what_transformers_loads(exported: tuple[Path, Path]) -> None:
    run, out = exported
    ours, tokenizer = load_model(run).double(), load_tokenizer(run / "tokenizer.json")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)
    theirs_ = transformers.AutoTokenizer.from_pretrained(out)
    for text in ("some words of text, 12 times: Ünïcödé —\n\n  end", "", " ", "don't" + "a" * 300):
        ids = tokenizer.encode_ordinary(text)
        assert theirs_(text)["input_ids"] == ids
        assert theirs_.decode(ids, clean_up_tokenization_spaces=False) == text
    idx = torch.tensor([tokenizer.encode_ordinary("some words of text")])[:, :32]
    assert (model.eval()(idx).logits - ours(idx)[0]).abs().max() < 1e-12
    card = (out / "README.md").read_text()
    assert "In training a token sees nothing but its past." in card
    assert "n_layer: 2" in card


def test_an_export_is_read_and_sampled_like_a_run(exported: tuple[Path, Path]) -> None:
    run, out = exported
    texts = []
    for folder in (run, out):
        result = run_program(f"run_dir={folder}", "prompt=some ", "seed=3", script="sample")
        assert result.returncode == 0, result.stderr
        texts.append(result.stdout)
    assert texts[0] == texts[1]
    ours, back = load_tokenizer(run / "tokenizer.json"), read_hf_tokenizer(out)
    assert fingerprint(ours) == fingerprint(back)


def test_an_export_never_overwrites(exported: tuple[Path, Path]) -> None:
    run, out = exported
    again = run_program(f"run_dir={run}", f"to={out}", script="export")
    assert (again.returncode, again.stderr.count("\n")) == (78, 1)
    assert "it has files; use a new or an empty folder" in again.stderr
    wrong = run_program(f"run_dir={run}", "out=x", script="export")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (64, 1)


def test_a_model_of_the_hub_is_downloaded_once_and_sampled(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    """From a stand-in over HTTP; afterwards it works without the hub."""
    _, out = exported
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    files["pytorch_model.bin"] = b"not asked for"
    args = ["run_dir=gpt2", "prompt=some ", "seed=3"]
    local = run_program(f"run_dir={out}", *args[1:], script="sample")
    env = {"HF_HOME": str(tmp_path / "hub")}
    with hub_server("gpt2", files, kind="models") as (url, asked):
        online = run_program(*args, script="sample", cwd=tmp_path, HF_ENDPOINT=url, **env)
        assert online.returncode == 0, online.stderr
        assert not [path for path in asked if "pytorch" in path]
        missing = run_program("run_dir=no/such", script="sample", HF_ENDPOINT=url, **env)
    offline = run_program(*args, script="sample", cwd=tmp_path, HF_ENDPOINT=url, **env)
    assert local.stdout == online.stdout == offline.stdout
    assert (missing.returncode, missing.stderr.count("\n")) == (66, 1)


def test_a_hub_name_without_network_is_one_line_within_seconds(tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    for name in ("gpt2", "someone/model"):
        result = run_program(f"run_dir={name}", script="sample", cwd=tmp_path, **env)
        assert (result.returncode, result.stderr.count("\n")) == (66, 1), result.stderr
        assert f"{name}: no such run or folder, and the hub cannot be reached" in result.stderr


def test_a_mistyped_run_asks_nobody(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with hub_server("runs/x", {}, kind="models") as (url, asked):
        result = run_program("run_dir=runs/x", script="sample", cwd=tmp_path, HF_ENDPOINT=url)
    assert (result.returncode, asked) == (66, [])
    assert "runs/x: not a run directory" in result.stderr
