"""PEFT adapters of a base model: finds them, checks them against the base, loads them and merges them."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hf_decoder.interop.checkpoint import read_json, read_shapes
from hf_decoder.interop.untrusted_files import check_numbers
from hf_decoder.safety.limits import bounded
from hf_decoder.safety.terminal import first_line

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LANGUAGE_MODEL, CLASSIFIER = "CAUSAL_LM", "SEQ_CLS"  # what PEFT calls the tasks of these heads
MOST_LAYERS = 1 << 12
MOST_RANK = 1 << 10  # whatever the weights are


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (Path(folder) / ADAPTER_CONFIG).is_file() and not (Path(folder) / "config.json").is_file()


def base_of(folder: str | Path) -> str:
    """The base model that an adapter's folder names.

    Raises:
        ValueError: if its adapter_config.json is damaged or names none.
    """
    path = Path(folder) / ADAPTER_CONFIG
    base = read_adapter_config(path).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{path} names no base model; give the base as the model and this folder as the adapter")
    return str(base)


def read_adapter_config(path: Path) -> dict[str, Any]:
    """What an adapter_config.json says.

    Raises:
        ValueError: if it is damaged, or has PEFT import a module, or make layers without end.
    """
    values = read_json(path)
    check_numbers(path, values)
    if values.get("megatron_config"):
        raise ValueError(f"{path} sets megatron_config, which has PEFT import the module that it names: not held here")
    pairs = values.get("layer_replication")
    if pairs is not None:
        try:
            count = sum(end - start for start, end in pairs)
        except (TypeError, ValueError):
            raise ValueError(f"{path} has a layer_replication that is no list of pairs of numbers") from None
        if len(pairs) > MOST_LAYERS or not 0 < count <= MOST_LAYERS:
            raise ValueError(f"{path} has a layer_replication of {count:,} layers; at most {MOST_LAYERS:,} are made")
    return values


def task_of(name: str) -> str | None:
    """What an adapter was trained for, by PEFT's name of the task (`CLASSIFIER`, ...); None where it does not tell.

    Raises:
        ValueError: if PEFT cannot read its config.
    """
    from peft import PeftConfig

    _check_config(name)
    with _explained(name):
        return PeftConfig.from_pretrained(name).task_type


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """What goes wrong with the files of an adapter, in one line."""
    try:
        yield
    except Exception as error:  # whatever PEFT makes of a stranger's config
        raise ValueError(f"{name} holds no adapter that PEFT can read: {first_line(error)}") from None


def load_adapter(model: Any, name: str, *, is_trainable: bool = False) -> Any:
    """`PeftModel.from_pretrained(model, name)`, refused where the adapter was trained on another base or head.

    An adapter that fits but names another base is loaded, and one line on standard error says so.

    Raises:
        ValueError: naming the first tensor or module that differs and the base the adapter was made for, or its task.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils import load_peft_weights

    values = _check_config(name)
    if values is not None:
        _check_sizes(model, values, Path(name) / ADAPTER_WEIGHTS)
    with _explained(name):
        config = PeftConfig.from_pretrained(name)
        weights = load_peft_weights(name, device="cpu")
    _check_task(model, config.task_type, name)
    _check_fits(model, weights, name, config.base_model_name_or_path)
    given = model.name_or_path
    if given and config.base_model_name_or_path and not _same_base(config.base_model_name_or_path, given):
        print(
            f"warning: adapter {name} was trained on {config.base_model_name_or_path} and is put on {given}",
            file=sys.stderr,
        )
    try:
        return PeftModel.from_pretrained(model, name, is_trainable=is_trainable)
    except Exception as error:  # whatever PEFT makes of a stranger's config
        raise ValueError(
            f"adapter {name} does not fit the base model (it was made for {config.base_model_name_or_path}): "
            f"{first_line(error)}"
        ) from None


def merge(model: Any) -> Any:
    """The base model with the adapter's change added to its weights: the same logits, up to rounding.

    An adapter on an embedding that is tied to the head would be added to both; so the two are untied first, and tied
    again where they come out equal.

    Raises:
        ValueError: if a merged weight is not finite.
    """
    base = model.get_base_model()
    untied = _untie_adapted(base)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ValueError(f"the adapter cannot be merged: {error}") from None
    if untied:
        embedding, head = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
        if torch.allclose(embedding, head, rtol=1e-5, atol=1e-7):
            merged.config.tie_word_embeddings = True
            merged.tie_weights()
    return merged


