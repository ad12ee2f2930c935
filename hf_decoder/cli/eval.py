"""`hf-decoder eval`: measures any causal language model, or a sequence classifier, on text and on prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import set_seed

from hf_decoder.cli import (
    check_at_least,
    check_choice,
    is_classifier,
    load_classifier,
    load_model,
    load_tokenizer,
    select_device,
    show_progress,
)
from hf_decoder.cli.arguments import takes_argv
from hf_decoder.cli.flags.eval import (
    ANSWER_METRICS,
    DEFAULT_BLOCK_SIZE,
    FLAGS_OF,
    LABEL_METRICS,
    METRICS,
    TEXT_METRICS,
    EvalArguments,
)
from hf_decoder.costs import accounting
from hf_decoder.data import records
from hf_decoder.data.conversations import read_turns, turns_fault
from hf_decoder.data.documents import load_text
from hf_decoder.data.label_names import name_classes
from hf_decoder.evaluation import harness, metrics
from hf_decoder.evaluation.batch_generation import complete_or_cut, encode_prompt
from hf_decoder.evaluation.classification import (
    check_against_chance,
    class_report,
    plot_confusion,
    predict,
    share_padding,
)
from hf_decoder.reporting.model_card import add_task_results, update_model_index
from hf_decoder.training.callbacks import check_output_dir
from hf_decoder.tuning.rewards import python_parses

SHARES = (*LABEL_METRICS, "exact_match", "stop_rate", "python_parses")  # between 0 and 1


@takes_argv
def main(args: EvalArguments) -> int:
    """Measures, prints, and writes."""
    results: dict[str, Any] = {}
    predictions: list[dict[str, Any]] = []
    try:
        measure(args, results, predictions)
    finally:  # what fails later does not take the figures with it
        for metric in [metric for metric in args.metrics or () if metric in results]:
            signature = results.get(f"{metric}_signature")
            print(f"{metric:<16} {results[metric]:.4f}" + (f"  {signature}" if signature else ""))
        for line in _task_lines(results.get("tasks", {})):
            print(line)
    _write(args, results, predictions)
    matrix = ", confusion_matrix.png" if "confusion_matrix" in results else ""
    print(f"{args.output_dir} holds eval_results.json{matrix} and eval_results.png")
    if matrix and (warning := check_against_chance(results)):
        print(warning)
    return 0


def measure(args: EvalArguments, results: dict[str, Any], predictions: list[dict[str, Any]]) -> None:
    """Runs every metric that `args` names, and puts each result into `results` as soon as it is there.

    Raises:
        ValueError: for what the user can get wrong, as far as possible before the model is loaded.
    """
    _check(args)
    wanted = set(args.metrics or ())
    suite = harness.find_tasks(args.tasks, args.include_path, trusted=args.trust_remote_code) if args.tasks else None
    documents = _documents(args) if wanted & set(TEXT_METRICS) else None
    pairs = _pairs(args) if wanted & set(ANSWER_METRICS) else []
    tokenizer = load_tokenizer(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    references = [_references(row, tokenizer) for row in pairs]
    scorers: dict[str, Any] = {
        name: metrics.text_metric(name, references, args.tokenize) for name in ("bleu", "chrf") if name in wanted
    }
    options: dict[str, Any] = {"adapter": args.adapter_name_or_path, "trust_remote_code": args.trust_remote_code}
    classifier = is_classifier(args.model_name_or_path, **options)
    if classifier and (suite or wanted - set(LABEL_METRICS)):
        raise ValueError(f"{_measured(args)} is a sequence classifier, which has only {' and '.join(LABEL_METRICS)}")
    labelled = _labelled(args, classifies=classifier) if wanted & set(LABEL_METRICS) else []
    model = (load_classifier if classifier else load_model)(args.model_name_or_path, dtype=args.dtype, **options)
    model = model.to(select_device(args.device)).eval()
    if classifier:
        share_padding(model, tokenizer)
    set_seed(args.seed)

    names = {"model": args.model_name_or_path, "adapter": args.adapter_name_or_path}
    results |= {kind: Path(name).absolute().name for kind, name in names.items() if name is not None}
    results["parameters"] = model.num_parameters()
    if documents is not None:
        results |= _measure_text(args, model, tokenizer, documents)
    if pairs:
        results |= _measure_answers(args, model, tokenizer, pairs, references, scorers, predictions)
    if labelled:
        measure_labels = _classify if classifier else _choose_labels
        results |= measure_labels(args, model, tokenizer, labelled, predictions)
    if suite is not None:
        results["tasks"] = _measure_tasks(args, model, tokenizer, suite)
    results |= accounting.hardware()


def _check(args: EvalArguments) -> None:
    if args.metrics is None and not args.tasks:
        args.metrics = list(TEXT_METRICS)
    for metric in args.metrics or ():
        check_choice("--metrics", metric, METRICS)
    for name in ("batch_size", "max_eval_samples", "max_new_tokens", "num_beams"):
        check_at_least(f"--{name}", getattr(args, name), 1)
    check_at_least("--num_fewshot", args.num_fewshot, 0)
    if args.limit is not None and not args.limit > 0:
        raise ValueError(f"--limit {args.limit:g} must be more than 0: rows, or below 1 a share of them")
    if "{prompt}" not in (args.prompt_template or "{prompt}"):
        raise ValueError(f"--prompt_template {args.prompt_template!r} must hold {{prompt}}")
    for kind, flag in ((TEXT_METRICS, "validation_file"), ((*ANSWER_METRICS, *LABEL_METRICS), "test_file")):
        asked = [metric for metric in args.metrics or () if metric in kind]
        if asked and getattr(args, flag) is None:
            raise ValueError(f"--metrics {asked[0]} needs --{flag}")
    for measures, flags in FLAGS_OF.items():
        idle = [flag for flag in flags if getattr(args, flag) != getattr(EvalArguments, flag)]
        if idle and not (set(measures) & set(args.metrics or ()) if measures else args.tasks):
            missing = f"--metrics {' or '.join(measures)}" if measures else "--tasks"
            raise ValueError(f"--{idle[0]} has no effect without {missing}; add that, or leave it out")
    if args.update_card and not Path(_measured(args)).is_dir():
        owner = "adapter" if args.adapter_name_or_path else "model"
        raise ValueError(f"--update_card writes into the {owner}'s folder, and {_measured(args)} is none here")
    check_output_dir(args.output_dir, overwrite=True)  # measuring may take hours


def _measured(args: EvalArguments) -> str:
    """What the results are of: the adapter, where one is put on the model."""
    return args.adapter_name_or_path or args.model_name_or_path


def _measure_tasks(args: EvalArguments, model: Any, tokenizer: Any, suite: harness.Suite) -> dict[str, Any]:
    """By task: its measures, the one that counts, the level of chance, and that measure with random weights."""
    options: dict[str, Any] = {"limit": args.limit, "num_fewshot": args.num_fewshot, "batch_size": args.batch_size}
    options |= {"apply_chat_template": args.apply_chat_template, "trusted": args.trust_remote_code}
    results = harness.run_tasks(model, tokenizer, suite, **options)
    random: dict[str, Any] = {}
    if suite.is_named if args.random_baseline is None else args.random_baseline:
        new = harness.with_random_weights(model, args.seed, trust_remote_code=args.trust_remote_code)
        random = harness.run_tasks(new, tokenizer, suite, **options)
    for task, measures in results.items():
        counted = harness.counted_measure(measures, suite.counts.get(task))
        measures["counts"] = counted
        measures["asked_for"] = task in suite.names
        if counted.partition(",")[0] not in harness.CHOSEN:
            measures.pop("chance", None)
        if random and counted:  # a group may have no figure of its own
            measures["random_weights"] = random[task][counted]
    return results


def _task_lines(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each task that was asked for; what its groups hold stands in eval_results.json."""
    lines = []
    for task, measures in tasks.items():
        counted = measures["counts"]
        if measures["asked_for"] and counted:
            error = measures.get(counted.replace(",", "_stderr,", 1) if "," in counted else f"{counted}_stderr")
            beside = [f"+- {error:.4f}"] if isinstance(error, float) else []
            beside += [f"chance {measures['chance']:.4f}"] if "chance" in measures else []
            beside += [f"random weights {measures['random_weights']:.4f}"] if "random_weights" in measures else []
            rows = f"{measures['rows']:,} rows"
            lines.append(f"{task:<16} {counted} {measures[counted]:.4f}  ({', '.join([*beside, rows])})")
    return lines


