"""The n-gram classifier against scikit-learn's solver, and that it never learns from what it is asked about."""

import random

import numpy as np
import pytest
import torch

from hf_decoder import ngrams

WORDS = ["good", "bad", "not", "film", "plot", "a", "the"]


@pytest.fixture
def texts():
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=6)) for _ in range(40)]


@pytest.fixture
def classes(texts):
    return [int("good" in text) for text in texts]


def test_ngrams_are_runs_of_up_to_three_words_each_once():
    assert ngrams.ngrams("a b a b") == {"a", "b", "a b", "b a", "a b a", "b a b"}
    assert ngrams.ngrams("") == set()


def test_two_classes_equal_scikit_learn_s_logistic_regression_on_features_weighted_by_log_count_ratios(texts, classes):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    train, unseen = texts[:30], [*texts[30:], "words unheard of", ""]
    count = CountVectorizer(ngram_range=(1, 3), binary=True, token_pattern=r"\S+")
    features, labels = count.fit_transform(train).toarray(), np.array(classes[:30])
    inside, outside = 1 + features[labels == 1].sum(0), 1 + features[labels == 0].sum(0)
    ratios = np.log(inside / inside.sum()) - np.log(outside / outside.sum())
    model = LogisticRegression(tol=1e-8, max_iter=10_000).fit(features * ratios, labels)
    expected = model.predict_proba(count.transform(unseen).toarray() * ratios)
    ours = ngrams.probabilities(train, classes[:30], 2, unseen)
    torch.testing.assert_close(ours.double(), torch.tensor(expected), atol=1e-3, rtol=0)


def test_three_classes(texts):
    classes = [0 if "good" in text else 1 if "bad" in text else 2 for text in texts]
    found = ngrams.probabilities(texts, classes, 3, texts)
    assert found.sum(-1).allclose(torch.ones(40)) and (found.argmax(-1) == torch.tensor(classes)).float().mean() > 0.9


def test_what_is_said_of_a_text_does_not_depend_on_its_label(texts, classes):
    before = ngrams.held_out_probabilities(texts, classes, 2)
    assert (before.argmax(-1) == torch.tensor(classes)).float().mean() > 0.8
    for index in (0, 17):
        other = [1 - of if place == index else of for place, of in enumerate(classes)]
        assert torch.equal(ngrams.held_out_probabilities(texts, other, 2)[index], before[index])