def _untie_adapted(base: Any) -> bool:
    """Gives the head weights of its own where it shares them with an embedding and either has an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [base.get_input_embeddings(), base.get_output_embeddings()]
    if None in layers or not any(isinstance(layer, BaseTunerLayer) for layer in layers):
        return False
    embedding, head = (getattr(layer, "base_layer", layer) for layer in layers)
    if embedding.weight is not head.weight:
        return False
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    base.config.tie_word_embeddings = False
    return True


def _check_task(model: Any, task: str | None, name: str) -> None:
    """Compares the head that the adapter was trained with and the model's; whatever else there is, PEFT compares."""
    heads = {LANGUAGE_MODEL: "a language model", CLASSIFIER: "a sequence classifier"}
    here = CLASSIFIER if type(model).__name__.endswith("ForSequenceClassification") else LANGUAGE_MODEL
    if task in heads and task != here:
        raise ValueError(f"adapter {name} is of {heads[task]}, and here it is put on {heads[here]}")


def _check_config(name: str) -> dict[str, Any] | None:
    """What the config of an adapter's folder says, once it is looked into; None for a name of the Hub."""
    path = Path(name).expanduser() / ADAPTER_CONFIG
    return read_adapter_config(path) if path.is_file() else None


def _check_sizes(model: Any, values: dict[str, Any], weights: Path) -> None:
    """Raises ValueError for sizes in an adapter's config that its weights do not have: PEFT makes room for them first.

    The expressions that name modules are tried, too, within the limits of time.
    """
    shapes = read_shapes(weights) if weights.is_file() else {}
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    patterns = values.get("rank_pattern") or {}
    sizes = {name: value for name, value in values.items() if name not in ("lora_alpha", "alpha", "bone_alpha")}
    sizes |= (
        {f"rank_pattern of {key!r}": value for key, value in patterns.items()} if isinstance(patterns, dict) else {}
    )
    for name, value in sizes.items():
        if isinstance(value, int | float) and value > max(MOST_RANK, largest):
            raise ValueError(
                f"{weights.parent} asks for {name}={value:,}, and its weights have sizes up to {largest:,}"
            )
    named = [values.get(name) for name in ("target_modules", "exclude_modules", "layers_pattern")]
    named += [key for name in ("rank_pattern", "alpha_pattern") for key in values.get(name) or ()]
    modules = [name for name, _ in model.named_modules()]
    try:
        with bounded(f"the expression that {weights.parent} names modules by"):
            for pattern in named:
                if isinstance(pattern, str):
                    expression = re.compile(pattern)
                    for module in modules:
                        expression.fullmatch(module)
    except re.error as error:
        raise ValueError(f"{weights.parent} names modules by {pattern!r}, which is no expression: {error}") from None


def _same_base(named: str, given: str) -> bool:
    """Whether two names may be of one base: where only one is a folder here, it may have been moved or downloaded."""
    one, other = Path(named).expanduser(), Path(given).expanduser()
    if one.exists() == other.exists():
        return one.resolve() == other.resolve()
    return one.resolve().name == other.resolve().name


def _check_fits(model: Any, weights: dict[str, Any], name: str, base: str | None) -> None:
    """Compares each LoRA factor with the module it goes on: A is [r, in], B is [out, r]."""
    modules = dict(model.named_modules())
    for key, tensor in weights.items():
        path = key.removeprefix("base_model.model.")
        for part, axis, side in (("lora_A", 1, "in"), ("lora_B", 0, "out")):
            target, found, _ = path.partition(f".{part}")
            if not found:
                continue
            module = modules.get(target)
            if module is None:
                raise ValueError(
                    f"adapter {name} was made for another base ({base}): it changes {target}, which this model lacks"
                )
            size = getattr(module, f"{side}_features", None)
            if size is not None and tensor.ndim == 2 and tensor.shape[axis] != size:
                raise ValueError(
                    f"adapter {name} was made for another base ({base}): {target} has {side}_features={size} here "
                    f"and {tensor.shape[axis]} there"
                )
