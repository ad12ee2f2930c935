"""Corpus and packing, against plain Python references and a stock model."""

import gzip
import hashlib
import json
import os
import random
import sysconfig
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset, Features, List, Value
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

from hf_decoder.data import packing
from hf_decoder.data.documents import (
    CorpusReport,
    load_standard_library,
    load_text,
    pack,
    pack_for_evaluation,
    standard_library_files,
    tokenize,
)
from hf_decoder.data.reading import find_invalid_byte
from hf_decoder.data.tokenization import train_tokenizer

DOCUMENTS = ["First line,\r\nsecond.\n", "  Übung: 東京\n", "third"]


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS * 3, vocab_size=280)


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


def write(folder, name, documents=DOCUMENTS, column="text"):
    path = folder / name
    rows = [{"id": index, column: text} for index, text in enumerate(documents)]
    kind = name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "json":
        data = json.dumps(rows).encode()
    elif kind == "jsonl":
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    elif kind in ("parquet", "csv"):
        plain = folder / f"plain.{kind}"
        getattr(Dataset.from_list(rows), f"to_{kind}")(str(plain))
        data = plain.read_bytes()
        plain.unlink()
    else:
        data = "".join(documents).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


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


def test_folder_is_read_recursively(tmp_path):
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


def test_lists_and_empty_rows(tmp_path):
    files = [write(tmp_path, "a.txt", ["one"]), write(tmp_path, "b.jsonl", ["two", "", None, "three"])]
    assert texts(load_text(files, validation_fraction=0)["train"]) == ["one", "two", "three"]


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
    # The order and the company of documents do not move them.
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


# ------------------------------------------------------------------------------------------- tokens


def test_tokenize_against_one_document_at_a_time(tokenizer):
    documents = [*DOCUMENTS, "mentions <|endoftext|> and <|im_end|>", ""]
    rows = tokenize(Dataset.from_dict({"text": documents, "source": documents}), tokenizer)
    assert rows.column_names == ["input_ids", "num_bytes"]
    for row, text in zip(rows, documents, strict=True):
        plain = tokenizer.backend_tokenizer
        plain.encode_special_tokens = True
        assert row["input_ids"] == [0, *plain.encode(text, add_special_tokens=False).ids, 0]
        assert tokenizer.decode(row["input_ids"][1:-1]) == text
        assert not {0, 1, 2, 3} & set(row["input_ids"][1:-1])
        assert row["num_bytes"] == len(text.encode())


def test_long_documents_are_encoded_in_pieces(tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "_ENCODE_CHARACTERS", 2_000_000)
    rng = random.Random(0)
    long = "".join(rng.choice(["First ", "line\n", "東京", "second. ", "\r\n\r\n  "]) for _ in range(500_000))
    documents = ["short", long, "third"]
    rows = tokenize(Dataset.from_dict({"text": documents}), tokenizer)
    assert len(long) > 2_000_000
    assert rows[1]["input_ids"][1:-1] == tokenizer(long)["input_ids"]
    assert [row["num_bytes"] for row in rows] == [len(text.encode()) for text in documents]


def test_a_tokenizer_with_bos_opens_with_it():
    tokenizer = train_tokenizer(DOCUMENTS, vocab_size=270)
    tokenizer.bos_token = "<|im_start|>"
    rows = tokenize(Dataset.from_dict({"text": ["x"]}), tokenizer)["input_ids"]
    assert rows[0] == [2, *tokenizer("x")["input_ids"], 0]