def _documents(args: EvalArguments) -> Any:
    column = args.text_column or "text"
    options: dict[str, Any] = {"text_column": column, "encoding": args.encoding}
    return load_text(str(args.validation_file), validation_fraction=0, **options)["train"]


def _template(args: EvalArguments, prompt: Any) -> Any:
    if not isinstance(prompt, str):
        return prompt
    return (args.prompt_template or "{prompt}").replace("\\n", "\n").replace("{prompt}", prompt)


def _pairs(args: EvalArguments) -> list[records.Row]:
    """Prompts and their references, without the rows that lack either."""
    if args.reference_file:
        rows = records.pair_lines(str(args.test_file), args.reference_file, args.prompt_column)
        separator = records.BETWEEN
    else:
        named = {"prompt": args.prompt_column, "reference": args.reference_column}
        selected = _selected(args, "reference", named)
        rows, separator = list(selected), selected.separator
    rows = _usable(args, rows)
    if args.prompt_template is None:
        rows = [records.separate(row, separator) for row in rows]
    return rows


def _labelled(args: EvalArguments, *, classifies: bool) -> list[records.Row]:
    """Texts, or chats for a language model, and their labels. A column of references serves as labels too."""
    separator = records.BETWEEN
    if args.reference_file:
        rows = records.pair_lines(str(args.test_file), args.reference_file, args.prompt_column)
    else:
        kind = "classification" if args.reference_column is None else "reference"
        named = {"label": args.label_column, "text": args.text_column}
        if kind == "reference":
            named = {"prompt": args.prompt_column, "reference": args.reference_column}
        elif args.prompt_column:
            named["text"] = args.prompt_column
        selected = _selected(args, kind, named)
        rows, separator = list(selected), selected.separator
    roles = {"prompt": "text", "reference": "label"}
    rows = [{roles.get(role, role): value for role, value in row.items()} for row in rows]
    for row in rows:
        row["label"] = _said(row["label"])
        row["text"] = row["text"] if classifies else read_turns(row["text"])
    rows = _usable(args, rows)
    if not classifies:
        if args.prompt_template is None:
            for row in rows:
                row["text"] = records.separate({"prompt": row["text"]}, separator)["prompt"]
    elif any(isinstance(row["text"], list) for row in rows):
        raise ValueError(
            f"{args.test_file} holds messages, and {_measured(args)} is a sequence classifier, which reads text"
        )
    return rows


