"""`hf-decoder eval` on our model and on a stock one, against the library called by hand."""

import json
import shutil

import pytest
import sacrebleu
import torch
from huggingface_hub import ModelCard
from made_up import made_text
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_decoder.cli import eval as eval_command
from hf_decoder.cli.main import main
from hf_decoder.data.label_names import name_classes
from hf_decoder.evaluation import metrics

BLEU = ["--metrics", "bleu", "--test_file"]
ACCURACY = ["--metrics", "accuracy", "--prompt_column", "prompt", "--test_file"]
PROMPTS = ["the cat", "the dog sees the", "the bird hears", "a"]
CHAT = [{"role": "user", "content": "the cat"}]
TOOLS = [{"type": "function", "function": {"name": "see", "parameters": {"properties": {"what": {}}}}}]


@pytest.fixture(scope="module")
def llama(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"source": prompt, "target": f" the {word}"} for prompt, word in zip(PROMPTS, "abcd", strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def evaluate(folder, output, *flags) -> dict:
    assert main(["eval", str(folder), "--output_dir", str(output), *map(str, flags)]) == 0
    return json.loads((output / "eval_results.json").read_text(encoding="utf-8"))


def greedy(folder, prompt: str, tokens: int) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=tokens, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True).strip()


@pytest.mark.process
@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_several_metrics_in_one_run(run, llama, pairs, tmp_path, kind):
    folder = run.folder if kind == "ours" else llama
    flags = ["--metrics", "perplexity", "bits_per_byte", "bleu", "chrf", "exact_match"]
    flags += ["--validation_file", run.validation_file, "--test_file", pairs, "--max_new_tokens", 8, "--batch_size", 3]
    results = evaluate(folder, tmp_path / "out", *flags)
    answers = [greedy(folder, prompt, 8) for prompt in PROMPTS]
    references = [[f" the {word}" for word in "abcd"]]
    assert results["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, references).score)
    assert results["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, references).score)
    saved = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert [row["prediction"] for row in saved] == answers
    assert results["perplexity"] == pytest.approx(torch.tensor(results["loss"]).exp().item(), rel=1e-5)
    assert results["text_bytes"] == len(run.validation_file.read_bytes())
    with Image.open(tmp_path / "out" / "eval_results.png") as picture:
        picture.load()
        assert picture.format == "PNG"
    again = evaluate(folder, tmp_path / "again", *flags[:-1], 1)
    for metric in ("loss", "bits_per_byte"):
        assert again[metric] == pytest.approx(results[metric], rel=1e-6)
    for metric in ("bleu", "chrf", "exact_match"):
        assert again[metric] == results[metric]


def test_text_of_another_encoding_is_the_same_text(run, tmp_path):
    losses = []
    for encoding, flags in (("utf-8", []), ("cp1252", ["--encoding", "cp1252"])):
        path = tmp_path / f"{encoding}.txt"
        path.write_text(made_text(3, 20), encoding=encoding)
        losses.append(evaluate(run.folder, tmp_path / f"out_{encoding}", "--validation_file", path, *flags)["loss"])
    assert losses[0] == losses[1]


def test_labels_are_chosen_by_likelihood(run, tmp_path, capsys):
    path = tmp_path / "labels.csv"
    path.write_text("text,label,title\nthe cat, sees,\nthe dog, hears,a title\nthe bird,xqz,\n", encoding="utf-8")
    results = evaluate(run.folder, tmp_path / "out", "--metrics", "accuracy", "f1", "--test_file", path)
    assert f"{path}: columns that are not used: title (1 rows)" in capsys.readouterr().out
    saved = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text("utf-8").splitlines()]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run.folder), AutoTokenizer.from_pretrained(run.folder)
    for row in saved:
        nats = {}
        for option in (" sees", " hears", "xqz"):
            prompt, ids = tokenizer(row["prompt"])["input_ids"], tokenizer(option)["input_ids"]
            labels = torch.tensor([[-100] * len(prompt) + ids])
            with torch.no_grad():
                nats[option] = float(model(torch.tensor([prompt + ids]), labels=labels).loss) * len(ids)
        assert row["prediction"] == min(nats, key=nats.__getitem__)
    assert results["accuracy"] == sum(row["prediction"] == row["label"] for row in saved) / 3


