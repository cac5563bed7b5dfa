"""Corpora, token files and batches."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.common.errors import ConfigError, DataError, MissingInput
from gpt.config import Config, DataConfig
from gpt.data import tokens
from gpt.data.batches import TrainBatches, ValBatches
from gpt.data.corpus import Corpus, open_corpus
from gpt.data.readers import CHUNK
from gpt.data.tokens import open_tokens, prepare
from tests.tools.configs import make_config
from tests.tools.programs import run_program


def split_of(corpus: Corpus) -> dict[str, str]:
    texts = {"train": "", "val": ""}
    for split, text in corpus.documents():
        texts[split] += text
    return texts


def text_config(path: Path, *extra: str) -> Config:
    return make_config("data=text", f"data.path='{path}'", *extra)


def test_pydoc_validation_holds_no_paragraph_that_training_has() -> None:
    """The topics quote one another: a plain split would validate on text seen in training."""
    texts = split_of(open_corpus(DataConfig("pydoc")))
    paragraphs = {
        split: {" ".join(p.split()) for p in text.split("\n\n") if p.strip()}
        for split, text in texts.items()
    }
    assert not paragraphs["train"] & paragraphs["val"]
    assert 300_000 < sum(map(len, texts.values())) < 600_000
    assert 0.05 < len(texts["val"]) / len(texts["train"]) < 0.2


def test_stdlib_is_the_sources_of_this_python() -> None:
    texts = split_of(open_corpus(DataConfig("stdlib")))
    assert "def " in texts["val"]
    assert len(texts["train"]) > 5_000_000


def test_stdlib_validation_hardly_repeats_what_training_has() -> None:
    """Compares runs of four lines. Once 19% was repeated: tables in `encodings` are copies."""
    fours, lines = {}, {}
    for split, text in split_of(open_corpus(DataConfig("stdlib"))).items():
        lines[split] = [line.strip() for line in text.split("\n") if line.strip()]
        fours[split] = list(zip(*(lines[split][i:] for i in range(4)), strict=False))
    shown = set(fours["train"])
    repeated = {i + j for i, four in enumerate(fours["val"]) if four in shown for j in range(4)}
    assert sum(len(lines["val"][i]) for i in repeated) < 0.05 * sum(map(len, lines["val"]))


def test_text_is_split_at_nine_tenths_and_kept_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("é\r\n".encode() * 1000)
    texts = split_of(open_corpus(DataConfig("text", str(path))))
    assert (texts["train"] + texts["val"]).encode() == path.read_bytes()
    assert len(texts["val"].encode()) == 400


def test_a_large_text_is_read_in_chunks_and_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(("é" * 700 + "\n") * 2500 + "ü" * 50_001)
    corpus = open_corpus(DataConfig("text", str(path)))
    assert len(list(corpus.documents())) > path.stat().st_size // CHUNK
    texts = split_of(corpus)
    assert texts["train"] + texts["val"] == path.read_text()
    assert abs(len(texts["val"].encode()) - path.stat().st_size / 10) < 3


def test_a_folder_is_its_files_in_order_and_its_hidden_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.md").write_text("first")
    (tmp_path / ".hidden").write_text("never")
    texts = split_of(open_corpus(DataConfig("text", str(tmp_path))))
    assert texts["train"] + texts["val"] == "firstsecond"


def test_what_comes_after_the_cut_is_all_validation(tmp_path: Path) -> None:
    for i in range(19):
        (tmp_path / f"{i:02}.txt").write_text(chr(97 + i) * 10)
    texts = split_of(open_corpus(DataConfig("text", str(tmp_path))))
    assert texts["train"].endswith("q" * 10 + "r")
    assert texts["val"] == "r" * 9 + "s" * 10


@pytest.mark.parametrize("size", [0, 1, 32, 300])
def test_too_little_text_is_refused_with_its_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a" * size)
    with pytest.raises(DataError, match=r"bytes, \d+ tokens; model.block_size=32 needs 33"):
        prepare(text_config(path))


def test_text_that_is_not_utf8_is_refused_with_file_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"abc\n" * 100 + b"caf\xe9 au lait\n")
    with pytest.raises(DataError, match=r"latin.txt: not UTF-8 at byte 403"):
        prepare(text_config(path))


def test_a_missing_path_and_an_unknown_corpus_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="no such file or folder"):
        open_corpus(DataConfig("text", str(tmp_path / "none")))
    with pytest.raises(MissingInput, match="no readable file"):
        open_corpus(DataConfig("text", str(tmp_path)))
    with pytest.raises(ConfigError, match="did you mean 'pydoc'"):
        open_corpus(DataConfig("pydok"))


def test_a_token_file_says_what_it_is(config: Callable[..., Config], corpus: Path) -> None:
    data = prepare(config())
    header = data.train.header
    assert header.dtype == "<u2"
    assert header.vocab_size == 256
    assert header.tokenizer == "bytes"
    assert header.corpus_sha256 == hashlib.sha256(corpus.read_bytes()).hexdigest()
    assert len(header.fingerprint) == 64
    assert (
        bytes(data.train.ids.astype(np.uint8)) + bytes(data.val.ids.astype(np.uint8))
        == corpus.read_bytes()
    )
    assert isinstance(data.train.ids, np.memmap)


def test_ids_above_65535_take_four_bytes(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2 fits two bytes; a larger vocabulary must not wrap around."""
    import tiktoken

    wide = tiktoken.Encoding(
        "wide",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([b]): b + 70_000 for b in range(256)},
        special_tokens={},
    )
    monkeypatch.setattr(tokens, "make_tokenizer", lambda *_: wide)
    monkeypatch.setattr(tokens, "fingerprint", lambda _: "wide")
    monkeypatch.setattr(
        tokens, "save_tokenizer", lambda _, path: path.write_text('{"name": "gpt2"}')
    )
    monkeypatch.setattr(tokens, "load_tokenizer", lambda _: wide)
    data = prepare(config("model.block_size=31", "tokenizer=gpt2"))
    assert data.train.header.dtype == "<u4"
    assert data.train.ids.min() >= 70_000