def _said(label: Any) -> Any:
    """A label as it is; of messages, what the assistant says first."""
    if isinstance(label, list) and not turns_fault("label", label) and (turn := records.first_answer(label)):
        return turn["content"]
    return label


def _selected(args: EvalArguments, kind: str, named: dict[str, str | None]) -> records.Selection:
    selected = records.select_columns(records.read_rows(str(args.test_file)), kind, named, str(args.test_file))
    if selected.unused:
        print(f"{args.test_file}: {records.describe_unused(selected.unused)}")
    return selected


def _usable(args: EvalArguments, rows: list[records.Row]) -> list[records.Row]:
    rows, skipped = records.drop_unusable(rows[: args.max_eval_samples])
    if skipped.reasons:
        print(f"{args.test_file}: {skipped}")
    if not rows:
        raise ValueError(f"{args.test_file} has no row to measure with: {skipped}")
    prompts = (row.get("prompt", row.get("text")) for row in rows)
    if args.prompt_template is not None and any(isinstance(prompt, list) for prompt in prompts):
        raise ValueError(
            f"--prompt_template is for prompts of text, and the rows of {args.test_file} hold messages; leave it out"
        )
    return rows


def _measure_text(args: EvalArguments, model: Any, tokenizer: Any, documents: Any) -> dict[str, Any]:
    limit = getattr(model.config, "max_position_embeddings", None) or DEFAULT_BLOCK_SIZE
    block_size = min(limit, DEFAULT_BLOCK_SIZE) if args.block_size is None else args.block_size
    if not 2 <= block_size <= limit:
        raise ValueError(f"--block_size {block_size} must lie between 2 and the model's context, {limit}")
    stride = block_size // 2 if args.stride is None else args.stride
    score, report = metrics.score_text(
        model, tokenizer, documents, block_size=block_size, stride=stride, batch_size=args.batch_size
    )
    return {
        "loss": score.loss,
        "perplexity": metrics.perplexity(score.loss),
        "bits_per_byte": metrics.bits_per_byte(score.nats, report.bytes),
        "text_bytes": report.bytes,
        "text_tokens": score.tokens,
        "block_size": block_size,
        "stride": stride,
    }


