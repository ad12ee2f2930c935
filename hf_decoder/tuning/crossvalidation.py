"""Cross-validates a text classifier in k folds. A fold's classifier sees nothing but the rows of the other folds.

For every fold a tokenizer and a classifier are trained from scratch on the other folds, the classifier from a language
model of their texts if wanted. It learns the labels and, beside them, to score a text after each of its words as a
model of n-grams does that learned from the same rows: one text teaches as much as it has words. A bag-of-words model
measured on the same folds says what that is worth.
"""

from __future__ import annotations

import functools
import math
import random
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_decoder import HfDecoderConfig
from hf_decoder.data.packing import pack, tokenize
from hf_decoder.data.records import Row
from hf_decoder.data.tokenization import train_word_tokenizer
from hf_decoder.evaluation.classification import predict
from hf_decoder.training import callbacks
from hf_decoder.training.optimizers import muon_adamw, wsd_kwargs
from hf_decoder.tuning.finetuning import add_dropout
from hf_decoder.tuning.ngrams import NgramClassifier
from hf_decoder.tuning.rows import class_rows

if TYPE_CHECKING:
    from datasets import Dataset

BLOCK_SIZE = 128
MAX_LENGTH = 512


def fold_of_each(labels: Sequence[Any], num_folds: int, seed: int = 0) -> list[int]:
    """The fold, 0 to `num_folds - 1`, that each row is held out in: every fold has its share of every label.

    Raises:
        ValueError: for fewer than two folds, or a label with fewer rows than folds.
    """
    if num_folds < 2:
        raise ValueError(f"--num_folds {num_folds} must be at least 2")
    rows = defaultdict(list)
    for index, label in enumerate(labels):
        rows[str(label)].append(index)
    folds = [0] * len(labels)
    draw = random.Random(seed)
    for label in sorted(rows):
        if len(rows[label]) < num_folds:
            raise ValueError(
                f"{num_folds} folds need as many rows of each label, and {label!r} has {len(rows[label])}"
            )
        draw.shuffle(rows[label])
        for place, index in enumerate(rows[label]):
            folds[index] = place % num_folds
    return folds


