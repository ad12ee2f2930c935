"""What a user can get wrong: one line that names it, exit code 2, and nothing touched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def train_flags(path: Path, output: Path, *more: str) -> list[str]:
    return ["pretrain", "--train_file", str(path), "--output_dir", str(output), "--block_size", "64", *more]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "data, reason",
    [
        (None, "does not exist"),
        (b"", "empty"),
        (b"some text\x00\x01\x02" * 50, "binary"),
        ("größe ".encode("latin-1") * 50, "UTF-8"),
        (b"too short", "block"),
    ],
    ids=["missing", "empty", "binary", "not-utf8", "shorter-than-a-block"],
)
@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["whole", "streamed"])
def test_training_file(fails, tmp_path, data, reason, streaming):
    path = tmp_path / "text.txt"
    if data is not None:
        path.write_bytes(data)
    line = fails(*train_flags(path, tmp_path / "out", *streaming))
    assert reason in line
    assert not (tmp_path / "out").exists()


def test_a_streamed_text_is_as_short_as_the_same_text_read_whole(fails, tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "bc"}\n')
    held_out = write(tmp_path / "b.txt", b"some text")
    flags = train_flags(path, tmp_path / "out", "--validation_file", str(held_out))
    line = fails(*flags)
    assert "less than one block of 64" in line and fails(*flags, "--streaming") == line


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["whole", "streamed"])
def test_a_table_without_the_column_lists_its_columns(fails, tmp_path, streaming):
    path = write(tmp_path / "a.jsonl", b'{"title": "a", "body": "b"}\n')
    line = fails(*train_flags(path, tmp_path / "out", *streaming))
    assert f"{path} has no column 'text'; its columns are title, body" in line and "text_column" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["whole", "streamed"])
def test_one_file_of_another_encoding_is_named_with_its_byte(fails, tmp_path, streaming):
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder / "a.txt", "größe\n".encode() * 100)
    write(folder / "b.txt", b"plain\n" * 10 + "größe".encode("cp1252"))
    line = fails(*train_flags(folder, tmp_path / "out", *streaming))
    assert f"{folder / 'b.txt'} is not UTF-8 (byte 0xf6 at offset 62)" in line and "--encoding cp1252" in line


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["whole", "streamed"])
@pytest.mark.parametrize("rows", ["", '{"text": ""}\n'], ids=["no-rows", "no-text"])
def test_an_empty_validation_split(fails, tmp_path, streaming, rows):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", b'{"text": "some text"}\n' * 50)
    write(folder / "validation.jsonl", rows.encode())
    flags = ["pretrain", "--dataset_name", str(folder), "--output_dir", str(tmp_path / "out"), *streaming]
    assert "validation" in fails(*flags)
    line = fails(*train_flags(folder / "train.jsonl", tmp_path / "out", "--validation_file", str(folder / "validation.jsonl"), *streaming))  # fmt: skip # noqa: E501
    assert "validation.jsonl is empty" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.process
def test_unknown_preset_lists_them(fails, run, tmp_path):
    line = fails(*train_flags(run.train_file, tmp_path / "out", "--preset", "giant"))
    assert "'giant'" in line
    assert "nano" in line and "8b" in line


def test_vocabulary_larger_than_the_config(fails, run, tmp_path):
    overrides = "hidden_size=32,num_attention_heads=2,num_key_value_heads=1,vocab_size=280"
    line = fails(
        *train_flags(run.train_file, tmp_path / "out", "--vocab_size", "300", "--config_overrides", overrides)
    )
    assert "tokenizer has" in line and "vocab_size is 280" in line
    assert not (tmp_path / "out").exists()


def test_output_folder_with_another_run_is_left_as_it_is(fails, run, model_copy):
    before = {path: path.read_bytes() for path in model_copy.rglob("*") if path.is_file()}
    line = fails(*train_flags(run.train_file, model_copy))
    assert "--overwrite_output_dir" in line and "--resume_from_checkpoint" in line
    assert {path: path.read_bytes() for path in model_copy.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_elsewhere_does_not_open_the_folder_of_another_run(fails, run, model_copy):
    checkpoint = str(run.folder / "checkpoint-3")
    assert "another run" in fails(*train_flags(run.train_file, model_copy, "--resume_from_checkpoint", checkpoint))


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--resume_from_checkpoint"], "no checkpoint"),
        (["--resume_from_checkpoint", "nowhere"], "trainer_state.json"),
        (["--max_eval_samples", "few"], "max_eval_samples"),
        (["--block_size", "4096"], "max_position_embeddings"),
        (["--config_overrides", "hiden_size=3"], "'hidden_size'"),
        (["--config_overrides", "hidden_size"], "name=value"),
        (["--config_overrides", "num_key_value_heads=2"], "num_key_value_heads=2"),
        (["--learning_rat", "1"], "'--learning_rate'"),
        (["--learning_rate", "fast"], "learning_rate"),
        (["--tokenizer_type", "words"], "'words'"),
        (["--vocab_size", "10"], "vocab_size"),
        (["--validation_split_percentage", "0"], "--validation_split_percentage"),
        (["--validation_file", "nowhere.txt"], "nowhere.txt"),
        (["--model_name_or_path", "./nowhere"], "./nowhere"),
        (["--model_name_or_path", "x", "--config_overrides", "qk_norm=true"], "--config_overrides"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--dataset_name", "some/name"], "dataset_name"),
        (["--time_limit", "soon"], "'soon'"),
        (["--sample_steps", "0"], "--sample_steps 0"),
        (["--max_eval_samples", "0"], "--max_eval_samples 0 must be at least 1"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0 must be at least 1"),
        (["--learning_rate", "nan"], "--learning_rate nan must be at least 0, and finite"),
        (["--learning_rate", "inf"], "--learning_rate inf must be at least 0, and finite"),
        (["--model_name_or_path", "x", "--preset", "125m"], "--preset"),
        (["--gradient_accumulation_steps", "-2"], "--gradient_accumulation_steps -2 must be at least 1"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0 must be at least 1"),
        (["--per_device_eval_batch_size", "0"], "--per_device_eval_batch_size 0 must be at least 1"),
        (["--max_steps", "0"], "--max_steps 0"),
        (["--max_steps", "-1", "--num_train_epochs", "0"], "--num_train_epochs 0"),
        (["--max_steps", "-1", "--num_train_epochs", "-3"], "--num_train_epochs -3"),
        (["--max_steps", "-1", "--num_train_epochs", "inf"], "--num_train_epochs inf"),
        (["--bf16", "true", "--fp16", "true"], "At most one of fp16 and bf16"),
        (["--lr_scheduler_kwargs", '{"foo": 1}'], "--lr_scheduler_kwargs {'foo': 1}"),
        (["--lr_scheduler_kwargs", "foo"], "--lr_scheduler_kwargs foo"),
        (["--lr_scheduler_kwargs", "{foo"], "--lr_scheduler_kwargs {foo"),
        (["--report_to", "carrier_pigeon"], "carrier_pigeon is not supported"),
        (["--report_to", "mlflow"], "pip install mlflow"),
        (["--encoding", "klingon"], "--encoding 'klingon'"),
        (["--streaming", "--shuffle_buffer_size", "-1"], "--shuffle_buffer_size -1"),
        (["--streaming", "--text_column", "body", "--validation_split_percentage", "0"], "--validation_split"),
    ],
)
def test_flags(fails, run, tmp_path, monkeypatch, flags, reason):
    monkeypatch.chdir(tmp_path)
    assert reason in fails(*train_flags(run.train_file, tmp_path / "out", *flags))
    assert not (tmp_path / "out").exists()


def test_an_output_folder_below_a_file(fails, run, tmp_path):
    folder = run.train_file / "model"
    # before anything is read: the text is not there
    assert f"--output_dir {folder} cannot be made" in fails(*train_flags(tmp_path / "nowhere.txt", folder))


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--bf16", "true", "--fp16", "true"], "At most one of fp16 and bf16"),
        (["--lr_scheduler_kwargs", '{"foo": 1}'], "--lr_scheduler_kwargs {'foo': 1}"),
    ],
)
def test_flags_of_finetuning(fails, run, flags, reason):
    pytest.importorskip("trl")
    assert reason in fails("finetune", str(run.folder), "--train_file", str(run.train_file), *flags)


def test_prompt_longer_than_the_model_reads(fails, run):
    line = fails("generate", str(run.folder), "the cat sees the dog " * 100)
    assert "max_position_embeddings is 128" in line


@pytest.mark.parametrize("damage", ["cut", "garbage", "absent", "other-shape", "fewer-tensors"])
@pytest.mark.parametrize("verb", ["generate", "pretrain"])
def test_damaged_weights(fails, run, model_copy, tmp_path, damage, verb):
    weights = model_copy / "model.safetensors"
    data = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(data[: len(data) // 2])
    elif damage == "garbage":
        weights.write_bytes(b"\xff" * 1000)
    elif damage == "absent":
        weights.unlink()
    else:
        config = json.loads((model_copy / "config.json").read_text(encoding="utf-8"))
        changed = {"intermediate_size": 64} if damage == "other-shape" else {"attention_bias": True}
        (model_copy / "config.json").write_text(json.dumps({**config, **changed}), encoding="utf-8")
    if verb == "generate":
        line = fails("generate", str(model_copy), "the cat")
    else:
        line = fails(*train_flags(run.train_file, tmp_path / "out", "--model_name_or_path", str(model_copy)))
    assert "weights" in line and str(model_copy) in line


@pytest.mark.parametrize(
    "config, reason",
    [
        ('{"model_type": "t5"}', "not a causal language model"),
        ('{"model_type": "vit"}', "not a causal language model"),
        ('{"model_type": "no_such_model"}', "no_such_model"),
        ('{"hidden_size": 32}', "model_type"),
        ('{"model_type": "hf_decoder", "num_attention_heads": 5, "head_dim": 2}', "num_attention_heads=5"),
        ('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 7}', "(30)"),
        ("[1]", "a list, not an object"),
        ('{"model_type": ', "damaged"),
        (None, "no config.json"),
    ],
)
def test_config_of_another_or_no_model(fails, model_copy, config, reason):
    path = model_copy / "config.json"
    path.unlink()
    if config is not None:
        path.write_text(config, encoding="utf-8")
    assert reason in fails("generate", str(model_copy), "the cat")


def test_weights_of_another_model_type(fails, model_copy):
    # The same tensors' names, another model: only what is missing tells.
    config = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2}
    (model_copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "missing" in fails("generate", str(model_copy), "the cat")


@pytest.mark.parametrize(
    "flags, reason",
    [
        ([], "prompt"),
        (["the cat", "--dtype", "int3"], "int3"),
        (["the cat", "--device", "abacus"], "abacus"),
        (["the cat", "--system", "be brief"], "--chat"),
        ([""], "empty"),
        (["the cat", "--temperature", "-1"], "temperature"),
        (["the cat", "--num_beams", "0"], "--num_beams 0 must be at least 1"),
        (["the cat", "--max_new_tokens", "0"], "--max_new_tokens 0 must be at least 1"),
    ],
)
def test_generate_flags(fails, run, flags, reason):
    assert reason in fails("generate", str(run.folder), *flags)


def test_chat_without_a_template(fails, model_copy):
    (model_copy / "chat_template.jinja").unlink()
    assert "chat template" in fails("generate", str(model_copy), "--chat", "--system", "Be kind.")


def test_damaged_tokenizer(fails, model_copy):
    path = model_copy / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8")[:1000], encoding="utf-8")
    assert "tokenizer" in fails("generate", str(model_copy), "the cat")


@pytest.mark.process
@pytest.mark.parametrize(
    "argv, word",
    [
        (["scripts/pretrain.py", "--preset", "giant"], "giant"),
        (["scripts/generate.py", "runs/none", "hi"], "runs/none"),
    ],
)
def test_as_a_program(argv, word, tmp_path):
    script, *flags = argv
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *flags],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert word in done.stderr
    assert list(tmp_path.iterdir()) == []