def _measure_answers(
    args: EvalArguments,
    model: Any,
    tokenizer: Any,
    rows: list[records.Row],
    references: list[list[str]],
    scorers: Mapping[str, Any],
    predictions: list[dict[str, Any]],
) -> dict[str, Any]:
    names = ("max_new_tokens", "num_beams", "length_penalty", "do_sample", "stop_strings")
    given = {name: getattr(args, name) for name in names}
    prompts = [_template(args, row["prompt"]) for row in rows]
    completions = complete_or_cut(model, tokenizer, prompts, given, args.batch_size, rows)
    completed = list(show_progress(completions, len(prompts), "answers"))
    answers = [text.strip() for text, _ in completed]
    for prompt, answer, options, (_, ended) in zip(prompts, answers, references, completed, strict=True):
        predictions.append({"prompt": prompt, "prediction": answer, "references": options, "ended": ended})
    wanted = args.metrics or ()
    results: dict[str, Any] = {"answers": len(rows)}
    for name, scorer in scorers.items():
        results[name] = metrics.corpus_score(scorer, answers, references)
        results[f"{name}_signature"] = scorer.get_signature().format()
    if "exact_match" in wanted:
        results["exact_match"] = metrics.exact_match(answers, references)
    if "stop_rate" in wanted:
        results["stop_rate"] = sum(ended for _, ended in completed) / len(completed)
    if "python_parses" in wanted:  # Python may begin with spaces
        parses = python_parses(prompts, [text for text, _ in completed])
        results["python_parses"] = sum(parses) / len(parses)
    return results


def _references(row: records.Row, tokenizer: Any) -> list[str]:
    """The texts that an answer is compared with: a text, several, or of messages what the assistant says first.

    A call of a tool is compared as the chat template writes it.
    """
    value = row["reference"]
    if not isinstance(value, list):
        return [str(value)]
    if not isinstance(value[0], Mapping):
        return [str(option) for option in value]
    answer: Any = records.first_answer(value)
    if not answer.get("tool_calls"):
        return [str(answer["content"])]
    prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    tools, options = row.get("tools"), row.get("chat_template_kwargs") or {}
    asked = encode_prompt(tokenizer, prompt, tools, options)
    whole = tokenizer.apply_chat_template([*prompt, answer], **{**options, "tools": tools, "return_dict": True})
    return [tokenizer.decode(whole["input_ids"][len(asked) :], skip_special_tokens=True).strip()]


def _classify(
    args: EvalArguments, model: Any, tokenizer: Any, rows: list[records.Row], predictions: list[dict[str, Any]]
) -> dict[str, Any]:
    """Accuracy and F1 of a classifier's own classes."""
    texts, names = [_template(args, row["text"]) for row in rows], model.config.id2label
    labels = name_classes([str(row["label"]) for row in rows], names, str(args.test_file))
    guesses = [names[index] for index in predict(model, tokenizer, texts, batch_size=args.batch_size)]
    return _compare_labels(texts, guesses, labels, list(names.values()), predictions)


