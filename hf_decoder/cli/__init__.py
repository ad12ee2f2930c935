"""What the commands share: checks of arguments, and loading of saved models with clear errors.

Nothing heavy is imported at the top: `hf-decoder --help` should not wait for torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_decoder.cli.arguments import did_you_mean, find_value, parse_arguments
from hf_decoder.safety.quiet import on_terminal, quiet
from hf_decoder.safety.terminal import first_line

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

MUON_ADAMW = "muon_adamw"  # a value of --optim; all others are names of transformers
T = TypeVar("T")
# Files of a model that its answers depend on.
ANSWERING_FILES = (
    *("*.safetensors", "pytorch_model*.bin", "*config.json", "*.py"),
    *("tokenizer.json", "*.model", "vocab.*", "merges.txt", "chat_template.*"),
)
# Numbers of a training that must be at least 1, and others that must be at least 0 and finite.
COUNTS = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_generations",
    "sample_steps", "max_folds",
)  # fmt: skip
RATES = ("learning_rate", "pretraining_learning_rate", "pretraining_epochs")

__all__ = ["did_you_mean", "find_value", "parse_arguments"]


def select_device(name: str | None) -> torch.device:
    """The device called `name`. None and "auto" choose the accelerator, or the CPU where there is none.

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


def check_package(name: str, extra: str) -> None:
    """Raises ValueError where a package is not installed that comes with this extra."""
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"this needs {name}: pip install 'hf-decoder[{extra}]'")


def check_at_least(flag: str, value: int | None, least: int) -> None:
    """Raises ValueError if `value` is given and below `least`."""
    if value is not None and value < least:
        raise ValueError(f"{flag} {value} must be at least {least}")


def check_training(args: Any) -> None:
    """Checks the counts, rates and lengths of a training; `args` need not have them all.

    Raises:
        ValueError: naming the flag.
    """
    for name in COUNTS:
        check_at_least(f"--{name}", getattr(args, name, None), 1)
    for name in RATES:
        value = getattr(args, name, 0)
        if not 0 <= value < math.inf:
            raise ValueError(f"--{name} {value:g} must be at least 0, and finite")
    steps = getattr(args, "max_steps", -1)
    if steps == 0:
        raise ValueError("--max_steps 0 trains nothing; give at least 1, or -1 to count --num_train_epochs")
    if steps < 0 and not 0 < args.num_train_epochs < math.inf:
        raise ValueError(f"--num_train_epochs {args.num_train_epochs:g} must be more than 0, and finite")


def optimizer_name(args: Any) -> str:
    """The name that --optim gave. `args.optim` holds AdamW in place of Muon, which transformers does not know."""
    from transformers.training_args import OptimizerNames

    return MUON_ADAMW if args.uses_muon else OptimizerNames(args.optim).value


def parse_overrides(text: str | None) -> dict[str, Any]:
    """Parses `name=value,name=value`. A value that is not JSON is a string.

    Raises:
        ValueError: for a part without `=`, or a name that is no field of `HfDecoderConfig`.
    """
    from hf_decoder import HfDecoderConfig

    known = [*(f.name for f in fields(HfDecoderConfig)), "rope_theta", "rope_scaling", "partial_rotary_factor"]
    overrides = {}
    for part in re.split(r",\s*(?=\w+=)", text) if text else []:
        name, equals, value = part.strip().partition("=")
        if not equals:
            raise ValueError(f"--config_overrides {part!r} is not of the form name=value")
        if name not in known:
            raise ValueError(f"--config_overrides names {name!r}, no config field{did_you_mean(name, known)}")
        try:
            overrides[name] = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
        except json.JSONDecodeError:
            overrides[name] = value
    return overrides


