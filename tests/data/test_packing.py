"""Tokens and packed blocks, against plain Python references and a stock model."""

import random

import datasets
import pytest
import torch
from datasets import Dataset, Features, List, Value
from text_files import DOCUMENTS, write
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

from hf_decoder.data import packing
from hf_decoder.data.documents import load_text
from hf_decoder.data.packing import CorpusReport, pack, pack_for_evaluation, tokenize
from hf_decoder.data.tokenization import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS * 3, vocab_size=280)


def texts(dataset):
    return dataset["text"][:]


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


@pytest.mark.process
def test_long_documents_are_encoded_in_pieces(tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "ENCODE_CHARACTERS", 2_000_000)
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
@pytest.mark.parametrize("trials", [2, pytest.param(25, marks=pytest.mark.process)])
def test_packing_against_the_plain_reference(markers, keep_tail, trials, monkeypatch):
    rng = random.Random(sum(markers) + keep_tail)
    for trial in range(trials):
        monkeypatch.setattr(packing, "PACK_TOKENS", [64, 16, 1 << 20][trial % 3])
        documents = random_documents(rng, rng.randrange(3, 40), *markers)
        block_size = [16, 8, 2, 33][trial % 4]
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
    reached = 8 + (len(packed) - 1) * (stride or 7)
    assert reached - (stride or 7) < len(reference_stream(documents)) <= reached
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
    """Each token sees the tokens before it in its own document and its own block."""
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
    """The texts that were tokenised since it was last emptied."""
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
    changed = rows(write(tmp_path, "a.jsonl", [*lines[:-1], lines[-1].replace("49", "xy")]))  # of the same length
    assert tokenized and changed["input_ids"][-1] != one["input_ids"][-1]
    assert len(changed) == len(one) or len(changed) == len(one) + 1
    rows(write(tmp_path, "a.jsonl", ["x" + lines[0][1:], *lines[1:]]))
    assert tokenized
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
    # a text whose end is held out is in memory, but its tokens are on disk
    text = write(tmp_path, "a.txt", lines)
    rows(text)
    assert tokenized
    again = rows(text)
    assert not tokenized and again.cache_files


@pytest.mark.process
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


@pytest.mark.parametrize(("rows", "length", "expected"), [(0, 1, 1000), (3, 1, 1000), (100, 100, 96), (3, 20000, 1)])
def test_long_rows_are_held_by_fewer(rows, length, expected, monkeypatch):
    """A row of 100 characters takes 104.04 bytes: its text, an offset of 4, and a share of the last offset."""
    monkeypatch.setattr(packing, "ENCODE_CHARACTERS", 10_000)
    dataset = Dataset.from_dict({"text": ["x" * length] * rows}, Features({"text": Value("string")}))
    assert packing.batch_rows(dataset) == expected


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
    with pytest.raises(ValueError, match="has 0 tokens, less than one block of 8"):
        pack(as_dataset([]), 8)
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
