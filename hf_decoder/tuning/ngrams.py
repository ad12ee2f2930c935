"""A logistic regression on n-grams of one to three words. It teaches the classifier that starts from scratch.

The features are weighted by their Naive Bayes log-count ratios (Wang and Manning 2012, "Baselines and bigrams",
section 2.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch

LONGEST = 3  # words


class NgramClassifier:
    """Learns the classes of `texts` from their n-grams of whitespace-separated words, with scikit-learn.

    Args:
        texts: the texts to learn from.
        classes: their class ids.
        num_classes: how many classes there are.

    Raises:
        ValueError: if scikit-learn is not installed.
    """

    def __init__(self, texts: Sequence[str], classes: Sequence[int], num_classes: int):
        try:
            from sklearn.feature_extraction.text import CountVectorizer
            from sklearn.linear_model import LogisticRegression
        except ModuleNotFoundError:
            raise ValueError(
                "a teacher of n-grams needs scikit-learn: pip install 'hf-decoder[crossvalidate]', or give "
                "--teacher_weight 0"
            ) from None
        self._counter = CountVectorizer(analyzer=list, binary=True)
        counts = self._counter.fit_transform([[*chain(*_grams_by_word(text))] for text in texts])
        one_hot = np.eye(num_classes)[np.array(classes)]
        inside, outside = 1 + counts.T @ one_hot, 1 + counts.T @ (1 - one_hot)  # (features, classes)
        ratios = np.log(inside / inside.sum(0)) - np.log(outside / outside.sum(0))
        weights = []
        for ratio, is_class in zip(ratios.T, one_hot.T, strict=True):
            model = LogisticRegression(max_iter=1000).fit(counts.multiply(ratio).tocsr(), is_class)
            weights.append(np.append(ratio * model.coef_[0], model.intercept_))  # the last one is the bias
        # log-odds against the mean of the other classes -> scores that add up to 0
        self._weights = np.stack(weights, -1) * (num_classes - 1) / num_classes
        self._weights -= self._weights.mean(-1, keepdims=True)

    def scores(self, text: str) -> torch.Tensor:
        """(words + 1, classes): the scores of no word, then after each word. They add up to 0; a softmax makes
        probabilities of them."""
        seen: set[str] = set()
        steps: list[list[str]] = [[]]
        for grams in _grams_by_word(text):
            steps.append([gram for gram in grams if gram not in seen])
            seen.update(grams)
        added = self._counter.transform(steps) @ self._weights[:-1]
        added[0] = self._weights[-1]
        return torch.from_numpy(added.cumsum(0)).float()


def _grams_by_word(text: str) -> Iterator[list[str]]:
    """For each word of `text` the runs of one to `LONGEST` words that end with it."""
    words = text.split()
    for stop in range(1, len(words) + 1):
        yield [" ".join(words[start:stop]) for start in range(max(0, stop - LONGEST), stop)]
