"""The flags of `hf-decoder eval`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli.flags import CAUSAL_MODEL, Answers, Loading, flag, needed

TEXT_METRICS = ("perplexity", "bits_per_byte")
ANSWER_METRICS = ("bleu", "chrf", "exact_match", "stop_rate", "python_parses")
LABEL_METRICS = ("accuracy", "f1")
METRICS = (*TEXT_METRICS, *ANSWER_METRICS, *LABEL_METRICS)
DEFAULT_BLOCK_SIZE = 1024
# measures, or none for --tasks -> the flags that nothing else reads
FLAGS_OF: dict[tuple[str, ...], tuple[str, ...]] = {
    (): ("include_path", "limit", "num_fewshot", "apply_chat_template", "random_baseline"),
    TEXT_METRICS: ("validation_file", "encoding", "block_size", "stride"),
    ANSWER_METRICS: ("max_new_tokens", "stop_strings", "num_beams", "length_penalty", "do_sample"),
    (*ANSWER_METRICS, *LABEL_METRICS): (
        *("test_file", "reference_file", "prompt_template", "max_eval_samples"),
        *("prompt_column", "reference_column"),
    ),
    LABEL_METRICS: ("label_column",),
    (*TEXT_METRICS, *LABEL_METRICS): ("text_column",),
    ("bleu",): ("tokenize",),
}
DESCRIPTION = (
    "Measures a model. perplexity and bits_per_byte score --validation_file; bleu, chrf and exact_match compare what "
    "the model writes after each prompt of --test_file with the reference; accuracy and f1 choose among the labels of "
    "--test_file the one the model finds likeliest, or ask the classification head of a classifier. stop_rate is the "
    "share of answers that the model ends by itself, python_parses of those that parse. --tasks runs the tasks of "
    "lm-evaluation-harness."
)


@dataclass
class Columns:
    """Where the rows hold what; found by the usual names if not given."""

    text_column: str | None = flag(None, "The column that holds the text.")
    prompt_column: str | None = flag(None, "The column that holds the prompt.")
    reference_column: str | None = flag(None, "The column that holds the reference, or a list of several.")
    label_column: str | None = flag(None, "The column that holds the label.")


@dataclass
class Writing(Answers):
    """How the model answers; what is not given is as its generation_config says."""

    num_beams: int | None = flag(None, "Beams of beam search; 1 is none.")
    length_penalty: float | None = flag(None, "Above 0 favours longer beams.")
    do_sample: bool = flag(False, "Draw the answers, as generation_config says.")
    seed: int = flag(42, "Seed of the draws.")


@dataclass(kw_only=True)
class EvalArguments(Columns, Writing, Loading):
    """Which model, which measures, and on what."""

    model_name_or_path: str = needed(f"{CAUSAL_MODEL} or sequence classifier.", positional=True, metavar="MODEL")
    metrics: list[str] | None = flag(
        None, f"What to measure; if unset, {' and '.join(TEXT_METRICS)}, or the --tasks alone.", choices=METRICS
    )
    validation_file: str | None = flag(None, "Held-out text: .txt, .jsonl, .parquet, or a folder.")
    encoding: str | None = flag(None, "Encoding of the text files that are not UTF-8, for example cp1252.")
    test_file: str | None = flag(
        None, "Prompts and references or labels: .jsonl, .csv, .parquet; or prompts, one a line."
    )
    reference_file: str | None = flag(None, "References, one a line, of a --test_file that holds prompts alone.")
    tokenize: str | None = flag(
        None,
        "Tokenizer of BLEU, by sacrebleu's names: 13a, intl, char, zh, ja-mecab, ko-mecab, flores200, ... If unset, "
        "the one that sacrebleu takes for the script of the references.",
    )
    prompt_template: str | None = flag(
        None,
        r"What the model reads; {prompt} is the prompt and \n a new line. If unset, what finetune makes of the same "
        "columns.",
    )
    block_size: int | None = flag(
        None, f"Tokens of a window, {DEFAULT_BLOCK_SIZE} or the model's context if that is shorter."
    )
    stride: int | None = flag(
        None, "Tokens a window advances and scores, half a window if unset: a token sees at least the rest."
    )
    batch_size: int = flag(8, "Rows that run together; no measure depends on it.")
    max_eval_samples: int | None = flag(None, "Only the first rows of --test_file.")
    tasks: list[str] | None = flag(
        None, "Tasks of lm-evaluation-harness (a,b or a b), or small: a set for models of 10M to 500M parameters."
    )
    include_path: str | None = flag(None, "Folder with tasks of one's own, as .yaml.")
    limit: float | None = flag(None, "Only the first rows of each task; below 1, this share of them.")
    num_fewshot: int | None = flag(
        None, "Solved rows before each row of a task; if unset, as the task says.", rare=True
    )
    apply_chat_template: bool = flag(False, "Put the rows of the tasks into the chat template.", rare=True)
    random_baseline: bool | None = flag(
        None, "Measure the tasks with random weights, too; if unset, for a named set of tasks.", rare=True
    )
    adapter_name_or_path: str | None = flag(None, "PEFT adapter to put on the model.")
    output_dir: str = flag("runs/eval", "Folder for results, picture and predictions.")
    update_card: bool = flag(
        False, "Write the results into the model-index of README.md in the folder of the model, or of the adapter."
    )


ARGUMENTS = (EvalArguments,)
