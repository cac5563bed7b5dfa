"""Tokenizers of Hugging Face, in and out: the ids are those of `transformers`."""

from __future__ import annotations

import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from gpt.common.errors import DataError
from gpt.data.hf_tokenizer import END, GPT2_PATTERN, read_hf_tokenizer, write_hf_tokenizer
from gpt.data.tokenizer import byte_letters, fingerprint, gpt2, train_bpe

transformers = pytest.importorskip("transformers")


@given(st.text(max_size=60))
def test_a_tokenizer_of_gpt2_s_form_survives_both_files(text: str) -> None:
    """vocab.json and merges.txt, and tokenizer.json: the ids are those of `transformers`."""
    encoding, folder = gpt2_like()
    ids = encoding.encode_ordinary(text)
    assert read_hf_tokenizer(folder / "old").encode_ordinary(text) == ids
    assert read_hf_tokenizer(folder / "new").encode_ordinary(text) == ids
    assert fast(folder / "new")(text)["input_ids"] == ids


@cache
def fast(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@cache
def gpt2_like() -> tuple[tiktoken.Encoding, Path]:
    """GPT-2's pattern, special token and order of bytes, with the merges of a small BPE."""
    folder = Path(tempfile.mkdtemp())
    letters = byte_letters()
    tokens = [bytes([byte]) for byte in letters.values()]
    tokens += [
        t
        for t in train_bpe(["some words of text and more of them, 123 times\n"] * 50)
        if len(t) > 1
    ]
    ranks = {token: i for i, token in enumerate(tokens)}
    encoding = tiktoken.Encoding(
        "small", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)}
    )
    for name in ("old", "new"):
        (folder / name).mkdir()
    write_hf_tokenizer(encoding, folder / "new", 32)
    model = json.loads((folder / "new" / "tokenizer.json").read_text())["model"]
    (folder / "old" / "vocab.json").write_text(json.dumps(model["vocab"] | {END: len(ranks)}))
    lines = [
        "#version: 0.2",
        *(m if isinstance(m, str) else " ".join(m) for m in model["merges"]),
        "",
    ]
    (folder / "old" / "merges.txt").write_text("\n".join(lines))
    return encoding, folder


def test_gpt2_s_own_vocabulary_is_written_and_read() -> None:
    """Only where tiktoken has it cached."""
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("no cached vocabulary of GPT-2")
    encoding = gpt2()
    folder = Path(tempfile.mkdtemp())
    write_hf_tokenizer(encoding, folder, 1024)
    back = read_hf_tokenizer(folder)
    assert (back.name, back.n_vocab) == ("gpt2", 50257)
    assert fingerprint(back) == fingerprint(encoding)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "Unigram", "vocab": {}}}, "expected a byte-level BPE"),
        ({"normalizer": {"type": "NFC"}}, "without a normalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits words in another way"),
    ],
)
def test_another_kind_of_tokenizer_is_one_line(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    _, folder = gpt2_like()
    content = json.loads((folder / "new" / "tokenizer.json").read_text()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read_hf_tokenizer(tmp_path)


def test_ids_that_do_not_follow_the_merges_are_refused(tmp_path: Path) -> None:
    _, folder = gpt2_like()
    content = json.loads((folder / "new" / "tokenizer.json").read_text())
    content["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="not in the order of its merges"):
        read_hf_tokenizer(tmp_path)