def _choose_labels(
    args: EvalArguments, model: Any, tokenizer: Any, rows: list[records.Row], predictions: list[dict[str, Any]]
) -> dict[str, Any]:
    """Accuracy and F1 of the label that a language model finds likeliest after each text."""
    texts, labels = [_template(args, row["text"]) for row in rows], [str(row["label"]) for row in rows]
    options = sorted(set(labels))
    tokens = [tokenizer(option, add_special_tokens=False)["input_ids"] for option in options]
    beside = [(row.get("tools"), row.get("chat_template_kwargs")) for row in rows]
    prompts = [encode_prompt(tokenizer, text, *more) for text, more in zip(texts, beside, strict=True)]
    nats = metrics.option_nats(model, prompts, tokens, batch_size=args.batch_size)
    guesses = [options[min(range(len(options)), key=row.__getitem__)] for row in nats]
    return _compare_labels(texts, guesses, labels, options, predictions)


def _compare_labels(
    texts: list[Any], guesses: list[str], labels: list[str], names: list[str], predictions: list[dict[str, Any]]
) -> dict[str, Any]:
    for text, guess, label in zip(texts, guesses, labels, strict=True):
        predictions.append({"prompt": text, "prediction": guess, "label": label})
    return {
        "labelled": len(labels),
        "accuracy": metrics.accuracy(guesses, labels),
        "f1": metrics.macro_f1(guesses, labels),
        **class_report(guesses, labels, names),
    }


def _write(args: EvalArguments, results: Mapping[str, Any], predictions: list[dict[str, Any]]) -> None:
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    (folder / "eval_results.json").write_text(text, encoding="utf-8")
    if predictions:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
        (folder / "predictions.jsonl").write_text(lines, encoding="utf-8")
    title = " + ".join(results[kind] for kind in ("model", "adapter") if kind in results)
    if "confusion_matrix" in results:
        plot_confusion(results, folder / "confusion_matrix.png", title)
    shown = {name: results[name] for name in args.metrics or ()}
    asked_for = {name: found for name, found in results.get("tasks", {}).items() if found["asked_for"]}
    tasks = {name: (found["counts"], found[found["counts"]]) for name, found in asked_for.items() if found["counts"]}
    shown |= {name: value for name, (_, value) in tasks.items()}
    plot_metrics(shown, folder / "eval_results.png", title)
    if args.update_card:
        for kind, file in (
            (TEXT_METRICS, args.validation_file),
            ((*ANSWER_METRICS, *LABEL_METRICS), args.test_file),
        ):
            asked = set(kind) & set(args.metrics or ())
            names = {name for metric in asked for name in (metric, f"{metric}_signature")}
            if found := {name: results[name] for name in names & results.keys()}:
                update_model_index(_measured(args), found, dataset=Path(str(file)).name)
        if tasks:
            add_task_results(_measured(args), {name: {kind: value} for name, (kind, value) in tasks.items()})


def plot_metrics(values: Mapping[str, float], path: Path, title: str) -> None:
    """One bar a metric, each on its own scale: they have different units."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 1.6 * len(values), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (name, value) in enumerate(values.items(), 1):
        axes = figure.add_subplot(1, len(values), number)
        shown = value if value < float("inf") else 0.0
        axes.bar([0], [shown], color=f"C{number - 1}", width=0.5)
        axes.set_xticks([0], [name], parse_math=False)  # the name of a task may hold dollar signs
        top = 100.0 if name in ("bleu", "chrf") else 1.0 if name in SHARES else 1.2 * shown
        axes.set_ylim(0, max(top, 1e-9))
        axes.set_xlim(-0.6, 0.6)
        axes.text(0, shown, f"{value:.4g}", ha="center", va="bottom")
    figure.suptitle(title, parse_math=False)  # the name of a folder may hold dollar signs
    figure.savefig(path, dpi=120)
