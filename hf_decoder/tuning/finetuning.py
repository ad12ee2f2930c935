"""Adds losses, metrics, learning rates, adapters and ends of turns to the trainers of TRL and transformers."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from hf_decoder import HfDecoderForCausalLM
from hf_decoder.data.conversations import without_weights
from hf_decoder.data.packing import IGNORE_INDEX
from hf_decoder.data.records import Row
from hf_decoder.evaluation.batch_generation import end_ids
from hf_decoder.evaluation.classification import class_report
from hf_decoder.evaluation.metrics import Score, accuracy, macro_f1, perplexity
from hf_decoder.training.checkpoint_formats import form_of
from hf_decoder.tuning.rows import MOST_CHATS, TaskData, example_prompt

HIGHEST_RATE = 5e-3  # of AdamW


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
    if task in ("sft", "distillation"):
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


def learning_rate(share: float, config: Any, *, new: bool, adapts: bool) -> float:
    """A peak learning rate for AdamW: what a model bears falls as it gets wider.

    5e-5 at a width of 768 is what BERT and GPT-2 are fine-tuned with, 1e-5 at 4096 what 7B models are. Below, where
    few have measured, it rises with the square of the width: 8e-4 at 192 is what the smallest preset takes best.
    LoRA takes ten times the rate of full fine-tuning (Schulman et al. 2025, "LoRA Without Regret"), a new model takes
    four times, and the loss of preferences, whose optimum is flat, a tenth: `share` is that of the task.
    """
    shrink = 768 / config.hidden_size
    rate = 5e-5 * (shrink**2 if shrink > 1 else shrink)
    rate *= (10 if adapts else 1) * (4 if new else 1) * share
    return min(float(f"{rate:.1g}"), HIGHEST_RATE)


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
