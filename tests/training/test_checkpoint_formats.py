"""A checkpoint in another form, against the model and the optimizer that it was written from."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model
from transformers import TrainingArguments

from hf_decoder.training.checkpoint_formats import form_of, resumable, save_in_full, whole_model
from hf_decoder.training.optimizers import MuonAdamW, parameter_groups


def trainer_of(model, state_dict_type: str | None = None, deepspeed: bool = False):
    """What `resumable` asks of a Trainer; with a type of state, one that trains with FSDP2."""
    plugin = state_dict_type and SimpleNamespace(state_dict_type=f"StateDictType.{state_dict_type}")
    return SimpleNamespace(
        model=model,
        args=TrainingArguments(output_dir="nowhere", use_cpu=True),
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)),
        is_deepspeed_enabled=deepspeed,
        is_world_process_zero=lambda: True,
    )


@pytest.fixture
def trained(tmp_path):
    """A model with tied embeddings and an optimizer after one step, and their checkpoint."""
    model = tiny_model(tie_word_embeddings=True)
    optimizer = MuonAdamW(parameter_groups(model, 0.1))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    checkpoint = tmp_path / "checkpoint-5"
    model.save_pretrained(checkpoint)
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
    (checkpoint / "trainer_state.json").write_text("{}", encoding="utf-8")
    (checkpoint / "of-the-user").mkdir()
    return model, optimizer, checkpoint


def assert_same_states(model, found, optimizer):
    """The states of two optimizers of one model, parameter by parameter, and the settings of each."""
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(torch.as_tensor(found.state[parameter][key]), torch.as_tensor(value)), (name, key)
    for left, right in zip(found.param_groups, optimizer.param_groups, strict=True):
        assert {**left, "params": 0} == {**right, "params": 0}


def test_the_full_form_has_every_weight_and_state_by_name(trained):
    model, optimizer, checkpoint = trained
    (checkpoint.parent / "checkpoint-5-as-full").mkdir()
    (checkpoint.parent / "checkpoint-5-as-full" / "of-a-killed-run").touch()
    with resumable(checkpoint, trainer_of(model, "FULL_STATE_DICT")) as folder:
        files = {path.name for path in Path(folder).iterdir()}
        weights = torch.load(Path(folder) / "pytorch_model_fsdp.bin", weights_only=True)
        states = torch.load(Path(folder) / "optimizer.bin", weights_only=True)
    assert {"config.json", "trainer_state.json", "pytorch_model_fsdp.bin", "optimizer.bin"} <= files
    assert not files & {"model.safetensors", "optimizer.pt", "of-the-user", "of-a-killed-run"}
    assert not Path(folder).exists() and form_of(checkpoint) == "plain"
    expected = model.state_dict()
    assert weights.keys() == expected.keys() and "lm_head.weight" in weights
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert states["state"].keys() == set(names.values())
    for parameter, state in optimizer.state.items():
        assert all(torch.equal(torch.as_tensor(states["state"][names[parameter]][key]), torch.as_tensor(value))
                   for key, value in state.items())  # fmt: skip
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    assert [group["params"] for group in states["param_groups"]] == groups


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_there_and_back_is_the_same_checkpoint(trained, kind, tmp_path):
    model, optimizer, checkpoint = trained
    with resumable(checkpoint, trainer_of(model, kind)) as folder:
        assert form_of(folder) == ("full" if "FULL" in kind else "sharded")
        there = Path(folder).rename(tmp_path / "checkpoint-6")
    with resumable(there, trainer_of(model)) as folder:
        assert Path(folder).name == "checkpoint-6-as-plain" and form_of(folder) == "plain"
        assert {path.name for path in Path(folder).iterdir()} >= {"model.safetensors", "trainer_state.json"}
        assert not (Path(folder) / "joined.bin").exists()
        again = type(model).from_pretrained(folder)
        states = torch.load(Path(folder) / "optimizer.pt", weights_only=True)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    found = MuonAdamW(parameter_groups(model, 0.1))
    found.load_state_dict(states)
    assert_same_states(model, found, optimizer)


def test_a_checkpoint_that_is_read_as_it_is_and_one_that_cannot_be(trained, tmp_path):
    model, _, checkpoint = trained
    with resumable(checkpoint, trainer_of(model)) as folder:
        assert folder == str(checkpoint)
    (tmp_path / "checkpoint-7").mkdir()
    with resumable(tmp_path / "checkpoint-7", trainer_of(model, deepspeed=True)) as folder:
        assert folder == str(tmp_path / "checkpoint-7")
    with pytest.raises(ValueError, match=r"holds no optimizer state .*--model_name_or_path"):
        resumable(tmp_path / "checkpoint-7", trainer_of(model)).__enter__()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-7"]


def test_a_checkpoint_that_holds_code_is_refused(trained, tmp_path):
    model, *_ = trained
    for name in ("pytorch_model_fsdp.bin", "optimizer.bin"):
        (tmp_path / "checkpoint-7").mkdir(exist_ok=True)
        torch.save({"weight": SimpleNamespace()}, tmp_path / "checkpoint-7" / name)
    with pytest.raises(pickle.UnpicklingError):
        resumable(tmp_path / "checkpoint-7", trainer_of(model)).__enter__()


@pytest.mark.parametrize("kind", [None, "SHARDED_STATE_DICT"])
def test_what_is_saved_at_the_end_is_whole_and_holds_no_pickle(kind, tmp_path):
    trainer, called = trainer_of(None, kind), []

    def save_model(folder: str):
        called.append("saved")
        for name in ("model.safetensors", "training_args.bin"):
            (Path(folder) / name).touch()

    if kind:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type = called.append
    trainer.save_model = save_model
    save_in_full(trainer, tmp_path)
    assert called == ["FULL_STATE_DICT"] * bool(kind) + ["saved"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    trainer.save_model = lambda folder: None  # on processes that write nothing
    save_in_full(trainer, tmp_path)


def test_a_model_in_parts_is_loaded_where_it_was_saved(trained):
    model, _, checkpoint = trained
    assert whole_model(trainer_of(model), checkpoint) is model
    next(model.parameters()).ds_id = 3  # as DeepSpeed marks what it splits
    loaded = whole_model(trainer_of(model), checkpoint)
    assert loaded is not model and loaded.dtype == torch.float32
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
