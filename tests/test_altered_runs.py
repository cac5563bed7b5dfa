"""Run directories that somebody changed or crafted: one line, and nothing overwritten."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt.common.errors import ConfigError, DataError, Diverged
from gpt.common.files import write_manifest
from gpt.config import Config
from gpt.norms.batch import BatchNorm
from gpt.training.checkpoint import FILES, checkpoints, load_model
from gpt.training.trainer import train
from tests.tools.programs import run_program


def test_a_configuration_edited_after_the_run_is_not_sampled(run_dir: Path) -> None:
    cfg = run_dir / "config.yaml"
    cfg.write_text(cfg.read_text().replace("eps: 1.0e-05", "eps: 1.0e-01"))
    with pytest.raises(DataError, match=r"config\.yaml: not what step_6 was made with; restore it"):
        load_model(run_dir)


def test_a_tokenizer_edited_after_the_run_is_not_sampled(run_dir: Path) -> None:
    """One token more, or a file that tiktoken would panic on."""
    path = run_dir / "tokenizer.json"
    content = json.loads(path.read_text())
    byte = [base64.b64encode(bytes([b])).decode() for b in range(256)]
    path.write_text(json.dumps({"name": "bytes", "ranks": [*byte, "YWI="]}))
    with pytest.raises(DataError, match=r"tokenizer\.json: not what step_6 was made with"):
        load_model(run_dir)
    for ranks in ([*byte[:-1]], [*byte, "YQ=="], [*byte, ""], [*byte, "YWI=", "YWI="], [7], None):
        path.write_text(json.dumps(content | {"ranks": ranks}))
        with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
            load_model(run_dir)


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "stats.jsonl", "summary.json", "sample.txt"]
)
def test_a_changed_file_of_a_finished_run_is_named_by_the_next_command_and_the_report(
    run_dir: Path, config: Callable[..., Config], name: str
) -> None:
    path = run_dir / name
    text = path.read_text()
    path.write_text(text.replace("1", "2", 1) if "json" in name else text + "# a word\n")
    with pytest.raises(DataError, match=f"{re.escape(name)} changed since the run finished"):
        train(config("norm=batch", f"run_dir={run_dir}"))
    result = run_program(str(run_dir), script="report")
    assert result.returncode == 0, result.stderr
    assert f"Runs whose files have changed since they finished: run ({name})." in result.stdout


def test_a_done_of_any_content_is_no_proof(run_dir: Path, config: Callable[..., Config]) -> None:
    for content in ("", "{}", "[]", "0" * 64):
        (run_dir / "DONE").write_text(content)
        with pytest.raises(DataError, match=r"(DONE: damaged|changed since the run finished)"):
            train(config("norm=batch", f"run_dir={run_dir}"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "stats.jsonl"])
@pytest.mark.parametrize("change", ["shortened", "edited"])
def test_rows_changed_before_a_resume_are_missed(
    run_dir: Path, config: Callable[..., Config], name: str, change: str
) -> None:
    (run_dir / "DONE").unlink()
    shutil.rmtree(run_dir / "checkpoints" / "step_6")
    lines = (run_dir / name).read_text().splitlines(True)
    lines = lines[1:] if change == "shortened" else [lines[0].replace("1", "2"), *lines[1:]]
    (run_dir / name).write_text("".join(lines))
    with pytest.raises(DataError, match=rf"{re.escape(name)}: changed or shortened since"):
        train(config("norm=batch", f"run_dir={run_dir}"))


def test_a_checkpoint_with_a_number_that_is_not_finite_is_never_written(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training uses the batch's own statistics, so its losses do not show it."""
    end_step = BatchNorm.end_step

    def broken(norm: BatchNorm) -> None:
        end_step(norm)
        norm.running_var[0] = float("nan")

    monkeypatch.setattr(BatchNorm, "end_step", broken)
    changes = ["train.grad_accum=2", "train.eval_every=100", "train.checkpoint_every=2"]
    with pytest.raises(Diverged, match=r"at step 2: h\.0\.attn\.in\.running_var is not finite"):
        train(config("norm=batch", *changes))
    assert not checkpoints(tmp_path / "run")


