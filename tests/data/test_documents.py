"""Documents of files, folders and the standard library, and how some are held out."""

import gzip
import hashlib
import os
import sysconfig
from pathlib import Path

import pytest
from text_files import DOCUMENTS, write
from transformers.utils import logging

from hf_decoder.data.documents import (
    load_standard_library,
    load_text,
    standard_library_files,
)
from hf_decoder.data.reading import find_invalid_byte


def texts(dataset):
    return dataset["text"][:]


# ------------------------------------------------------------------------------------------- standard library


def test_standard_library_files_against_a_walk_of_the_folder():
    root = sysconfig.get_path("stdlib")
    expected = []
    for folder, _, names in os.walk(root):
        parts = os.path.relpath(folder, root).split(os.sep)
        if any(p in {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"} for p in parts):
            continue
        expected += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    files = [str(path) for path in standard_library_files()]
    assert len(files) == len(set(files)) > 300
    left_out = set(expected) - set(files)
    assert set(files) <= set(expected)
    for path in left_out:
        generated = os.path.basename(path).startswith(("_sysconfigdata", "sitecustomize", "usercustomize"))
        with open(path, "rb") as file:
            assert generated or b"coding" in file.read(400), path  # another encoding, declared
    relative = [Path(path).relative_to(root).as_posix() for path in files]
    assert relative == sorted(relative) and "json/decoder.py" in relative


def test_standard_library_split_is_by_path():
    split = load_standard_library()
    root = Path(sysconfig.get_path("stdlib"))
    seen = {}
    for name, part in split.items():
        for text, source in zip(part["text"], part["source"], strict=True):
            assert source not in seen
            seen[source] = name
            assert text.encode() == (root / source).read_bytes()
            # The first 64 bits of MD5, as a fraction of 2^64.
            low = int(hashlib.md5(source.encode()).hexdigest()[:16], 16) < 2**64 // 20
            assert (name == "validation") == low
    assert len(seen) == sum(1 for path in standard_library_files() if path.stat().st_size)
    assert 0.02 < len(split["validation"]) / len(seen) < 0.09


# ------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
def test_tables_give_one_document_per_row(tmp_path, kind, gz):
    path = write(tmp_path, f"data [1].{kind}{gz}")
    train = load_text(path, validation_fraction=0)["train"]
    assert texts(train) == DOCUMENTS
    assert train["source"][:] == [f"{path.name}:{row}" for row in range(3)]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.md", "notes.unknown", "noname"])
def test_a_text_file_is_one_document(tmp_path, name):
    path = write(tmp_path, name if "." in name else "x.txt")
    if "." not in name:
        path = path.rename(tmp_path / name)
    train = load_text(str(path), validation_fraction=0)["train"]
    assert texts(train) == ["".join(DOCUMENTS)]
    assert train["source"][:] == [path.name]


@pytest.fixture
def said(monkeypatch, caplog):
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    caplog.set_level("WARNING", logger="transformers")
    return caplog


def test_folder_is_read_recursively(tmp_path, said):
    folder = tmp_path / "corpus"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".git").mkdir()
    write(folder, "b.txt", ["bee"])
    write(folder / "deep" / "er", "a.py.gz", ["ay"])
    write(folder / ".git", "hidden.txt", ["no"])
    (folder / "settings.json").write_text("{}")
    (folder / "empty.md").write_text("")
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    write(folder / "deep", "t.jsonl", ["row"])
    train = load_text(folder, validation_fraction=0)["train"]
    assert dict(zip(train["source"], train["text"], strict=True)) == {
        "b.txt": "bee",
        "deep/er/a.py.gz": "ay",
        "t.jsonl:0": "row",
    }
    assert "2 files are not read (1 with .png, 1 with .json); a file that is named itself is" in said.text
    assert "1 of 3 files are empty and are left out" in said.text


def test_lists_and_empty_rows(tmp_path, said):
    files = [write(tmp_path, "a.txt", ["one"]), write(tmp_path, "b.jsonl", ["two", "", None, "three"])]
    assert texts(load_text(files, validation_fraction=0)["train"]) == ["one", "two", "three"]
    assert "2 of 4 rows have no text and are left out" in said.text


def test_text_column_and_validation_file(tmp_path):
    train = write(tmp_path, "a.jsonl", column="content")
    validation = write(tmp_path, "v.csv", ["held out"], column="content")
    split = load_text(train, validation, text_column="content")
    assert texts(split["train"]) == DOCUMENTS and texts(split["validation"]) == ["held out"]


def test_an_edited_file_is_read_again(tmp_path):
    path = write(tmp_path, "a.txt", ["old text"])
    assert texts(load_text(path, validation_fraction=0)["train"]) == ["old text"]
    path.write_text("new text")
    os.utime(path, ns=(1, 1))
    assert texts(load_text(path, validation_fraction=0)["train"]) == ["new text"]


def test_dataset_name_is_loaded_with_datasets(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    write(folder, "train.jsonl", [f"row {i}" for i in range(100)])
    split = load_text(dataset_name=str(folder))
    assert sorted([*texts(split["train"]), *texts(split["validation"])]) == sorted(f"row {i}" for i in range(100))
    write(folder, "validation.jsonl", ["apart"])
    split = load_text(dataset_name=str(folder))
    assert len(split["train"]) == 100 and texts(split["validation"]) == ["apart"]


# ------------------------------------------------------------------------------------------- holding out


def test_many_documents_are_split_by_their_hash(tmp_path):
    documents = [f"document {index}\n" for index in range(400)]
    split = load_text(write(tmp_path, "a.jsonl", documents + documents[::-1]))
    held_out = set(texts(split["validation"]))
    assert not held_out & set(texts(split["train"]))
    assert len(split["train"]) + len(split["validation"]) == 800
    assert 4 <= len(held_out) <= 50
    # Neither order nor other documents change the side of a document.
    again = load_text(write(tmp_path, "b.jsonl", documents[100:]))
    assert set(texts(again["validation"])) == held_out & set(documents[100:])


def test_few_documents_lose_their_last_lines(tmp_path):
    lines = [f"line {index:03d}\n" for index in range(200)]
    split = load_text(write(tmp_path, "a.txt", lines))
    assert texts(split["train"]) == ["".join(lines[:190])] and texts(split["validation"]) == ["".join(lines[190:])]
    split = load_text(write(tmp_path, "b.jsonl", ["a" * 50, "b" * 40 + "\n" + "c" * 8, "d"]), validation_fraction=0.08)
    assert texts(split["train"]) == ["a" * 50, "b" * 40 + "\n"]
    assert texts(split["validation"]) == ["c" * 8, "d"]
    one_line = load_text(write(tmp_path, "c.txt", ["x\n" + "y" * 998]), validation_fraction=0.1)
    assert list(map(len, texts(one_line["train"]) + texts(one_line["validation"]))) == [900, 100]


def test_equal_documents_are_still_split(tmp_path):
    split = load_text(write(tmp_path, "a.jsonl", ["same text"] * 40))
    assert len(split["train"]) and len(split["validation"])


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "a.txt.gz is empty"),
        ("a.txt", b"\xef\xbb\xbf", "a.txt is empty"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.txt", b"ab\0c", "a.txt is binary, not text .*offset 2"),
        ("a.txt", "né".encode("latin-1"), "a.txt is not UTF-8 .byte 0xe9 at offset 1.; convert"),
        ("a.txt.gz", gzip.compress(b"hello" * 9, mtime=0)[:-9], "not a whole gzip file"),
        ("a.txt.gz", b"plain", "not a whole gzip file"),
        ("a.jsonl", b'{"text": "a"}\n{"te', "cannot be read as json"),
        ("a.parquet", b"hello", "cannot be read as parquet"),
        ("a.jsonl", b'{"id": 1, "content": "a"}\n', "no column 'text'; its columns are id, content"),
        ("a.csv", b"text\n1\n", "holds int64, not text"),
        ("a.txt", b"x", "1 characters are too few"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        load_text(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_mixed_encodings_are_named_with_the_byte_and_the_way_out(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("größe", encoding="utf-8")
    (folder / "b.txt").write_text("größe", encoding="cp1252")
    with pytest.raises(ValueError, match=r"b.txt is not UTF-8 .byte 0xf6 at offset 2.; .*--encoding cp1252"):
        load_text(folder)
    assert texts(load_text(folder, encoding="cp1252", validation_fraction=0)["train"]) == ["größe", "größe"]
    (folder / "c.txt").write_bytes("größe ÿ".encode("utf-16"))
    with pytest.raises(ValueError, match=r"c.txt is neither UTF-8 nor ascii .byte 0xff at offset 0"):
        load_text(folder / "c.txt", encoding="ascii")
    assert texts(load_text(folder / "c.txt", encoding="utf-16", validation_fraction=0)["train"]) == ["größe ÿ"]
    with pytest.raises(ValueError, match="--encoding 'klingon' is unknown"):
        load_text(folder, encoding="klingon")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("gz", ["", ".gz"])
def test_tables_in_another_encoding(tmp_path, kind, gz):
    data = {"jsonl": '{"text": "größe"}\n{"text": "b"}\n', "csv": "text\ngröße\nb\n"}[kind].encode("cp1252")
    path = tmp_path / f"a.{kind}{gz}"
    path.write_bytes(gzip.compress(data) if gz else data)
    offset = data.index(b"\xf6")
    with pytest.raises(ValueError, match=rf"a.{kind}{gz} is not UTF-8 .byte 0xf6 at offset {offset}.;"):
        load_text(path, validation_fraction=0)
    assert texts(load_text(path, validation_fraction=0, encoding="cp1252")["train"]) == ["größe", "b"]


def test_the_first_invalid_byte_is_found_wherever_it_stands(tmp_path):
    path = tmp_path / "a.txt"
    for size in (0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 2_500_000):
        good = ("é" * (size // 2) + "a")[: max(0, size)].encode()
        for tail, at in ((b"", None), (b"\xff", 0), (b"\xc3", 0), ("é".encode() + b"\xe2\x82x", 2)):
            path.write_bytes(good + tail)
            expected = None if at is None else ((good + tail)[len(good) + at], len(good) + at)
            assert find_invalid_byte(path) == expected, (size, tail)


def test_bad_arguments(tmp_path):
    path = write(tmp_path, "a.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"nowhere.txt does not exist; .*dataset_name"):
        load_text(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match="validation_file"):
        load_text(path, tmp_path / "nowhere.txt")
    for arguments, message in [
        ({}, "either train_file or dataset_name"),
        ({"train_file": path, "dataset_name": "x"}, "either train_file or dataset_name"),
        ({"train_file": []}, "empty list"),
        ({"train_file": tmp_path / "empty"}, "has no text files"),
        ({"train_file": path, "validation_fraction": 1.0}, "validation_fraction 1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_text(**arguments)
