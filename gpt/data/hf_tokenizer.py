"""Tokenizers of Hugging Face, in and out: `tokenizer.json`, or `vocab.json` with `merges.txt`.

They write a byte as one printable letter, as GPT-2 did, and list merges; tiktoken has the bytes of
each token, merged in the order of their ids.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tiktoken

from gpt.common.errors import DataError, MissingInput
from gpt.common.files import read_json, write_json
from gpt.data.tokenizer import byte_letters

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END = "<|endoftext|>"
GPT2_PATTERN = (  # GPT-2's own; PATTERN limits its words to 128 characters
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
)


def read_hf_tokenizer(folder: Path) -> tiktoken.Encoding:
    """The byte-level BPE of a folder. DataError if it is another kind of tokenizer."""
    if (folder / "tokenizer.json").is_file():
        return from_tokenizer_json(folder / "tokenizer.json")
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        raise MissingInput(f"{folder}: no tokenizer.json, and no vocab.json with merges.txt")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    vocab = read_json(folder / "vocab.json")
    special = {END: vocab.pop(END)} if END in vocab else {}
    return make(vocab, merges, special, GPT2_PATTERN, folder / "vocab.json")


def from_tokenizer_json(path: Path) -> tiktoken.Encoding:
    content = read_json(path)
    model = content.get("model") or {}
    split, *more = (content.get("pre_tokenizer") or {}).get("pretokenizers", [None])
    split = split or content.get("pre_tokenizer") or {}
    if model.get("type", "BPE") != "BPE" or content.get("normalizer"):
        raise DataError(f"{path}: expected a byte-level BPE without a normalizer, as GPT-2 has")
    if split.get("type") == "Split" and more and more[0].get("type") == "ByteLevel":
        pattern = split["pattern"].get("Regex", "")
    elif split.get("type") == "ByteLevel" and not split.get("add_prefix_space"):
        pattern = GPT2_PATTERN
    else:
        raise DataError(f"{path}: it splits words in another way than GPT-2 does")
    special = {t["content"]: t["id"] for t in content.get("added_tokens", [])}
    vocab = {token: i for token, i in model["vocab"].items() if token not in special}
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return make(vocab, merges, special, pattern, path)


def make(
    vocab: dict[str, int], merges: list[str], special: dict[str, int], pattern: str, path: Path
) -> tiktoken.Encoding:
    """The encoding, if the order of the merges is that of the ids of the tokens they make."""
    letters = byte_letters()
    try:
        ranks = {bytes(letters[c] for c in token): i for token, i in vocab.items()}
        made = [vocab[merge.replace(" ", "", 1)] for merge in merges]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: not a byte-level BPE; it lacks {error}") from error
    in_order = all(a < b for a, b in pairwise(made)) and len(made) == len(ranks) - 256
    if not in_order or sorted([*ranks.values(), *special.values()]) != list(
        range(len(ranks) + len(special))
    ):
        raise DataError(f"{path}: its ids are not in the order of its merges, as GPT-2's are")
    name = "gpt2" if END in special and len(ranks) == 50256 else path.parent.name or "hf"
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def write_hf_tokenizer(tokenizer: tiktoken.Encoding, folder: Path, block_size: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer` reads."""
    to_library(tokenizer).save(str(folder / "tokenizer.json"))
    ends = {"eos_token": END, "bos_token": END} if tokenizer.special_tokens_set else {}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size, **ends},
    )


def to_library(tokenizer: tiktoken.Encoding) -> Tokenizer:
    """The same tokenizer as an object of the `tokenizers` library."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    names = {byte: letter for letter, byte in byte_letters().items()}

    def spell(token: bytes) -> str:
        return "".join(names[byte] for byte in token)

    ranks: dict[bytes, int] = dict(tokenizer._mergeable_ranks)
    ordered = sorted(ranks, key=ranks.__getitem__)
    pairs = [parts_of(token, ranks) for token in ordered if len(token) > 1]
    merges = [(spell(a), spell(b)) for a, b in pairs]
    model: Any = models.BPE(vocab={spell(t): i for t, i in ranks.items()}, merges=merges)
    library = Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizer._pat_str), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(t) for t in sorted(tokenizer.special_tokens_set)])
    return library


def parts_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge makes `token`: what the merges before it leave of its bytes."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        made = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        i = made.index(min(made))
        if made[i] >= ranks[token]:
            raise DataError(f"token {token!r} cannot be made by merges of earlier tokens")
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
