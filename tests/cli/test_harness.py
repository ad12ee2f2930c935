"""Tasks of EleutherAI's lm-evaluation-harness: our `eval --tasks` and its own command line, without this package."""

import json
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_decoder.cli.main import main

pytestmark = pytest.mark.peers

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm_eval")

DATA = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
target_delimiter: " "
metadata: {{version: 1}}
"""
TASKS = {
    "which_word": """
        output_type: multiple_choice
        doc_to_choice: "{{choices}}"
        doc_to_target: label
        metric_list: [{metric: acc}]
        """,
    "next_word": """
        output_type: loglikelihood
        doc_to_target: "{{choices[label]}}"
        metric_list: [{metric: perplexity}, {metric: acc}]
        """,
    "what_follows": """
        output_type: generate_until
        doc_to_target: "{{choices[label]}}"
        generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
        metric_list: [{metric: exact_match}, {metric: chrf}]
        """,
}
ROWS = [
    {"prompt": "the cat " * n + "the", "choices": ["dog", "bird sees the cat"], "label": n % 2}
    for n in (0, 7, 1, 3, 2, 9, 4, 5, 0, 6)
]
CODE = """
    import sys
    from lm_eval.__main__ import cli_evaluate
    flags, folder = sys.argv[2:], sys.argv[1]
    for size in ("1", "8"):
        sys.argv = ["lm_eval", *flags, "--batch_size", size, "--output_path", f"{folder}/batch{size}"]
        cli_evaluate()
"""


@pytest.fixture
def tasks(tmp_path):
    """A folder with one task of each kind."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = tmp_path / "rows.json"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    for name, lines in TASKS.items():
        text = f"task: {name}\n{DATA.format(rows=rows)}" + "\n".join(line.strip() for line in lines.splitlines())
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def of_command_line(folder, size):
    """What lm_eval's command line measured with this batch size: figures, and log-likelihoods of the answers."""
    (results,) = (folder / f"batch{size}").rglob("results_*.json")
    figures = json.loads(results.read_text(encoding="utf-8"))["results"]
    (samples,) = (folder / f"batch{size}").rglob("samples_which_word_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    lines.sort(key=lambda line: line["doc_id"])
    return figures, [[float(answer[0][0]) for answer in line["resps"]] for line in lines]


def test_figures_are_those_of_the_harness_for_any_batch_size(run, model_copy, tasks, run_python, tmp_path, capsys):
    flags = ["--model", "hf", "--model_args", f"pretrained={run.folder},trust_remote_code=True,dtype=float32"]
    flags += ["--include_path", tasks, "--tasks", ",".join(TASKS), "--device", "cpu", "--log_samples"]
    run_python(CODE, tmp_path, *flags, hide=("hf_decoder",))  # one process, which takes most of a minute to begin
    likelihoods = {}
    for size in (1, 8):
        figures, likelihoods[size] = of_command_line(tmp_path, size)
        argv = ["eval", str(model_copy), "--tasks", *TASKS, "--include_path", str(tasks), "--batch_size", str(size)]
        assert main([*argv, "--update_card", "--output_dir", str(tmp_path / "ours")]) == 0
        ours = json.loads((tmp_path / "ours/eval_results.json").read_text(encoding="utf-8"))["tasks"]
        assert set(ours) == set(TASKS)
        for task, measures in figures.items():
            numbers = {key.replace(",none", ""): value for key, value in measures.items() if type(value) is float}
            assert numbers and {key: ours[task][key] for key in numbers} == pytest.approx(numbers, rel=1e-5)
    assert torch.tensor(likelihoods[1]).shape == (len(ROWS), 2)
    torch.testing.assert_close(torch.tensor(likelihoods[8]), torch.tensor(likelihoods[1]), rtol=1e-5, atol=1e-5)
    assert ours["which_word"]["chance"] == 0.5 and "chance" not in ours["what_follows"]
    assert "which_word       acc" in capsys.readouterr().out
    results = ModelCard.load(model_copy / "README.md").data.eval_results
    assert {"which_word", "next_word", "what_follows"} <= {result.dataset_type for result in results}

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(run.folder).eval(),
        AutoTokenizer.from_pretrained(run.folder),
    )
    for row, answers in zip(ROWS, likelihoods[1], strict=True):
        for choice, log_likelihood in zip(row["choices"], answers, strict=True):
            start = len(tokenizer(row["prompt"])["input_ids"])
            ids = tokenizer(f"{row['prompt']} {choice}")["input_ids"]
            with torch.no_grad():
                log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
            expected = sum(float(log_probs[i - 1, ids[i]]) for i in range(start, len(ids)))
            assert log_likelihood == pytest.approx(expected, rel=1e-4)


def test_a_part_of_the_rows_and_random_weights_beside_the_figure(run, tasks, tmp_path):
    argv = ["eval", str(run.folder), "--tasks", "which_word", "--include_path", str(tasks), "--limit", "4"]
    assert main([*argv, "--random_baseline", "--output_dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/eval_results.json").read_text(encoding="utf-8"))["tasks"]["which_word"]
    assert found["rows"] == 4 and found["counts"] == "acc" and 0 <= found["random_weights"] <= 1


def test_a_group_without_a_figure_of_its_own_stops_nothing(model_copy, tasks, tmp_path):
    (tasks / "both.yaml").write_text("group: both\ntask: [which_word, next_word]\n", encoding="utf-8")
    argv = ["eval", str(model_copy), "--tasks", "both", "--include_path", str(tasks), "--limit", "2"]
    argv += ["--random_baseline", "--update_card", "--output_dir", str(tmp_path / "out")]
    assert main(argv) == 0
    found = json.loads((tmp_path / "out/eval_results.json").read_text(encoding="utf-8"))["tasks"]
    assert found["both"]["counts"] == "" and "random_weights" in found["which_word"]


def test_an_unknown_task_is_answered_with_the_nearest_names(run, fails):
    line = fails("eval", str(run.folder), "--tasks", "hellaswagg")
    assert "'hellaswagg' is no task" in line and "'hellaswag'" in line


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("doc_to_target: !function code.target", "!function"),
        ("class: !function code.Task", "class"),
        ("metric_list: [{metric: ./evil}]", "./evil"),
        ("dataset_path: pandas", "pandas"),
        ("include: /etc/other.yaml", "include"),
    ],
)
def test_a_task_that_would_run_code_is_refused(run, tasks, fails, line, named):
    with (tasks / "which_word.yaml").open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    (tasks / "code.py").write_text("raise SystemExit('code was run')", encoding="utf-8")
    said = fails("eval", str(run.folder), "--tasks", "which_word", "--include_path", str(tasks))
    assert named in said and "--trust_remote_code" in said


def test_a_template_reaches_no_more_than_its_row(run, tasks, fails, tmp_path):
    path = tasks / "which_word.yaml"
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    path.write_text(path.read_text(encoding="utf-8").replace("{{prompt}}", escape), encoding="utf-8")
    argv = ["--tasks", "which_word", "--include_path", str(tasks), "--output_dir", str(tmp_path / "out")]
    assert "unsafe" in fails("eval", str(run.folder), *argv)


def test_a_missing_harness_is_one_line(run, fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'hf-decoder[eval]'" in fails("eval", str(run.folder), "--tasks", "hellaswag")
