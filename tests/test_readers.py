"""Local files become documents: none is lost, shifted or misread without a word."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from gpt.common.errors import ConfigError, DataError, MissingInput
from gpt.config import DataConfig
from gpt.data.corpus import open_corpus
from gpt.data.readers import read_csv, read_jsonl, split_of
from gpt.data.tokens import prepare
from tests.tools.configs import make_config, overrides
from tests.tools.made_files import jsonl
from tests.tools.programs import run_program


def texts(path: Path, column: str = "text") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"train": [], "val": []}
    for split, text in open_corpus(DataConfig("hf", str(path), column=column)).documents():
        found[split].append(text)
    return found


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "txt"])
def test_files_of_every_kind_are_the_same_documents(tmp_path: Path, kind: str) -> None:
    path = jsonl(tmp_path / "docs.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path = path.with_suffix(f".{kind}")
    if kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("id", "text"), *((r["id"], r["text"]) for r in rows)])
    elif kind == "txt":
        path.write_text("\n\n".join(row["text"] for row in rows))
    data = prepare(make_config("data=hf", f"data.path={path}"))
    text = data.tokenizer.decode(data.val.ids.tolist())
    assert [f"document {i}:" in text for i in range(40)] == [i % 10 == 9 for i in range(40)]
    assert data.train.header.n_tokens == data.train.header.n_bytes + 2 * 36  # an empty line between


@pytest.mark.parametrize("name", ["x[1].jsonl", "a, b.jsonl", "a*.jsonl"])
def test_reads_a_file_that_is_there_whatever_its_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("".join(json.dumps({"text": f"document {i} " * 9}) + "\n" for i in range(40)))
    documents = list(open_corpus(DataConfig("hf", str(path))).documents())
    assert [split for split, _ in documents].count("val") == 4


@pytest.mark.parametrize("pattern", ["*.jsonl", ""])
def test_reads_the_files_that_a_pattern_names_or_a_folder_holds(
    tmp_path: Path, pattern: str
) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "README.md").write_text("no data")
    corpus = open_corpus(DataConfig("hf", str(tmp_path / pattern)))
    assert [text for _, text in corpus.documents()] == ["a", "b"]


def test_takes_at_most_max_documents_and_names_the_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "docs.jsonl")
    few = prepare(make_config("data=hf", f"data.path={path}", "data.max_documents=10"))
    assert "document 10" not in few.tokenizer.decode(few.train.ids.tolist())
    with pytest.raises(ConfigError, match=r"data.max_documents=0: expected an integer >= 1"):
        make_config("data=hf", f"data.path={path}", "data.max_documents=0")
    with pytest.raises(ConfigError, match=r"data.column=txt: .* has text, id; did you mean 'text'"):
        prepare(make_config("data=hf", f"data.path={path}", "data.column=txt"))


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ("a.jsonl,none.jsonl", "no such file: .*none.jsonl"),
        ("a.bin", "files of .bin; expected one kind of .jsonl"),
        ("a.jsonl,b.csv", "files of .csv, .jsonl"),
    ],
)
def test_files_that_cannot_be_read_never_become_a_name_on_the_hub(
    tmp_path: Path, files: str, error: str
) -> None:
    for name in ("a.jsonl", "a.bin", "b.csv"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    path = ",".join(str(tmp_path / name) for name in files.split(","))
    with pytest.raises((DataError, MissingInput), match=error):
        open_corpus(DataConfig("hf", path))


def test_leaves_texts_as_they_are_written(tmp_path: Path) -> None:
    """A csv cell stays text, the word NA is not a missing value, a line is not a document."""
    cells = ["00001", "NA", "None", "1.50", "true", "2020-01-01", 'a "quoted", word', "two\nlines"]
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("id", "text"), (9, ""), *enumerate(cells)])
    documents = open_corpus(DataConfig("hf", str(tmp_path / "a.csv")))
    assert [text for _, text in documents.documents()] == cells
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    documents = open_corpus(DataConfig("hf", str(tmp_path / "a.txt")))
    assert [text for _, text in documents.documents()] == ["one\ntwo", "three\n"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": 5}\n', "line 2: data.column=text has a value of type int"),
        ('{"text": ["a"]}\n', "line 1: data.column=text has a value of type list"),
        ('["a"]', "line 1: expected an object"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_refuses_a_column_of_no_text(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        list(open_corpus(DataConfig("hf", str(tmp_path / "a.jsonl"))).documents())


def test_names_the_columns_of_a_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,txt\n1,a\n")
    with pytest.raises(ConfigError, match=r"has id, txt; did you mean 'txt'"):
        list(open_corpus(DataConfig("hf", str(tmp_path / "a.csv"))).documents())


def test_rows_without_text_are_counted_and_move_no_split(tmp_path: Path) -> None:
    full = [{"text": f"{i} " + "words " * 30} for i in range(40)]
    empty = [{"text": None}, {"text": ""}, {"id": 7}]
    for name, rows in (("a", full), ("b", [full[0], *empty, *full[1:]])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    a, b = (prepare(make_config("data=hf", f"data.path={tmp_path}/{n}.jsonl")) for n in "ab")
    assert (a.train.header.left_out, b.train.header.left_out) == ({}, {"empty documents": 3})
    assert a.val.ids.tolist() == b.val.ids.tolist()
    assert a.train.ids.tolist() == b.train.ids.tolist()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "data.path={path}: it is empty"),
        ('{"text": "fine"}\n{"text": ', "{path}: line 2: not JSON (Expecting value"),
    ],
)
def test_a_damaged_file_is_one_line_and_65(tmp_path: Path, content: str, error: str) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text(content)
    args = overrides("data=hf", f"data.path={path}", f"run_dir={tmp_path}/run")
    result = run_program(*args, GPT_DATA=str(tmp_path / "data"))
    assert result.returncode == 65
    assert result.stderr.count("\n") == 1
    assert error.format(path=path) in result.stderr
    assert not [p for p in tmp_path.glob("data/*") if p.suffix != ".lock"]


def test_files_have_no_subset(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "docs.jsonl")
    with pytest.raises(ConfigError, match=r"data\.subset=en: local files have no"):
        open_corpus(DataConfig("hf", str(path), subset="en"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("id,text\n1,a b c, d e f\n", "line 2 has 3 cells, and the header has 2"),
        ("id,text\n1,fine\n2\n", "line 3 has 1 cells, and the header has 2"),
        ('id,text\n1,"never closed\n', "after line 2: unexpected end of data"),
        ("id,text\n1,a\x00b\n2,caf\udce9\n", "not UTF-8"),
    ],
)
def test_a_csv_row_that_does_not_fit_its_header_is_refused_with_its_line(
    tmp_path: Path, rows: str, message: str
) -> None:
    """pandas takes a surplus first column for an index, so that the text moves to the next one."""
    path = tmp_path / "r.csv"
    path.write_bytes(rows.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message):
        list(read_csv(path, "text"))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))))
def test_a_csv_gives_back_every_text(
    tmp_path_factory: pytest.TempPathFactory, cells: list[str]
) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "id"), *((cell, i) for i, cell in enumerate(cells))])
    assert list(read_csv(path, "text")) == cells


def test_a_column_that_is_not_the_text_may_change_its_type(tmp_path: Path) -> None:
    """`datasets` infers a type for each column: "Couldn't cast array of type string to null"."""
    path = tmp_path / "a.jsonl"
    rows = [
        {"text": f"t{i}", "meta": None if i < 3 else {"a": "b"} if i < 6 else 7} for i in range(9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_jsonl(path, "text")) == [f"t{i}" for i in range(9)]


def test_a_parquet_column_of_dates_is_named(tmp_path: Path) -> None:
    import datetime

    table = pa.table({"text": [datetime.date(2020, 1, 1)]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: data\.column=text has a value of type date"):
        texts(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(DataError, match=r"b\.parquet: "):
        texts(tmp_path / "b.parquet")


@pytest.mark.parametrize("other", ["validation", "test", "valid", "dev"])
def test_the_names_of_files_give_splits(tmp_path: Path, other: str) -> None:
    """Otherwise 45 of 50 validation documents would be trained on."""
    for name in ("train", other):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(50)))
    found = texts(tmp_path)
    assert {text.split()[0] for text in found["train"]} == {"train"}
    assert {text.split()[0] for text in found["val"]} == {other}
    assert (len(found["train"]), len(found["val"])) == (50, 50)


def test_a_text_folder_with_splits_keeps_them(tmp_path: Path) -> None:
    for name in ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"):
        (tmp_path / name).write_text(name * 9)
    corpus = open_corpus(DataConfig("text", str(tmp_path)))
    found = {"train": "", "val": ""}
    for split, text in corpus.documents():
        found[split] += text
    assert found == {"train": "wiki.train.tokens" * 9, "val": "wiki.valid.tokens" * 9}
    assert dict(corpus.left_out) == {"files of the split test": 1}


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.jsonl", "train"), ("data/train-00000-of-00002.parquet", "train"),
        ("my_valid.txt", "validation"), ("dev/a.txt", "validation"), ("eval.csv", "test"),
        ("test/train.txt", "train"), ("training.txt", "train"), ("strain.txt", ""),
        ("latest.txt", ""), ("contest/a.txt", ""), ("evaluate.txt", ""),
    ],
)  # fmt: skip
def test_a_split_is_a_whole_word_of_a_name(path: str, split: str) -> None:
    assert split_of(Path(path)) == split


@pytest.mark.parametrize("name", ["text", "hf"])
def test_what_a_folder_leaves_out_is_counted_and_shown(tmp_path: Path, name: str) -> None:
    folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for place in (folder, elsewhere, folder / ".git", folder / "runs" / "layer"):
        place.mkdir(parents=True)
    (folder / "a.txt").write_text("some words\n\n" * 300)
    (folder / ".DS_Store").write_bytes(b"\xff")
    (folder / "runs" / "layer" / "config.yaml").touch()
    (folder / "runs" / "layer" / "metrics.jsonl").touch()
    os.symlink(elsewhere, folder / "more")
    if name == "hf":
        (folder / "b.pdf").touch()
    args = overrides(f"data={name}", f"data.path={folder}", f"run_dir={tmp_path}/run")
    result = run_program(*args, "train.steps=2", GPT_DATA=str(tmp_path / "data"))
    assert result.returncode == 0, result.stderr
    (line,) = re.findall("left out of the text: (.*)", result.stdout)
    assert set(line.split(", ")) == {
        "hidden folders (1)", "hidden files (1)", "links to folders (1)",
        "folders of runs or tokens (1)", *(["files of other kinds (1)"] if name == "hf" else []),
    }  # fmt: skip


def test_a_run_inside_its_own_text_resumes(tmp_path: Path) -> None:
    """`data.path=.` contains runs/, which changes with every step."""
    (tmp_path / "a.txt").write_text("some words\n" * 500)
    args = overrides("data=text", "data.path=.", "run_dir=runs/x", "train.steps=2")
    for said in ("text: folders of runs or tokens (1)\n", "runs/x has already finished"):
        result = run_program(*args, cwd=tmp_path, GPT_DATA=str(tmp_path / "data"))
        assert result.returncode == 0, result.stderr
        assert said in result.stdout


def test_a_folder_that_may_not_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("x")

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        open_corpus(DataConfig("text", str(tmp_path)))


def test_an_empty_part_of_a_list_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "secret.txt").write_text("b")
    for path in ("a.txt,", ",a.txt", "a.txt,,a.txt", "none,"):
        for name in ("text", "hf"):
            with pytest.raises(ConfigError, match="a part between the commas is empty"):
                open_corpus(DataConfig(name, path))


@pytest.mark.parametrize("path", [".", "train,validation", "*", "**/*.jsonl", "*/a.jsonl"])
def test_folders_give_splits_however_they_are_named(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "validation"):
        (tmp_path / split / "more").mkdir(parents=True)
        for place in (split, f"{split}/more"):
            if place == split or path != "*/a.jsonl":
                (tmp_path / place / "a.jsonl").write_text(
                    json.dumps({"text": split + place}) + "\n"
                )
    found = texts(Path(path))
    count = 1 if path == "*/a.jsonl" else 2
    assert [len(found["train"]), len(found["val"])] == [count, count]
    assert all(text.startswith("validation") for text in found["val"])


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    os.symlink("a.jsonl", tmp_path / "b.jsonl")
    for path in (
        tmp_path,
        f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl",
        f"{tmp_path},{tmp_path}/a.jsonl",
    ):
        corpus = open_corpus(DataConfig("hf", str(path)))
        assert [text for _, text in corpus.documents()] == ["a"]
        assert corpus.left_out["files named twice"] == 1


def test_a_folder_with_a_run_and_texts_keeps_its_texts(tmp_path: Path) -> None:
    run = tmp_path / "work" / "run"
    run.mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl"):
        (run / name).touch()
    (tmp_path / "work" / "mine.txt").write_text("mine")
    corpus = open_corpus(DataConfig("text", str(tmp_path)))
    assert "".join(text for _, text in corpus.documents()) == "mine"
    assert corpus.left_out["folders of runs or tokens"] == 1


def test_pipes_and_links_to_nothing_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    os.mkfifo(tmp_path / "pipe.txt")
    os.symlink("loop.txt", tmp_path / "loop.txt")
    corpus = open_corpus(DataConfig("text", str(tmp_path)))
    assert corpus.left_out["files that are not regular"] == 2
    with pytest.raises(DataError, match="not a regular file"):
        open_corpus(DataConfig("text", str(tmp_path / "pipe.txt")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,id,text\na,1,b\n", "it has 2 columns text"),
        ("a.jsonl", '{"text": "bad \\ud800"}\n', "half of a surrogate pair"),
    ],
)
def test_what_would_lose_text_is_one_line(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / name)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, content in (("a.txt", "a"), ("a.json", '[\n{"text": "a"}\n]')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert texts(tmp_path / name)["train"] == ["a"]
