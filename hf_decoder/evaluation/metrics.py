"""Measures language models: likelihood of held-out text, and answers against references.

sacrebleu computes BLEU (Post 2018, "A Call for Clarity in Reporting BLEU Scores") and chrF (Popovic 2015), from 0 to
100, with its defaults: cased, 13a tokenisation, or its tokenizer of Chinese, Japanese or Korean if the references are
in one of these. Accuracy, F1 and exact match lie between 0 and 1.
"""

from __future__ import annotations

import contextlib
import inspect
import lzma
import math
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from hf_decoder.data.packing import IGNORE_INDEX, CorpusReport, pack_for_evaluation, tokenize
from hf_decoder.evaluation.classification import class_report

if TYPE_CHECKING:
    from datasets import Dataset


def perplexity(loss: float) -> float:
    """exp of the mean negative log-likelihood `loss` (nats per token); infinite if that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """Bits that the model needs for one byte of text: `total_nats` / ln 2 / `num_bytes`.

    Unlike perplexity it does not depend on the tokenizer, so it compares models with different vocabularies, and
    compressors, on the same text.

    Raises:
        ValueError: if `num_bytes` is not positive.
    """
    if num_bytes <= 0:
        raise ValueError(f"bits per byte need a text of at least one byte, got {num_bytes} bytes")
    return total_nats / math.log(2) / num_bytes


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits per byte that `xz -9e` needs for all `texts` as one UTF-8 stream.

    Raises:
        ValueError: if the texts are empty.
    """
    data = "".join(texts).encode("utf-8")
    if not data:
        raise ValueError("there is no text to compress: every text is empty")
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood of a text: the sum in nats, and the number of tokens it was summed over."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Mean nats per scored token; NaN if no token was scored."""
        return self.nats / self.tokens if self.tokens else math.nan


@torch.no_grad()
def score(
    model: PreTrainedModel,
    rows: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    autocast_dtype: torch.dtype | None = None,
) -> Score:
    """Sums -ln p(label) over every label of `rows`; the batch size does not change the result.

    Args:
        model: any `...ForCausalLM` that returns the mean loss over the labels. It is put into evaluation mode and
            back.
        rows: mappings with `input_ids` and `labels` (both `[block]`, of one length), and `position_ids` if the row is
            packed. Labels are aligned with `input_ids`: the model shifts them. Labels of -100 are not scored, and
            neither is the first label of a row, which nothing predicts.
        batch_size: rows per forward pass.
        autocast_dtype: runs the model under autocast in this type; None: no autocast.
    """
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, autocast_dtype) if autocast_dtype else contextlib.nullcontext()
    options: dict[str, Any] = {"use_cache": False}
    if "skip_logits" in inspect.signature(type(model).forward).parameters:
        options["skip_logits"] = True  # only the loss is read
    if getattr(model.config, "z_loss_coef", 0.0):
        options["z_loss_coef"] = 0.0  # a term of training, no part of the likelihood
    was_training = model.training
    model.eval()
    nats, tokens = 0.0, 0
    try:
        for batch in _batches(rows, batch_size):
            inputs = {name: column.to(device) for name, column in batch.items()}
            # A mean of batch means would weigh tokens unequally, so each is multiplied by its count.
            count = int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
            if count == 0:
                continue
            with autocast:
                loss = model(**inputs, **options).loss
            nats += float(loss.double()) * count
            tokens += count
    finally:
        model.train(was_training)
    return Score(nats=nats, tokens=tokens)


