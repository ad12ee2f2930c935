"""`hf-decoder crossvalidate`: the parts are parts, nothing of a part is seen before it is measured, runs go on."""

import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from made_up import SHAPE

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM, crossvalidation, ngrams
from hf_decoder.cli.main import main

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


def test_bag_of_words_is_scikit_learn_s_own(rows):
    from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
    from sklearn.linear_model import LogisticRegression

    train, held_out = rows[:30], rows[30:]
    count, weigh = CountVectorizer(ngram_range=(1, 2)), TfidfTransformer()
    features = weigh.fit_transform(count.fit_transform([row["text"] for row in train]))
    model = LogisticRegression(max_iter=1000).fit(features, [row["label"] for row in train])
    expected = model.predict(weigh.transform(count.transform([row["text"] for row in held_out]))).tolist()
    assert crossvalidation.bag_of_words(train, held_out) == expected


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

    def broken_off_at_the_third(train, *args):
        calls.append(len(train))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return Untrained(), None

    monkeypatch.setattr(crossvalidation, "train_classifier", broken_off_at_the_third)
    monkeypatch.setattr(crossvalidation, "predicted_labels", lambda model, tokenizer, rows: ["pos"] * len(rows))
    argv = ["crossvalidate", "--train_file", train_file, "--output_dir", str(tmp_path / "out"), *FLAGS]
    assert main([*argv, "--max_folds", "1"]) == 0
    assert len(calls) == 1
    assert main(argv) == 130
    assert main(argv) == 0
    assert len(calls) == 4  # the third was broken off, and only that was done again
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert Counter(line["fold"] for line in lines) == {0: 16, 1: 16, 2: 16}


def test_the_tokenizer_and_the_language_model_know_the_training_rows_alone(rows):
    recipe = crossvalidation.Recipe({"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}, 600, 1, 1e-2, 0.0, 1, 1e-2, 0.0, 0.1, 0.5, 8, 0)  # fmt: skip # noqa: E501
    train = [{**row, "text": row["text"] + " zebra"} for row in rows]
    model, tokenizer = crossvalidation.train_classifier(train, {"neg": 0, "pos": 1}, recipe, "nowhere")
    _, other = crossvalidation.train_classifier(rows, {"neg": 0, "pos": 1}, recipe, "nowhere")
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


def test_the_target_is_the_label_and_what_n_grams_of_other_rows_say(rows):
    texts, classes = [row["text"] for row in rows], [int(row["label"] == "pos") for row in rows]
    recipe = SimpleNamespace(teacher_weight=0.0, seed=3)
    labels = crossvalidation._targets(texts, classes, 2, recipe)
    assert labels.argmax(-1).tolist() == classes and labels.max(-1).values.eq(1).all()
    recipe.teacher_weight = 0.75
    taught = ngrams.held_out_probabilities(texts, classes, 2, seed=3)
    torch.testing.assert_close(crossvalidation._targets(texts, classes, 2, recipe), 0.25 * labels + 0.75 * taught)


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
    ],
)
def test_what_a_user_can_get_wrong(fails, train_file, tmp_path, flags, reason):
    assert reason in fails("crossvalidate", "--train_file", train_file, "--output_dir", str(tmp_path / "o"), *flags)


def test_results_of_other_settings_are_not_mixed(fails, train_file, tmp_path, monkeypatch):
    monkeypatch.setattr(crossvalidation, "train_classifier", lambda *args: (Untrained(), None))
    monkeypatch.setattr(crossvalidation, "predicted_labels", lambda model, tokenizer, rows: ["pos"] * len(rows))
    argv = ["crossvalidate", "--train_file", train_file, "--output_dir", str(tmp_path), *FLAGS]
    assert main(argv) == 0
    assert "other rows or settings" in fails(*argv, "--dropout", "0.2")
    assert main([*argv, "--dropout", "0.2", "--overwrite_output_dir", "true"]) == 0
    (tmp_path / "crossvalidation_results.json").write_text("{}", encoding="utf-8")
    assert "no result of this command" in fails(*argv)