@pytest.mark.parametrize(
    "names, rows, same",
    [
        (["1", "2"], ["1", "2", "2", "1"], ["1", "2", "2", "1"]),
        (["1", "2", "3", "4", "5"], [5, 4, 1, 2], ["5", "4", "1", "2"]),
        (["-1", "1"], [-1, 1, 1, -1], ["-1", "1", "1", "-1"]),
        (["neg", "pos"], ["1", "neg", "0", "pos"], ["pos", "neg", "neg", "pos"]),
    ],
)
def test_a_label_is_the_name_of_a_class_before_it_is_its_number(run, tmp_path, monkeypatch, names, rows, same):
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    model = AutoModelForSequenceClassification.from_pretrained(run.folder, **labels)
    model.save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "the cat", "label": label}) + "\n" for label in rows), "utf-8")
    flags = ["--metrics", "accuracy", "f1", "--test_file", path]
    # a classifier that is always right
    monkeypatch.setattr(eval_command, "predict", lambda *args, **kwargs: [names.index(label) for label in same])
    results = evaluate(tmp_path / "classifier", tmp_path / "out", *flags)
    assert results["accuracy"] == results["f1"] == 1
    saved = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert [row["label"] for row in saved] == same


def test_a_number_that_is_no_class_is_refused_where_the_classes_are_numbers():
    with pytest.raises(ValueError, match="x has the label '0', which the model does not know; its labels: 1, 2"):
        name_classes(["1", "0"], {0: "1", 1: "2"}, "x")


def test_references_in_messages_are_what_the_assistant_says(run, tmp_path):
    path = tmp_path / "chat.jsonl"
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    rows = [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": f"the {word}"}]}
        for prompt, word in zip(prompts, "abcd", strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ["--metrics", "bleu", "exact_match", "--test_file", path, "--max_new_tokens", 4]
    results = evaluate(run.folder, tmp_path / "out", *flags)
    saved = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert [row["references"] for row in saved] == [[f"the {word}"] for word in "abcd"]
    answers = [row["prediction"] for row in saved]
    assert results["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, [[f"the {w}" for w in "abcd"]]).score)


def test_tools_are_shown_to_the_model_and_a_call_is_compared_as_the_template_writes_it(model_copy, tmp_path):
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    path = tmp_path / "calls.jsonl"
    tools, prompt = TOOLS, CHAT
    call = {"type": "function", "function": {"name": "see", "arguments": {"what": 1}}}
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "", "tool_calls": [call]}]}
    path.write_text(json.dumps({**row, "tools": tools}) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    evaluate(model_copy, tmp_path / "out", "--metrics", "exact_match", "--test_file", path, "--max_new_tokens", 8)
    saved = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text("utf-8").splitlines()]
    tokenizer, model = AutoTokenizer.from_pretrained(model_copy), AutoModelForCausalLM.from_pretrained(model_copy)
    for row, described in zip(saved, (tools, None), strict=True):
        assert row["references"] == ['<tool_call>\n{"name": "see", "arguments": {"what": 1}}\n</tool_call>']
        asked = tokenizer.apply_chat_template(prompt, tools=described, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(asked, return_tensors="pt").input_ids
        answer = model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
        assert row["prediction"] == tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_an_answer_may_have_several_references(run, tmp_path):
    path = tmp_path / "several.jsonl"
    options = [greedy(run.folder, "the cat", 4), "x"]
    path.write_text(json.dumps({"prompt": "the cat", "references": options}) + "\n", encoding="utf-8")
    flags = ["--metrics", "exact_match", "--test_file", path, "--max_new_tokens", 4]
    assert evaluate(run.folder, tmp_path / "out", *flags)["exact_match"] == 1


def test_update_card_writes_the_model_index_and_keeps_the_rest(run, model_copy, pairs, tmp_path):
    before = ModelCard.load(model_copy / "README.md")
    flags = ["--metrics", "perplexity", "bleu", "--validation_file", run.validation_file, "--test_file", pairs]
    for _ in range(2):  # twice: replaced, not added again
        results = evaluate(model_copy, tmp_path / "out", *flags, "--max_new_tokens", 4, "--update_card")
    after = ModelCard.load(model_copy / "README.md")
    measured = [(r.dataset_name, r.metric_type, r.metric_value) for r in after.data.eval_results]
    assert ("held_out.txt", "perplexity", results["perplexity"]) in measured
    assert ("pairs.jsonl", "bleu", results["bleu"]) in measured
    assert len(measured) == len(before.data.eval_results) + 2
    assert after.text == before.text
    assert after.data.license == before.data.license


def test_bleu_of_chinese_says_how_it_was_measured(fails, run, model_copy, tmp_path, capsys):
    path = tmp_path / "zh.jsonl"
    path.write_text(json.dumps({"prompt": "the cat", "completion": "今天天气很好"}) + "\n", encoding="utf-8")
    flags = [*BLEU[:2], "chrf", BLEU[2], path, "--max_new_tokens", 4]
    results = evaluate(model_copy, tmp_path / "out", *flags, "--update_card")
    assert "tok:zh" in results["bleu_signature"] and "nc:6" in results["chrf_signature"]
    assert results["bleu_signature"] in capsys.readouterr().out
    names = {r.metric_type: r.metric_name for r in ModelCard.load(model_copy / "README.md").data.eval_results}
    assert "tok:zh" in names["bleu"]
    assert "tok:char" in evaluate(model_copy, tmp_path / "out", *flags, "--tokenize", "char")["bleu_signature"]
    argv = ["eval", str(model_copy), *map(str, flags)]
    assert "--tokenize 'zhh' is unknown; choose one of: none, zh, 13a" in fails(*argv, "--tokenize", "zhh")
    assert "--tokenize has no effect without --metrics bleu" in fails(*argv, "--metrics", "chrf", "--tokenize", "zh")


def test_update_card_makes_a_card_where_there_is_none(run, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "peer")
    results = evaluate(folder, tmp_path / "out", "--validation_file", run.validation_file, "--update_card")
    found = ModelCard.load(folder / "README.md").data
    assert found.model_name == "peer"
    assert {r.metric_type: r.metric_value for r in found.eval_results}["perplexity"] == results["perplexity"]


def test_an_answer_that_begins_with_spaces_is_python_behind_its_prompt(run, tmp_path, monkeypatch):
    path = write(tmp_path / "f.jsonl", [{"prompt": "def f(a):\n", "completion": "x"}] * 2)
    answers = [("    return a\n", True), ("    return a a\n", True)]
    monkeypatch.setattr(eval_command, "complete_or_cut", lambda *args: iter(answers))
    results = evaluate(run.folder, tmp_path / "out", "--metrics", "python_parses", "--test_file", path)
    assert results["python_parses"] == 0.5


def test_what_an_adapter_is_measured_at_is_written_into_its_own_card(run, model_copy, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_copy), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "lora")
    before = (model_copy / "README.md").read_text(encoding="utf-8")
    flags = ["--adapter_name_or_path", tmp_path / "lora", "--validation_file", run.validation_file, "--update_card"]
    results = evaluate(model_copy, tmp_path / "out", *flags)
    assert (results["model"], results["adapter"]) == ("model", "lora")
    assert (model_copy / "README.md").read_text(encoding="utf-8") == before
    found = ModelCard.load(tmp_path / "lora/README.md").data.eval_results
    assert {r.metric_type: r.metric_value for r in found}["perplexity"] == results["perplexity"]


