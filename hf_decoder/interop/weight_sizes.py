"""Checks from the headers of weights files that a config asks for a model of that size, before one is allocated."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from hf_decoder.engine.loading import MAX_NEW_PARAMETERS, fields_of
from hf_decoder.interop.checkpoint import INDEX_NAME, WEIGHTS_NAME, read_shapes, read_weight_map
from hf_decoder.safety.quiet import quiet
from hf_decoder.safety.terminal import first_line

# Parameters that one element of a quantized checkpoint may hold: 2 bits each in an int32.
PACKED = 16


def check_sizes(
    folder: Path, config: PretrainedConfig, auto_class: Any = AutoModelForCausalLM, *, trust_remote_code: bool = False
) -> None:
    """Refuses a config that asks for more than twice the parameters in the safetensors files of `folder`.

    transformers allocates and fills all that a config asks for before it says that the weights do not fit. A folder
    without safetensors files passes.

    Raises:
        ValueError: naming a tensor and the fields that ask for it; or if the weights files or the index are damaged.
    """
    if (folder / INDEX_NAME).is_file():
        files = [folder / file for file in sorted(set(read_weight_map(folder / INDEX_NAME).values()))]
    else:
        files = [folder / WEIGHTS_NAME]
    if not all(file.is_file() for file in files):
        return
    shapes = {name: shape for file in files for name, shape in read_shapes(file).items()}
    held = sum(math.prod(shape) for shape in shapes.values())
    check_layers(config, len(shapes), str(folder))
    try:
        described = copy.deepcopy(config)
        described._attn_implementation = "eager"  # its own choice may be a kernel of the Hub
        asked = parameter_shapes(lambda: auto_class.from_config(described, trust_remote_code=trust_remote_code))
    except Exception as error:  # a stranger's config may raise anything
        raise ValueError(
            f"config.json in {folder} describes a model that cannot be built: {first_line(error)}"
        ) from None
    total = sum(math.prod(shape) for shape in asked.values())
    packed = PACKED if getattr(config, "quantization_config", None) else 1
    if total <= max(MAX_NEW_PARAMETERS, 2 * packed * held):
        return
    names = [name for name, shape in asked.items() if shape != shapes.get(name)]
    name = max(names, key=lambda name: math.prod(asked[name]))
    there = f"of shape {list(shapes[name])} in its weights" if name in shapes else "not in its weights"
    because = fields_of(config.get_text_config(), set(asked[name]) - set(shapes.get(name, ())))
    raise ValueError(
        f"the weights in {folder} do not fit its config.json: it asks for {total:,} parameters, and there are "
        f"{held:,}; {name!r} is {there}, but {because or 'the config'} asks for {list(asked[name])}; correct "
        "config.json, or use the weights that belong to it"
    )


def check_layers(config: Any, count: int, where: str) -> None:
    """Raises ValueError for a config with more layers than the `count` tensors in `where`: each layer has some.

    Many layers take long to build.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > max(count, 128):
        raise ValueError(
            f"the weights in {where} do not fit its config.json: they are {count:,} tensors, but "
            f"num_hidden_layers={layers} asks for more; correct it, or use the weights that belong to it"
        )


def parameter_shapes(make: Callable[[], Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters of the model that `make` returns, by name. Tied ones count once."""
    with torch.device("meta"), quiet():
        return {name: tuple(parameter.shape) for name, parameter in make().named_parameters()}