def bag_of_words(train: Sequence[Row], held_out: Sequence[Row]) -> list[str] | None:
    """Labels of the held-out rows by scikit-learn's TF-IDF of one and two words and logistic regression, its defaults.

    None where scikit-learn is not installed, or finds no word to learn from.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ModuleNotFoundError:
        return None
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    try:
        model.fit([row["text"] for row in train], [str(row["label"]) for row in train])
    except ValueError as error:  # its words have two letters or more
        print(f"warning: no bag-of-words baseline: {error}")
        return None
    return [str(label) for label in model.predict([row["text"] for row in held_out])]


@dataclass
class Recipe:
    """How the classifier of a fold comes about: its shape, and the two trainings."""

    shape: dict[str, Any]
    vocab_size: int
    pretraining_epochs: float
    pretraining_learning_rate: float
    pretraining_dropout: float
    num_train_epochs: float
    learning_rate: float
    dropout: float
    word_dropout: float
    teacher_weight: float
    batch_size: int
    seed: int


def train_classifier(
    rows: Sequence[Row],
    label2id: dict[str, int],
    recipe: Recipe,
    output_dir: str,
    history: list[dict[str, Any]] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier of `rows` (`text` and `label`), from random weights, and its tokenizer; it sees nothing else.

    `history` is filled with the logs of the classifier's training.
    """
    from datasets import Dataset

    set_seed(recipe.seed)
    texts = [row["text"] for row in rows]
    teacher = None
    if recipe.teacher_weight:
        teacher = NgramClassifier(texts, [label2id[str(row["label"])] for row in rows], len(label2id))
    tokenizer = train_word_tokenizer(texts, recipe.vocab_size)
    special_tokens = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    config = HfDecoderConfig(**{**recipe.shape, "vocab_size": len(tokenizer), **special_tokens})
    language_model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if recipe.pretraining_epochs:
        add_dropout(language_model, recipe.pretraining_dropout)
        _add_word_dropout(language_model, recipe.word_dropout)
        blocks = pack(tokenize(Dataset.from_dict({"text": texts}), tokenizer), BLOCK_SIZE)
        args = _arguments(recipe, output_dir, recipe.pretraining_epochs, recipe.pretraining_learning_rate)
        # as many tokens in a step as a step of the classifier has, about
        args.per_device_train_batch_size = max(1, recipe.batch_size // 4)
        _fit(language_model, args, blocks, callbacks.collate_rows)

    config.label2id, config.id2label = label2id, {index: name for name, index in label2id.items()}
    classifier = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    classifier.model.load_state_dict(language_model.model.state_dict())
    add_dropout(classifier, recipe.dropout)
    _add_word_dropout(classifier, recipe.word_dropout)
    classifier.score.register_forward_pre_hook(
        lambda head, inputs: torch.nn.functional.dropout(inputs[0], recipe.dropout, head.training)
    )
    args = _arguments(recipe, output_dir, recipe.num_train_epochs, recipe.learning_rate)
    args.train_sampling_strategy = "group_by_length"
    args.remove_unused_columns = False
    mark_texts(tokenizer)
    encoded = class_rows(rows, tokenizer, label2id, MAX_LENGTH)
    trainer: Callable[..., Trainer] = Trainer
    if teacher is not None:
        encoded = encoded.add_column("scores", [_score_each_token(text, tokenizer, teacher) for text in texts])
        trainer = functools.partial(_TaughtTrainer, recipe.teacher_weight)
    logs = _fit(classifier, args, encoded, functools.partial(_collate, tokenizer), trainer)
    if history is not None:
        history += logs
    return classifier, tokenizer


class _TaughtTrainer(Trainer):
    """Trains a classifier on its labels, and to score a text after every token as a teacher does.

    The batches hold the teacher's `scores` (B, S, classes), which add up to 0 for each token.
    """

    def __init__(self, teacher_weight: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.teacher_weight = teacher_weight
        self.model_accepts_loss_kwargs = False  # the loss is a mean, which Trainer shares among the batches of a step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scores, labels = inputs.pop("scores"), inputs.pop("labels")
        outputs = model(**inputs, output_hidden_states=True)
        classes = torch.nn.functional.one_hot(labels, scores.shape[-1]).to(scores.dtype)
        target = classes.lerp(scores[:, -1].softmax(-1), self.teacher_weight)
        loss = torch.nn.functional.cross_entropy(outputs.logits.float(), target)
        found = self.accelerator.unwrap_model(model).score(outputs.hidden_states[-1]).float()
        distance = (found - found.mean(-1, keepdim=True) - scores).square().sum(-1)
        seen = inputs["attention_mask"]
        loss = loss + (distance * seen).sum() / seen.sum()
        return (loss, outputs) if return_outputs else loss


def _score_each_token(text: str, tokenizer: PreTrainedTokenizerBase, teacher: NgramClassifier) -> list[list[float]]:
    """(tokens, classes): what `teacher` says of the words up to each token, markers included."""
    scores = teacher.scores(text).tolist()
    ends, place = [], 0
    for word in text.split():
        place = text.index(word, place) + len(word)
        ends.append(place)
    stops = [stop for _, stop in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
    stops[-1] = len(text)  # the marker behind it
    return [scores[bisect_right(ends, stop)] for stop in stops[-MAX_LENGTH:]]


def _collate(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = dict(tokenizer.pad({"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt"))
    batch["labels"] = torch.tensor([row["labels"] for row in rows])
    if "scores" in rows[0]:
        scores = [torch.tensor(row["scores"]) for row in rows]
        batch["scores"] = torch.nn.utils.rnn.pad_sequence(scores, batch_first=True, padding_side="left")
    return batch


def _add_word_dropout(model: PreTrainedModel, probability: float) -> None:
    """Takes whole tokens away from what the model reads, in training mode alone; the markers stay."""

    def drop(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        kept = torch.rand(output.shape[:-1], device=output.device) >= probability
        kept |= inputs[0] == model.config.eos_token_id
        return output * kept.unsqueeze(-1).to(output.dtype)

    if probability:
        model.get_input_embeddings().register_forward_hook(drop)


def mark_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Has the tokenizer put the markers around a text that stood there in pretraining; the last one is classified."""
    end = str(tokenizer.eos_token)
    markers = TemplateProcessing(single=f"{end} $A {end}", special_tokens=[(end, tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = markers


def _arguments(recipe: Recipe, output_dir: str, epochs: float, learning_rate: float) -> TrainingArguments:
    return TrainingArguments(
        output_dir,
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=recipe.batch_size,
        lr_scheduler_type="warmup_stable_decay",
        warmup_steps=0.1,
        weight_decay=0.1,
        adam_beta2=0.95,
        bf16=callbacks.bf16_supported(),
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="no",
        logging_first_step=True,
        disable_tqdm=True,
        report_to="none",
        seed=recipe.seed,
    )


def _fit(
    model: PreTrainedModel,
    args: TrainingArguments,
    rows: Dataset,
    collator: Any,
    trainer: Callable[..., Trainer] = Trainer,
) -> list[dict[str, Any]]:
    """Trains the model by the recipe; returns the logs."""
    steps = math.ceil(args.num_train_epochs * math.ceil(len(rows) / args.per_device_train_batch_size))
    args.lr_scheduler_kwargs = wsd_kwargs(steps)
    args.logging_steps = callbacks.logging_steps(steps)
    made = trainer(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=collator,
        optimizer_cls_and_kwargs=muon_adamw(args),
    )
    made.remove_callback(PrinterCallback)
    made.train()
    return made.state.log_history


def predicted_labels(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[str]:
    """The likeliest label of each row, by a classifier of `train_classifier`."""
    names: Any = model.config.id2label
    texts = [row["text"] for row in rows]
    return [str(names[index]) for index in predict(model, tokenizer, texts, batch_size=32)]