@pytest.mark.parametrize(
    "flags, row",
    [
        (["--prompt_column", "prompt"], {"prompt": CHAT, "label": "pos"}),
        (["--prompt_column", "prompt"], {"prompt": json.dumps(CHAT), "label": "pos"}),
        (["--reference_column", "class"], {"prompt": "the cat", "class": "pos", "system": "the dog"}),
        (["--reference_column", "class"], {"prompt": CHAT, "class": "pos", "tools": TOOLS}),
        (["--reference_column", "answer"], {"prompt": CHAT, "answer": [{"role": "assistant", "content": "pos"}]}),
    ],
)
def test_labels_of_chats_are_chosen_behind_the_chat_template(model_copy, tmp_path, monkeypatch, flags, row):
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    path, seen = write(tmp_path / "rows.jsonl", [row, {**row, "label": "neg", "class": "neg"}]), []
    nats = metrics.option_nats
    monkeypatch.setattr(metrics, "option_nats", lambda *args, **more: seen.append(args) or nats(*args, **more))
    evaluate(model_copy, tmp_path / "out", "--metrics", "accuracy", "--test_file", path, *flags)
    turns = ([{"role": "system", "content": "the dog"}] if "system" in row else []) + CHAT
    tokenizer = AutoTokenizer.from_pretrained(model_copy)
    asked = {"tools": row.get("tools"), "tokenize": False, "add_generation_prompt": True}
    expected = tokenizer(tokenizer.apply_chat_template(turns, **asked)).input_ids
    assert seen[0][1] == [expected, expected]
    saved = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert [line["prompt"] for line in saved] == [turns, turns] and saved[0]["label"] == "pos"


def test_a_label_stands_where_the_answer_of_the_same_row_would(run, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"source": "the cat", "target": "sees"}])
    flags = ["--metrics", "exact_match", "accuracy", "--test_file", path, "--reference_column", "target"]
    evaluate(run.folder, tmp_path / "out", *flags, "--max_new_tokens", 2)
    answer, label = map(json.loads, (tmp_path / "out" / "predictions.jsonl").read_text("utf-8").splitlines())
    assert answer["prompt"] == label["prompt"] == "the cat\n\n"


