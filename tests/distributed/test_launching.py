"""`hf-decoder pretrain` in several processes, and the configurations that `accelerate launch` starts them by."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.config import load_config_from_file
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from rank_work import pretrain
from ranks import run_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.cli.main import main as command
from hf_decoder.training.checkpoints import is_complete
from hf_decoder.training.launch import check_launch, configuration_file, configurations

ROOT = Path(__file__).resolve().parents[2]
SHAPE = "hidden_size=32,num_attention_heads=2,num_key_value_heads=1,num_hidden_layers=2,max_position_embeddings=128"


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """A small run in fp32, its text about 70 rows."""
    text = tmp_path_factory.mktemp("text") / "train.txt"
    text.write_text("".join(f"the cat {i % 7} sees the dog {i % 5}\n" for i in range(760)), encoding="utf-8")
    flags = ["--train_file", str(text), "--vocab_size", "300", "--block_size", "64", "--config_overrides", SHAPE]
    flags += ["--per_device_train_batch_size", "4", "--eval_steps", "4", "--bf16", "false"]
    return flags


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Keeps the disk cache of `datasets` out of the home folder, in the ranks too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def log(folder) -> list[dict]:
    return json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


@pytest.mark.process
def test_accelerate_launch_starts_two_processes_and_only_the_first_speaks(flags, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(configuration_file("cpu")), "--num_processes", "2", "--main_process_port", "0"]
    command += [str(ROOT / "scripts/pretrain.py"), *flags, "--max_steps", "4", "--save_steps", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "run")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for once in ("corpus: ", "tokenizer: ", "training text", "holds the model. These lines load"):
        assert done.stdout.count(once) == 1, done.stdout
    last = tmp_path / "run/checkpoint-4"
    assert is_complete(last) and (last / "rng_state_1.pth").is_file()
    steps = {entry["step"]: entry for entry in log(tmp_path / "run")}
    assert steps[4]["num_input_tokens_seen"] == 4 * 2 * 4 * 64  # steps, processes, rows, tokens
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


@pytest.mark.process
def test_a_run_in_shards_ends_as_a_plain_folder_and_goes_on_in_one_process(flags, tmp_path):
    flags = [*flags, "--max_steps", "8", "--save_steps", "4", "--save_total_limit", "2", "--sample_steps", "4"]
    alone = [*flags, "--per_device_train_batch_size", "8"]  # the last of a flag's values counts
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    assert run_ranks(1, pretrain, [*alone, "--output_dir", str(whole)], folder=tmp_path) == [0]
    assert run_ranks(2, _pretrain_in_shards, [*flags, "--output_dir", str(shards)], folder=tmp_path) == [0, 0]
    assert (shards / "samples_in_training.md").read_text(encoding="utf-8").count("# Step") == 2
    same_weights(shards, whole)
    assert is_complete(shards / "checkpoint-8") and (shards / "checkpoint-8/optimizer.bin").is_file()
    HfDecoderForCausalLM.from_pretrained(shards / "checkpoint-8")
    # the second half of it again, in one process
    argv = [*alone, "--output_dir", str(shards), "--resume_from_checkpoint", str(shards / "checkpoint-4")]
    assert run_ranks(1, pretrain, argv, folder=tmp_path) == [0]
    assert (shards / "checkpoint-8/optimizer.pt").is_file()
    same_weights(shards, whole)


def same_weights(folder, whole):
    expected, found = weights(whole), weights(folder)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.process
def test_a_fine_tuned_model_is_measured_alike_in_one_process_and_in_two(tokenizer, tmp_path):
    """Five rows of different lengths; without care the second process would repeat one of them."""
    config = dict(part.split("=") for part in SHAPE.split(","))
    torch.manual_seed(0)
    model = HfDecoderForCausalLM(HfDecoderConfig(**{name: int(value) for name, value in config.items()}, vocab_size=len(tokenizer)))  # fmt: skip # noqa: E501
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": "def main", "completion": "(argv):" * n} for n in (1, 9, 2, 12, 5)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    argv = ["finetune", str(tmp_path / "base"), "--train_file", str(data), "--validation_file", str(data)]
    argv += ["--max_steps", "1", "--learning_rate", "1e-9", "--bf16", "false", "--report_to", "none"]
    losses = []
    for processes, size in ((1, 5), (1, 2), (2, 1), (2, 2), (2, 4)):
        out = tmp_path / f"{processes}x{size}"
        flags = ["--per_device_eval_batch_size", str(size), "--output_dir", str(out)]
        assert run_ranks(processes, command, [*argv, *flags], folder=tmp_path) == [0] * processes
        losses.append(json.loads((out / "eval_results.json").read_text(encoding="utf-8"))["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-5)


def _pretrain_in_shards(argv: list[str]) -> int:
    return pretrain(argv, in_shards=True)


def _pretrain_with_a_signal(argv: list[str]) -> int:
    return pretrain(argv, signal_to_rank=1)


@pytest.mark.process
def test_a_signal_to_one_process_stops_all_after_the_same_step(flags, tmp_path):
    argv = [*flags, "--max_steps", "100000", "--save_steps", "4", "--output_dir", str(tmp_path / "run")]
    assert run_ranks(2, _pretrain_with_a_signal, argv, folder=tmp_path) == [128 + 15] * 2
    (last,) = (tmp_path / "run").glob("checkpoint-*")
    assert is_complete(last) and (last / "rng_state_1.pth").is_file()


@pytest.mark.slow
def test_a_time_limit_ends_all_processes_after_the_same_step(flags, tmp_path):
    argv = [*flags, "--max_steps", "100000", "--eval_strategy", "no", "--save_steps", "100000", "--logging_steps", "1"]
    argv += ["--time_limit", "4s", "--warmup_steps", "2", "--output_dir", str(tmp_path / "run")]
    assert run_ranks(2, pretrain, argv, folder=tmp_path) == [0, 0]
    entries = [entry for entry in log(tmp_path / "run") if "loss" in entry]
    assert 4 < entries[-1]["step"] < 100000
    peak = max(entry["learning_rate"] for entry in entries)
    assert entries[-1]["learning_rate"] < 0.6 * peak  # the rate was on its way down


# ------------------------------------------------------------------------------------------------ configurations

TYPES = {
    "cpu": DistributedType.MULTI_GPU,
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
}


def arguments_of(*flags: str):
    """The arguments of `accelerate launch` after it has read flags and configuration."""
    parser = accelerate_launch.launch_command_parser()
    arguments, *_ = accelerate_launch._validate_launch_command(parser.parse_args([*flags, "script.py"]))
    return arguments


def test_every_configuration_is_one_of_those_tested():
    assert set(configurations()) == set(TYPES)


@pytest.mark.parametrize("name", list(TYPES))
def test_accelerate_reads_the_configuration(name):
    path = str(configuration_file(name))
    config = load_config_from_file(path)  # refuses keys that it does not know
    assert config.distributed_type == TYPES[name]
    arguments = arguments_of("--config_file", path, "--num_processes", "4")
    assert arguments.num_processes == 4
    starts = {"multi_gpu": name in ("cpu", "ddp"), "use_fsdp": name == "fsdp2", "use_deepspeed": "deepspeed" in name}
    assert {flag: bool(getattr(arguments, flag)) for flag in starts} == starts
    if name != "deepspeed_zero3":
        environment = prepare_multi_gpu_env(arguments)
        assert environment["ACCELERATE_MIXED_PRECISION"] == ("no" if name == "cpu" else "bf16")
    if name == "fsdp2":
        assert environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_TRANSFORMER_CLS_TO_WRAP"] in HfDecoderForCausalLM._no_split_modules
        assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"


def test_an_unknown_configuration_is_named():
    with pytest.raises(ValueError, match=r"'fsdp3' is unknown; choose one of: cpu, ddp, deepspeed_zero3, fsdp2"):
        configuration_file("fsdp3")


def test_accelerate_launch_with_cpu_alone_is_refused():
    arguments = arguments_of("--cpu", "--num_processes", "2")
    _, environment = prepare_simple_launcher_cmd_env(arguments)
    with pytest.raises(ValueError, match=r"--cpu starts .* started one; give it --config_file \S+/cpu.yaml"):
        check_launch(use_cpu=True, uses_muon=True, environment=environment)
    # one process was asked for; or MPI started several
    _, single = prepare_simple_launcher_cmd_env(arguments_of("--cpu", "--num_processes", "1"))
    check_launch(use_cpu=True, uses_muon=True, environment=single)
    check_launch(use_cpu=True, uses_muon=True, environment={**environment, "OMPI_COMM_WORLD_SIZE": "2"})


def test_shards_on_cpus_and_muon_with_deepspeed_are_refused():
    environment = prepare_multi_gpu_env(arguments_of("--config_file", str(configuration_file("fsdp2"))))
    check_launch(use_cpu=False, uses_muon=True, environment=environment)
    with pytest.raises(ValueError, match="replicas on these CPUs"):
        check_launch(use_cpu=True, uses_muon=True, environment=environment)
    environment = {"ACCELERATE_USE_DEEPSPEED": "true"}
    check_launch(use_cpu=False, uses_muon=False, environment=environment)
    with pytest.raises(ValueError, match="--optim adamw_torch, or FSDP2"):
        check_launch(use_cpu=False, uses_muon=True, environment=environment)