def load_config(name: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Loads the config of a causal language model from a folder or Hub name.

    Raises:
        ValueError: if there is no such folder or name, config.json is damaged, or the model is of another kind.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    import hf_decoder  # noqa: F401  (registers the model type)
    from hf_decoder.interop.checkpoint import local_folder, not_on_hub, read_config_values
    from hf_decoder.interop.untrusted_files import check_model

    folder = local_folder(name)
    if folder is not None:
        read_config_values(folder)
    check_model(name)
    try:
        config = AutoConfig.from_pretrained(str(folder or name), trust_remote_code=trust_remote_code)
    except Exception as error:  # a stranger's config may raise anything
        if folder is None:
            raise not_on_hub(name, error) from None
        raise ValueError(f"config.json in {name} describes no model known here: {first_line(error)}") from None
    remote = "AutoModelForCausalLM" in getattr(config, "auto_map", {}) and trust_remote_code
    if type(config) not in AutoModelForCausalLM._model_mapping and not remote:
        raise ValueError(f"{name} holds a {config.model_type!r} model, which is not a causal language model")
    return config


def is_classifier(name: str, *, adapter: str | None = None, trust_remote_code: bool = False) -> bool:
    """Whether a saved model, or its adapter, is a sequence classifier. Raises ValueError as `load_config` does."""
    base, adapter = _base_and_adapter(name, adapter)
    return _classifies(load_config(base, trust_remote_code=trust_remote_code), adapter)


def _classifies(config: PretrainedConfig, adapter: str | None = None) -> bool:
    from hf_decoder.interop.adapters import CLASSIFIER, task_of

    if adapter is not None and task_of(adapter) == CLASSIFIER:
        return True
    return any(kind.endswith("ForSequenceClassification") for kind in config.architectures or [])


def load_model(name: str, *, trust_remote_code: bool = False, adapter: str | None = None, **kwargs: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained(name, **kwargs)` with errors of one line.

    `name` may also be an adapter's folder, which names its base. `adapter` is put on the model.

    Raises:
        ValueError: as `load_config` does; if weights are damaged, missing or do not fit the config; if the adapter was
            made for another base; or for a classifier, which writes no text.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, name, trust_remote_code, adapter, kwargs)


def load_classifier(name: str, *, trust_remote_code: bool = False, adapter: str | None = None, **kwargs: Any) -> Any:
    """`AutoModelForSequenceClassification.from_pretrained(name, **kwargs)` with errors of one line.

    With `num_labels` or `id2label` in `kwargs`, a missing head starts from random weights. An adapter brings its head.
    The names of its classes come from the file beside it, or from a base that is a classifier.

    Raises:
        ValueError: as `load_model` does, or if nothing names an adapter's classes.
    """
    from transformers import AutoModelForSequenceClassification

    return _load(AutoModelForSequenceClassification, name, trust_remote_code, adapter, kwargs)


def _base(name: str) -> str:
    """The base model of an adapter's folder; else `name`."""
    from hf_decoder.interop.adapters import base_of, is_adapter

    return base_of(name) if is_adapter(name) else name


def _base_and_adapter(name: str, adapter: str | None) -> tuple[str, str | None]:
    """The base model and the adapter on it, where `name` may itself be the adapter."""
    base = _base(name)
    return base, adapter or (name if base != name else None)


def _load(auto_class: Any, name: str, trust_remote_code: bool, adapter: str | None, kwargs: dict[str, Any]) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    from hf_decoder.interop.adapters import load_adapter
    from hf_decoder.interop.checkpoint import INDEX_NAME, read_weight_map
    from hf_decoder.interop.weight_sizes import check_sizes
    from hf_decoder.training.checkpoints import check_content

    name, adapter = _base_and_adapter(name, adapter)
    folder = Path(name).expanduser()
    config = load_config(name, trust_remote_code=trust_remote_code)
    classifies = auto_class is AutoModelForSequenceClassification
    if not classifies and _classifies(config, adapter):
        raise ValueError(
            f"{adapter or name} is a sequence classifier, which writes no text; eval --metrics accuracy measures it, "
            "and finetune --task classification trains it"
        )
    check_content(name)  # against the digests that training left
    if (folder / INDEX_NAME).is_file():
        read_weight_map(folder / INDEX_NAME)  # refuses files outside the folder, which transformers would load
    if adapter is not None and classifies and "id2label" not in kwargs:
        kwargs["id2label"] = _label_names(adapter, config)
    if "id2label" in kwargs:
        kwargs.setdefault("label2id", {label: index for index, label in kwargs["id2label"].items()})
    new_head = "id2label" in kwargs or "num_labels" in kwargs
    for key in ("num_labels", "id2label", "label2id"):
        if key in kwargs:
            setattr(config, key, kwargs.pop(key))
    if folder.is_dir():
        check_sizes(folder, config, auto_class, trust_remote_code=trust_remote_code)
    try:
        with quiet():  # transformers' table of missing tensors is one line below
            model, report = auto_class.from_pretrained(
                name, config=config, trust_remote_code=trust_remote_code, output_loading_info=True, **kwargs
            )
    except SafetensorError as error:
        raise ValueError(
            f"the weights in {name} are damaged or cut short ({first_line(error)}); copy or download them again"
        ) from None
    except Exception as error:  # weights, quantization settings and classes of strangers may raise anything
        raise ValueError(f"the weights in {name} cannot be loaded: {first_line(error)}") from None
    missing = sorted(key for key in report["missing_keys"] if not (new_head and key.startswith("score.")))
    if missing:
        raise ValueError(
            f"the weights in {name} do not fit its config.json: {len(missing)} tensors are missing, "
            f"first {missing[0]!r}"
        )
    return model if adapter is None else load_adapter(model, adapter)


def _label_names(adapter: str, config: PretrainedConfig) -> dict[int, str]:
    """The names of the classes of an adapter whose base has this config."""
    from hf_decoder.data.label_names import LABELS_FILE, read_label_names

    names = read_label_names(adapter)
    if names is not None:
        return names
    if _classifies(config):
        return {int(index): label for index, label in (config.id2label or {}).items()}
    raise ValueError(
        f"the adapter {adapter} is of a classifier, and nothing names its classes; write them beside it "
        f'into {LABELS_FILE}, by class id: {{"0": "a name", "1": "a name"}}'
    )


def show_progress(items: Iterable[T], total: int, name: str) -> Iterator[T]:
    """Yields `items` and shows progress on standard error: a bar on a terminal, about ten lines in a log."""
    from tqdm import tqdm

    if on_terminal():
        yield from tqdm(items, total=total, desc=name, mininterval=0.5)
        return
    for number, item in enumerate(items, 1):
        yield item
        if number == total or number % max(1, total // 10) == 0:
            print(f"{name}: {number}/{total}", file=sys.stderr, flush=True)


def mark_of(name: str, adapter: str | None, *settings: Any) -> str:
    """A digest that tells the answers of one model with these settings from all others.

    It covers the content of the files in a folder, so training there again changes it. Of the Hub it covers the name.
    """
    from hf_decoder.training.checkpoints import file_digest

    parts: list[Any] = []
    for one in filter(None, _base_and_adapter(name, adapter)):
        files = sorted(path for path in Path(one).expanduser().glob("*") if path.is_file())
        chosen = [path for path in files if any(map(path.match, ANSWERING_FILES))]
        parts.append({path.name: file_digest(path) for path in chosen} or one)
    return hashlib.sha256(json.dumps([parts, settings], sort_keys=True, default=str).encode()).hexdigest()


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """`AutoTokenizer.from_pretrained(name)`, or that of the base where an adapter's folder has none.

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
        raise ValueError(f"the tokenizer in {name} cannot be loaded: {first_line(error)}") from None
