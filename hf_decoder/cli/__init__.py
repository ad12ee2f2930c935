"""Shared code of the commands: checks of arguments, and loading a saved model with clear errors.

Nothing heavy is imported here: `hf-decoder --help` should not wait for torch.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_decoder.cli.arguments import did_you_mean, find_value, parse_arguments
from hf_decoder.safety.quiet import on_terminal

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

MUON_ADAMW = "muon_adamw"  # a value of --optim beside transformers' own names
DTYPES = ("auto", "float32", "bfloat16", "float16")
T = TypeVar("T")

__all__ = ["did_you_mean", "find_value", "parse_arguments"]


def select_device(name: str | None) -> torch.device:
    """The device called `name`; None: the accelerator if there is one, else the CPU.

    Raises:
        ValueError: if this machine has no such device.
    """
    import torch

    if name in (None, "auto"):
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"--device {name!r} is not a device of this machine") from None
    return device


def check_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{flag} {value!r} is unknown; choose one of: {', '.join(choices)}")


def check_at_least(flag: str, value: int | None, least: int) -> None:
    """Raises ValueError where a number is given and below `least`: a zero is no way of leaving a flag out."""
    if value is not None and value < least:
        raise ValueError(f"{flag} {value} must be at least {least}")


def optimizer_name(args: Any) -> str:
    """What --optim said: transformers does not know our name, and has AdamW's in its place."""
    from transformers.training_args import OptimizerNames

    return MUON_ADAMW if args.uses_muon else OptimizerNames(args.optim).value


def parse_overrides(text: str | None) -> dict[str, Any]:
    """Reads `name=value,name=value`; a value is JSON, or else a string.

    Raises:
        ValueError: for a part without `=`, or a name that `HfDecoderConfig` does not have.
    """
    from hf_decoder import HfDecoderConfig

    known = [*(f.name for f in fields(HfDecoderConfig)), "rope_theta", "rope_scaling", "partial_rotary_factor"]
    overrides = {}
    for part in re.split(r",\s*(?=\w+=)", text) if text else []:
        name, equals, value = part.strip().partition("=")
        if not equals:
            raise ValueError(f"--config_overrides {part!r} is not of the form name=value")
        if name not in known:
            raise ValueError(f"--config_overrides names {name!r}, no field of the config{did_you_mean(name, known)}")
        try:
            overrides[name] = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
        except json.JSONDecodeError:
            overrides[name] = value
    return overrides


