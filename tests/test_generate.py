"""Sampling: streamed, repeatable, and honest about BatchNorm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpt.common.errors import Diverged
from gpt.data.tokenizer import load_tokenizer, make_tokenizer
from gpt.norms.batch import batch_statistics
from gpt.sampling.generate import generate, stream
from gpt.training.checkpoint import load_model
from gpt.training.trainer import train
from tests.tools.configs import make_config
from tests.tools.programs import run_program


@pytest.fixture(scope="module", params=["layer", "batch"])
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
            corpus: Path) -> Path:  # fmt: skip
    path = tmp_path_factory.mktemp("run") / "run"
    train(make_config("data=text", f"data.path={corpus}", f"run_dir={path}", "train.steps=60",
                      f"norm={request.param}", "train.eval_every=60"))  # fmt: skip
    return path


def sample(run_dir: Path, prompt: str = "the ", **options: float) -> str:
    model, tokenizer = load_model(run_dir), load_tokenizer(run_dir / "tokenizer.json")
    return generate(model, tokenizer, prompt, **{"max_new_tokens": 40, **options})


def test_a_seed_gives_the_same_text_and_another_seed_another(run_dir: Path) -> None:
    assert sample(run_dir, seed=1) == sample(run_dir, seed=1)
    assert sample(run_dir, seed=1) != sample(run_dir, seed=2)


def test_temperature_0_and_top_1_are_greedy(run_dir: Path) -> None:
    assert sample(run_dir, temperature=0) == sample(run_dir, top_k=1, seed=9)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 100])
def test_prompts_around_and_past_block_size_work(run_dir: Path, length: int) -> None:
    assert len(sample(run_dir, "x" * length)) > 0


def test_a_tiny_temperature_is_greedy_too(run_dir: Path) -> None:
    assert sample(run_dir, temperature=1e-300) == sample(run_dir, temperature=0)
    assert len(sample(run_dir, temperature=1e300)) > 0


def test_top_k_larger_than_the_vocabulary_is_all_of_it(run_dir: Path) -> None:
    assert sample(run_dir, top_k=10**6) == sample(run_dir, top_k=0)


def test_text_is_yielded_piece_by_piece_and_characters_whole(run_dir: Path) -> None:
    model = load_model(run_dir)
    tokenizer = make_tokenizer("bytes", [])
    steps = iter("aé€".encode())

    def forced(idx: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits = torch.full((1, idx.shape[1], 256), -100.0)
        logits[0, -1, next(steps)] = 100.0
        return logits, None

    model.forward = forced  # type: ignore[method-assign, assignment]
    pieces = list(stream(model, tokenizer, "x", max_new_tokens=6))
    assert pieces == ["a", "", "é", "", "", "€", ""]
    steps = iter("é".encode()[:1])
    assert list(stream(model, tokenizer, "x", max_new_tokens=1)) == ["", "\ufffd"]


def test_every_token_follows_from_the_last_block_size_before_it(run_dir: Path) -> None:
    model, contexts = load_model(run_dir), []

    def next_in_order(idx: torch.Tensor) -> tuple[torch.Tensor, None]:
        contexts.append(idx[0].tolist())
        logits = torch.zeros(1, idx.shape[1], 256)
        logits[0, -1, idx[0, -1] + 1] = 1
        return logits, None

    model.forward = next_in_order  # type: ignore[method-assign, assignment]
    pieces = stream(model, make_tokenizer("bytes", []), "(", max_new_tokens=50, temperature=0)
    assert "".join(pieces) == bytes(range(41, 91)).decode()
    assert contexts[-1] == list(range(90 - 32, 90))  # block_size is 32


def test_tokens_are_drawn_by_their_probabilities_at_a_temperature(run_dir: Path) -> None:
    model = load_model(run_dir)

    def fixed(idx: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits = torch.full((1, idx.shape[1], 256), -torch.inf)
        logits[0, -1, 97:100] = torch.tensor([0.5, 0.3, 0.2]).log()
        return logits, None

    model.forward = fixed  # type: ignore[method-assign, assignment]
    bytes_ = make_tokenizer("bytes", [])
    pieces = stream(model, bytes_, "x", max_new_tokens=2000, temperature=0.5, top_k=2)
    text = "".join(pieces)
    assert text.count("a") / 2000 == pytest.approx(0.25 / (0.25 + 0.09), abs=0.04)
    assert text.count("a") + text.count("b") == 2000


def test_logits_of_one_sample_do_not_depend_on_its_neighbours(run_dir: Path) -> None:
    """True with running statistics; false for a BatchNorm model with the batch's own."""
    model = load_model(run_dir)
    x = torch.randint(256, (8, 16), generator=torch.Generator().manual_seed(0))
    alone, among = model(x[:1])[0], model(x)[0][:1]
    torch.testing.assert_close(alone, among, rtol=1e-4, atol=1e-5)
    with batch_statistics(model):
        alone, among = model(x[:1])[0], model(x)[0][:1]
    is_batch = hasattr(model.final_norm, "running_mean")
    assert torch.allclose(alone, among, rtol=1e-4, atol=1e-5) is not is_batch


def test_the_program_streams_a_sample(run_dir: Path) -> None:
    args = [f"run_dir={run_dir}", "prompt=the norm's (row, ", "max_new_tokens=20", "seed=3"]
    first = run_program(*args, script="sample")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("the norm's (row, ")
    assert first.stdout == run_program(*args, script="sample").stdout
    own = run_program(*args, "batch_stats=true", script="sample")
    if hasattr(load_model(run_dir).final_norm, "running_mean"):
        assert own.stdout != first.stdout
    else:
        assert own.returncode == 78
        assert "no norm of this run has statistics over the batch" in own.stderr
    older = run_program(*args, "step=58", script="sample")
    assert older.returncode == 0


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["run_dir=/nowhere"], 66, "not a run directory"),
        ([], 78, "run_dir: not given; add run_dir=VALUE"),
        (["run_dir=x", "temperature=-1"], 78, "temperature=-1.0: expected a number >= 0"),
        (["run_dir=x", "promt=a"], 78, "did you mean 'prompt'"),
        (["run_dir=x", "n_layer=5"], 78, "n_layer: no such key\n"),
        (["run_dir=x", "device=cuda"], 66, "device=cuda: not on this machine"),
    ],
)
def test_mistakes_are_one_line(args: list[str], code: int, message: str) -> None:
    if "device=cuda" in args and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    result = run_program(*args, script="sample")
    assert result.returncode == code
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_model_that_has_diverged_writes_no_text(run_dir: Path, temperature: float) -> None:
    model, tokenizer = load_model(run_dir), load_tokenizer(run_dir / "tokenizer.json")
    model.wte.weight.data[3, 5] = torch.nan
    with pytest.raises(Diverged, match="its logits are not finite"):
        next(stream(model, tokenizer, "the ", max_new_tokens=3, temperature=temperature))
