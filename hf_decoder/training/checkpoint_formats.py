"""Converts checkpoints between one process, DDP and FSDP2, with full or sharded state.

Trainer reads only the form that it writes itself. One process and DDP number the optimizer's states (`optimizer.pt`).
FSDP2 names them, either in full (`optimizer.bin`, `pytorch_model_fsdp.bin`) or in shards (two folders). `resumable`
converts a checkpoint to the form that the training reads, and leaves the checkpoint itself as it is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from hf_decoder.training.optimizers import parameter_groups

# form -> files of weights and optimizer; all other files are the same in every form
FORMS = {
    "plain": ("model.safetensors", "optimizer.pt"),
    "full": ("pytorch_model_fsdp.bin", "optimizer.bin"),
    "sharded": ("pytorch_model_fsdp_0", "optimizer_0"),
}


def form_of(checkpoint: str | Path) -> str | None:
    """The form of a checkpoint by its files: plain, full or sharded; None for any other, such as DeepSpeed's."""
    return next((form for form, (_, state) in FORMS.items() if (Path(checkpoint) / state).exists()), None)


def form_read_by(trainer: Trainer) -> str:
    """The form that a Trainer reads and writes."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return "plain"
    return "full" if "FULL_STATE_DICT" in str(plugin.state_dict_type) else "sharded"


def save_in_full(trainer: Trainer, folder: str | Path) -> None:
    """Saves a plain model folder, also where FSDP2 writes its checkpoints in shards."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))
    (Path(folder) / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, which nobody should have to trust


def is_sharded(model: nn.Module) -> bool:
    """Whether the model is split over processes, so that all of them have to call it together."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def whole_model(trainer: Trainer, folder: str | Path) -> Any:
    """The whole trained model in this process; loaded from `folder` if the trainer's is sharded."""
    model: Any = trainer.model
    if is_sharded(model):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.to(trainer.args.device)
    return model


@contextlib.contextmanager
def resumable(checkpoint: str | Path, trainer: Trainer) -> Iterator[str]:
    """The folder to resume `trainer` from: the checkpoint, or a converted copy beside it, deleted afterwards.

    The optimizer must be one of `training.optimizers`, and the model not yet wrapped. All processes must enter.

    Raises:
        ValueError: if the checkpoint has no optimizer state of one process, DDP or FSDP.
    """
    form, wanted = form_of(checkpoint), form_read_by(trainer)
    if form == wanted or trainer.is_deepspeed_enabled:
        yield str(checkpoint)
        return
    if form is None:
        raise ValueError(
            f"{checkpoint} holds no optimizer state of one process, DDP or FSDP; train from its weights instead: "
            f"--model_name_or_path {checkpoint}"
        )
    source = Path(checkpoint)
    folder = source.with_name(f"{source.name}-as-{wanted}")
    model: Any = trainer.model
    try:
        with trainer.args.main_process_first(local=False, desc="converting the checkpoint"):
            if trainer.is_world_process_zero():
                convert_checkpoint(source, folder, model, wanted)
        yield str(folder)
    finally:
        if trainer.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)


def convert_checkpoint(source: Path, folder: Path, model: PreTrainedModel, wanted: str) -> None:
    """Writes the checkpoint `source` to `folder` in the form `wanted`; `model` has its shape and is not sharded."""
    form = form_of(source)
    if form is None:
        raise ValueError(f"{source} is no checkpoint of one process, DDP or FSDP")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    own = {name for names in FORMS.values() for name in names}
    for path in source.iterdir():
        if path.name not in own and path.is_file():
            shutil.copy2(path, folder)
    weights = _read_weights(source, form, folder)
    states = _read(source / FORMS[form][1], "optimizer", folder)
    states = _numbered(states, model) if wanted == "plain" else _named(states, model)
    if wanted == "plain":
        model.save_pretrained(folder, state_dict=weights)
        torch.save(states, folder / "optimizer.pt")
        return
    _write(_with_tied_names(weights, model), folder / FORMS[wanted][0], "model")
    _write(states, folder / FORMS[wanted][1], "optimizer")


def _read_weights(source: Path, form: str, scratch: Path) -> dict[str, torch.Tensor]:
    if form != "plain":
        return _read(source / FORMS[form][0], "model", scratch)
    from safetensors.torch import load_file

    weights: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("model*.safetensors")):
        weights |= load_file(file)
    return weights


def _read(path: Path, part: str, scratch: Path) -> Any:
    """Reads what FSDP2 saved in a file, or in a folder of shards under the name `part`."""
    if path.is_file():
        return torch.load(path, map_location="cpu", weights_only=True)
    joined = scratch / "joined.bin"
    dcp_to_torch_save(path, joined)
    whole = torch.load(joined, map_location="cpu", weights_only=True)[part]
    joined.unlink()
    return whole


def _write(values: Any, path: Path, part: str) -> None:
    """Writes a file, or a folder of shards where the name has no suffix."""
    if path.suffix:
        torch.save(values, path)
        return
    joined = path.with_suffix(".bin")
    torch.save({part: values}, joined)
    torch_save_to_dcp(joined, path)
    os.remove(joined)


def _with_tied_names(weights: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights under all their names: tied weights are saved under one of them."""
    names: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        names.setdefault(id(value), []).append(name)
    found: dict[str, torch.Tensor] = {}
    for alike in names.values():
        value = next(weights[name] for name in alike if name in weights)
        found |= dict.fromkeys(alike, value)
    return found


def _names_in_order(model: nn.Module) -> list[str]:
    """The names of the optimizer's parameters, in the order that it numbers them by."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in parameter_groups(model, 0.0) for parameter in group["params"]]


def _named(states: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The optimizer's state with its parameters by name."""
    if any(isinstance(name, str) for name in states["state"]):
        return states
    names = _names_in_order(model)
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in states["param_groups"]]
    return {"state": {names[i]: state for i, state in states["state"].items()}, "param_groups": groups}


def _numbered(states: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The optimizer's state with its parameters by number."""
    numbers = {name: i for i, name in enumerate(_names_in_order(model))}
    groups = [
        {**group, "params": sorted(numbers[name] for name in group["params"])} for group in states["param_groups"]
    ]
    groups.sort(key=lambda group: group["params"])
    return {"state": {numbers[name]: state for name, state in states["state"].items()}, "param_groups": groups}
