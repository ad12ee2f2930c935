"""What fine-tuning adds to the trainers of TRL and transformers: rows of a task, classes, losses, ends of turns.

TRL's SFTTrainer puts the loss on completions when rows have a `completion`, and on the assistant's turns when asked by
`assistant_only_loss`; which tokens those are, the chat template's generation block says.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from . import HfDecoderForCausalLM
from .classification import class_report, encode_texts, label_map
from .completion import encode_prompt, end_ids
from .conversations import Rendering, is_learned, weighted_rows, without_weights
from .evaluation import IGNORE_INDEX, Score, accuracy, macro_f1, perplexity
from .examples import (
    TO_TEMPLATE,
    Row,
    Skipped,
    check_alike,
    count_overlap,
    describe_unused,
    drop_unusable,
    read_lines,
    read_rows,
    select_columns,
    separate,
)
from .layouts import form_of
from .results import example_of, line_of

if TYPE_CHECKING:
    from datasets import Dataset

MOST_CHATS = 100  # that are looked through for the special tokens of their template
HIGHEST_RATE = 5e-3  # of AdamW
# what the loss of a task counts in
LOSS_UNITS = {
    "sft": "nats per token",
    "classification": "cross-entropy, nats per row",
    "preference": "DPO, nats per pair",
}
TASKS = ("sft", "classification", "preference")


@dataclass
class TaskData:
    """The usable rows of a task: what is trained on, what is held out, and what was left out of either."""

    train: list[Row]
    validation: list[Row]
    skipped: dict[str, Skipped]
    overlap: int
    masked: tuple[int, int] = (0, 0)  # of either, how many have no token to learn within the block (`skip_masked`)
    unused: dict[str, dict[str, int]] = field(default_factory=dict)  # by file, columns and in how many rows
    separator: str = ""  # what stands between a prompt of text and its answer (`examples.Selection`)

    @property
    def roles(self) -> tuple[str, ...]:
        """The columns of the rows, by their roles."""
        return _roles(self.train)

    @property
    def weighs(self) -> bool:
        """Whether some assistant's turn is not to be learned."""
        return any(not is_learned(turn) for row in [*self.train, *self.validation] for turn in row.get("messages", ()))

    def describe(self) -> dict[str, Any]:
        """What has to stay the same of the rows for a run to go on (`checkpoints.describe_run`)."""
        digest = hashlib.sha256()
        for row in self.train:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return {"rows": len(self.train), "content": digest.hexdigest()[:16]}

    def counts(self) -> dict[str, int]:
        """How many rows were trained on, held out, and skipped, and how many stand in both parts."""
        return {
            "train_rows": len(self.train) - self.masked[0],
            "eval_rows": len(self.validation) - self.masked[1],
            "skipped_rows": sum(sum(skipped.reasons.values()) for skipped in self.skipped.values()),
            "overlapping_rows": self.overlap,
        }

    def warnings(self) -> list[str]:
        """One line for each thing about the rows that the user should know."""
        lines = [f"{name}: {skipped}" for name, skipped in self.skipped.items() if skipped.reasons]
        lines += [f"{name}: {describe_unused(columns)}" for name, columns in self.unused.items() if columns]
        if self.separator:
            lines.append(
                "a blank line stands between prompt and answer; what generate is to answer needs it too, "
                r"--prompt_template '{prompt}\n\n' (with '{prompt}' here, nothing does)"
            )
        if self.overlap:
            lines.append(
                f"{self.overlap:,} of {len(self.validation):,} held-out rows also stand in the training rows; "
                "what is measured on them is too good"
            )
        return lines


