"""PEFT adapters beside a base model: found, checked against the base, and put on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ADAPTER_CONFIG = "adapter_config.json"


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (Path(folder) / ADAPTER_CONFIG).is_file() and not (Path(folder) / "config.json").is_file()


def base_of(folder: str | Path) -> str:
    """The base model that an adapter's folder names.

    Raises:
        ValueError: if its adapter_config.json is damaged or names none.
    """
    path = Path(folder) / ADAPTER_CONFIG
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not base:
        raise ValueError(f"{path} names no base model; give the base as the model and this folder as the adapter")
    return str(base)


def load_adapter(model: Any, name: str, *, is_trainable: bool = False) -> Any:
    """`PeftModel.from_pretrained(model, name)`, refused where the adapter was trained on another base.

    Raises:
        ValueError: naming the first tensor or module that differs and the base the adapter was made for.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils import load_peft_weights

    try:
        config = PeftConfig.from_pretrained(name)
        weights = load_peft_weights(name, device="cpu")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{name} holds no adapter that PEFT can read: {str(error).splitlines()[0]}") from None
    _check_fits(model, weights, name, config.base_model_name_or_path)
    try:
        return PeftModel.from_pretrained(model, name, is_trainable=is_trainable)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"adapter {name} does not fit the base model (it was made for {config.base_model_name_or_path}): "
            f"{str(error).splitlines()[0]}"
        ) from None


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
