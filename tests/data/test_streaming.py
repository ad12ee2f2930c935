"""Streamed text against the same text read whole, and readers that resume where others stopped."""

import json
import random
import shutil
import tracemalloc
from itertools import islice

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from hf_decoder.data import streamed_text, streaming
from hf_decoder.data.packing import pack, tokenize
from hf_decoder.data.sources import TextArguments, load_texts
from hf_decoder.data.streamed_text import open_stream
from hf_decoder.data.streaming import Reader
from hf_decoder.data.tokenization import train_tokenizer
from hf_decoder.training import streamed_rows
from hf_decoder.training.streamed_rows import PLACE, StreamedRows

WORDS = ["alpha", "beta ", "größe", "東京", "12", "\n", "\n\n", "  ", "x=1;", "don't", "\r\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["".join(WORDS) * 3], vocab_size=290)


@pytest.fixture
def small(monkeypatch):
    """Segments and ranges of a few hundred bytes, so that short files have many."""
    monkeypatch.setattr(streaming, "RANGE_BYTES", 700)
    monkeypatch.setattr(streaming, "PIECE_CHARACTERS", 120)
    monkeypatch.setattr(streaming, "LONGEST_PIECE", 250)
    monkeypatch.setattr(streaming, "LOOK_BYTES", 64)


def made(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words)).strip() + "."


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def write_corpus(tmp_path, kind):
    rng = random.Random(kind)
    if kind == "rows":
        return [write_rows(tmp_path / "a.jsonl", [made(rng, rng.randrange(60)) for _ in range(80)])]
    if kind == "huge":  # rows of many segments among short ones
        return [write_rows(tmp_path / "a.jsonl", [made(rng, 900 if n % 9 == 4 else 5) for n in range(60)])]
    if kind == "parquet":
        path = tmp_path / "a.parquet"
        datasets.Dataset.from_dict({"text": [made(rng, rng.randrange(60)) for _ in range(80)]}).to_parquet(path)
        return [str(path)]
    folder = tmp_path / kind
    folder.mkdir()
    for number in range({"files": 40, "few": 3, "one": 1}[kind]):
        words = rng.randrange(20, 200) * (10 if kind != "files" else 1)
        (folder / f"{number:02}.txt").write_text(made(rng, words), encoding="utf-8")
    if kind == "files":
        (folder / "empty.txt").touch()
        write_rows(folder / "rows.jsonl", [made(rng, 30) for _ in range(20)])
    return [str(folder)]


def rows_of(args, tokenizer, **options):
    text = open_stream(args)
    sources = [part.sources for part in text.parts]
    return StreamedRows(sources, text.weights, tokenizer, 32, **options)


def plain(row):
    return {name: row[name].tolist() for name in ("input_ids", "position_ids", "labels")}


@pytest.mark.parametrize("kind", ["rows", "huge", "parquet", "files", "few", "one"])
@pytest.mark.parametrize("bos", [False, True])
def test_the_rows_are_those_of_the_text_read_whole(tmp_path, small, kind, bos):
    tokenizer = train_tokenizer(["".join(WORDS) * 3], vocab_size=290)
    if bos:
        tokenizer.bos_token = "<|im_start|>"
    args = TextArguments(train_file=write_corpus(tmp_path, kind), validation_split_percentage=10.0)
    whole = load_texts(args)
    expected = pack(tokenize(whole["train"], tokenizer), 32)
    streamed = list(islice(rows_of(args, tokenizer), len(expected)))
    assert len(expected) > 50
    for number, (one, other) in enumerate(zip(streamed, expected, strict=True)):
        assert plain(one) == plain(other), number
        assert all(one[name].dtype == torch.int64 for name in plain(one))
    validation = open_stream(args).validation["text"][:]
    assert validation == whole["validation"]["text"][:]


@pytest.mark.parametrize("kind", ["files", "few", "one"])
def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer, small, kind):
    (folder,) = write_corpus(tmp_path, kind)
    marked = tmp_path / "marked"
    shutil.copytree(folder, marked)
    for path in marked.glob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    args, other = (
        TextArguments(train_file=[name], validation_split_percentage=10.0) for name in (folder, str(marked))
    )
    expected, whole = load_texts(args), load_texts(other)
    assert all(whole[side]["text"][:] == expected[side]["text"][:] for side in ("train", "validation"))
    streamed = open_stream(other)
    assert streamed.validation["text"][:] == expected["validation"]["text"][:]
    assert streamed.num_bytes == open_stream(args).num_bytes
    rows, marked_rows = (list(islice(rows_of(each, tokenizer), 60)) for each in (args, other))
    assert [plain(row) for row in marked_rows] == [plain(row) for row in rows]