def load_task(
    task: str,
    train_file: str,
    validation_file: str | None,
    columns: Mapping[str, str | None],
    *,
    completion_files: tuple[str | None, str | None] = (None, None),
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> TaskData:
    """Reads the rows of `task` and leaves out those that it cannot use.

    Args:
        columns: role -> column, where the user named it (`examples.select_columns`).
        completion_files: for sft, files of completions that run in parallel with the lines of the two files.
        validation_fraction: share of the training rows to hold out where there is no validation file.

    Raises:
        ValueError: for files or columns that do not fit the task, or without one usable row.
    """
    files = [train_file] if validation_file is None else [train_file, validation_file]
    parts: list[list[Row]] = []
    skipped: dict[str, Skipped] = {}
    unused: dict[str, dict[str, int]] = {}
    separators: list[str] = []
    for path, completions in zip(files, completion_files, strict=False):
        read = _with_completions(path, completions) if completions else read_rows(path)
        rows = select_columns(read, task, columns, path)
        unused[path] = rows.unused
        separators.append(rows.separator)
        selected, skipped[path] = drop_unusable(rows)
        if not selected:
            raise ValueError(f"{path} has no usable row: {skipped[path]}")
        check_alike(rows, path, across_roles=task == "sft")
        parts.append(selected)
    train, validation = parts if len(parts) == 2 else _hold_out(parts[0], validation_fraction, seed)
    if (here := _roles(train)) != (there := _roles(validation or train)):
        raise ValueError(f"{train_file} has {', '.join(here)} and {validation_file} has {', '.join(there)}")
    if validation and is_conversational(train) != is_conversational(validation):
        raise ValueError(
            f"of {train_file} and {validation_file}, one holds text and the other messages; give two alike"
        )
    overlap = count_overlap(train, validation)
    return TaskData(train, validation, skipped, overlap, unused=unused, separator=separators[0])


def _roles(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(role for role in rows[0] if role not in TO_TEMPLATE)


def _with_completions(path: str, completion_file: str) -> list[Row]:
    prompts, completions = read_lines(path), read_lines(completion_file)
    if len(prompts) != len(completions):
        raise ValueError(
            f"{path} has {len(prompts):,} lines but {completion_file} has {len(completions):,}; "
            "they must run in parallel"
        )
    # Lines, unlike TRL's prompts and completions, have no space where they meet.
    return [{"source": p, "target": c} for p, c in zip(prompts, completions, strict=True)]


def _hold_out(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    count = round(fraction * len(rows))
    if count == 0:
        return rows, []
    if count >= len(rows):
        raise ValueError(f"{len(rows)} rows are too few to hold out {count} of them; give a validation file")
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]


def skip_unrendered(data: TaskData, tokenizer: Any, prompt_template: str | None = None) -> list[str]:
    """Leaves out the conversations that the chat template does not render whole, and says how many and why.

    Returns a line for each file that lost rows, and one about what of turns the template does not read.

    Raises:
        ValueError: if there is no chat template, or one for prompts of text; or no training row is left.
    """
    if prompt_template is not None:
        raise ValueError("--prompt_template is for prompts of text, and the rows hold messages; leave it out")
    if tokenizer.chat_template is None:
        raise ValueError(
            "the rows hold messages, or a system text, a history or tools, which make messages of them; the tokenizer "
            f"of {tokenizer.name_or_path} has no chat template"
        )
    lines = []
    rendering = Rendering(tokenizer)
    paths = (next(iter(data.skipped)), next(reversed(data.skipped)))
    for path, part in zip(paths, ("train", "validation"), strict=True):
        rows, kept = getattr(data, part), []
        lost = Skipped(len(rows))
        for row in rows:
            reason = rendering.row_fault(row)
            if reason is None:
                kept.append(row)
            else:
                lost.reasons[reason] += 1
        if rows and not kept and part == "train":
            raise ValueError(f"{path} has no usable row: {lost}")
        setattr(data, part, kept)
        data.skipped[path].reasons.update(lost.reasons)
        lines += [f"{path}: {lost}"] if lost.reasons else []
    if rendering.unused:
        keys = ", ".join(f"{key} ({count:,} conversations)" for key, count in rendering.unused.items())
        lines.append(f"of turns, the chat template does not read: {keys}")
    return lines


def trainer_rows(
    data: TaskData, tokenizer: Any, args: Any, prompt_template: str | None
) -> tuple[Dataset, Dataset | None]:
    """The rows to train on and those held out, as TRL's trainer of `args` takes them; settles where the loss is."""
    if getattr(args, "assistant_only_loss", False) is None:
        args.assistant_only_loss = data.roles == ("messages",)
    if data.weighs:
        rows_of = functools.partial(weighted_rows, tokenizer=tokenizer, assistant_only=args.assistant_only_loss)
        args.assistant_only_loss = False  # the labels say it
    else:
        rows_of = functools.partial(text_rows, prompt_template=prompt_template, separator=data.separator)
    return rows_of(data.train), rows_of(data.validation) if data.validation else None


def text_rows(rows: Sequence[Row], prompt_template: str | None = None, separator: str = "") -> Dataset:
    """Rows for TRL's trainers; a prompt that is text is put into `prompt_template`.

    Without a template, `separator` follows a prompt that does not end in a space.
    """
    from datasets import Dataset, Features, Json, List, Value

    filled = [_fill(row, prompt_template, separator) for row in rows]
    # As JSON, turns keep their own keys: a table gives each the keys of all, without a value.
    kinds = {role: List(Json()) if isinstance(value, list) else Value("string") for role, value in filled[0].items()}
    kinds |= {"tools": Value("string"), "chat_template_kwargs": Json()}
    return Dataset.from_list(filled, Features({role: kinds[role] for role in filled[0]}))


def _fill(row: Row, prompt_template: str | None, separator: str = "") -> Row:
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        if prompt_template is None:
            return separate(row, separator)
        return {**row, "prompt": prompt_template.replace("{prompt}", prompt)}
    row = {role: without_weights(value) if isinstance(value, list) else value for role, value in row.items()}
    if row.get("tools") is not None:
        row["tools"] = json.dumps(row["tools"])  # which TRL reads
    if "chat_template_kwargs" in row:
        row["chat_template_kwargs"] = row["chat_template_kwargs"] or {}
    return row


def skip_masked(trainer: Any, data: TaskData, prompt_template: str | None = None) -> list[str]:
    """Counts the rows whose prompt fills the block as skipped, and returns a line about those of each file.

    TRL's trainers cut rows at `max_length`. Of such a row nothing is left to learn: it is dropped without a word, or
    packed with the others without a label. Rows of which only the end is cut off have a line too.

    Raises:
        ValueError: if a file has no other rows, naming the length of its shortest prompt and the limit.
    """
    args, lines, masked = trainer.args, [], []
    packing = getattr(args, "packing", False)  # DPO has none
    packs = (packing, packing if getattr(args, "eval_packing", None) is None else args.eval_packing)
    parts = ((data.train, trainer.train_dataset), (data.validation, trainer.eval_dataset))
    paths = (next(iter(data.skipped)), next(reversed(data.skipped)))
    names = (paths[0], paths[1] if paths[1] != paths[0] else f"the held-out part of {paths[0]}")
    for path, name, packed, (rows, prepared) in zip(paths, names, packs, parts, strict=True):
        lost = _count_masked(prepared, len(rows), args.packing_strategy if packed else None) if rows else 0
        masked.append(lost)
        if rows and lost == len(rows):
            filled = [_fill(row, prompt_template, data.separator) for row in rows]
            lengths = [_prompt_length(row, trainer.processing_class) for row in filled]
            raise ValueError(
                f"{name} has no row with an answer to learn: its shortest prompt has {min(lengths):,} tokens, and "
                f"--max_length or the model's context cuts a row off after {args.max_length:,}"
            )
        if lost:
            reason = f"the prompt fills the {args.max_length:,} tokens of --max_length or of the model's context"
            data.skipped[path].reasons[reason] += lost
            lines.append(f"{name}: {lost:,} of {len(rows):,} rows skipped: {reason}")
        if rows and (cut := _count_full(prepared, args, packed)):
            lines.append(
                f"{name}: {cut:,} of {len(rows):,} rows fill the {args.max_length:,} tokens of --max_length or of the "
                "model's context: what is longer is cut off there"
            )
    data.masked = (masked[0], masked[1])
    return lines


def _count_full(prepared: Dataset, args: Any, packed: bool) -> int:
    """How many rows reach `max_length`, where what lies behind is cut off."""
    if "input_ids" not in prepared.column_names:
        longest = (max(len(row["chosen_ids"]), len(row["rejected_ids"])) + len(row["prompt_ids"]) for row in prepared)
    elif not packed:
        longest = (len(ids) for ids in prepared["input_ids"])
    elif args.packing_strategy == "bfd":
        longest = (length for lengths in prepared["seq_lengths"] for length in lengths)
    else:  # what is longer stands in another row
        return 0
    return sum(length >= args.max_length for length in longest)


def _count_masked(prepared: Dataset, rows: int, strategy: str | None) -> int:
    """How many of `rows` the trainer's `prepared` rows, packed by `strategy`, hold without a label or no longer."""
    if strategy is None:
        return rows - len(prepared)
    if strategy != "bfd":  # nothing is cut off: the rest of a row stands in another
        return 0
    count = 0
    for row in prepared.select_columns(["labels", "seq_lengths"]).with_format("numpy"):
        starts = np.cumsum([0, *row["seq_lengths"][:-1]])
        count += int((np.add.reduceat((row["labels"] != IGNORE_INDEX).astype(int), starts) == 0).sum())
    return count


def _prompt_length(row: Row, tokenizer: Any) -> int:
    """Tokens before the first that the model is to write."""
    if "messages" not in row:
        return len(encode_prompt(tokenizer, row.get("prompt") or row["chosen"]))
    answer = next(number for number, turn in enumerate(row["messages"]) if turn["role"] == "assistant")
    return len(encode_prompt(tokenizer, row["messages"][:answer]))


def class_rows(rows: Sequence[Row], tokenizer: Any, label2id: Mapping[str, int], max_length: int | None) -> Dataset:
    """Rows for a classifier: `input_ids` of the text and `labels`, the class id.

    Raises:
        ValueError: counting the labels outside `label2id`.
    """
    from datasets import Dataset

    names = [str(row["label"]) for row in rows]
    label_map(names, list(label2id))
    ids = encode_texts(tokenizer, [row["text"] for row in rows], max_length)
    return Dataset.from_dict({"input_ids": ids, "labels": [label2id[name] for name in names]})


class ClassMetrics:
    """Accuracy and macro F1 of a transformers `EvalPrediction`; keeps the whole report of the last one.

    Args:
        names: the classes, by id.
    """

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self.report: dict[str, Any] = {}

    def __call__(self, prediction: Any) -> dict[str, float]:
        guesses = [self.names[index] for index in prediction.predictions.argmax(-1).tolist()]
        labels = [self.names[index] for index in prediction.label_ids.tolist()]
        self.report = class_report(guesses, labels, self.names)
        return {"accuracy": accuracy(guesses, labels), "f1": macro_f1(guesses, labels)}


def is_conversational(rows: Sequence[Row]) -> bool:
    """Whether rows hold lists of messages in place of text."""
    return any(isinstance(value, list) for value in rows[0].values())


def train_template_tokens(peft_config: Any, rows: Sequence[Row], tokenizer: Any, model: Any) -> list[str]:
    """Has an adapter train the embeddings of the special tokens that the chat template writes, which it returns.

    A base that was pretrained on plain text never saw them: their embeddings, and with a tied head their logits, are
    alike, and no change of the other weights tells the end of a turn from the rest of them.
    """
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    seen: set[int] = set()
    for row in rows[:MOST_CHATS]:
        turns = [turn for role in ("messages", "prompt", "completion", "chosen") for turn in row.get(role) or ()]
        options = row.get("chat_template_kwargs") or {}
        rendered = tokenizer.apply_chat_template(
            without_weights(turns), tools=row.get("tools"), return_dict=True, **options
        )
        seen.update(rendered["input_ids"])
    found = sorted(seen & special)
    layers = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    names = [name for name, module in model.named_modules() if id(module) in layers]
    trained_whole = {*(peft_config.modules_to_save or [])} | {*(peft_config.target_modules or [])}
    if not found or any(name.rpartition(".")[2] in trained_whole for name in names):
        return []
    peft_config.trainable_token_indices = dict.fromkeys(names, found)
    return tokenizer.convert_ids_to_tokens(found)


def evaluate(trainer: Any, task: str) -> dict[str, Any]:
    """The measures on the held-out rows, under the names that pretraining gives them."""
    metrics = trainer.evaluate()
    if task == "sft":
        metrics["perplexity"] = perplexity(metrics["eval_loss"])
    elif task == "classification":
        metrics |= trainer.compute_metrics.report
    return metrics


def end_turns(model: Any, tokenizer: Any) -> None:
    """Lets `generate` stop where a chat turn ends, wherever the model is loaded."""
    model.generation_config.eos_token_id = end_ids(model, tokenizer, chat=True)


@functools.cache
def sft_trainer() -> type:
    """TRL's SFTTrainer, with the loss of our own models formed by themselves: they never hold the logits either.

    TRL's fused head also gives the entropy and the accuracy of the tokens, at more than the cost of a small model's
    whole step (measured on a CPU); they are not logged then. Any other model, and label smoothing, take TRL's way.

    The loss of an evaluation is the mean over its tokens, where Trainer takes the mean over batches: that depends on
    which rows share one. (Of several processes, those that repeat rows to have as many as the others leave these out,
    but packed ones, which stand in one row.)
    """
    import trl
    from accelerate.utils import gather_object

    class OwnLossTrainer(trl.SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            unwrapped = self.accelerator.unwrap_model(model)
            base = getattr(unwrapped, "get_base_model", lambda: unwrapped)()
            own = isinstance(base, HfDecoderForCausalLM) and self.args.loss_type == "nll"
            if not own or return_outputs or self.label_smoother is not None or self.compute_loss_func is not None:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if self.model.training:
                tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
                tokens = self.accelerator.gather_for_metrics(torch.as_tensor(tokens, device=self.args.device))
                self._total_train_tokens += int(tokens.sum())
                self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            inputs = {**inputs, "use_cache": False, "skip_logits": True}
            return Trainer.compute_loss(self, model, inputs, num_items_in_batch=num_items_in_batch)

        def prediction_step(self, model, inputs, *args, **kwargs):
            own = inputs["labels"].clone()
            state = self.accelerator.gradient_state
            if self.args.world_size > 1 and state.end_of_dataloader and state.remainder > 0 and not self.padding_free:
                own[max(0, state.remainder - self.args.process_index * len(own)) :] = IGNORE_INDEX
            count = int((own[:, 1:] != IGNORE_INDEX).sum())
            loss, logits, labels = super().prediction_step(model, {**inputs, "labels": own}, *args, **kwargs)
            if count:
                self._scores.append(Score(float(loss) * count, count))
            return loss, logits, labels

        def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
            self._scores = []
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            scores = gather_object(self._scores)
            total = Score(math.fsum(score.nats for score in scores), sum(score.tokens for score in scores))
            output.metrics[f"{metric_key_prefix}_loss"] = total.loss
            return output

    return OwnLossTrainer


def add_dropout(model: Any, probability: float) -> None:
    """Drops parts of what embedding, attentions and MLPs write, in training mode alone (Vaswani et al. 2017, 5.4).

    A matter of the training and not of the model: hooks on the modules that write, named as Llama's, hold it, and
    nothing of it is saved.

    Raises:
        ValueError: for a model without such modules.
    """
    if not probability:
        return
    writers = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("o_proj", "down_proj") or module is model.get_input_embeddings()
    ]
    if len(writers) < 3:
        raise ValueError(f"--dropout does not know the layers of {type(model).__name__}; leave it out")

    def drop(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, probability, module.training)

    for module in writers:
        module.register_forward_hook(drop)


def learning_rate(task: str, config: Any, *, new: bool, adapts: bool) -> float:
    """A peak learning rate for AdamW: what a model bears falls as it gets wider.

    5e-5 at a width of 768 is what BERT and GPT-2 are fine-tuned with, 1e-5 at 4096 what 7B models are. Below, where
    few have measured, it rises with the square of the width: 8e-4 at 192 is what the smallest preset takes best.
    LoRA takes ten times the rate of full fine-tuning (Schulman et al. 2025, "LoRA Without Regret"), a new model takes
    four times, and the loss of preferences, whose optimum is flat, a tenth.
    """
    shrink = 768 / config.hidden_size
    rate = 5e-5 * (shrink**2 if shrink > 1 else shrink)
    rate *= (10 if adapts else 1) * (4 if new else 1) * (0.1 if task == "preference" else 1)
    return min(float(f"{rate:.1g}"), HIGHEST_RATE)


def example_prompt(data: TaskData, prompt_template: str | None = None) -> Any:
    """A prompt of the user's own rows, text or messages, short enough to stand in a line of code."""
    rows = (data.validation or data.train)[:MOST_CHATS]
    prompts: list[Any]
    if "messages" in data.roles:
        prompts = [
            list(itertools.takewhile(lambda turn: turn["role"] != "assistant", row["messages"])) for row in rows
        ]
    elif "prompt" in data.roles:
        prompts = [_fill(row, prompt_template, data.separator)["prompt"] for row in rows]
    else:
        prompts = [row["text"] if "label" in data.roles else line_of([row["text"]]) for row in rows]
    return example_of(prompts)


def count_parameters(model: Any) -> dict[str, int | float]:
    """Parameters in all and trained, and the share of them that is trained."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = model.num_parameters()
    return {"parameters": total, "trainable_parameters": trained, "trainable_share": trained / total}


def training_state_bytes(model: Any, optimizer: Any) -> int:
    """Bytes that training holds beside the weights: a gradient for every trained parameter, the optimizer's state."""
    if optimizer is None:  # of a run that had nothing left to train
        return 0
    state = getattr(optimizer, "optimizer", optimizer).state  # accelerate wraps the optimizer
    held = [value for values in state.values() for value in values.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in [*held, *(p for p in model.parameters() if p.requires_grad)])


def count_steps(trainer: Any) -> int:
    """Optimizer steps of the whole run."""
    args = trainer.args
    batches = len(trainer.get_train_dataloader())
    steps = math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))
    return args.max_steps if args.max_steps > 0 else steps


