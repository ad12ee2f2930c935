"""The n-gram classifier against the formula of its paper, at the end of a text and after each of its words."""

import random
import sys

import numpy as np
import pytest
import torch

from hf_decoder.tuning.ngrams import NgramClassifier

WORDS = ["good", "bad", "not", "film", "plot", "a", "the"]


@pytest.fixture
def texts():
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=6)) for _ in range(40)]


@pytest.fixture
def classes(texts):
    return [int("good" in text) for text in texts]


def probabilities(model: NgramClassifier, texts: list[str]) -> torch.Tensor:
    return torch.stack([model.scores(text)[-1] for text in texts]).softmax(-1)


def test_two_classes_equal_scikit_learn_s_logistic_regression_on_features_weighted_by_log_count_ratios(texts, classes):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    train, unseen = texts[:30], [*texts[30:], "words unheard of", "", "a film a film a film"]
    count = CountVectorizer(ngram_range=(1, 3), binary=True, token_pattern=r"\S+")
    features, labels = count.fit_transform(train).toarray(), np.array(classes[:30])
    inside, outside = 1 + features[labels == 1].sum(0), 1 + features[labels == 0].sum(0)
    ratios = np.log(inside / inside.sum()) - np.log(outside / outside.sum())
    model = LogisticRegression(tol=1e-8, max_iter=10_000).fit(features * ratios, labels)
    expected = model.predict_proba(count.transform(unseen).toarray() * ratios)
    ours = probabilities(NgramClassifier(train, classes[:30], 2), unseen)
    torch.testing.assert_close(ours.double(), torch.tensor(expected), atol=1e-3, rtol=0)


def test_three_classes(texts):
    classes = [0 if "good" in text else 1 if "bad" in text else 2 for text in texts]
    model = NgramClassifier(texts, classes, 3)
    assert (probabilities(model, texts).argmax(-1) == torch.tensor(classes)).float().mean() > 0.9


def test_the_scores_after_a_word_are_those_of_the_text_up_to_it(texts, classes):
    model = NgramClassifier(texts, classes, 2)
    text = "  not good a film not good a film unheard of\tthe film "
    scores, words = model.scores(text), text.split()
    assert scores.shape == (len(words) + 1, 2)
    torch.testing.assert_close(scores.sum(-1), torch.zeros(len(scores)), atol=1e-5, rtol=0)
    for count in range(len(words) + 1):
        torch.testing.assert_close(scores[count], model.scores(" ".join(words[:count]))[-1])
    assert model.scores("").shape == (1, 2)


def test_without_scikit_learn_the_way_out_is_named(texts, classes, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ValueError, match=r"hf-decoder\[crossvalidate\]"):
        NgramClassifier(texts, classes, 2)