def test_a_sequence_classifier_reads_no_chats(fails, run, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(run.folder, num_labels=2).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(run.folder).save_pretrained(tmp_path / "model")
    path = write(tmp_path / "rows.jsonl", [{"text": "the cat", "label": 0}, {"text": CHAT, "label": 1}])
    said = fails("eval", str(tmp_path / "model"), "--metrics", "accuracy", "--test_file", str(path))
    assert "rows.jsonl holds messages" in said and "sequence classifier, which reads text" in said


@pytest.mark.parametrize("late", ["plot_metrics", "complete_or_cut"])
def test_figures_are_printed_whatever_fails_after_them(run, pairs, tmp_path, monkeypatch, capsys, late):
    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(eval_command, late, full)
    argv = ["eval", str(run.folder), "--metrics", "perplexity", "chrf", "--validation_file", str(run.validation_file)]
    argv += ["--test_file", str(pairs), "--max_new_tokens", "2", "--output_dir", str(tmp_path / "out")]
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert "perplexity       " in printed.out and "no space left" in printed.err
    assert ("chrf             " in printed.out) == (late == "plot_metrics")


def test_an_output_folder_that_is_a_file_is_refused_before_anything_is_measured(fails, run, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_command, "load_model", None)  # not asked for
    (tmp_path / "out").write_text("")
    argv = ["eval", str(run.folder), "--validation_file", str(run.validation_file)]
    assert "out is a file; name a folder" in fails(*argv, "--output_dir", str(tmp_path / "out"))


def test_the_name_of_a_task_may_hold_dollar_signs(tmp_path):
    eval_command.plot_metrics({"$$": 0.5, "a$b$^": 2.0}, tmp_path / "bars.png", "$$ + $")
    with Image.open(tmp_path / "bars.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--metrics", "blue"], "'blue'"),
        (["--metrics", "bleu"], "--test_file"),
        ([], "--validation_file"),
        (["--validation_file", "nowhere.txt"], "nowhere.txt"),
        ([*BLEU, "prompts.txt", "--reference_file", "short.txt"], "2 prompts but short.txt has 1"),
        ([*BLEU, "other.jsonl"], "columns a, b"),
        ([*BLEU, "empty.jsonl"], "empty prompt"),
        (["--validation_file", "prompts.txt", "--stride", "64", "--block_size", "64"], "stride 64"),
        (["--validation_file", "prompts.txt", "--block_size", "4096"], "128"),
        (["--validation_file", "prompts.txt", "--batch_size", "0"], "--batch_size 0"),
        (["--validation_file", "prompts.txt", "--prompt_template", "x"], "--prompt_template"),
        (["--validation_file", "prompts.txt", "--stride", "0"], "stride 0"),
        (["--validation_file", "prompts.txt", "--block_size", "0"], "--block_size 0"),
        ([*BLEU, "prompts.txt", "--max_eval_samples", "0"], "--max_eval_samples 0 must be at least 1"),
        ([*BLEU, "prompts.txt", "--max_new_tokens", "0"], "--max_new_tokens 0 must be at least 1"),
        ([*BLEU, "prompts.txt", "--num_beams", "0"], "--num_beams 0 must be at least 1"),
        (["--validation_file", "prompts.txt", "--limit", "3"], "--limit has no effect without --tasks"),
        (["--validation_file", "prompts.txt", "--num_fewshot", "0"], "--num_fewshot has no effect without --tasks"),
        (["--validation_file", "prompts.txt", "--include_path", "."], "--include_path has no effect without --tasks"),
        (["--validation_file", "prompts.txt", "--test_file", "chats.jsonl"], "--test_file has no effect without"),
        ([*BLEU, "prompts.txt", "--stride", "8"], "--stride has no effect without --metrics perpl"),
        ([*BLEU, "chats.jsonl", "--prompt_template", "X {prompt}"], "chats.jsonl hold messages; leave it out"),
        ([*ACCURACY, "chats.jsonl", "--prompt_template", "X {prompt}"], "chats.jsonl hold messages; leave it out"),
    ],
)  # fmt: skip
def test_what_a_user_can_get_wrong(fails, run, tmp_path, monkeypatch, flags, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "short.txt").write_text("one\n", encoding="utf-8")
    (tmp_path / "other.jsonl").write_text('{"a": 1, "b": 2}\n', encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text('{"prompt": "", "completion": "x"}\n', encoding="utf-8")
    write(tmp_path / "chats.jsonl", [{"prompt": CHAT, "label": "x"}])
    assert reason in fails("eval", str(run.folder), *flags)
    assert not (tmp_path / "runs").exists()
