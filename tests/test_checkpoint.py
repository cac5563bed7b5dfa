"""Checkpoints are complete or absent, damage is detected, and nothing is pickled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt.common.errors import ConfigError, DataError, MissingInput
from gpt.common.files import write_manifest
from gpt.config import Config, load_config
from gpt.training.checkpoint import FILES, checkpoints, load_model
from gpt.training.trainer import train
from tests.tools.configs import curve


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_run_directory_holds_what_the_design_says(finished: Path) -> None:
    names = {p.name for p in finished.iterdir() if not p.name.startswith(".")}
    assert names == {
        "config.yaml", "tokenizer.json", "metrics.jsonl", "stats.jsonl", "summary.json",
        "sample.txt", "DONE", "checkpoints",
    }  # fmt: skip
    newest = finished / "checkpoints" / "step_6"
    assert {p.name for p in newest.iterdir()} == {
        "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json",
    }  # fmt: skip


def test_only_the_newest_are_kept(finished: Path) -> None:
    assert [f.name for f in checkpoints(finished)] == ["step_6", "step_4"]


def test_load_model_gives_the_trained_model_back(finished: Path) -> None:
    model = load_model(finished)
    assert not model.training
    assert model.final_norm.running_var.ne(1).all()  # the norm's buffers came along
    older = load_model(finished, step=4)
    assert not torch.equal(model.wte.weight, older.wte.weight)


def test_what_is_not_there_is_named(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="no checkpoint of step 5; it has step_6, step_4"):
        load_model(finished, step=5)
    with pytest.raises(MissingInput, match=r"not a run directory, it has no config.yaml"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    run_dir: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_a_bit(run_dir / "checkpoints" / "step_6" / name)
    model = load_model(run_dir)
    assert torch.equal(model.wte.weight, load_model(run_dir, step=4).wte.weight)
    assert "step_6 is damaged" in capsys.readouterr().err


def test_a_manifest_that_lists_nothing_is_no_proof(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "step_6" / "manifest.json").write_text("{}")
    (run_dir / "checkpoints" / "step_6" / "model.safetensors").unlink()
    model = load_model(run_dir)
    assert torch.equal(model.wte.weight, load_model(run_dir, step=4).wte.weight)


def test_weights_of_another_model_are_named(run_dir: Path) -> None:
    cfg = run_dir / "config.yaml"
    cfg.write_text(cfg.read_text().replace("n_embd: 32", "n_embd: 16"))
    path = run_dir / "checkpoints" / "step_6"
    state = json.loads((path / "state.json").read_text())
    state["setting"]["configuration"] = load_config(cfg).hash()
    (path / "state.json").write_text(json.dumps(state))
    write_manifest(path / "manifest.json", FILES)
    with pytest.raises(DataError, match=r"model.safetensors: it does not fit the model"):
        load_model(run_dir)


@pytest.mark.parametrize("content", ["", '{"loss": 1}\n'])
def test_rows_that_are_gone_are_missed(
    run_dir: Path, config: Callable[..., Config], content: str
) -> None:
    """Otherwise the curve would begin in the middle and the summary cover half a run."""
    (run_dir / "DONE").unlink()
    shutil.rmtree(run_dir / "checkpoints" / "step_6")
    (run_dir / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"metrics\.jsonl: changed or shortened since the check"):
        train(config("norm=batch", f"run_dir={run_dir}"))


def test_a_run_directory_of_an_earlier_version_is_one_line(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    train(config())
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("final_norm:", "head:"))
    line = "config.yaml: from an earlier version of gpt-norms; train it again$"
    with pytest.raises(DataError, match=line):
        load_model(tmp_path / "run")
    with pytest.raises(DataError, match=line):
        train(config())


def test_resuming_from_the_older_checkpoint_gives_the_same_curve(
    run_dir: Path, finished: Path, config: Callable[..., Config]
) -> None:
    flip_a_bit(run_dir / "checkpoints" / "step_6" / "optimizer.safetensors")
    (run_dir / "DONE").unlink()
    train(config("norm=batch", f"run_dir={run_dir}"))
    assert curve(run_dir) == curve(finished)


def test_where_all_are_damaged_nothing_is_started_over(
    run_dir: Path, config: Callable[..., Config]
) -> None:
    for folder in checkpoints(run_dir):
        flip_a_bit(folder / "optimizer.safetensors")
    (run_dir / "DONE").unlink()
    with pytest.raises(DataError, match="no checkpoint is intact"):
        train(config("norm=batch", f"run_dir={run_dir}"))
    with pytest.raises(DataError, match="intact"):
        load_model(run_dir)


def test_what_a_killed_writer_left_is_swept(run_dir: Path, config: Callable[..., Config]) -> None:
    shutil.copytree(run_dir / "checkpoints" / "step_4", run_dir / "checkpoints" / "step_5.tmp")
    assert [f.name for f in checkpoints(run_dir)] == ["step_6", "step_4"]
    (run_dir / "DONE").unlink()
    train(config("norm=batch", f"run_dir={run_dir}"))
    assert not list((run_dir / "checkpoints").glob("*.tmp"))


def test_other_tokens_are_refused(
    run_dir: Path, config: Callable[..., Config], tmp_path: Path
) -> None:
    text = tmp_path / "other.txt"
    text.write_text("another text\n" * 500)
    (run_dir / "DONE").unlink()
    cfg = run_dir / "config.yaml"
    old = next(line for line in cfg.read_text().splitlines() if line.startswith("  path:"))
    cfg.write_text(cfg.read_text().replace(old, f"  path: {text}"))
    with pytest.raises(DataError, match=r"its corpus_sha256 was [0-9a-f]{64} and is now"):
        train(config("norm=batch", f"run_dir={run_dir}", f"data.path={text}"))


def test_a_finished_run_on_a_text_that_changed_is_not_taken_for_this_one(
    tmp_path: Path, config: Callable[..., Config]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one text\n" * 500)
    train(config(f"data.path={text}"))
    text.write_text("another text\n" * 500)
    with pytest.raises(DataError, match="has finished on another text"):
        train(config(f"data.path={text}"))


def test_a_finished_run_on_another_split_of_the_text_is_not_taken_for_this_one(
    tmp_path: Path, config: Callable[..., Config]
) -> None:
    """The same text in different documents: every tenth document is validation."""
    words, path = [f"some text {i} " * 20 for i in range(40)], tmp_path / "docs.jsonl"
    where = ["data=hf", f"data.path={path}"]
    for texts in (words, [a + b for a, b in zip(words[::2], words[1::2], strict=True)]):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        if texts is words:
            train(config(*where))
    with pytest.raises(DataError, match="another split of it"):
        train(config(*where))


def test_equal_numbers_written_otherwise_are_named(config: Callable[..., Config]) -> None:
    """Their hashes differ, and so do the names of the runs."""
    train(config("norm.eps=1"))
    with pytest.raises(ConfigError, match=r"norm.eps=1, and now it is 1.0"):
        train(config("norm.eps=1.0"))


def test_a_run_without_its_config_file_is_not_resumed_as_another(
    run_dir: Path, config: Callable[..., Config]
) -> None:
    (run_dir / "config.yaml").unlink()
    with pytest.raises(DataError, match=r"config\.yaml changed since the run finished"):
        train(config("norm=batch", f"run_dir={run_dir}", "optim.lr=1e-3"))
    (run_dir / "DONE").unlink()
    with pytest.raises(DataError, match="its configuration was"):
        train(config("norm=batch", f"run_dir={run_dir}", "optim.lr=1e-3"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", b"a: [", "config.yaml: damaged"),
        ("config.yaml", b"", "config.yaml: damaged"),
        ("DONE", b"done\n", "DONE: damaged"),
        ("summary.json", b"{", "run: summary.json changed since the run finished"),
        ("tokenizer.json", b"\xff", "tokenizer.json: damaged"),
        ("metrics.jsonl", b'{"step": 0}\nbroken\n{"step": 1}\n', "metrics.jsonl: changed or"),
    ],
)
def test_a_damaged_file_is_named(
    run_dir: Path, config: Callable[..., Config], name: str, content: bytes, message: str
) -> None:
    (run_dir / name).write_bytes(content)
    if name not in ("summary.json", "DONE"):
        (run_dir / "DONE").unlink()
    cfg = config("norm=batch", f"run_dir={run_dir}")
    read = load_model if name == "tokenizer.json" else lambda _: train(cfg)
    with pytest.raises(DataError, match=message):
        read(run_dir)


def test_a_folder_that_is_no_checkpoint_is_left_alone(run_dir: Path) -> None:
    shutil.copytree(run_dir / "checkpoints" / "step_6", run_dir / "checkpoints" / "step_6_backup")
    assert [f.name for f in checkpoints(run_dir)] == ["step_6", "step_4"]


def test_nothing_is_pickled(finished: Path) -> None:
    pickled = [
        p
        for p in finished.rglob("*")
        if p.is_file() and (p.read_bytes()[:2] == b"\x80\x02" or p.read_bytes()[:2] == b"PK")
    ]
    assert pickled == []