def load_config(name: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a folder or Hub name, checked to belong to a causal language model.

    Raises:
        ValueError: if there is no such folder, its config.json is damaged, or it describes another kind of model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    import hf_decoder  # noqa: F401  (registers the model type)
    from hf_decoder.interop.checkpoint import read_config_values
    from hf_decoder.interop.untrusted_files import check_model

    folder = Path(name).expanduser()
    if folder.is_dir():
        read_config_values(folder)
    elif folder.exists():
        raise ValueError(f"{name} is a file; give the folder that holds config.json and the weights")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and folder.parent.is_dir()):
        raise ValueError(f"folder {name} does not exist")
    check_model(name)
    try:
        config = AutoConfig.from_pretrained(
            str(folder) if folder.is_dir() else name, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # whatever a stranger's config makes of itself
        if folder.is_dir():
            raise ValueError(
                f"config.json in {name} is not a model this program knows: {_first_line(error)}"
            ) from None
        raise ValueError(
            f"{name} is neither a folder here nor a model that the Hub gives us: {_first_line(error)}"
        ) from None
    remote = "AutoModelForCausalLM" in getattr(config, "auto_map", {}) and trust_remote_code
    if type(config) not in AutoModelForCausalLM._model_mapping and not remote:
        raise ValueError(f"{name} holds a {config.model_type!r} model, which is not a causal language model")
    return config


def _first_line(error: BaseException) -> str:
    """The first line of what went wrong first: a wrapper's own words say only that something did."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def is_classifier(name: str, *, adapter: str | None = None, trust_remote_code: bool = False) -> bool:
    """Whether a saved model or its adapter has a sequence-classification head. Raises ValueError as `load_config`."""
    base, adapter = _parts_of(name, adapter)
    return _classifies(load_config(base, trust_remote_code=trust_remote_code), adapter)


def _classifies(config: PretrainedConfig, adapter: str | None = None) -> bool:
    from hf_decoder.interop.adapters import CLASSIFIER, task_of

    if adapter is not None and task_of(adapter) == CLASSIFIER:
        return True
    return any(kind.endswith("ForSequenceClassification") for kind in config.architectures or [])


def load_model(name: str, *, trust_remote_code: bool = False, adapter: str | None = None, **kwargs: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained(name, **kwargs)`; whatever is wrong with the weights is one line.

    `name` may be the folder of an adapter, which names its base; `adapter` is one to put on the model.

    Raises:
        ValueError: as `load_config`; if a weights file is damaged, missing, or lacks tensors of the config; if the
            adapter was made for another base; or for a classifier, whose tied head would write nonsense.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, name, trust_remote_code, adapter, kwargs)


def load_classifier(name: str, *, trust_remote_code: bool = False, adapter: str | None = None, **kwargs: Any) -> Any:
    """`AutoModelForSequenceClassification.from_pretrained(name, **kwargs)`, as `load_model`.

    With `num_labels` or `id2label` in `kwargs` the head may be missing: it starts from random weights. An adapter
    brings its head, and the names of the classes in a file beside it; else they are those of a base that is a
    classifier itself.

    Raises:
        ValueError: as `load_model`; or if nothing tells the names of an adapter's classes.
    """
    from transformers import AutoModelForSequenceClassification

    return _load(AutoModelForSequenceClassification, name, trust_remote_code, adapter, kwargs)


def _base(name: str) -> str:
    """`name`, or the base model where `name` is the folder of an adapter."""
    from hf_decoder.interop.adapters import base_of, is_adapter

    return base_of(name) if is_adapter(name) else name


def _parts_of(name: str, adapter: str | None) -> tuple[str, str | None]:
    """The base model and the adapter to put on it, which `name` itself may be."""
    base = _base(name)
    return base, adapter or (name if base != name else None)


def _load(auto_class: Any, name: str, trust_remote_code: bool, adapter: str | None, kwargs: dict[str, Any]) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    from hf_decoder.interop.checkpoint import INDEX_NAME, read_weight_map
    from hf_decoder.interop.weight_sizes import check_sizes
    from hf_decoder.training.checkpoints import check_content

    name, adapter = _parts_of(name, adapter)
    config = load_config(name, trust_remote_code=trust_remote_code)
    classifies = auto_class is AutoModelForSequenceClassification
    if not classifies and _classifies(config, adapter):
        raise ValueError(
            f"{adapter or name} is a sequence classifier, which writes no text; eval --metrics accuracy measures it, "
            "and finetune --task classification trains it"
        )
    check_content(name)  # of a training's checkpoint, which has digests
    if (index := Path(name).expanduser() / INDEX_NAME).is_file():
        read_weight_map(index)  # transformers follows it out of the folder
    if adapter is not None and classifies and "id2label" not in kwargs:
        kwargs["id2label"] = _label_names(adapter, config)
    if "id2label" in kwargs:
        kwargs.setdefault("label2id", {label: index for index, label in kwargs["id2label"].items()})
    new_head = "id2label" in kwargs or "num_labels" in kwargs
    for key in ("num_labels", "id2label", "label2id"):
        if key in kwargs:
            setattr(config, key, kwargs.pop(key))
    if (folder := Path(name).expanduser()).is_dir():
        check_sizes(folder, config, auto_class, trust_remote_code=trust_remote_code)
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the loading report would repeat in a table what is said below in one line
    try:
        loaded: Any = auto_class.from_pretrained(
            name, config=config, trust_remote_code=trust_remote_code, output_loading_info=True, **kwargs
        )
    except SafetensorError as error:
        raise ValueError(
            f"the weights in {name} are damaged or cut short ({_first_line(error)}); copy or download them again"
        ) from None
    except Exception as error:  # of weights that do not fit, of a quantization_config that is nonsense, of any class
        raise ValueError(f"the weights in {name} cannot be loaded: {_first_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)
    model, report = loaded
    missing = sorted(key for key in report["missing_keys"] if not (new_head and key.startswith("score.")))
    if missing:
        raise ValueError(
            f"the weights in {name} do not fit its config.json: {len(missing)} tensors are missing, "
            f"first {missing[0]!r}"
        )
    if adapter is not None:
        from hf_decoder.interop.adapters import load_adapter

        model = load_adapter(model, adapter)
    return model


def _label_names(adapter: str, config: PretrainedConfig) -> dict[int, str]:
    """The names of the classes that an adapter tells apart, whose base has this config."""
    from hf_decoder.data.label_names import LABELS_FILE, read_label_names

    names = read_label_names(adapter)
    if names is not None:
        return names
    if _classifies(config):
        return {int(index): label for index, label in (config.id2label or {}).items()}
    raise ValueError(
        f"the adapter {adapter} is of a classifier, and nothing tells the names of its classes; write them beside it "
        f'into {LABELS_FILE}, by class id: {{"0": "a name", "1": "a name"}}'
    )


def show_progress(items: Iterable[T], total: int, name: str) -> Iterator[T]:
    """`items`, with a bar on standard error; ten lines or so in place of the bar where that goes into a log."""
    from tqdm import tqdm

    if on_terminal():
        yield from tqdm(items, total=total, desc=name, mininterval=0.5)
        return
    for number, item in enumerate(items, 1):
        yield item
        if number == total or number % max(1, total // 10) == 0:
            print(f"{name}: {number}/{total}", file=sys.stderr, flush=True)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """`AutoTokenizer.from_pretrained(name)`.

    Raises:
        ValueError: if there is no tokenizer, or its files are damaged.
    """
    from transformers import AutoTokenizer

    from hf_decoder.interop.untrusted_files import check_model
    from hf_decoder.safety.limits import bound_templates

    if not (Path(name) / "tokenizer_config.json").is_file():
        name = _base(name)
    check_model(name)
    bound_templates()
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise ValueError(f"the tokenizer in {name} cannot be loaded: {_first_line(error)}") from None
