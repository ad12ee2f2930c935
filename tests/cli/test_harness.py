"""EleutherAI's lm-evaluation-harness on a saved folder, where this package is not installed."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.peers

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm_eval")

TASK = """
task: which_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: " "
metric_list: [{{metric: acc}}]
metadata: {{version: 1}}
"""
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


def test_log_likelihoods_are_the_same_for_any_batch_size(run, run_python, tmp_path):
    (tmp_path / "tasks").mkdir()
    rows = tmp_path / "rows.json"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (tmp_path / "tasks" / "which_word.yaml").write_text(TASK.format(rows=rows), encoding="utf-8")
    flags = ["--model", "hf", "--model_args", f"pretrained={run.folder},trust_remote_code=True,dtype=float32"]
    flags += ["--include_path", tmp_path / "tasks", "--tasks", "which_word", "--device", "cpu", "--log_samples"]
    run_python(CODE, tmp_path, *flags, hide=("hf_decoder",))  # one process, which takes most of a minute to begin
    found = {}
    for size in (1, 8):
        (samples,) = (tmp_path / f"batch{size}").rglob("samples_which_word_*.jsonl")
        lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
        lines.sort(key=lambda line: line["doc_id"])
        found[size] = [[float(answer[0][0]) for answer in line["resps"]] for line in lines]
    assert torch.tensor(found[1]).shape == (len(ROWS), 2)
    torch.testing.assert_close(torch.tensor(found[8]), torch.tensor(found[1]), rtol=1e-5, atol=1e-5)

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(run.folder).eval(),
        AutoTokenizer.from_pretrained(run.folder),
    )
    for row, answers in zip(ROWS, found[1], strict=True):
        for choice, log_likelihood in zip(row["choices"], answers, strict=True):
            start = len(tokenizer(row["prompt"])["input_ids"])
            ids = tokenizer(f"{row['prompt']} {choice}")["input_ids"]
            with torch.no_grad():
                log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
            expected = sum(float(log_probs[i - 1, ids[i]]) for i in range(start, len(ids)))
            assert log_likelihood == pytest.approx(expected, rel=1e-4)
