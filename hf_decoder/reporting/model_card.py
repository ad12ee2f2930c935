"""Fills the templates of model cards with measured results. A missing result is written as not measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_decoder.reporting.loading_lines import CLASSIFIERS, finetuned_load_lines, load_lines, neutral
from hf_decoder.reporting.markup import code, line, plain, quoted
from hf_decoder.safety.terminal import printable

NOT_MEASURED = "not measured"
LOAD_BLOCK = re.compile(r"(## How to load it\n+```python\n)(.*?\n)(```)", re.DOTALL)
_NAME = re.compile(r'(model=|from_pretrained\()"(?:[^"\\]|\\.)*"(?:, revision="[0-9a-f]{40}")?')

# metric of all_results.json -> (metric id of the Hub, name shown)
METRICS = {
    "eval_loss": ("loss", "Loss (nats per token)"),
    "perplexity": ("perplexity", "Perplexity (per token)"),
    "eval_bits_per_byte": ("bits_per_byte", "Bits per byte"),
}


def template_path(name: str = "model_card.md") -> Path:
    """The path of a card's template, a file of this room.

    Raises:
        ValueError: if it is missing. A training asks before it starts.
    """
    path = Path(__file__).with_name(name)
    if not path.is_file():
        raise ValueError(f"the template of the model card, {path}, is missing; install hf-decoder again")
    return path


def pin_load_lines(text: str, repo_id: str, revision: str) -> str:
    """Makes the load lines of the card `text` load `repo_id` at the commit `revision`. A card without them stays."""

    def pin(found: re.Match[str]) -> str:
        return found[1] + _NAME.sub(rf'\1"{repo_id}", revision="{revision}"', found[2]) + found[3]

    return LOAD_BLOCK.sub(pin, text, count=1)


def pinned_revision(text: str, repo_id: str) -> str | None:
    """The commit at which the card's lines load `repo_id`, or None."""
    lines = LOAD_BLOCK.search(text)
    found = re.search(rf'"{re.escape(repo_id)}", revision="([0-9a-f]{{40}})"', lines[2]) if lines else None
    return found[1] if found else None