def test_a_folder_that_is_not_a_run_is_left_as_it_is(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    theirs = tmp_path / "run"
    theirs.mkdir()
    for name in ("tokenizer.json", "metrics.jsonl"):
        (theirs / name).write_text("of somebody")
    with pytest.raises(ConfigError, match=r"has metrics\.jsonl, tokenizer\.json and no config"):
        train(config())
    assert {p.name: p.read_text() for p in theirs.iterdir()} == dict.fromkeys(
        ("tokenizer.json", "metrics.jsonl"), "of somebody"
    )


@pytest.mark.parametrize("there", [True, False])
def test_a_refused_run_removes_only_the_folders_it_made(
    config: Callable[..., Config], tmp_path: Path, there: bool
) -> None:
    parent = tmp_path / "a"
    if there:
        (parent / "b").mkdir(parents=True)
    with pytest.raises(ConfigError, match="strict_causal"):
        train(config("norm=batch", "strict_causal=true", f"run_dir={parent}/b"))
    assert (parent / "b").exists() == there
    assert parent.exists() == there


def craft(folder: Path, name: str, content: bytes) -> None:
    """Change a file of a checkpoint, and its manifest accordingly."""
    (folder / name).write_bytes(content)
    write_manifest(folder / "manifest.json", FILES)


def header(**tensors: object) -> bytes:
    content = json.dumps(tensors).encode()
    return len(content).to_bytes(8, "little") + content


HUGE = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", header(**{"wte.weight": HUGE})),
        ("model.safetensors", (1 << 60).to_bytes(8, "little") + b"{}"),
        ("model.safetensors", header()),
        ("model.safetensors", b""),
        (
            "optimizer.safetensors",
            header(**{"other/exp_avg": {**HUGE, "shape": [0], "data_offsets": [0, 0]}}),
        ),
        ("state.json", b"{}"),
        ("state.json", b'{"step": -5, "setting": {}, "rows": {}, "processes": 1}'),
        ("state.json", b'{"step": 5, "setting": {}, "rows": {}, "processes": 1}'),
        ("state.json", b'{"step": true, "setting": [], "rows": {}, "processes": 1}'),
        ("state.json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    ],
)
def test_a_crafted_checkpoint_is_one_line(
    run_dir: Path, config: Callable[..., Config], name: str, content: bytes
) -> None:
    """Somebody may send a run whose manifest fits."""
    craft(run_dir / "checkpoints" / "step_6", name, content)
    (run_dir / "DONE").unlink()
    with pytest.raises(DataError) as error:
        train(config("norm=batch", f"run_dir={run_dir}"))
    assert "\n" not in str(error.value)
    if name != "optimizer.safetensors":
        with pytest.raises(DataError):
            load_model(run_dir)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: BOMB + text, "it has an alias"),
        (lambda text: text + "x: " + "[" * 1_000_000, "damaged (while"),
        (lambda text: text + "#" * (1 << 20), "longer than 1 MiB"),
        (lambda text: text.replace("seed: 1337", "seed: ${oc.env:SECRET}"), "seed has an interp"),
        (lambda text: text.replace("name: batch", "name: x${oc.env:SECRET}"), "norm.name has an"),
        (lambda text: text.replace("n_layer: 2", "n_layer: 100000000"), "model.n_layer=100000000"),
        (lambda text: text.replace("n_embd: 32", "n_embd: 400000000"), "model.n_embd=400000000"),
    ],
)
def test_a_crafted_configuration_is_one_line(
    run_dir: Path, change: Callable[[str], str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "a-secret")
    path = run_dir / "config.yaml"
    text = path.read_text()
    assert text != change(text)
    path.write_text(change(text))
    with pytest.raises(DataError, match=re.escape(message)) as error:
        load_model(run_dir)
    assert "a-secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_millions_of_tokens_is_one_line(run_dir: Path) -> None:
    (run_dir / "tokenizer.json").write_text(
        json.dumps({"name": "x", "ranks": ["YQ=="] * 2_000_000})
    )
    with pytest.raises(DataError, match="more than 1,000,000 tokens"):
        load_model(run_dir)
