"""Text from several places, and mixtures by weight."""

import bz2
import collections
import gzip
import json
import lzma

import pytest
from datasets import Dataset

from hf_decoder.data.sources import TextArguments, load_texts, mix, names_of, weighted_files


def documents(name: str, count: int, size: int) -> Dataset:
    texts = [f"{name}{i:03}" + "é" * ((size - 4) // 2) for i in range(count)]  # of `size` bytes
    return Dataset.from_dict({"text": texts, "source": [name] * count})


def byte_shares(mixed: Dataset) -> dict[str, float]:
    found: collections.Counter = collections.Counter()
    for text, source in zip(mixed["text"], mixed["source"], strict=True):
        found[source] += len(text.encode("utf-8"))
    return {source: number / found.total() for source, number in found.items()}


@pytest.mark.parametrize("weights", [(0.7, 0.3), (7, 3), (0.5, 0.5), (0.02, 0.98)])
def test_shares_of_bytes_are_the_weights(weights):
    mixed = mix([documents("a", 50, 100), documents("b", 300, 40)], weights)
    shares = byte_shares(mixed)
    assert shares["a"] == pytest.approx(weights[0] / sum(weights), abs=0.02)
    assert len(set(mixed["text"])) == 350  # nothing is lost
    counts = collections.Counter(mixed["text"])
    for name in "ab":  # documents of a part repeat equally often, give or take one
        times = [number for text, number in counts.items() if text.startswith(name)]
        assert max(times) - min(times) <= 1
    # spread evenly: half of it holds the same shares
    assert byte_shares(mixed.select(range(len(mixed) // 2)))["a"] == pytest.approx(shares["a"], abs=0.05)


def test_mixing_is_the_same_every_time():
    parts = [documents("a", 5, 100), documents("b", 3, 40)]
    assert mix(parts, [1, 2])["text"] == mix(parts, [1, 2])["text"]


def test_weights_are_told_from_names(tmp_path):
    odd = tmp_path / "odd:0.5"
    odd.touch()
    assert weighted_files(["a.txt:0.7", "dir/b.jsonl:3"]) == [("a.txt", 0.7), ("dir/b.jsonl", 3.0)]
    assert weighted_files("a.txt") == [("a.txt", None)]
    assert weighted_files([str(odd), "c:/text.txt"]) == [(str(odd), None), ("c:/text.txt", None)]
    for wrong in (["a.txt:0"], ["a.txt:-1"], ["a.txt:nan"], ["a.txt:inf"], ["a.txt:1", "b.txt"]):
        with pytest.raises(ValueError, match="--train_file"):
            weighted_files(wrong)


def test_files_with_and_without_weights(tmp_path):
    for name, count in (("a", 60), ("b", 240)):
        rows = [json.dumps({"text": f"{name} {i:06}"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    names = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    together = load_texts(TextArguments(train_file=names))
    assert len(together["train"]) + len(together["validation"]) == 300
    weighted = TextArguments(train_file=[f"{names[0]}:0.6", f"{names[1]}:0.4"])
    mixed = load_texts(weighted)
    letters = collections.Counter(text[0] for text in mixed["train"]["text"])
    assert letters["a"] / letters.total() == pytest.approx(0.6, abs=0.01)
    # what is held out is held out of both, once, and the same as without weights
    assert sorted(mixed["validation"]["text"]) == sorted(together["validation"]["text"])
    assert set(mixed["train"]["text"]) == set(together["train"]["text"])
    assert names_of(weighted) == ["a.jsonl", "b.jsonl"]


def test_weights_and_a_data_set_contradict_each_other():
    with pytest.raises(ValueError, match="one of the two"):
        load_texts(TextArguments(train_file=["a.txt:1"], dataset_name="some/name"))


def test_columns_that_are_not_read_may_hold_anything(tmp_path):
    """`datasets` reads JSON in pieces and refuses a column whose type another piece does not have."""
    path = tmp_path / "mixed.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(700):
            more = {"late": [number]} if number > 690 else {}
            file.write(
                json.dumps({"text": f"{number} {'word ' * 4000}", "meta": number % 690 or "none", **more}) + "\n"
            )
    texts = load_texts(TextArguments(train_file=[str(path)]))
    assert len(texts["train"]) + len(texts["validation"]) == 700
    with pytest.raises(ValueError, match=r"no column 'body'|cannot be read as json"):
        load_texts(TextArguments(train_file=[str(path)], text_column="body"))


@pytest.mark.parametrize("pack", [bz2.compress, gzip.compress, lzma.compress], ids=["bz2", "gz", "xz"])
def test_compressed_text_is_unpacked(tmp_path, pack):
    suffix = {"bz2": "bz2", "gzip": "gz", "lzma": "xz"}[pack.__module__]
    for name, data in (("a.txt", b"some words\n" * 50), ("a.jsonl", b'{"text": "some words"}\n' * 30)):
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(pack(data))
        assert load_texts(TextArguments(train_file=[str(path)]))["train"]["text"][0].startswith("some words")