def write_model_card(folder: str | Path, results: Mapping[str, Any], words: Mapping[str, str]) -> ModelCard:
    """Writes README.md of a model trained from scratch.

    Args:
        folder: folder of the model, whose name becomes the title.
        results: content of all_results.json; the card says "not measured" for a missing metric.
        words: text for `dataset`, `held_out` (how that part was chosen), `tokenizer` and `start` (random weights or a
            model), Markdown for `procedure`, and a licence id for `license`. The card says "not stated" for a missing
            one.
    """
    folder = Path(folder)
    name = folder.resolve().name
    card_data = ModelCardData(
        model_name=line(name),
        license=words.get("license"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf_decoder", "causal-lm", "custom_code"],
        eval_results=[
            _result(
                "text-generation",
                words.get("dataset", "text"),
                metric,
                results[key],
                part=", held-out part",
                dataset_type="text",
                dataset_split="validation",
            )
            for key, metric in METRICS.items()
            if key in results
        ]
        or None,
    )
    fields = {"title": plain(name), "load_lines": load_lines(_address(folder)), **_measured(results), **_stated(words)}
    card = ModelCard.from_template(card_data, template_path=str(template_path()), **fields)
    return _save(card, folder)


# name in eval_results.json -> (task of the Hub, metric id of the Hub, name shown)
EVALUATION_METRICS = {
    "perplexity": ("text-generation", "perplexity", "Perplexity (per token)"),
    "bits_per_byte": ("text-generation", "bits_per_byte", "Bits per byte"),
    "bleu": ("text-generation", "bleu", "BLEU (sacrebleu)"),
    "chrf": ("text-generation", "chrf", "chrF2 (sacrebleu)"),
    "exact_match": ("text-generation", "exact_match", "Exact match"),
    "stop_rate": ("text-generation", "stop_rate", "Share of answers that end by themselves"),
    "python_parses": ("text-generation", "python_parses", "Share of answers that parse as Python"),
    "accuracy": ("text-classification", "accuracy", "Accuracy"),
    "f1": ("text-classification", "f1", "F1 (macro)"),
}


def update_model_index(folder: str | Path, results: Mapping[str, Any], *, dataset: str) -> ModelCard:
    """Writes measured results into the model-index of README.md in `folder`, and makes a README.md if there is none.

    A result for the same task, data set and metric is replaced. The rest of the card stays.

    Args:
        results: value of each metric of `EVALUATION_METRICS`; `NAME_signature` says how NAME was measured.
        dataset: name of the text or rows that were measured.

    Raises:
        ValueError: if the metadata of an existing README.md cannot be read.
    """
    new = [
        _result(task, dataset, (metric, f"{shown} {results.get(f'{key}_signature', '')}".rstrip()), results[key])
        for key, (task, metric, shown) in EVALUATION_METRICS.items()
        if key in results
    ]
    return _add_results(folder, new)


def add_task_results(folder: str | Path, tasks: Mapping[str, Mapping[str, float]]) -> ModelCard:
    """The same for tasks of lm-evaluation-harness: by name of a task, its measures by name."""
    new = [
        EvalResult(
            task_type="text-generation",
            dataset_type=line(task),
            dataset_name=line(f"{task} (lm-evaluation-harness)"),
            metric_type=line(metric),
            metric_name=line(metric),
            metric_value=value,
        )
        for task, measures in tasks.items()
        for metric, value in measures.items()
    ]
    return _add_results(folder, new)


def _add_results(folder: str | Path, new: list[EvalResult]) -> ModelCard:
    folder = Path(folder)
    path = folder / "README.md"
    name = folder.resolve().name
    try:
        card = ModelCard.load(path) if path.is_file() else ModelCard(f"---\n{{}}\n---\n\n# {plain(name)}\n")
    except (ValueError, TypeError) as error:
        raise ValueError(f"the metadata at the top of {path} cannot be read: {error}") from None
    data: Any = card.data
    kept = [old for old in data.eval_results or [] if not any(_same_measure(old, result) for result in new)]
    data.model_name = data.model_name or line(name)
    data.eval_results = kept + new
    card.save(path)
    return card


TASK_WORDS = {
    "sft": "supervised fine-tuning",
    "classification": "sequence classification",
    "preference": "preference optimisation (DPO)",
    "kto": "preference optimisation (KTO)",
    "reward": "a reward model",
    "grpo": "reinforcement learning (GRPO)",
    "rloo": "reinforcement learning (RLOO)",
    "distillation": "distillation",
}
# metric of all_results.json -> (metric id of the Hub, name shown)
FINETUNING_METRICS = {
    "eval_loss": ("loss", "Loss"),
    "perplexity": ("perplexity", "Perplexity (per token)"),
    "eval_accuracy": ("accuracy", "Accuracy"),
    "eval_f1": ("f1", "F1 (macro)"),
    "eval_reward": ("reward", "Reward"),
    "eval_kl": ("kl", "KL to the model that the training started from, nats per token"),
    "eval_completions/mean_length": ("completion_length", "Tokens of a completion"),
    "eval_margin": ("reward_margin", "Reward margin"),
    "eval_rewards/margins": ("reward_margin", "Reward margin"),
    "eval_rewards/accuracies": ("reward_accuracy", "Share of pairs with the chosen answer ahead"),
}


def write_finetuning_card(
    folder: str | Path, results: Mapping[str, Any], words: Mapping[str, Any], *, is_adapter: bool
) -> ModelCard:
    """Writes README.md of a fine-tuned model or adapter.

    Args:
        folder: folder of the model or adapter, whose name becomes the title.
        results: content of all_results.json.
        words: `task`, `base` (name of the base model), `dataset` and `method`; where known, `change` (what it
            changed), `base_model` (its Hub name), `license` and `prompt`. The card shows a neutral prompt of the same
            kind.
        is_adapter: whether the folder holds an adapter.
    """
    folder = Path(folder)
    name = folder.resolve().name
    kind = "text-classification" if words["task"] in CLASSIFIERS else "text-generation"
    found = {key: shown for key, shown in FINETUNING_METRICS.items() if key in results}
    card_data = ModelCardData(
        model_name=line(name),
        license=words.get("license"),
        base_model=words.get("base_model"),
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=kind,
        tags=["hf_decoder", words["task"]],
        eval_results=[
            _result(kind, words["dataset"], shown, results[key], part=", held-out rows")
            for key, shown in found.items()
        ]
        or None,
    )
    rows = [f"| {shown} | {results[key]:.4g} |" for key, (_, shown) in found.items()]
    counts = ("train_rows", "eval_rows", "skipped_rows", "overlapping_rows", "trainable_parameters", "parameters")
    fields = {key: f"{results[key]:,}" if key in results else NOT_MEASURED for key in counts}
    measured = _measured(results)
    fields |= {key: measured[key] for key in ("steps", "train_time", "energy", "peak_memory", "hardware")}
    card = ModelCard.from_template(
        card_data,
        template_path=str(template_path("finetuned_card.md")),
        title=plain(name),
        kind="An adapter" if is_adapter else "A version",
        task=TASK_WORDS[words["task"]],
        load_lines=finetuned_load_lines(
            _address(folder),
            words["task"],
            neutral(words.get("prompt")),
            adapter=folder if is_adapter else None,
        ),
        results="\n".join(["| measure | value |", "|---|---:|", *rows]) if rows else NOT_MEASURED,
        base=code(words["base"]),
        dataset=plain(words["dataset"]),
        method=words["method"],
        change=words.get("change", "")[:1].upper() + words.get("change", "")[1:],
        **fields,
    )
    return _save(card, folder)


ONNX = "onnx"
DIFFERENCE = "largest difference of two logits, here and in the source"


def write_conversion_card(
    folder: Path,
    words: Mapping[str, str],
    *,
    parameters: int,
    context_length: int,
    measured: Mapping[str, str],
    source_card: Path | None,
) -> ModelCard:
    """Writes README.md of a converted or quantized folder.

    Args:
        folder: folder of the result.
        words: `title`, `kind` (class of the result, or `ONNX`), `source` (its name) and `source_kind` (its class, in
            Markdown). For a source on the Hub also `base_model` and, where known, `revision`. For quantized weights
            also `method`.
        parameters: number of parameters.
        context_length: tokens of the context.
        measured: name and value of each measurement.
        source_card: the source's README.md, whose licence is kept. Without a readable one the licence is "unknown".
    """
    is_onnx, is_ours = words["kind"] == ONNX, words["kind"].startswith("HfDecoder")
    source_data = _metadata(source_card)
    known: dict[str, Any] = {
        key: line(source_data[key]) for key in ("license", "license_name", "license_link") if source_data.get(key)
    }
    if "method" in words and "base_model" in words:
        known["base_model_relation"] = "quantized"
    card_data = ModelCardData(
        model_name=line(words["title"]),
        base_model=words.get("base_model"),
        library_name=ONNX if is_onnx else "transformers",
        pipeline_tag="text-generation",
        tags=["hf_decoder", "quantized" if "method" in words else "converted", *(["custom_code"] if is_ours else [])],
        language=source_data.get("language"),
        **known,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(template_path("converted_card.md")),
        title=plain(words["title"]),
        kind="ONNX" if is_onnx else f"`{words['kind']}`",
        is_ours=is_ours,
        method=words.get("method"),
        source=plain(words["source"]),
        source_code=code(words["source"]),
        source_kind=words["source_kind"],
        revision=plain(words.get("revision", "")),
        load_lines=_onnx_load_lines(words["title"]) if is_onnx else load_lines(words["title"], trust=is_ours),
        parameters=f"{parameters:,}",
        context_length=f"{context_length:,}",
        measured={plain(what): plain(value) for what, value in measured.items()},
        software=", ".join(f"{package} {version(package)}" for package in ("torch", "transformers")),
        has_card=bool(source_data),
        license=plain(known.get("license_name") or known.get("license") or "unknown"),
    )
    return _save(card, folder)


def _save(card: ModelCard, folder: str | Path) -> ModelCard:
    """Writes README.md, without control characters."""
    (Path(folder) / "README.md").write_text(printable(card.content), encoding="utf-8")
    return card


def _metadata(path: Path | None) -> dict[str, Any]:
    """The metadata at the top of a card; empty if it cannot be read."""
    if path is None or not path.is_file():
        return {}
    try:
        return ModelCard.load(path).data.to_dict()
    except Exception:  # errors of YAML, and of the checks of ModelCard
        return {}


def _onnx_load_lines(folder: str) -> str:
    return "\n".join(
        [
            "import onnxruntime",
            "from transformers import AutoTokenizer",
            f"tokenizer = AutoTokenizer.from_pretrained({quoted(folder)})",
            f"session = onnxruntime.InferenceSession({quoted(folder + '/model.onnx')})",
        ]
    )


def _address(folder: Path) -> str:
    """The name of the folder in a card, which shows no absolute path."""
    return folder.name if folder.is_absolute() else folder.as_posix()


def _same_measure(one: EvalResult, other: EvalResult) -> bool:
    keys = ("task_type", "dataset_name", "metric_type")
    return all(getattr(one, key) == getattr(other, key) for key in keys)


def _result(task: str, dataset: str, metric: tuple[str, str], value: float, part: str = "", **more: Any) -> EvalResult:
    """One entry of the model-index. `metric` is the Hub's id and the name shown, `part` the part of the data set."""
    kind, name = metric
    return EvalResult(
        task_type=task,
        dataset_name=line(dataset + part),
        metric_type=kind,
        metric_name=name,
        metric_value=value,
        **{"dataset_type": line(Path(dataset).stem), **more},
    )


def _stated(words: Mapping[str, str]) -> dict[str, str]:
    said = {key: plain(words.get(key, "not stated")) for key in ("dataset", "held_out", "tokenizer", "start")}
    return {**said, "procedure": words.get("procedure", "not stated")}


def _energy(seconds: float) -> str:
    """The formula for the energy, E = P t, for a reader who knows the machine's power. 1 kWh is 3.6e6 J."""
    return f"{NOT_MEASURED}; a machine that draws P watts took P x {seconds:,.0f} s / 3,600,000 kWh"


def steps_taken(results: Mapping[str, Any]) -> str:
    """The steps that a training took, with their share of the schedule where it was cut short."""
    taken, planned = results["train_steps"], results["planned_steps"]
    return f"{taken:,}" + (f" of {planned:,}, {taken / planned:.1%} of the schedule" if taken < planned else "")


def _measured(results: Mapping[str, Any]) -> dict[str, str]:
    def say(key: str, form: Callable[[Any], str]) -> str:
        return form(results[key]) if results.get(key) is not None else NOT_MEASURED

    counts = (
        *("parameters", "context_length", "vocab_size"),
        *("train_documents", "train_bytes", "train_tokens", "eval_documents", "eval_bytes", "eval_tokens"),
    )
    measures = ("eval_loss", "perplexity", "eval_bits_per_byte", "xz_bits_per_byte")
    versions = [
        f"{library} {results[library]}" for library in ("python", "torch", "transformers") if library in results
    ]
    return {
        **{key: say(key, "{:,}".format) for key in counts},
        **{key: say(key, "{:.4g}".format) for key in measures},
        "hardware": say("device", plain),
        "software": ", ".join(versions) or NOT_MEASURED,
        "steps": steps_taken(results) if "train_steps" in results else NOT_MEASURED,
        "train_time": say("train_runtime", "{:,.0f} s".format),
        "energy": say("train_runtime", _energy),
        "tokens_seen": say("num_input_tokens_seen", "{:,}".format),
        "speed": say("train_tokens_per_second", "{:,.0f} tokens/s".format),
        "peak_memory": say("peak_memory_bytes", lambda number: f"{number / 2**30:.2f} GiB"),
    }
