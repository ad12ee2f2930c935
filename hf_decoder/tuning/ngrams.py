"""A logistic regression on n-grams of one to three words. It teaches the classifier that starts from scratch.

The features are weighted by their Naive Bayes log-count ratios (Wang and Manning 2012, "Baselines and bigrams",
section 2.3). Plain torch, so that it needs no further library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional

LONGEST = 3  # words
LBFGS_STEPS = 30


class NgramClassifier:
    """Learns the classes of `texts` from the n-grams in them, words being what stands between blanks.

    Args:
        texts: what it learns from.
        classes: their class ids.
        num_classes: how many classes there are.
    """

    def __init__(self, texts: Sequence[str], classes: Sequence[int], num_classes: int):
        self._index: dict[str, int] = {}
        found = [list(dict.fromkeys(gram for grams in _grams_by_word(text) for gram in grams)) for text in texts]
        for grams in found:
            for gram in grams:
                self._index.setdefault(gram, len(self._index))
        pairs = [(row, self._index[gram]) for row, grams in enumerate(found) for gram in grams]
        matrix = torch.sparse_coo_tensor(
            torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T,
            torch.ones(len(pairs)),
            (len(texts), len(self._index)),
            check_invariants=True,
        ).coalesce()
        one_hot = functional.one_hot(torch.tensor(classes), num_classes).float()
        inside = 1 + matrix.T @ one_hot  # (features, classes), counts
        outside = 1 + matrix.T @ (1 - one_hot)
        ratios = (inside / inside.sum(0)).log() - (outside / outside.sum(0)).log()
        weights = torch.zeros(len(self._index) + 1, num_classes, requires_grad=True)  # the last row is the bias
        optimizer = torch.optim.LBFGS([weights], max_iter=LBFGS_STEPS, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            scores = matrix @ (ratios * weights[:-1]) + weights[-1]
            # two columns share what one would hold in the binary case, hence the square without its usual half
            value = functional.cross_entropy(scores, one_hot, reduction="sum") + weights[:-1].square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        with torch.no_grad():
            weights = torch.cat([ratios * weights[:-1], weights[-1:]])
            self._weights = weights - weights.mean(-1, keepdim=True)

    def scores(self, text: str) -> torch.Tensor:
        """(words + 1, classes): the scores after each word, which add up to 0, and first those of no word at all.

        A softmax makes probabilities of them.
        """
        seen: set[str] = set()
        steps = torch.zeros(len(text.split()) + 1, self._weights.shape[1])
        steps[0] = self._weights[-1]
        for word, grams in enumerate(_grams_by_word(text), start=1):
            new = [self._index[gram] for gram in grams if gram in self._index and gram not in seen]
            seen.update(grams)
            if new:
                steps[word] = self._weights[new].sum(0)
        return steps.cumsum(0)


def _grams_by_word(text: str) -> Iterator[list[str]]:
    """For each word of `text` the runs of one to `LONGEST` words that end with it."""
    words = text.split()
    for stop in range(1, len(words) + 1):
        yield [" ".join(words[start:stop]) for start in range(max(0, stop - LONGEST), stop)]
