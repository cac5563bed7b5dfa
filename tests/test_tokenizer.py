"""Tokenizers: decoding gives back any text that was encoded."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.common.errors import DataError, MissingInput
from gpt.data.tokenizer import (
    BPE_VOCAB,
    PATTERN,
    byte_letters,
    fingerprint,
    from_ranks,
    gpt2,
    limited,
    load_tokenizer,
    make_tokenizer,
    save_tokenizer,
    token_bytes,
    train_bpe,
    train_library_bpe,
)
from tests.tools.programs import run_program

TEXT = ["The norm's mean and variance, 123 times: Ünïcödé — and  white   space.\n\n" * 50] * 3


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> tiktoken.Encoding:
    return make_tokenizer(request.param, TEXT)


@given(text=st.text(max_size=80))
@settings(deadline=None)
def test_any_text_survives_a_round_trip(tokenizer: tiktoken.Encoding, text: str) -> None:
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(ids) == text
    lengths = token_bytes(tokenizer)
    assert sum(lengths[i] for i in ids) == len(text.encode())


def test_bytes_are_the_256_bytes() -> None:
    assert make_tokenizer("bytes", []).encode_ordinary("aé") == list("aé".encode())


def test_bpe_is_trained_on_the_text_and_the_same_each_time() -> None:
    a, b = make_tokenizer("bpe", TEXT), make_tokenizer("bpe", TEXT)
    assert fingerprint(a) == fingerprint(b)
    assert 256 < a.n_vocab <= BPE_VOCAB
    assert len(a.encode_ordinary(TEXT[0])) < len(TEXT[0]) / 3
    assert fingerprint(a) != fingerprint(make_tokenizer("bpe", ["other text " * 100]))


def test_bpe_is_trained_on_so_many_characters_of_all_texts() -> None:
    assert list(limited(["abc", "defg", "h"], 5)) == ["abc", "de"]


def test_tiktoken_cuts_text_as_the_library_that_trained_the_bpe() -> None:
    from pydoc_data.topics import topics

    library = train_library_bpe(topics.values())
    ours = from_ranks("bpe", tuple(train_bpe(topics.values())))
    assert ours.n_vocab == BPE_VOCAB
    letters = byte_letters()
    for text in topics.values():
        theirs = [bytes(letters[c] for c in token) for token in library.encode(text).tokens]
        assert ours.decode_tokens_bytes(ours.encode_ordinary(text)) == theirs


def test_a_tokenizer_survives_its_file(tokenizer: tiktoken.Encoding, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert fingerprint(loaded) == fingerprint(tokenizer)
    assert loaded.encode_ordinary(TEXT[0]) == tokenizer.encode_ordinary(TEXT[0])


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(MissingInput, match="no such file"):
        load_tokenizer(tmp_path / "none.json")


def test_gpt2_without_network_or_cache_is_one_line_with_the_way_out(tmp_path: Path) -> None:
    env = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"), "https_proxy": "http://127.0.0.1:9"}
    result = run_program("tokenizer=gpt2", f"run_dir={tmp_path}/run", **env)
    assert result.returncode == 66
    assert result.stderr.count("\n") == 1
    assert "TIKTOKEN_CACHE_DIR" in result.stderr
    assert "tokenizer=bpe or bytes" in result.stderr


def test_gpt2_is_tiktoken_s_and_saved_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = tiktoken.Encoding(
        "r50k_base",
        pat_str=PATTERN,
        mergeable_ranks={bytes([b]): b for b in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"r50k_base": stand_in}.__getitem__)
    gpt2.cache_clear()
    tokenizer = make_tokenizer("gpt2", [])
    assert tokenizer.name == "gpt2"
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_text() == '{"name": "gpt2"}\n'
    assert load_tokenizer(tmp_path / "tokenizer.json") is tokenizer
    gpt2.cache_clear()
    assert token_bytes(tokenizer)[256] == 2  # <|endoftext|> stands for an empty line


def test_a_bpe_of_little_text_is_small_and_works() -> None:
    tokenizer = make_tokenizer("bpe", ["aaa"])
    assert tokenizer.decode(tokenizer.encode_ordinary("aaab")) == "aaab"