def test_held_out_text_ends_at_its_limit(tmp_path, small, monkeypatch):
    monkeypatch.setattr(streamed_text, "HELD_OUT_BYTES", 500)
    for kind in ("rows", "one"):
        args = TextArguments(train_file=write_corpus(tmp_path, kind), validation_split_percentage=20.0)
        whole, streamed = load_texts(args)["validation"]["text"][:], open_stream(args).validation["text"][:]
        assert sum(len(text.encode()) for text in streamed) in range(497, 501)
        assert whole[: len(streamed) - 1] == streamed[:-1] and whole[len(streamed) - 1].startswith(streamed[-1])


def test_shuffled_windows_hold_the_same_rows_and_each_pass_has_its_own_order(tmp_path, tokenizer, small):
    folder = tmp_path / "tables"
    folder.mkdir()
    for name in "abcdef":
        write_rows(folder / f"{name}.jsonl", [f"{name}{number:03} " + "x " * 30 for number in range(30)])
    args = TextArguments(train_file=[str(folder)], validation_file=str(folder / "a.jsonl"))
    total = sum(len(ids) - 1 for ids in tokenize(load_texts(args)["train"], tokenizer)["input_ids"])
    one_pass = total // 31

    def seen(seed):
        rows = islice(rows_of(args, tokenizer, buffer_size=20, seed=seed), 2 * one_pass)
        return [plain(row)["input_ids"] for row in rows]

    rows = seen(1)
    assert rows == seen(1) and rows != seen(2)
    assert rows[:one_pass] != rows[one_pass:]
    text = "".join(tokenizer.decode([token for row in rows for token in row[1:]]))
    missing = [name for name in "abcdef" for number in range(30) if f"{name}{number:03}" not in text]
    assert len(missing) <= 20  # texts cut by the end of a row, and the last window
    starts = [tokenizer.decode(row).count("a0") > 0 for row in rows[:20]]
    assert not all(starts)  # the files come in another order


@pytest.mark.parametrize("workers", [0, *(pytest.param(count, marks=pytest.mark.process) for count in (1, 3))])
@pytest.mark.parametrize("kind", ["rows", "huge", "files", "one"])
def test_a_resumed_stream_goes_on_to_the_bit(tmp_path, tokenizer, small, kind, workers):
    args = TextArguments(train_file=write_corpus(tmp_path, kind), validation_split_percentage=10.0)
    options = {"buffer_size": 30, "seed": 3}

    def loader(places=None, batches=0):
        rows = rows_of(args, tokenizer, **options)
        rows.batch_size = 4
        if places is not None:
            rows.resume(places, batches * 4)
        return DataLoader(rows, batch_size=4, num_workers=workers, collate_fn=lambda rows: rows)

    batches, places = [], {}
    taken = []
    for batch in islice(loader(), 60):
        worker, window, row = batch[-1][PLACE]
        places[str(worker)] = {"window": window, "row": row}
        batches.append([plain(row) for row in batch])
        taken.append(json.loads(json.dumps(places)))
    for stop in (1, 2, 8, 23, 40):
        resumed = list(islice(loader(taken[stop - 1], stop), 60))
        assert all(row is None for batch in resumed[:stop] for row in batch)
        assert [[plain(row) for row in batch] for batch in resumed[stop:]] == batches[stop:], stop


