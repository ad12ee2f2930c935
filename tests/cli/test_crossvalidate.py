"""`hf-decoder crossvalidate`: the parts are parts, nothing of a part is seen before it is measured, runs go on."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from made_up import SHAPE
from transformers import TrainingArguments

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM, HfDecoderForSequenceClassification
from hf_decoder.cli.main import main
from hf_decoder.data.tokenization import train_tokenizer, train_word_tokenizer
from hf_decoder.tuning import crossvalidation
from hf_decoder.tuning.ngrams import NgramClassifier

WORDS = {"pos": ["good", "fine", "great"], "neg": ["bad", "poor", "dull"]}
FLAGS = ["--num_folds", "3", "--vocab_size", "300", "--config_overrides", SHAPE, "--pretraining_epochs", "1"]
FLAGS += [
    "--num_train_epochs",
    "6",
    "--learning_rate",
    "1e-2",
    "--dropout",
    "0.1",
    "--per_device_train_batch_size",
    "8",
]


class Untrained:
    def num_parameters(self) -> int:
        return 1

    def save_pretrained(self, folder) -> None:
        pass


def always_pos(model, tokenizer, rows):
    return ["pos"] * len(rows)


@pytest.fixture
def untrained(monkeypatch) -> list[int]:
    """Nothing is trained and each guess is "pos"; holds how many rows each training would have had."""
    calls: list[int] = []
    trained = lambda train, *args: (calls.append(len(train)), (Untrained(), Untrained()))[1]  # noqa: E731
    monkeypatch.setattr(crossvalidation, "train_classifier", trained)
    monkeypatch.setattr(crossvalidation, "predicted_labels", always_pos)
    return calls


@pytest.fixture
def rows():
    draw = random.Random(0)
    return [
        {
            "text": f"a {draw.choice(WORDS[label])} film about the {draw.choice(['cat', 'dog', 'sea'])} {n}",
            "label": label,
        }
        for n in range(24)
        for label in WORDS
    ]


@pytest.fixture
def train_file(rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_every_row_is_held_out_once_and_every_fold_has_its_share_of_every_label():
    labels = ["a"] * 31 + ["b"] * 12
    folds = crossvalidation.fold_of_each(labels, 5, seed=1)
    for fold in range(5):
        counts = Counter(label for label, of in zip(labels, folds, strict=True) if of == fold)
        assert counts["a"] in (6, 7) and counts["b"] in (2, 3)
    assert folds == crossvalidation.fold_of_each(labels, 5, seed=1) != crossvalidation.fold_of_each(labels, 5, seed=2)


@pytest.mark.process
def test_bag_of_words_is_scikit_learn_s_own(rows):
    from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
    from sklearn.linear_model import LogisticRegression

    train, held_out = rows[:30], rows[30:]
    count, weigh = CountVectorizer(ngram_range=(1, 2)), TfidfTransformer()
    features = weigh.fit_transform(count.fit_transform([row["text"] for row in train]))
    model = LogisticRegression(max_iter=1000).fit(features, [row["label"] for row in train])
    expected = model.predict(weigh.transform(count.transform([row["text"] for row in held_out]))).tolist()
    assert crossvalidation.bag_of_words(train, held_out) == expected


@pytest.mark.process
def test_folds_are_measured_without_having_been_seen(rows, train_file, tmp_path, capsys, monkeypatch):
    seen = []
    train_classifier = crossvalidation.train_classifier

    def watched(train, *args):
        seen.append({row["text"] for row in train})
        return train_classifier(train, *args)

    monkeypatch.setattr(crossvalidation, "train_classifier", watched)
    out = tmp_path / "out"
    assert main(["crossvalidate", "--train_file", train_file, "--output_dir", str(out), *FLAGS]) == 0
    results = json.loads((out / "crossvalidation_results.json").read_text())
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert sorted(line["text"] for line in lines) == sorted(row["text"] for row in rows)
    assert seen.pop() == {row["text"] for row in rows}
    for fold, texts in enumerate(seen):
        held_out = [line for line in lines if line["fold"] == fold]
        assert texts == {row["text"] for row in rows} - {line["text"] for line in held_out}
        for kind, name in (("prediction", "accuracy"), ("baseline", "baseline_accuracy")):
            hits = [line[kind] == line["label"] for line in held_out]
            assert results["folds"][fold][name] == sum(hits) / len(hits)
    means = [sum(fold["accuracy"] for fold in results["folds"]) / 3]
    assert results["accuracy"] == pytest.approx(means[0]) and results["accuracy"] > 0.9
    printed = capsys.readouterr().out
    assert f"accuracy {results['accuracy']:.4f}, mean of 3 folds" in printed
    assert f"baseline_accuracy {results['baseline_accuracy']:.4f}, mean of 3 folds" in printed


def test_an_interrupted_run_goes_on(train_file, tmp_path, monkeypatch, capsys):
    calls = []

    def broken_off_at_the_fourth(train, *args):
        calls.append(len(train))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return Untrained(), Untrained()

    monkeypatch.setattr(crossvalidation, "train_classifier", broken_off_at_the_fourth)
    monkeypatch.setattr(crossvalidation, "predicted_labels", always_pos)
    argv = ["crossvalidate", "--train_file", train_file, "--output_dir", str(tmp_path / "out"), *FLAGS]
    assert main([*argv, "--max_folds", "1"]) == 0
    assert calls == [32, 48]  # a fold, and all rows
    assert main(argv) == 130
    assert main(argv) == 0
    assert len(calls) == 5  # the last fold was broken off, and only that was done again
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert Counter(line["fold"] for line in lines) == {0: 16, 1: 16, 2: 16}


@pytest.mark.process
def test_the_tokenizer_and_the_language_model_know_the_training_rows_alone(rows, tmp_path):
    recipe = crossvalidation.Recipe({"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}, 600, 1, 1e-2, 0.0, 1, 1e-2, 0.0, 0.1, 0.5, 8, 0)  # fmt: skip # noqa: E501
    train = [{**row, "text": row["text"] + " zebra"} for row in rows]
    model, tokenizer = crossvalidation.train_classifier(train, {"neg": 0, "pos": 1}, recipe, str(tmp_path))
    _, other = crossvalidation.train_classifier(rows, {"neg": 0, "pos": 1}, recipe, str(tmp_path))
    assert "zebra" in tokenizer.get_vocab() and "zebra" not in other.get_vocab()
    assert model.config.id2label == {0: "neg", 1: "pos"}


def test_words_are_dropped_in_training_alone_and_markers_never():
    shape = {"hidden_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    model = HfDecoderForCausalLM(HfDecoderConfig(vocab_size=50, eos_token_id=0, **shape))
    crossvalidation._add_word_dropout(model, 0.5)
    ids = torch.tensor([[0, *range(1, 49), 0]])
    written = model.train().get_input_embeddings()(ids)[0]
    gone = (written == 0).all(-1)
    assert 8 < gone.sum() < 40 and not gone[[0, -1]].any()
    assert torch.equal(written[~gone], model.model.embed_tokens.weight[ids[0]][~gone])
    assert not (model.eval().get_input_embeddings()(ids) == 0).all(-1).any()


def test_every_token_has_the_scores_of_the_words_up_to_it(rows):
    texts, classes = [row["text"] for row in rows], [int(row["label"] == "pos") for row in rows]
    teacher = NgramClassifier(texts, classes, 2)
    text = "a good\u3000film  a"
    expected = teacher.scores(text)
    for tokenizer in (train_word_tokenizer(texts, 600), train_tokenizer(texts, vocab_size=300)):
        ids = tokenizer(f"{tokenizer.eos_token}{text}{tokenizer.eos_token}")["input_ids"]
        crossvalidation.mark_texts(tokenizer)
        assert tokenizer(text)["input_ids"] == ids
        found = torch.tensor(crossvalidation._score_each_token(text, tokenizer, teacher))
        assert len(found) == len(ids)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[-1], expected[-1])
        assert torch.equal(torch.unique_consecutive(found, dim=0), torch.unique_consecutive(expected, dim=0))
    tokenizer = train_word_tokenizer(texts, 600)
    crossvalidation.mark_texts(tokenizer)
    words = torch.tensor(crossvalidation._score_each_token(text, tokenizer, teacher))
    assert torch.equal(words, expected[[0, 1, 2, 3, 4, 4]])


def test_what_the_teacher_says_is_learned_after_every_word_and_padding_is_not(tmp_path):
    """The loss, written out token by token."""
    shape = {"hidden_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    config = HfDecoderConfig(vocab_size=50, eos_token_id=0, pad_token_id=1, num_labels=3, **shape)
    model = HfDecoderForSequenceClassification(config).eval()
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = crossvalidation._TaughtTrainer(0.75, model=model, args=args)
    texts, labels = [[0, 5, 6, 7, 0], [0, 8, 0]], [2, 0]
    scores = [torch.randn(len(ids), 3) for ids in texts]
    scores = [score - score.mean(-1, keepdim=True) for score in scores]
    batch = {
        "input_ids": torch.tensor([texts[0], [1, 1, *texts[1]]]),
        "attention_mask": torch.tensor([[1] * 5, [0, 0, 1, 1, 1]]),
        "labels": torch.tensor(labels),
        "scores": torch.stack([scores[0], torch.cat([torch.full((2, 3), 9.0), scores[1]])]),
    }
    at_the_end, after_each = [], []
    for ids, label, score in zip(texts, labels, scores, strict=True):
        for stop in range(1, len(ids) + 1):
            logits = model(torch.tensor([ids[:stop]])).logits[0]
            after_each.append((logits - logits.mean() - score[stop - 1]).square().sum())
        taught = -(score[-1].softmax(-1) * logits.log_softmax(-1)).sum()
        at_the_end.append(0.25 * -logits.log_softmax(-1)[label] + 0.75 * taught)
    expected = torch.stack(at_the_end).mean() + torch.stack(after_each).mean()
    torch.testing.assert_close(trainer.compute_loss(model, batch), expected)


def test_without_a_teacher_the_labels_alone_are_learned(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(crossvalidation, "NgramClassifier", None)
    recipe = crossvalidation.Recipe({"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}, 600, 0, 1e-2, 0.0, 6, 1e-2, 0.0, 0.0, 0.0, 8, 0)  # fmt: skip # noqa: E501
    model, tokenizer = crossvalidation.train_classifier(rows, {"neg": 0, "pos": 1}, recipe, str(tmp_path))
    assert crossvalidation.predicted_labels(model, tokenizer, rows) == [row["label"] for row in rows]


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--num_folds", "1"], "--num_folds 1"),
        (["--num_folds", "25"], "'neg' has 24"),
        (["--dropout", "1"], "--dropout 1.0"),
        (["--word_dropout", "1"], "--word_dropout 1.0"),
        (["--teacher_weight", "1.5"], "--teacher_weight 1.5"),
        (["--preset", "huge"], "huge"),
        (["--text_column", "txt"], "txt"),
        (["--vocab_size", "3"], "vocab_size 3"),
        (["--max_folds", "-1"], "--max_folds -1 must be at least 1"),
        (["--max_folds", "0"], "--max_folds 0 must be at least 1"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0 must be at least 1"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0 must be more than 0"),
        (["--learning_rate", "nan"], "--learning_rate nan"),
        (["--pretraining_epochs", "-1"], "--pretraining_epochs -1"),
        (["--pretraining_learning_rate", "inf"], "--pretraining_learning_rate inf"),
    ],
)
def test_what_a_user_can_get_wrong(fails, train_file, tmp_path, flags, reason):
    assert reason in fails("crossvalidate", "--train_file", train_file, "--output_dir", str(tmp_path / "o"), *flags)


def test_results_of_other_settings_are_not_mixed(fails, train_file, tmp_path, untrained):
    out = tmp_path / "out"
    argv = ["crossvalidate", "--train_file", train_file, "--output_dir", str(out), *FLAGS]
    assert main(argv) == 0
    assert "other rows or settings" in fails(*argv, "--dropout", "0.2")
    assert main([*argv, "--dropout", "0.2", "--overwrite_output_dir", "true"]) == 0
    (out / "crossvalidation_results.json").write_text("{}", encoding="utf-8")
    assert "no results of this command" in fails(*argv)


@pytest.mark.process
def test_a_model_of_all_rows_is_left_that_anybody_loads(rows, train_file, tmp_path, capsys):
    """Its pipeline marks the texts as its training did, and `eval` measures it."""
    from sklearn.metrics import classification_report, confusion_matrix
    from transformers import pipeline

    out = tmp_path / "out"
    argv = ["crossvalidate", "--train_file", train_file, "--output_dir", str(out), *FLAGS, "--max_folds", "1"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "crossvalidation_results.json").read_text())
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    labels, guesses = [line["label"] for line in lines], [line["prediction"] for line in lines]
    assert results["labels"] == ["neg", "pos"]
    assert results["confusion_matrix"] == confusion_matrix(labels, guesses).tolist()
    expected = classification_report(labels, guesses, output_dict=True, zero_division=0)
    assert results["classification_report"].keys() == expected.keys()
    for name, measures in expected.items():
        assert results["classification_report"][name] == pytest.approx(measures), name
    assert results["model"]["train_rows"] == len(rows)
    for name in ("confusion_matrix.png", "loss_curve.png"):
        assert (out / name).stat().st_size > 1000
    assert (
        "cross-validation" not in (out / "README.md").read_text() and "1 of 3 folds" in (out / "README.md").read_text()
    )
    classify = pipeline("text-classification", model=str(out))
    found = [answer["label"] for answer in classify([row["text"] for row in rows])]
    assert sum(guess == row["label"] for guess, row in zip(found, rows, strict=True)) > 0.9 * len(rows)
    code = printed[printed.index("from transformers import pipeline") :]
    exec(code, {})
    assert "'label'" in capsys.readouterr().out
    assert (
        main(
            ["eval", str(out), "--metrics", "accuracy", "--eval_file", train_file, "--output_dir", str(tmp_path / "e")]
        )
        == 0
    )
    assert json.loads((tmp_path / "e/eval_results.json").read_text())["accuracy"] > 0.9


def test_guesses_no_better_than_the_most_frequent_class_are_called_so(train_file, tmp_path, untrained, capsys):
    assert main(["crossvalidate", "--train_file", train_file, "--output_dir", str(tmp_path / "o"), *FLAGS]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "no better than the most frequent class" in last and "0.5000 of the 48 held-out rows" in last


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("change", ["text", "label", "column"])
def test_as_many_other_rows_are_another_run(fails, rows, tmp_path, untrained, change):
    rows = [{**row, "tone": {"pos": "warm", "neg": "cold"}[row["label"]]} for row in rows]
    argv = ["crossvalidate", "--output_dir", str(tmp_path / "out"), *FLAGS]
    assert main([*argv, "--train_file", write(tmp_path / "a.jsonl", rows)]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    if change == "text":
        rows[0]["text"] += "!"
    elif change == "label":  # corrected in two rows, so that there are as many of each
        rows[0]["label"], rows[1]["label"] = rows[1]["label"], rows[0]["label"]
    flags = ["--label_column", "tone"] if change == "column" else []
    line = fails(*argv, "--train_file", write(tmp_path / "b.jsonl", rows), *flags)
    assert "other rows or settings" in line and len(untrained) == 4
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert main([*argv, "--train_file", str(tmp_path / "a.jsonl")]) == 0


@pytest.mark.parametrize("name", ["predictions", "crossvalidation_results"])
def test_a_fold_that_was_measured_outlives_a_half_written_file(train_file, tmp_path, untrained, monkeypatch, name):
    write_text, calls = Path.write_text, []

    def half(path, text, *args, **kwargs):
        calls.append(path.name.startswith(name))
        if sum(calls) == 2 and calls[-1]:
            write_text(path, text[: len(text) // 2], *args, **kwargs)
            raise KeyboardInterrupt
        return write_text(path, text, *args, **kwargs)

    argv = ["crossvalidate", "--train_file", train_file, "--output_dir", str(tmp_path / "out"), *FLAGS]
    monkeypatch.setattr(Path, "write_text", half)
    assert main(argv) == 130
    monkeypatch.setattr(Path, "write_text", write_text)
    assert main(argv) == 0
    assert untrained == [32, 32, 32, 32, 48]  # the second fold is done again, and not the first
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert Counter(line["fold"] for line in lines) == {0: 16, 1: 16, 2: 16}


def test_a_text_may_hold_any_end_of_line(rows, tmp_path, untrained):
    rows[0]["text"] += "\u2028a\x85b\x1dc\nd\re"
    argv = ["crossvalidate", "--train_file", write(tmp_path / "a.jsonl", rows), "--output_dir", str(tmp_path / "out")]
    assert main([*argv, *FLAGS, "--max_folds", "1"]) == 0
    assert main([*argv, *FLAGS]) == 0
    assert untrained == [32, 48, 32, 32]


def test_words_of_one_letter_have_no_baseline_and_are_measured(tmp_path, untrained, capsys):
    rows = [{"text": f"{n} {n % 3} 0", "label": ("pos", "neg")[n % 2]} for n in range(9)]
    argv = ["crossvalidate", "--train_file", write(tmp_path / "a.jsonl", rows), "--output_dir", str(tmp_path / "out")]
    assert main([*argv, *FLAGS]) == 0
    assert "no bag-of-words baseline: empty vocabulary" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/crossvalidation_results.json").read_text())
    assert len(results["folds"]) == 3 and "accuracy" in results and "baseline_accuracy" not in results


def test_the_model_of_another_run_is_not_overwritten(fails, train_file, model_copy, untrained):
    argv = ["crossvalidate", "--train_file", train_file, "--output_dir", str(model_copy), *FLAGS]
    assert "already holds another run" in fails(*argv) and not untrained