def test_tokenizers_that_cannot_end_or_exceed_themselves(monkeypatch):
    tokenizer = train_tokenizer(DOCUMENTS, vocab_size=270)
    data = Dataset.from_dict({"text": ["x"]})
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: 5)
    with pytest.raises(ValueError, match="past its vocabulary of 5"):
        tokenize(data, tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        tokenize(data, tokenizer)


# ------------------------------------------------------------------------------------------- blocks


def random_documents(rng, count, opening, closing, longest=40):
    return [[opening, *(rng.randrange(5, 50) for _ in range(rng.randrange(longest))), closing] for _ in range(count)]


def as_dataset(documents):
    features = Features({"input_ids": List(Value("int32")), "num_bytes": Value("int64")})
    return Dataset.from_dict({"input_ids": documents, "num_bytes": [7] * len(documents)}, features)


def reference_stream(documents):
    """(token, document, scored) along the stream; the marker between two documents belongs to the later one."""
    stream = []
    for number, row in enumerate(documents):
        if row[0] == row[-1]:
            stream.append((row[0], number, number > 0))
            stream += [(token, number, True) for token in row[1:-1]]
        else:
            stream.append((row[0], number, False))
            stream += [(token, number, True) for token in row[1:]]
    if documents[-1][0] == documents[-1][-1]:
        stream.append((documents[-1][-1], len(documents), True))
    return stream


def reference_blocks(documents, block_size, stride, keep_tail):
    stream = reference_stream(documents)
    blocks, done, start = [], 1, 0
    while start == 0 or done < len(stream):
        part = stream[start : start + block_size]
        if len(part) < block_size and not keep_tail:
            break
        ids, positions, labels = [], [], []
        for offset, (token, document, scored) in enumerate(part):
            new = offset == 0 or document != part[offset - 1][1]
            ids.append(token)
            positions.append(0 if new else positions[-1] + 1)
            labels.append(token if scored and start + offset >= done else -100)
        done = start + len(part)
        blocks.append((ids, positions, labels))
        start += stride
    return blocks


@pytest.mark.parametrize("markers", [(0, 0), (2, 0)])
@pytest.mark.parametrize("keep_tail", [False, True])
def test_packing_against_the_plain_reference(markers, keep_tail, monkeypatch):
    rng = random.Random(sum(markers) + keep_tail)
    for trial in range(25):
        monkeypatch.setattr(packing, "_PACK_TOKENS", rng.choice([16, 64, 1 << 20]))
        documents = random_documents(rng, rng.randrange(3, 40), *markers)
        block_size = rng.choice([2, 3, 8, 16, 33])
        stride = rng.randrange(1, block_size) if keep_tail and trial % 2 else block_size - 1
        data = as_dataset(documents)
        if trial % 5 == 0:  # through an indices mapping
            data = as_dataset(documents[::-1]).select(range(len(documents) - 1, -1, -1))
        packed = pack_for_evaluation(data, block_size, stride) if keep_tail else pack(data, block_size)
        expected = reference_blocks(documents, block_size, stride, keep_tail)
        assert len(packed) == len(expected)
        for row, (ids, positions, labels) in zip(packed, expected, strict=True):
            filling = block_size - len(ids)
            assert row["input_ids"].tolist() == ids + [0] * filling
            assert row["position_ids"].tolist()[: len(ids)] == positions
            assert row["labels"].tolist() == labels + [-100] * filling
            assert all(len(column) == block_size and column.dtype == torch.int64 for column in row.values())


@pytest.mark.parametrize("markers", [(0, 0), (2, 0)])
@pytest.mark.parametrize("stride", [None, 3, 1])
def test_evaluation_scores_every_token_exactly_once(markers, stride):
    """Counting oracle: each document owes its tokens and one end marker, in order."""
    rng = random.Random(5)
    documents = random_documents(rng, 30, *markers)
    packed = pack_for_evaluation(as_dataset(documents), 8, stride)
    scored = [label for row in packed for label in row["labels"].tolist() if label != -100]
    assert scored == [token for row in documents for token in row[1:]]
    report = CorpusReport.of(as_dataset(documents), packed)
    assert report.tokens == report.scored_tokens == len(scored)
    assert (report.documents, report.bytes, report.blocks) == (30, 210, len(packed))
    assert report.bytes_per_token == 210 / len(scored)
    assert len(report.lines()) == 6 and "210" in report.lines()[1]


def test_training_blocks_drop_only_the_tail():
    documents = random_documents(random.Random(6), 30, 0, 0)
    stream = [token for row in documents for token in row[1:]]
    packed = pack(as_dataset(documents), 16)
    scored = [label for row in packed for label in row["labels"].tolist() if label != -100]
    assert scored == stream[: len(scored)] and 0 <= len(stream) - len(scored) < 15
    assert CorpusReport.of(as_dataset(documents), packed).scored_tokens == len(scored)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        attn_implementation="eager",
        initializer_range=0.4,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def packed_nats(model, packed):
    """Summed loss over all labels of the packed rows, row by row."""
    total = 0.0
    for row in packed:
        batch = default_data_collator([row])
        with torch.no_grad():
            loss = model(**batch, use_cache=False).loss
        total += loss.item() * (batch["labels"][:, 1:] != -100).sum().item()
    return total


def nats(model, context, token):
    with torch.no_grad():
        return -model(torch.tensor([context])).logits[0, -1].log_softmax(-1)[token].item()


@pytest.mark.parametrize("markers", [(0, 0), (2, 0)])
def test_packed_loss_equals_one_document_at_a_time(model, markers):
    documents = random_documents(random.Random(7), 9, *markers, longest=20)
    alone = sum(nats(model, row[:end], row[end]) for row in documents for end in range(1, len(row)))
    for block_size in (256, sum(map(len, documents))):
        packed = pack_for_evaluation(as_dataset(documents), block_size)
        assert len(packed) == 1
        assert packed_nats(model, packed) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("stride", [11, 4])
def test_loss_of_cut_documents_sees_its_block_and_nothing_else(model, stride):
    """Each token is charged given what stands before it in its own document and in its own block."""
    documents = random_documents(random.Random(8), 9, 0, 0, longest=30)
    expected, position = 0.0, 0
    for row in documents:
        for end in range(1, len(row)):
            position += 1
            block = 0 if position < 12 else 1 + (position - 12) // stride
            expected += nats(model, row[max(0, end - (position - block * stride)) : end], row[end])
    packed = pack_for_evaluation(as_dataset(documents), 12, stride)
    assert packed_nats(model, packed) == pytest.approx(expected, rel=1e-5)


def test_documents_on_disk_are_packed_beside_them(tmp_path, tokenizer):
    path = write(tmp_path, "a.jsonl", [f"document {index} " * 5 for index in range(50)])
    rows = tokenize(load_text(path, validation_fraction=0)["train"], tokenizer)
    packed = pack(rows, 16)
    assert rows.cache_files and packed.cache_files
    memory = pack(as_dataset(rows["input_ids"][:]), 16)
    assert not memory.cache_files
    assert all((left["labels"] == right["labels"]).all() for left, right in zip(packed, memory, strict=True))
    assert len(pack(rows, 32)) != len(packed) == len(pack(rows, 16))


def test_from_text_to_blocks(tmp_path, tokenizer):
    split = load_text(write(tmp_path, "a.txt", ["First line, second third\n" * 400]))
    train, validation = (tokenize(split[name], tokenizer) for name in ("train", "validation"))
    assert len(pack(train, 32)) > 0
    report = CorpusReport.of(validation, pack_for_evaluation(validation, 32))
    assert report.bytes == len(texts(split["validation"])[0].encode())
    assert report.scored_tokens == len(tokenizer(texts(split["validation"])[0])["input_ids"]) + 1


@pytest.fixture
def tokenized(monkeypatch):
    """How many texts were tokenised since it was last emptied."""
    calls = []
    encode = packing.encode_texts
    monkeypatch.setattr(packing, "encode_texts", lambda tokenizer, texts: (calls.extend(texts), encode(tokenizer, texts))[1])  # fmt: skip # noqa: E501
    return calls


def test_the_same_text_is_not_tokenised_again(tmp_path, tokenizer, tokenized):
    lines = [f"document {index} \n" for index in range(50)]

    def rows(path, tokenizer=tokenizer):
        tokenized.clear()
        return tokenize(load_text(path, validation_fraction=0.1)["train"], tokenizer)

    one = rows(write(tmp_path, "a.jsonl", lines))
    assert tokenized
    (tmp_path / "copy").mkdir()
    other = rows(write(tmp_path / "copy", "b.jsonl", lines))  # another place, another time
    assert not tokenized and other["input_ids"][:] == one["input_ids"][:]
    changed = rows(write(tmp_path, "a.jsonl", [*lines[:-1], "document x\n"]))
    assert tokenized and changed["input_ids"][-1] != one["input_ids"][-1]
    assert len(changed) == len(one) or len(changed) == len(one) + 1
    # the same bytes, in other documents
    rows(write(tmp_path, "a.jsonl", [lines[0] + lines[1], *lines[2:]]))
    assert tokenized
    rows(write(tmp_path, "a.jsonl", lines), train_tokenizer(DOCUMENTS * 3, vocab_size=281))
    assert tokenized
    renamed = train_tokenizer(DOCUMENTS * 3, vocab_size=280)
    renamed.bos_token = "<|im_start|>"
    assert rows(write(tmp_path, "a.jsonl", lines), renamed)["input_ids"][0][0] == 2 and tokenized
    rows(tmp_path / "a.jsonl")
    assert not tokenized
    # a text whose end is held out lives in memory, its tokens do not
    text = write(tmp_path, "a.txt", lines)
    rows(text)
    assert tokenized
    again = rows(text)
    assert not tokenized and again.cache_files


def test_a_second_process_does_not_tokenise_again(tmp_path, run_python):
    text = write(tmp_path, "a.txt", [f"document {index} \n" for index in range(500)])
    code = """
        import sys
        import datasets
        datasets.config.HF_DATASETS_CACHE = sys.argv[2]
        from hf_decoder.data import packing
        from hf_decoder.data.documents import load_text
        from hf_decoder.data.tokenization import train_tokenizer
        texts = load_text(sys.argv[1])["train"]
        tokenizer = train_tokenizer(texts["text"], vocab_size=280)
        calls, encode = [], packing.encode_texts
        packing.encode_texts = lambda *args: (calls.append(1), encode(*args))[1]
        rows = packing.tokenize(texts, tokenizer)
        packing.pack(rows, 16)
        print("calls:", len(calls), rows._fingerprint)
    """
    said = [run_python(code, text, tmp_path / "cache") for _ in range(2)]
    first, second = (next(line for line in lines.splitlines() if line.startswith("calls:")) for lines in said)
    assert first.startswith("calls: 1 ") and second == first.replace("calls: 1", "calls: 0")


def test_processes_that_tokenise_give_the_same_rows(tmp_path, tokenizer):
    path = write(tmp_path, "a.jsonl", [f"document {index} " * (index % 7) for index in range(300)])
    texts = load_text(path, validation_fraction=0)["train"]
    two = tokenize(texts, tokenizer, num_proc=2)
    again = tokenize(texts, tokenizer, num_proc=2)
    assert again["input_ids"][:] == two["input_ids"][:]
    one = tokenize(texts.select(range(len(texts))), tokenizer)
    assert two["input_ids"][:] == one["input_ids"][:] and two["num_bytes"][:] == one["num_bytes"][:]
    packed = pack(two, 16)
    assert len(packed) and all(left["input_ids"].equal(right["input_ids"]) for left, right in zip(packed, pack(one, 16), strict=True))  # fmt: skip # noqa: E501


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    rows = tokenize(Dataset.from_dict({"text": DOCUMENTS}), tokenizer)
    assert len(rows) == 3 and not rows.cache_files


def test_packing_refusals():
    documents = as_dataset([[0, 5, 6, 0]])
    with pytest.raises(ValueError, match="4 tokens, less than one block of 8; lower block_size"):
        pack(documents, 8)
    with pytest.raises(ValueError, match="block_size 1 must be at least 2"):
        pack(documents, 1)
    with pytest.raises(ValueError, match="stride 8 must lie between 1 and block_size - 1 = 7"):
        pack_for_evaluation(documents, 8, 8)
    with pytest.raises(ValueError, match="validation split has no documents"):
        pack_for_evaluation(as_dataset([]), 8)
    with pytest.raises(ValueError, match="fewer than its two markers"):
        pack(as_dataset([[0, 5, 0], [0]]), 2)
    with pytest.raises(ValueError, match="differ in their markers"):
        pack(as_dataset([[0, 5, 0], [7, 5, 8]]), 2)
