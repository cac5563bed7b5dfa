"""Tokenizers, all run by tiktoken: the 256 bytes, a BPE trained on the corpus, GPT-2's."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tiktoken

from gpt.common.errors import DataError, MissingInput
from gpt.common.files import read_json, write_atomically

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BPE_VOCAB = 1024
# A long run of white space, except its last character. Python counts \x1c to \x1f, tiktoken not.
SPACES = re.compile(r"[^\S\x1c-\x1f]{100000,}(?=[^\S\x1c-\x1f]\S)")
MAX_VOCAB = 1_000_000  # tokens that a tokenizer's file may have
BPE_CHARACTERS = 20_000_000  # a BPE is trained on at most this much text
# GPT-2's split of text into words: contractions, letters, digits, the rest, white space. Unlike in
# GPT-2, a word ends after 128 characters, because merging takes time quadratic in its length.
PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}{1,128}| ?\p{N}{1,128}| ?[^\s\p{L}\p{N}]{1,128}"""
    r"""|\s{1,128}(?!\S)|\s{1,128}"""
)


def make_tokenizer(name: str, texts: Iterable[str]) -> tiktoken.Encoding:
    """The tokenizer `bytes`, `bpe` (trained on `texts`) or `gpt2`."""
    if name == "gpt2":
        return gpt2()
    return from_ranks(name, tuple(byte_ranks() if name == "bytes" else train_bpe(texts)))


@lru_cache(maxsize=8)  # a sweep's runs share a process; making one takes 0.1 s
def from_ranks(name: str, ranks: tuple[bytes, ...]) -> tiktoken.Encoding:
    """An encoding whose token i is `ranks[i]`, merged in that order."""
    mergeable = {token: rank for rank, token in enumerate(ranks)}
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=mergeable, special_tokens={})


def byte_ranks() -> list[bytes]:
    return [bytes([b]) for b in range(256)]


@lru_cache(maxsize=1)
def gpt2() -> tiktoken.Encoding:
    """GPT-2's tokenizer, which tiktoken fetches once and caches: as `r50k_base`, one file with the
    same ids as the two of `gpt2`."""
    try:
        base = tiktoken.get_encoding("r50k_base")
    except OSError as error:  # requests' exceptions are OSErrors
        raise MissingInput(
            "tokenizer=gpt2: tiktoken could not fetch GPT-2's vocabulary and has none cached; "
            "point TIKTOKEN_CACHE_DIR at a folder that has it, or use tokenizer=bpe or bytes"
        ) from error
    ranks, special = base._mergeable_ranks, base._special_tokens
    return tiktoken.Encoding(
        "gpt2", pat_str=base._pat_str, mergeable_ranks=ranks, special_tokens=special
    )


def train_bpe(texts: Iterable[str]) -> list[bytes]:
    """Byte-level BPE: the 256 bytes, then the merged tokens, the most frequent pair first."""
    vocab = train_library_bpe(texts).get_vocab()
    letters = byte_letters()
    tokens = [bytes(letters[c] for c in t) for t in sorted(vocab, key=lambda t: vocab[t])]
    return byte_ranks() + [t for t in tokens if len(t) > 1]


def train_library_bpe(texts: Iterable[str]) -> Tokenizer:
    """The same BPE as an object of the `tokenizers` library, which trains it. tiktoken runs it:
    ten times as fast, with the same tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_VOCAB,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(limited(texts, BPE_CHARACTERS), trainer)
    return tokenizer


def limited(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


def byte_letters() -> dict[str, int]:
    """The printable character that `tokenizers` writes for each byte, as GPT-2 did."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def encode(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """The tokens of a text, in which <|endoftext|> is text too.

    GPT-2's pattern overflows tiktoken's stack on a million spaces before a letter. The text is cut
    before the last of them, where the pattern would split it anyway.
    """
    if tokenizer.name != "gpt2":
        return tokenizer.encode_ordinary(text)
    cuts = [0, *(space.end() for space in SPACES.finditer(text)), len(text)]
    return [t for a, b in pairwise(cuts) for t in tokenizer.encode_ordinary(text[a:b])]


def separator(tokenizer: tiktoken.Encoding) -> list[int]:
    """The tokens between two documents: <|endoftext|> for GPT-2, otherwise an empty line."""
    return [tokenizer.eot_token] if tokenizer.name == "gpt2" else tokenizer.encode_ordinary("\n\n")


def token_bytes(tokenizer: tiktoken.Encoding) -> list[int]:
    """The number of bytes of text that each token stands for. <|endoftext|> counts as 2 bytes, the
    length of the others' "\n\n" separator, so that bits per byte are comparable."""
    special = {tokenizer.encode_single_token(t) for t in tokenizer.special_tokens_set}
    return [
        2 if token in special else len(tokenizer.decode_single_token_bytes(token))
        for token in range(tokenizer.n_vocab)
    ]


def save_tokenizer(tokenizer: tiktoken.Encoding, path: Path) -> None:
    """Write JSON: the name and, except for GPT-2, every token's bytes in base64."""
    content: dict[str, Any] = {"name": tokenizer.name}
    if tokenizer.name != "gpt2":
        tokens = (tokenizer.decode_single_token_bytes(t) for t in range(tokenizer.n_vocab))
        content["ranks"] = [base64.b64encode(t).decode() for t in tokens]
    write_atomically(path, json.dumps(content) + "\n")


def load_tokenizer(path: Path | str) -> tiktoken.Encoding:
    content = read_json(Path(path))
    try:
        name = content["name"]
        if name == "gpt2":
            return gpt2()
        if len(content["ranks"]) > MAX_VOCAB:
            raise ValueError(f"more than {MAX_VOCAB:,} tokens")
        ranks = tuple(base64.b64decode(token, validate=True) for token in content["ranks"])
        if not isinstance(name, str) or ranks[:256] != tuple(byte_ranks()):
            raise ValueError("its first 256 tokens are not the bytes")
        if len(set(ranks)) != len(ranks) or not all(ranks):
            raise ValueError("a token is empty or occurs twice")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a tokenizer ({error}); restore it") from error
    return from_ranks(name, ranks)


def fingerprint(tokenizer: tiktoken.Encoding) -> str:
    """SHA-256 over all tokens' bytes: tokenizers with equal fingerprints split text alike."""
    tokens = (tokenizer.decode_single_token_bytes(t) for t in range(tokenizer.n_vocab))
    return hashlib.sha256(b"\0".join(base64.b64encode(t) for t in tokens)).hexdigest()
