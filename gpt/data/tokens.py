"""Token files: a corpus as tokens on disk.

A corpus is tokenized once into `data/NAME-TOKENIZER-KEY/{train,val}.bin`. A token file is 1024
bytes of header (a magic word, JSON, padded with spaces: `head -c 1024` shows it) and then the
tokens as little-endian uint16 or uint32, read through a memory map. `manifest.json` has a checksum
of each file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken
from filelock import FileLock

from gpt.common.errors import DataError
from gpt.common.files import naming, read_json, write_json, xxh3
from gpt.common.places import data_root
from gpt.common.terminal import say
from gpt.config import Config
from gpt.data.corpus import Corpus, digest, file_key, open_corpus
from gpt.data.tokenizer import (
    encode,
    fingerprint,
    load_tokenizer,
    make_tokenizer,
    save_tokenizer,
    separator,
)

MAGIC = b"gpt-norms tokens 1\n"
HEADER_BYTES = 1024
FILES = ("train.bin", "val.bin", "tokenizer.json")
FORMAT = "3"  # part of a prepared folder's key: raise it when preparation changes


@dataclass(frozen=True)
class Header:
    """dtype           `<u2` or `<u4`
    n_tokens        the number of tokens
    n_bytes         the number of bytes of the text they encode
    vocab_size      every token is below it
    tokenizer       the tokenizer's name
    fingerprint     the tokenizer's fingerprint
    corpus_sha256   SHA-256 of the corpus's text, both splits
    left_out        what the corpus does not contain, and how often: {"hidden files": 2}
    """

    dtype: str
    n_tokens: int
    n_bytes: int
    vocab_size: int
    tokenizer: str
    fingerprint: str
    corpus_sha256: str
    left_out: dict[str, int]


@dataclass(frozen=True)
class Tokens:
    """One split: its header and its memory-mapped tokens."""

    path: Path
    header: Header
    ids: np.ndarray


@dataclass(frozen=True)
class Data:
    """A prepared corpus."""

    tokenizer: tiktoken.Encoding
    train: Tokens
    val: Tokens


def prepare(cfg: Config) -> Data:
    """The prepared corpus of `cfg`, which is prepared now if it is missing.

    Only one process prepares a folder, and the other processes wait. The folder appears complete or
    not at all. Its checksums are verified when a process first reads it.
    """
    corpus = open_corpus(cfg.data)
    key = digest(FORMAT, corpus.key, cfg.tokenizer)[:12]
    folder = data_root() / f"{corpus.name}-{cfg.tokenizer}-{key}"
    data_root().mkdir(parents=True, exist_ok=True)
    if not is_complete(folder):
        with FileLock(f"{folder}.lock"):
            if not is_complete(folder):
                say(f"preparing {corpus.name} in {folder}")
                temporary = folder.with_name(f"{folder.name}.tmp")
                shutil.rmtree(temporary, ignore_errors=True)  # left by a killed preparation
                try:
                    with naming(temporary):
                        write_folder(corpus, cfg.tokenizer, temporary)
                    shutil.rmtree(folder, ignore_errors=True)  # incomplete: a file was deleted
                    os.replace(temporary, folder)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)  # left by an error
    verify(folder, file_key([folder / name for name in (*FILES, "manifest.json")]))
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    train, val = (open_tokens(folder / f"{split}.bin") for split in ("train", "val"))
    for tokens in (train, val):
        need = cfg.model.block_size + 1
        if len(tokens.ids) < need:
            raise DataError(
                f"{corpus.name}: {tokens.path.stem} has {tokens.header.n_bytes} bytes, "
                f"{len(tokens.ids)} tokens; model.block_size={cfg.model.block_size} needs {need} "
                "in train and in val (a tenth of the text); use more text or a smaller block_size"
            )
    return Data(tokenizer, train, val)


def is_complete(folder: Path) -> bool:
    return all((folder / name).exists() for name in (*FILES, "manifest.json"))


@lru_cache(maxsize=64)
def verify(folder: Path, _: str) -> None:
    """Raise DataError if a file differs from the manifest. A process checks a folder once, or again
    if its files' sizes or times have changed."""
    manifest = read_json(folder / "manifest.json")
    for name in FILES:
        if xxh3(folder / name) != manifest.get(name):
            raise DataError(
                f"{folder / name}: damaged or changed; delete {folder} to prepare it anew"
            )


def write_folder(corpus: Corpus, tokenizer_name: str, folder: Path) -> None:
    """Tokenize `corpus` into a new folder."""
    folder.mkdir()
    training = (text for split, text in corpus.documents() if split == "train")
    tokenizer = make_tokenizer(tokenizer_name, training)
    between = separator(tokenizer) if corpus.separate else []
    dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
    sha256 = hashlib.sha256()
    with ExitStack() as stack:
        paths = {split: folder / f"{split}.bin" for split in ("train", "val")}
        files = {split: stack.enter_context(path.open("wb")) for split, path in paths.items()}
        n_tokens, n_bytes = dict.fromkeys(files, 0), dict.fromkeys(files, 0)
        for file in files.values():
            file.write(b" " * HEADER_BYTES)
        for split, text in corpus.documents():
            encoded = text.encode()
            sha256.update(encoded)
            ids = np.array(encode(tokenizer, text) + between, dtype=dtype)
            files[split].write(ids.tobytes())
            n_tokens[split] += len(ids)
            n_bytes[split] += len(encoded)
        for split, file in files.items():
            header = Header(
                dtype=dtype.str,
                n_tokens=n_tokens[split],
                n_bytes=n_bytes[split],
                vocab_size=tokenizer.n_vocab,
                tokenizer=tokenizer.name,
                fingerprint=fingerprint(tokenizer),
                corpus_sha256=sha256.hexdigest(),
                left_out={what: n for what, n in corpus.left_out.items() if n},
            )
            content = MAGIC + json.dumps(asdict(header)).encode()
            file.seek(0)
            file.write(content.ljust(HEADER_BYTES - 1) + b"\n")
            file.flush()
            os.fsync(file.fileno())
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    manifest = {name: xxh3(folder / name) for name in FILES}
    write_json(folder / "manifest.json", manifest)


def open_tokens(path: Path) -> Tokens:
    """Open a token file; DataError if its header and content do not agree."""
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    if not head.startswith(MAGIC):
        raise DataError(f"{path}: not a token file of this version; delete its folder")
    try:
        header = Header(**json.loads(head[len(MAGIC) :]))
        if header.dtype not in ("<u2", "<u4"):
            raise ValueError(header.dtype)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: its header is damaged; delete its folder") from error
    size = HEADER_BYTES + header.n_tokens * np.dtype(header.dtype).itemsize
    if path.stat().st_size != size:
        raise DataError(f"{path}: {path.stat().st_size} bytes, expected {size}; delete its folder")
    if header.n_tokens == 0:  # an empty file cannot be mapped
        return Tokens(path, header, np.empty(0, header.dtype))
    return Tokens(path, header, np.memmap(path, header.dtype, mode="r", offset=HEADER_BYTES))