def test_resuming_reads_no_shard_before_the_open_one(tmp_path, tokenizer, monkeypatch):
    folder = tmp_path / "tables"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.txt").write_text(f"{name} line of text\n" * 3000)
    monkeypatch.setattr(streaming, "RANGE_BYTES", 10_000)
    monkeypatch.setattr(streaming, "PIECE_CHARACTERS", 2_000)
    args = TextArguments(train_file=[str(folder)], validation_split_percentage=10.0)
    place = list(islice(rows_of(args, tokenizer), 2500))[-1][PLACE]
    opened = []
    decoded = streaming.decoded
    monkeypatch.setattr(streaming, "decoded", lambda path, start, stop: (opened.append((path, start)), decoded(path, start, stop))[1])  # fmt: skip # noqa: E501
    rows = rows_of(args, tokenizer)
    rows.resume({"0": {"window": place[1], "row": place[2]}}, 0)
    opened.clear()
    next(iter(rows))
    assert [path.rsplit("/")[-1] for path, _ in opened] == ["b.txt"] and opened[0][1] > 0


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", ["rows", "one", "files"])
def test_readers_share_the_text_without_overlap(tmp_path, small, kind, count):
    args = TextArguments(train_file=write_corpus(tmp_path, kind), validation_split_percentage=10.0)
    (part,) = open_stream(args).parts
    alone = [(segment.path, segment.start, segment.text) for segment in Reader(part.sources, endless=False)]
    shared = []
    for index in range(count):
        (part,) = open_stream(args).parts
        mine = Reader(part.sources, index, count, endless=False)
        shared.append([(segment.path, segment.start, segment.text) for segment in mine])
    assert sorted(map(str, alone)) == sorted(str(entry) for entries in shared for entry in entries)
    assert all(len(entries) >= len(alone) // count // 3 for entries in shared)


def test_foreign_segments_of_a_document_do_not_see_each_other(tmp_path, tokenizer, small):
    """Each of two readers has segments with gaps between them; nothing is scored across a gap."""
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {number:04} of a text\n" for number in range(400)))
    args = TextArguments(train_file=[str(path)], validation_split_percentage=1.0)
    scored = []
    for index in range(2):
        (part,) = open_stream(args).parts
        segments = list(Reader(part.sources, index, 2, endless=False))
        expected = []
        last = None
        for segment in segments:
            ids = tokenizer(segment.text)["input_ids"]
            expected += ids if segment.begins or segment.follows(last) else ids[1:]
            last = segment
        rows = list(islice(rows_of(args, tokenizer, index=index, count=2), len(expected) // 31 - 2))
        labels = [label for row in rows for label in row["labels"].tolist() if label not in (-100, 0)]
        scored.append(len(labels))
        assert labels == expected[: len(labels)] and len(labels) > 500
        for row in rows:
            restarts = [column for column, position in enumerate(row["position_ids"].tolist()) if position == 0]
            assert all(row["labels"][column] in (-100, 0) for column in restarts)


def test_a_mixture_has_the_shares_of_its_weights(tmp_path, tokenizer, small):
    names = [
        write_rows(tmp_path / f"{name}.jsonl", [name * 40 + str(number) for number in range(count)])
        for name, count in (("a", 60), ("b", 300))
    ]
    args = TextArguments(train_file=[f"{names[0]}:0.7", f"{names[1]}:0.3"])
    text = open_stream(args)
    assert {document[0] for document in text.validation["text"]} == {"a", "b"}
    rows = list(islice(rows_of(args, tokenizer), 800))
    letters = tokenizer.decode([token for row in rows for token in row["input_ids"].tolist()])
    share = letters.count("a" * 10) / (letters.count("a" * 10) + letters.count("b" * 10))
    assert share == pytest.approx(0.7, abs=0.02)
    place = rows[399][PLACE]
    again = rows_of(args, tokenizer)
    again.resume({"0": {"window": place[1], "row": place[2]}}, 0)
    assert [plain(row) for row in islice(again, 400)] == [plain(row) for row in rows[400:]]


@pytest.mark.process
def test_memory_does_not_grow_with_the_text(tmp_path, tokenizer, monkeypatch):
    for name, size in (("RANGE_BYTES", 1 << 18), ("LONGEST_PIECE", 1 << 16), ("PIECE_CHARACTERS", 1 << 15), ("LOOK_BYTES", 1 << 16)):  # fmt: skip # noqa: E501
        monkeypatch.setattr(streaming, name, size)
    peaks = []
    for megabytes in (1, 5):
        path = tmp_path / f"{megabytes}.txt"
        with path.open("w") as file:
            for number in range(megabytes):
                file.write(f"{number:06} " + "the quick brown fox\n" * 52_000)
        args = TextArguments(train_file=[str(path)])
        tracemalloc.start()
        stream = rows_of(args, tokenizer, buffer_size=100)
        for _ in islice(stream, megabytes * 10_000):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1e6, peaks


@pytest.mark.parametrize("kind", ["rows", "parquet", "files", "few"])
def test_the_size_of_the_text_is_told_before_it_is_read(tmp_path, kind):
    args = TextArguments(train_file=write_corpus(tmp_path, kind), validation_split_percentage=10.0)
    size = sum(len(text.encode()) for text in load_texts(args)["train"]["text"])
    assert open_stream(args).num_bytes == pytest.approx(size, rel=0.1)


def test_a_huge_row_is_not_tokenised_at_once(tmp_path, tokenizer, monkeypatch):
    for name in ("PIECE_CHARACTERS", "LONGEST_PIECE"):
        monkeypatch.setattr(streaming, name, 1000)
    path = write_rows(tmp_path / "a.jsonl", ["the quick brown fox " * 20_000, "short"])
    args = TextArguments(train_file=[path], validation_file=path)
    encoded = []
    encode = streamed_rows.encode_texts
    monkeypatch.setattr(streamed_rows, "encode_texts", lambda tokenizer, texts: (encoded.extend(texts), encode(tokenizer, texts))[1])  # fmt: skip # noqa: E501
    next(iter(rows_of(args, tokenizer)))
    assert 0 < sum(map(len, encoded)) < 3000


def hub(tmp_path, **splits):
    folder = tmp_path / "hub"
    folder.mkdir()
    for name, texts in splits.items():
        write_rows(folder / f"{name}.jsonl", texts)
    return str(folder)


def test_a_data_set_with_a_validation_split(tmp_path):
    name = hub(tmp_path, train=[f"row {number}" for number in range(50)], validation=["apart", "far apart"])
    text = open_stream(TextArguments(dataset_name=name))
    assert text.validation["text"][:] == ["apart", "far apart"]
    assert [segment.text for segment in text.once()] == [f"row {number}" for number in range(50)]


def test_compressed_and_foreign_files_are_read_too(tmp_path):
    import gzip

    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"first line\n" * 100))
    (tmp_path / "b.txt").write_bytes("größe\n".encode("cp1252") * 100)
    names = [str(tmp_path / "a.txt.gz"), str(tmp_path / "b.txt")]
    args = TextArguments(train_file=names, encoding="cp1252", validation_split_percentage=1)
    text = "".join(segment.text for segment in open_stream(args).once())
    assert text.startswith("first line\n" * 100 + "größe\n" * 10)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"good\n" * 5000 + b"\xff", "a.txt is not UTF-8 (byte 0xff at offset 25000)"),
        (b"good\n" * 5000 + b"\0", "a.txt is binary, not text (a zero byte at offset 25000)"),
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"x", "too few"),
        (b"\xef\xbb\xbfx", "too few"),
    ],
)
def test_bad_files(tmp_path, content, words):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        list(open_stream(TextArguments(train_file=[str(tmp_path / "a.txt")])).once())
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "rows, words",
    [
        ('{"id": 1, "content": "a"}\n', "no column 'text'; its columns are id, content"),
        ('{"text": 1}\n', "holds int, not text"),
        ('{"text": "a"}\n' * 3, "fewer than 20 documents; give a --validation_file"),
        ('{"text": "b"}\n' * 30, "no document of"),
        ('{"text": ', "cannot be read as json"),
        ("", "is empty"),
    ],
)
def test_bad_tables(tmp_path, rows, words):
    (tmp_path / "a.jsonl").write_text(rows)
    with pytest.raises(ValueError) as caught:
        open_stream(TextArguments(train_file=[str(tmp_path / "a.jsonl")]))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_bad_bytes_late_in_a_table(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' * 40 + '{"text": "größe"}\n'.encode("cp1252"))
    text = open_stream(TextArguments(train_file=[str(path)], validation_file=write_rows(tmp_path / "v.jsonl", ["v"])))
    with pytest.raises(ValueError, match=r"a.jsonl is not UTF-8 .byte 0xf6 at offset"):
        list(text.once())


def test_more_readers_than_documents(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one line\n" * 50)
    rows = rows_of(TextArguments(train_file=[str(tmp_path / "a.txt")]), tokenizer, index=1, count=2)
    with pytest.raises(ValueError, match="no text for reader 2 of 2; take fewer processes"):
        next(iter(rows))


def test_bad_flags(tmp_path):
    with pytest.raises(ValueError, match="--streaming needs a --train_file"):
        open_stream(TextArguments())
    with pytest.raises(ValueError, match="one of the two"):
        open_stream(TextArguments(train_file=["a"], dataset_name="b"))
    empty = hub(tmp_path, train=["a"] * 30, validation=[])
    with pytest.raises(ValueError, match="validation"):
        open_stream(TextArguments(dataset_name=empty))


@pytest.mark.parametrize("place", [3, 950, 999])
def test_a_text_of_the_same_size_that_begins_or_ends_otherwise_is_another_one(place, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed_text, "LOOK_BYTES", 64)
    file, texts = tmp_path / "a.txt", ["one word\n" * 111 + "z", ""]
    texts[1] = texts[0][:place] + "?" + texts[0][place + 1 :]
    identities = []
    for text in (texts[0], *texts):
        file.write_text(text)
        identities.append(open_stream(TextArguments(train_file=[str(file)])).identity)
    assert identities[0] == identities[1] != identities[2]


def test_the_cut_of_a_file_that_is_read_in_pieces_is_that_of_the_whole(tmp_path, small):
    (tmp_path / "a.txt").write_text("".join(f"{number}é\n" for number in range(900)), encoding="utf-8")
    for share in (10.0, 33.0, 50.5, 90.0):
        args = TextArguments(train_file=[str(tmp_path / "a.txt")], validation_split_percentage=share)
        assert open_stream(args).validation["text"][:] == load_texts(args)["validation"]["text"][:]
