"""Finds PEFT adapters, checks them against their base, loads and merges them."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hf_decoder.interop.checkpoint import download, local_folder, read_json, read_shapes
from hf_decoder.interop.untrusted_files import check_numbers
from hf_decoder.safety.limits import bounded
from hf_decoder.safety.terminal import first_line

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LANGUAGE_MODEL, CLASSIFIER = "CAUSAL_LM", "SEQ_CLS"  # PEFT's names of the tasks
MOST_LAYERS = 1 << 12
MOST_RANK = 1 << 10  # allowed whatever the size of the weights


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (Path(folder) / ADAPTER_CONFIG).is_file() and not (Path(folder) / "config.json").is_file()


def base_of(folder: str | Path) -> str:
    """The name of an adapter's base model.

    Raises:
        ValueError: if its adapter_config.json is damaged or names none.
    """
    path = Path(folder) / ADAPTER_CONFIG
    base = read_adapter_config(path).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{path} names no base model; give the base as the model, and this folder as the adapter")
    return str(base)


def adapters_near(folder: str | Path) -> list[Path]:
    """The adapters in the folder of a language model and beside it that were made for it."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return [path for path in sorted([*folder.iterdir(), *folder.parent.iterdir()]) if _is_made_for(path, folder)]


def _is_made_for(path: Path, folder: Path) -> bool:
    if not is_adapter(path):
        return False
    try:
        is_of_text = read_adapter_config(path / ADAPTER_CONFIG).get("task_type") != CLASSIFIER
        return is_of_text and _same_base(base_of(path), str(folder))
    except ValueError:  # a damaged one is no choice
        return False


def read_adapter_config(path: Path) -> dict[str, Any]:
    """The content of an adapter_config.json.

    Raises:
        ValueError: if it is damaged, makes PEFT import a module, or makes it build too many layers.
    """
    values = read_json(path)
    check_numbers(path, values)
    if values.get("megatron_config"):
        raise ValueError(f"{path} sets megatron_config, which makes PEFT import a module: not supported")
    pairs = values.get("layer_replication")
    if pairs is not None:
        try:
            count = sum(end - start for start, end in pairs)
        except (TypeError, ValueError):
            raise ValueError(f"{path} has a layer_replication that is not a list of pairs of numbers") from None
        if len(pairs) > MOST_LAYERS or not 0 < count <= MOST_LAYERS:
            raise ValueError(
                f"{path} has a layer_replication of {count:,} layers; at most {MOST_LAYERS:,} are allowed"
            )
    return values


def task_of(name: str) -> str | None:
    """The task of an adapter by PEFT's name (`CLASSIFIER`, ...); None if its config names none.

    Raises:
        ValueError: if PEFT cannot read its config.
    """
    from peft import PeftConfig

    folder, _ = _open(name)
    with _explained(name):
        return PeftConfig.from_pretrained(str(folder)).task_type


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns errors in the files of an adapter into a ValueError of one line."""
    try:
        yield
    except Exception as error:  # PEFT may raise anything on a stranger's config
        raise ValueError(f"{name} holds no adapter that PEFT can read: {first_line(error)}") from None


def load_adapter(model: Any, name: str, *, is_trainable: bool = False) -> Any:
    """`PeftModel.from_pretrained(model, name)` for an adapter that fits the model.

    An adapter that fits but names another base is loaded with a warning on standard error.

    Raises:
        ValueError: if the adapter was made for another base or task; names both, and the first module that differs.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils import load_peft_weights

    folder, values = _open(name)
    _check_sizes(model, values, folder / ADAPTER_WEIGHTS)
    with _explained(name):
        config = PeftConfig.from_pretrained(str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
    _check_task(model, config.task_type, name)
    _check_fits(model, weights, name, config.base_model_name_or_path)
    given = model.name_or_path
    if given and config.base_model_name_or_path and not _same_base(config.base_model_name_or_path, given):
        print(
            f"warning: adapter {name} was trained on {config.base_model_name_or_path}, and is put on {given}",
            file=sys.stderr,
        )
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    except Exception as error:  # PEFT may raise anything on a stranger's config
        raise ValueError(
            f"adapter {name} does not fit the base model (it was made for {config.base_model_name_or_path}): "
            f"{first_line(error)}"
        ) from None


def merge(model: Any) -> Any:
    """Merges an adapter into its base model, which then gives the same logits up to rounding.

    An adapter on an embedding that is tied to the head would be added to both. So the two are untied first, and tied
    again if they come out equal.

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
    """Gives the head its own weights if it shares them with an embedding and either has an adapter."""
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
    """Raises ValueError if the adapter was trained with another head than the model has."""
    heads = {LANGUAGE_MODEL: "a language model", CLASSIFIER: "a sequence classifier"}
    here = CLASSIFIER if type(model).__name__.endswith("ForSequenceClassification") else LANGUAGE_MODEL
    if task in heads and task != here:
        raise ValueError(f"adapter {name} belongs to {heads[task]}, and cannot be put on {heads[here]}")


def _open(name: str) -> tuple[Path, dict[str, Any]]:
    """The folder of an adapter and its checked config. Of a Hub name, config and weights alone are downloaded."""
    folder = local_folder(name) or download(name, None, allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS])
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{name} holds no adapter that PEFT can read: it has no {ADAPTER_CONFIG}")
    return folder, read_adapter_config(folder / ADAPTER_CONFIG)


def _check_sizes(model: Any, values: dict[str, Any], weights: Path) -> None:
    """Raises ValueError for sizes in an adapter's config that its weights do not have: PEFT allocates them first.

    It also tries the expressions that name modules, within a time limit.
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
        raise ValueError(f"{weights.parent} names modules by an invalid expression, {pattern!r}: {error}") from None


def _same_base(named: str, given: str) -> bool:
    """Whether two names may mean one base. If only one is a folder here, the last parts are compared."""
    one, other = Path(named).expanduser(), Path(given).expanduser()
    if one.exists() == other.exists():
        return one.resolve() == other.resolve()
    return one.resolve().name == other.resolve().name


def _check_fits(model: Any, weights: dict[str, Any], name: str, base: str | None) -> None:
    """Compares each LoRA factor with its module: A is (r, in), B is (out, r)."""
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