@pytest.mark.parametrize("damage", ["bytes, expected", "header", "not a token file"])
def test_a_damaged_token_file_is_refused(tmp_path: Path, corpus: Path, damage: str) -> None:
    text = tmp_path / "corpus.txt"
    text.write_bytes(corpus.read_bytes())
    path = prepare(text_config(text)).train.path
    content = path.read_bytes()
    damaged = {"bytes, expected": content[:-1], "header": content.replace(b"{", b"(", 1)}
    path.write_bytes(damaged.get(damage, b"x" * len(content)))
    with pytest.raises(DataError, match=f"{damage}.*delete its folder"):
        open_tokens(path)


def test_preparation_happens_once_and_again_when_the_text_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text\n" * 200)
    first = prepare(text_config(path)).train.path
    written = first.stat().st_mtime_ns
    assert prepare(text_config(path)).train.path == first
    assert first.stat().st_mtime_ns == written
    path.write_text("other text\n" * 200)
    assert prepare(text_config(path)).train.path != first


def test_a_killed_preparation_leaves_nothing_that_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text\n" * 200)
    folder = prepare(text_config(path)).train.path.parent
    os.rename(folder, f"{folder}.tmp")  # as if killed just before the rename
    (Path(f"{folder}.tmp") / "train.bin").write_bytes(b"half")
    assert len(prepare(text_config(path)).train.ids) == 1800
    assert not Path(f"{folder}.tmp").exists()


def prepare_and_count(path: Path) -> int:
    return len(prepare(text_config(path)).train.ids)


def test_processes_that_prepare_at_once_all_see_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text\n" * 50_000)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        counts = pool.map(prepare_and_count, [path] * 4, chunksize=1)
    assert counts == [450_000] * 4


