"""Fills the template model_card.md with measured results. A missing result is written as not measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_decoder.reporting.loading_lines import CLASSIFIERS, finetuned_load_lines, load_lines, neutral
from hf_decoder.reporting.markup import code, line, plain, quoted
from hf_decoder.safety.terminal import printable

NOT_MEASURED = "not measured"
TEMPLATE_NAME = "model_card.md"
LOAD_BLOCK = re.compile(r"(## How to load it\n+```python\n)(.*?\n)(```)", re.DOTALL)
_NAME = re.compile(r'(model=|from_pretrained\()"(?:[^"\\]|\\.)*"(?:, revision="[0-9a-f]{40}")?')

# metric of all_results.json -> (metric id of the Hub, name shown)
METRICS = {
    "eval_loss": ("loss", "Loss (nats per token)"),
    "perplexity": ("perplexity", "Perplexity (per token)"),
    "eval_bits_per_byte": ("bits_per_byte", "Bits per byte"),
}


def template_path() -> Path:
    """Where the template of the card lies: in the package, which holds the same file as the root of a clone.

    Raises:
        ValueError: if it is missing, which a training should know before it starts.
    """
    path = Path(__file__).with_name(TEMPLATE_NAME)
    if not path.is_file():
        raise ValueError(f"the template of the model card, {path}, is missing; install hf-decoder again")
    return path


def pin_load_lines(text: str, repo_id: str, revision: str) -> str:
    """The card `text` with lines that load `repo_id` at the commit `revision`; unchanged where it has none."""

    def pin(found: re.Match[str]) -> str:
        return found[1] + _NAME.sub(rf'\1"{repo_id}", revision="{revision}"', found[2]) + found[3]

    return LOAD_BLOCK.sub(pin, text, count=1)


def pinned_revision(text: str, repo_id: str) -> str | None:
    """The commit that the card's lines load `repo_id` at, or None."""
    lines = LOAD_BLOCK.search(text)
    found = re.search(rf'"{re.escape(repo_id)}", revision="([0-9a-f]{{40}})"', lines[2]) if lines else None
    return found[1] if found else None


def write_model_card(
    folder: str | Path,
    results: Mapping[str, Any],
    words: Mapping[str, str],
    *,
    model_name: str | None = None,
) -> ModelCard:
    """Writes README.md of `folder` from the metrics in `results` (the content of all_results.json).

    Args:
        folder: where the model lies.
        results: metrics under Hugging Face's names; a metric that is missing is written as "not measured".
        words: `dataset` (what the text is), `held_out` (how its held-out part was chosen), `tokenizer` (where it
            comes from) and `start` (what training started from), which are text; and Markdown for `procedure`. One
            that is missing is written as "not stated". `license` is a licence id for the metadata, if there is one.
        model_name: the card's title and the name in its model-index; the folder's name if None.
    """
    folder = Path(folder)
    name = model_name or folder.resolve().name
    card_data = ModelCardData(
        model_name=line(name),
        license=words.get("license"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf_decoder", "causal-lm", "custom_code"],
        eval_results=_eval_results(results, words.get("dataset", "text")) or None,
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
    """Writes measured results into the model-index of README.md in `folder`, which is made where it is missing.

    A result for the same task, data set and metric is replaced; everything else of the card stays as it is.

    Args:
        results: names of `EVALUATION_METRICS` to values, and `NAME_signature` to how one was measured.
        dataset: name of the text or the rows that were measured.

    Raises:
        ValueError: if the metadata of an existing README.md cannot be read.
    """
    new = [
        EvalResult(
            task_type=task,
            dataset_type=line(Path(dataset).stem),
            dataset_name=line(dataset),
            metric_type=metric,
            metric_name=f"{shown} {signature}" if (signature := results.get(f"{key}_signature")) else shown,
            metric_value=results[key],
        )
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


def _add_results(folder: str | Path, new: Sequence[EvalResult]) -> ModelCard:
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


FINETUNING_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ kind }} of {{ base }}, fine-tuned with hf_decoder: {{ task }}.

## How to load it

```python
{{ load_lines }}
```

`trust_remote_code=True` runs the model code that lies beside the weights of the base model; without such code it does
nothing. Read it before you trust it, and load it from the Hub at the commit that you have read (`revision="..."`).

## Training

| | |
|---|---|
| rows | {{ dataset }}: {{ train_rows }} trained on, {{ eval_rows }} held out, {{ skipped_rows }} skipped |
| held-out rows that also stand in the training rows | {{ overlapping_rows }} |
| method | {{ method }} |
| parameters trained | {{ trainable_parameters }} of {{ parameters }} |
| optimizer steps | {{ steps }} |
| training time | {{ train_time }} |
| energy | {{ energy }} |
| peak memory (resident) | {{ peak_memory }} |
| hardware | {{ hardware }} |

![Loss](loss_curve.png)

## Results on the held-out rows

{{ results }}
{% if change %}
{{ change }}.
{% endif %}
## Limits

What holds for the base holds here. Bias, safety and factual accuracy: not measured.
"""
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
    """Writes README.md of a fine-tuned model or adapter from the metrics in `results` (all_results.json).

    `words` holds `task`, `base` (name of the base model), `dataset`, `method`, and where they are known `change` (what
    it changed), `base_model` (its Hub name), `license` and `prompt`, text or messages: the lines that load it have a
    neutral one of its kind.
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
            EvalResult(
                task_type=kind,
                dataset_type=line(Path(words["dataset"]).stem),
                dataset_name=line(f"{words['dataset']}, held-out rows"),
                metric_type=metric,
                metric_name=shown,
                metric_value=results[key],
            )
            for key, (metric, shown) in found.items()
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
        template_str=FINETUNING_TEMPLATE,
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


CONVERSION_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ source_code }}, {{ source_kind }}, {{ done }} with hf_decoder.