def check_resumable(checkpoint: str | Path) -> None:
    """Refuses a checkpoint of the weights alone: Trainer would go on from it with a new optimizer and schedule.

    Raises:
        ValueError: naming what is missing.
    """
    missing = [] if form_of(checkpoint) else ["the state of the optimizer"]
    if not (Path(checkpoint) / SCHEDULER_NAME).is_file():
        missing.append("that of the schedule")
    if missing:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint} lacks {' and '.join(missing)}, so it cannot be gone on with "
            "(--save_only_model keeps neither); give it as the model, or its adapter as --adapter_name_or_path, to "
            "start anew from its weights"
        )


def describe_method(model_args: Any, adapter: str | None) -> str:
    """What is trained, in a few words, by the flags of TRL's ModelConfig and the adapter to go on with."""
    if adapter:
        return "an adapter, continued"
    if not model_args.use_peft:
        return "all parameters"
    kind = "DoRA" if model_args.use_dora else "LoRA"
    quantized = (
        " on a 4-bit base" if model_args.load_in_4bit else " on an 8-bit base" if model_args.load_in_8bit else ""
    )
    return f"{kind} of rank {model_args.lora_r}, alpha {model_args.lora_alpha}{quantized}"


def data_name(path: str) -> str:
    """How a model card calls a file: its name, without the folder, which means nothing elsewhere."""
    return Path(path).name


def words(task_args: Any, model_args: Any, data: TaskData, prompt_template: str | None) -> dict[str, Any]:
    """What the model card says in words, and what the lines that load the result prompt it with."""
    said: dict[str, Any] = {"task": task_args.task, "dataset": data_name(str(task_args.train_file))}
    said["base"] = Path(model_args.model_name_or_path or f"a new {task_args.preset} model").name
    said["method"] = describe_method(model_args, task_args.adapter_name_or_path)
    said["prompt"] = example_prompt(data, prompt_template)
    if task_args.merge and model_args.use_peft:
        said["method"] += ", merged"
    if model_args.model_name_or_path and not Path(model_args.model_name_or_path).exists():
        said["base_model"] = model_args.model_name_or_path
    if task_args.license:
        said["license"] = task_args.license
    return said
