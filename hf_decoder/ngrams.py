"""Logistic regression on words, pairs and triples of words: what a classifier that starts from scratch learns from.

The features are weighted by their Naive Bayes log-count ratios (Wang and Manning 2012, "Baselines and bigrams",
section 2.3). Plain torch, so that it needs no further library.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch.nn import functional

LONGEST = 3  # words
PARTS = 5
LBFGS_STEPS = 30


def ngrams(text: str) -> set[str]:
    """The distinct runs of one to `LONGEST` words of `text`, words being what stands between blanks."""
    words = text.split()
    return {
        " ".join(words[start : start + length])
        for length in range(1, LONGEST + 1)
        for start in range(len(words) - length + 1)
    }


def probabilities(
    texts: Sequence[str], classes: Sequence[int], num_classes: int, unseen: Sequence[str]
) -> torch.Tensor:
    """(len(unseen), num_classes): class probabilities of `unseen`, learned from `texts` and their class ids."""
    found = [ngrams(text) for text in texts]
    index: dict[str, int] = {}
    for grams in found:
        for gram in sorted(grams):
            index.setdefault(gram, len(index))
    one_hot = functional.one_hot(torch.tensor(classes), num_classes).float()
    matrix = _matrix(found, index)
    inside = 1 + matrix.T @ one_hot  # (features, classes), counts
    outside = 1 + matrix.T @ (1 - one_hot)
    ratios = (inside / inside.sum(0)).log() - (outside / outside.sum(0)).log()
    weights = torch.zeros(len(index) + 1, num_classes, requires_grad=True)  # the last row is the bias
    optimizer = torch.optim.LBFGS([weights], max_iter=LBFGS_STEPS, line_search_fn="strong_wolfe")

    def scores(features: torch.Tensor) -> torch.Tensor:
        return features @ (ratios * weights[:-1]) + weights[-1]

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        # two columns share what one would hold in the binary case, hence the square without its usual half
        value = functional.cross_entropy(scores(matrix), one_hot, reduction="sum") + weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return scores(_matrix([ngrams(text) for text in unseen], index)).softmax(-1)


def held_out_probabilities(
    texts: Sequence[str], classes: Sequence[int], num_classes: int, seed: int = 0
) -> torch.Tensor:
    """(len(texts), num_classes): what `probabilities` says of each text when it learns from the other parts alone."""
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    result = torch.empty(len(texts), num_classes)
    for part in range(min(PARTS, len(texts))):
        held_out = order[part::PARTS]
        others = [index for place, index in enumerate(order) if place % PARTS != part]
        result[held_out] = probabilities(
            [texts[index] for index in others],
            [classes[index] for index in others],
            num_classes,
            [texts[index] for index in held_out],
        )
    return result


def _matrix(rows: Sequence[set[str]], index: dict[str, int]) -> torch.Tensor:
    """(rows, features) of ones where a row has the n-gram; sparse."""
    pairs = [(row, index[gram]) for row, grams in enumerate(rows) for gram in grams if gram in index]
    places = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    shape = (len(rows), len(index))
    return torch.sparse_coo_tensor(places, torch.ones(places.shape[1]), shape, check_invariants=True).coalesce()