def test_batches_follow_from_seed_and_step_alone() -> None:
    ids = np.arange(1000, dtype=np.uint16)
    batches = TrainBatches(ids, batch_size=4, grad_accum=2, block_size=8, seed=1)
    cpu = torch.device("cpu")
    first = [x for x, _ in batches.at(7, cpu)]
    next_step = [x for x, _ in batches.at(8, cpu)]
    assert not torch.equal(torch.cat(first), torch.cat(next_step))
    again = [x for x, _ in batches.at(7, cpu)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    whole = TrainBatches(ids, batch_size=8, grad_accum=1, block_size=8, seed=1)
    x, y = next(whole.at(7, cpu))
    assert torch.equal(x, torch.cat(first))  # accumulation sees the same tokens
    assert torch.equal(y, x + 1)
    other = TrainBatches(ids, batch_size=8, grad_accum=1, block_size=8, seed=2)
    assert not torch.equal(next(other.at(7, cpu))[0], x)


def test_every_window_can_be_drawn_and_none_reaches_past_the_end() -> None:
    batches = TrainBatches(np.arange(10), batch_size=500, grad_accum=1, block_size=8, seed=1)
    x, _ = next(batches.at(1, torch.device("cpu")))
    assert set(x[:, 0].tolist()) == {0, 1}


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_validation_windows_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    ids = np.arange(1001)
    val = ValBatches(ids, batch_size=batch_size, block_size=10, max_tokens=200)
    targets = torch.cat([y for _, y in val.on(torch.device("cpu"))])
    assert targets.shape == (20, 10)
    assert len(set(targets.flatten().tolist())) == 200  # no token is a target twice
    assert targets.max() == 1000  # spread to the end
    equal = [len(y) for _, y in val.on(torch.device("cpu"), equal=True)]
    assert equal == {1: [1] * 20, 3: [3] * 6, 64: []}[batch_size]


@pytest.mark.parametrize("text", ["x" * 1_000_000, "字" * 300_000, " " * 300_000, "ab " * 100_000])
def test_text_without_spaces_is_tokenized_in_seconds(tmp_path: Path, text: str) -> None:
    """Merges take time quadratic in a word's length, so words end at 128 characters."""
    path = tmp_path / "long.txt"
    path.write_text(text)
    data = prepare(text_config(path, "tokenizer=bpe", "model.block_size=4"))
    assert data.tokenizer.decode(data.train.ids.tolist()) == text[: int(len(text) * 0.9)]


def test_a_prepared_folder_that_lost_a_file_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text\n" * 200)
    folder = prepare(text_config(path)).train.path.parent
    (folder / "tokenizer.json").unlink()
    assert len(prepare(text_config(path)).train.ids) == 1800


def test_a_corpus_is_prepared_without_training_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "it's a text (1).txt"
    path.write_text("some text\n" * 200)
    env = {"GPT_DATA": str(tmp_path / "data")}
    args = ["data=text", f"data.path={path}", "tokenizer=bytes"]
    result = run_program(*args, script="prepare", **env)
    assert result.returncode == 0, result.stderr
    assert "train.bin: 1,800 bytes as 1,800 bytes tokens" in result.stdout


def test_tokens_that_are_prepared_need_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepare on a machine with a network, train on one without."""
    texts = iter(["some text " * 50]), iter(["other text " * 20])
    monkeypatch.setattr("gpt.data.corpus.splits_of_hub", lambda *_: texts)
    cfg = make_config("data=hf", "data.path=someone/something", "data.streaming=true")
    prepare(cfg)
    monkeypatch.undo()
    monkeypatch.setattr("gpt.common.hub.reachable", lambda: False)
    assert len(prepare(cfg).val.ids) == 222


def test_a_text_that_changes_under_its_size_and_time_is_prepared_anew(tmp_path: Path) -> None:
    """Tokens of the old text would be trained on, and its old SHA-256 reported."""
    path = tmp_path / "a.txt"
    path.write_text("old words " * 500)
    old, times = prepare(text_config(path)), path.stat()
    path.write_text("new words " * 500)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    new = prepare(text_config(path))
    assert new.tokenizer.decode(new.val.ids[:9].tolist()) in "new words new words "
    assert new.train.header.corpus_sha256 != old.train.header.corpus_sha256


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json", "manifest.json"])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=20)
def test_a_flipped_bit_in_a_prepared_folder_is_found(
    prepared: Path, name: str, place: float, bit: int
) -> None:
    """One bit of val.bin once changed the validation loss from 5.541312 to 5.541323."""
    path = prepared / "folder" / name
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[int(place * len(whole))] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        with pytest.raises(DataError, match=r"(damaged|restore)"):
            prepare(text_config(prepared / "a.txt"))
    finally:
        path.write_bytes(whole)
    prepare(text_config(prepared / "a.txt"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A text and, as `folder`, its tokens."""
    place = tmp_path_factory.mktemp("prepared")
    (place / "a.txt").write_text("some words\n" * 300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT_DATA", str(place / "data"))
        tokens_path = prepare(text_config(place / "a.txt")).val.path
        os.symlink(tokens_path.parent, place / "folder")
        yield place