## How to load it

```python
{{ load_lines }}
```

{{ trust }}

## {{ heading }}

| | |
|---|---|
| source | {{ source }}{{ revision }} |
| parameters | {{ parameters }} |
| context | {{ context_length }} tokens |
{% for what, value in measured.items() %}| {{ what }} | {{ value }} |
{% endfor %}| software | {{ software }} |

## Training data, results and limits

Not part of this step, which measured no more than stands above: {{ elsewhere }}. Licence: {{ license }}.
"""
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
    """Writes README.md of a converted or quantized folder: what it was made from, and what was found by doing so.

    Args:
        folder: where the result lies.
        words: `title`, `kind` (class of the result, or `ONNX`), `source` (what it was made from), `source_kind` (its
            class, in Markdown), for a name of the Hub `base_model` and, where it is known, `revision`, and where the
            weights were quantized the `method`.
        measured: what, and its value.
        source_card: the source's README.md, whose licence is kept; None, absent or damaged: unknown.
    """
    is_onnx, is_ours = words["kind"] == ONNX, words["kind"].startswith("HfDecoder")
    is_quantized = "method" in words
    kind = "ONNX" if is_onnx else f"`{words['kind']}`"
    source_data = _metadata(source_card)
    known: dict[str, Any] = {
        key: line(source_data[key]) for key in ("license", "license_name", "license_link") if source_data.get(key)
    }
    if is_quantized and "base_model" in words:
        known["base_model_relation"] = "quantized"
    card_data = ModelCardData(
        model_name=line(words["title"]),
        base_model=words.get("base_model"),
        library_name=ONNX if is_onnx else "transformers",
        pipeline_tag="text-generation",
        tags=["hf_decoder", "quantized" if is_quantized else "converted", *(["custom_code"] if is_ours else [])],
        language=source_data.get("language"),
        **known,
    )
    card = ModelCard.from_template(
        card_data,
        template_str=CONVERSION_TEMPLATE,
        title=plain(words["title"]),
        done=f"quantized by `{words['method']}`" if is_quantized else f"converted to {kind}",
        heading="Quantization" if is_quantized else "Conversion",
        source=plain(words["source"]),
        source_code=code(words["source"]),
        source_kind=words["source_kind"],
        revision=f" at {plain(words['revision'])}" if "revision" in words else "",
        load_lines=_onnx_load_lines(words["title"]) if is_onnx else load_lines(words["title"], trust=is_ours),
        trust=TRUST if is_ours else "No code of this folder is run.",
        parameters=f"{parameters:,}",
        context_length=f"{context_length:,}",
        measured={plain(what): plain(value) for what, value in measured.items()},
        software=", ".join(f"{package} {version(package)}" for package in ("torch", "transformers")),
        elsewhere="see the card of the source" if source_data else "unknown, the source had no card",
        license=plain(known.get("license_name") or known.get("license") or "unknown"),
    )
    return _save(card, folder)


TRUST = (
    "`trust_remote_code=True` runs the model code that lies beside the weights. From the Hub, pin the commit that you "
    'have\nread with `revision="..."`. Where the `hf_decoder` package is installed, `import hf_decoder` registers the '
    "model and\nno code of this folder is run."
)


def _save(card: ModelCard, folder: str | Path) -> ModelCard:
    """Writes a new README.md, in which names and words of others are text alone."""
    (Path(folder) / "README.md").write_text(printable(card.content), encoding="utf-8")
    return card


def _metadata(path: Path | None) -> dict[str, Any]:
    """What stands at the top of a card; empty where there is none that can be read."""
    if path is None or not path.is_file():
        return {}
    try:
        return ModelCard.load(path).data.to_dict()
    except Exception:  # a stranger's card: YAML errors and those of the card's own checks
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
    """How a card names its folder: an absolute path says where it lies on this machine only."""
    return folder.name if folder.is_absolute() else folder.as_posix()


def _same_measure(one: EvalResult, other: EvalResult) -> bool:
    keys = ("task_type", "dataset_name", "metric_type")
    return all(getattr(one, key) == getattr(other, key) for key in keys)


def _eval_results(results: Mapping[str, Any], dataset: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=line(f"{dataset}, held-out part"),
            dataset_split="validation",
            metric_type=metric,
            metric_name=shown,
            metric_value=results[key],
        )
        for key, (metric, shown) in METRICS.items()
        if key in results
    ]


def _stated(words: Mapping[str, str]) -> dict[str, str]:
    said = {key: plain(words.get(key, "not stated")) for key in ("dataset", "held_out", "tokenizer", "start")}
    return {**said, "procedure": words.get("procedure", "not stated")}


def _energy(seconds: float) -> str:
    """What a reader who knows the machine's power can work out: E = P t, and a kilowatt hour is 3.6e6 joules."""
    return f"{NOT_MEASURED}; a machine that draws P watts took P x {seconds:,.0f} s / 3,600,000 kWh"


def steps_taken(results: Mapping[str, Any]) -> str:
    """How many steps of its schedule a training took."""
    taken, planned = results["train_steps"], results["planned_steps"]
    return f"{taken:,}" + (f" of {planned:,}, {taken / planned:.1%} of the schedule" if taken < planned else "")


def _measured(results: Mapping[str, Any]) -> dict[str, str]:
    def say(key: str, form: Callable[[Any], str]) -> str:
        return form(results[key]) if results.get(key) is not None else NOT_MEASURED

    counts: tuple[str, ...] = (
        "parameters",
        "context_length",
        "vocab_size",
        "train_documents",
        "train_bytes",
        "train_tokens",
    )
    counts += ("eval_documents", "eval_bytes", "eval_tokens")
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