def _batches(rows: Iterable[Mapping[str, Any]], batch_size: int) -> Iterable[dict[str, torch.Tensor]]:
    """Stacks `batch_size` rows at a time into tensors `[batch, block]`."""
    batch: list[Mapping[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == batch_size:
            yield _stack(batch)
            batch = []
    if batch:
        yield _stack(batch)


def _stack(batch: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    names = [name for name in ("input_ids", "position_ids", "labels") if name in batch[0]]
    return {name: torch.stack([torch.as_tensor(row[name]) for row in batch]) for name in names}


def score_text(
    model: PreTrainedModel,
    tokenizer: Any,
    documents: Dataset,
    *,
    block_size: int,
    stride: int | None = None,
    batch_size: int = 8,
) -> tuple[Score, CorpusReport]:
    """Scores every token of every document (column `text`) once, with a sliding window.

    A window holds `block_size` tokens and advances by `stride`, half of it if None. It scores only the tokens that the
    previous window did not reach. So every token has at least `block_size - stride` tokens of context, or all of its
    document. A smaller stride gives more context and costs `block_size / stride` times the work. `batch_size` does
    not change the result.

    Raises:
        ValueError: if the stride is outside 1..block_size - 1, or there is no text.
    """
    stride = max(1, block_size // 2) if stride is None else stride
    tokens = tokenize(documents, tokenizer)
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        parts = [tokens]
    else:  # documents of one window would see each other
        parts = [tokens.select([index]) for index in range(len(tokens))]
    nats, count, blocks = 0.0, 0, 0
    for part in parts:
        rows = pack_for_evaluation(part, block_size, stride)
        one = score(model, rows, batch_size=batch_size)
        nats, count, blocks = nats + one.nats, count + one.tokens, blocks + len(rows)
    return Score(nats, count), CorpusReport(len(tokens), sum(tokens["num_bytes"]), count, blocks, count)


@torch.no_grad()
def option_nats(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], options: Sequence[Sequence[int]], *, batch_size: int = 8
) -> list[list[float]]:
    """-ln p(option | prompt), summed over the option's tokens: one row per prompt, one number per option.

    Prompts and options are token ids; a prompt has at least one. A prompt that is too long is cut at its start.
    """
    device = next(model.parameters()).device
    limit = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    longest = max(map(len, options))
    pairs = [(list(prompt)[-max(1, limit - longest) :], list(option)) for prompt in prompts for option in options]
    was_training = model.training
    model.eval()
    nats: list[float] = []
    try:
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            length = max(len(prompt) + len(option) for prompt, option in batch)
            # Padding is on the right, where causal attention does not see it.
            ids = torch.tensor([p + o + [0] * (length - len(p) - len(o)) for p, o in batch], device=device)
            logits = model(input_ids=ids, use_cache=False).logits
            for row, (prompt, option) in enumerate(batch):
                span = slice(len(prompt) - 1, len(prompt) + len(option) - 1)
                log_probs = torch.log_softmax(logits[row, span].float(), -1)
                picked = log_probs.gather(-1, torch.tensor(option, device=device)[:, None])
                nats.append(-float(picked.double().sum()))
    finally:
        model.train(was_training)
    return [nats[start : start + len(options)] for start in range(0, len(nats), len(options))]


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], tokenize: str | None = None) -> float:
    """Corpus BLEU of sacrebleu; each prediction has one reference or more.

    `tokenize` is sacrebleu's name of a tokenizer; None: its default for the language of the references.

    Raises:
        ValueError: if the two differ in length, or if sacrebleu or a package of its tokenizer is not installed.
    """
    return corpus_score(text_metric("bleu", references, tokenize), predictions, references)


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus chrF2 of sacrebleu, which needs no tokenizer; arguments and errors as `bleu`."""
    return corpus_score(text_metric("chrf", references), predictions, references)


def corpus_score(metric: Any, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The corpus score of a `metric` of sacrebleu; afterwards its `get_signature()` says how it was computed.

    Raises:
        ValueError: if the two differ in length.
    """
    return float(metric.corpus_score(list(predictions), _streams(predictions, references)).score)


def text_metric(name: str, references: Sequence[Sequence[str]], tokenize: str | None = None) -> Any:
    """sacrebleu's metric `chrf` or `bleu`; BLEU with the tokenizer `tokenize` or that of the references' language.

    Raises:
        ValueError: for an unknown tokenizer, or one that needs a package that is not installed.
    """
    if name == "chrf":  # counts characters, so it needs no tokenizer
        return _sacrebleu().CHRF()
    kind = _sacrebleu().BLEU
    if tokenize is not None and tokenize not in kind.TOKENIZERS:
        raise ValueError(f"--tokenize {tokenize!r} is unknown; choose one of: {', '.join(kind.TOKENIZERS)}")
    language = _language(references)
    try:
        # sacrebleu picks its tokenizer by language; given both, it would warn
        return kind(trg_lang=language) if tokenize is None else kind(tokenize=tokenize)
    except (ImportError, RuntimeError, OSError) as error:
        asked = f"--tokenize {tokenize}" if tokenize else f"BLEU of text in {LANGUAGES[language]}"
        package = f"pip install 'sacrebleu[{language}]', or " if language in ("ja", "ko") and not tokenize else ""
        reason = " ".join(str(error).split())
        raise ValueError(f"{asked} needs a missing package: {package}give --tokenize char ({reason})") from None


# languages with a tokenizer of their own in sacrebleu, and the Unicode names of their scripts
LANGUAGES = {"zh": "Chinese", "ja": "Japanese", "ko": "Korean"}
SCRIPTS = {"CJK": "zh", "HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko"}


def _language(references: Sequence[Sequence[str]]) -> str:
    """`zh`, `ja` or `ko` if most letters of the references are in their scripts, else an empty string.

    At least a third of the letters of Japanese text are kana. A name in a Chinese text adds less than a tenth.
    """
    letters = Counter(letter for options in references for text in options for letter in text if letter.isalpha())
    counts: Counter[str] = Counter()
    for letter, count in letters.items():
        counts[SCRIPTS.get(unicodedata.name(letter, "").partition(" ")[0], "")] += count
    east_asian = counts.total() - counts[""]
    if 2 * east_asian <= counts.total():
        return ""
    if 2 * counts["ko"] > east_asian:
        return "ko"
    return "ja" if 10 * counts["ja"] > east_asian else "zh"


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of the predictions that equal one of their references, ignoring spaces at the ends."""
    _check_lengths(predictions, references)
    hits = [p.strip() in {r.strip() for r in options} for p, options in zip(predictions, references, strict=True)]
    return sum(hits) / len(hits)


def accuracy(predictions: Sequence[Any], labels: Sequence[Any]) -> float:
    """Share of the predictions that equal their label."""
    _check_lengths(predictions, labels)
    return sum(p == label for p, label in zip(predictions, labels, strict=True)) / len(labels)


def macro_f1(predictions: Sequence[Any], labels: Sequence[Any]) -> float:
    """Mean F1 = 2 TP / (2 TP + FP + FN) over all classes that occur; every class counts the same."""
    _check_lengths(predictions, labels)
    report = class_report(predictions, labels, {*predictions, *labels})
    return report["classification_report"]["macro avg"]["f1-score"]


def _check_lengths(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions):,} predictions but {len(references):,} references; they must be as many")
    if not len(predictions):
        raise ValueError("there are no predictions to measure")


def _streams(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """Transposes references for sacrebleu: all first references, all second ones; None where one is missing."""
    _check_lengths(predictions, references)
    count = max(map(len, references))
    return [[options[i] if i < len(options) else None for options in references] for i in range(count)]


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ModuleNotFoundError:
        raise ValueError("bleu and chrf need sacrebleu: pip install 'hf-decoder[eval]'") from None
    return sacrebleu
