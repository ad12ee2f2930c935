"""Checks that a config asks for a model of the size of its weights. Only the files' headers are read, before memory is
taken for the model."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from hf_decoder.engine.loading import MAX_NEW_PARAMETERS, fields_of
from hf_decoder.interop.checkpoint import INDEX_NAME, WEIGHTS_NAME, read_shapes, read_weight_map
from hf_decoder.safety.terminal import first_line

# Parameters that a quantized checkpoint may keep in one element: 2 bits each in an int32.
PACKED = 16


def check_sizes(
    folder: Path, config: PretrainedConfig, auto_class: Any = AutoModelForCausalLM, *, trust_remote_code: bool = False
) -> None:
    """Refuses a config that asks for more than twice what the safetensors files of `folder` hold.

    transformers makes room for all that a config asks for, and fills it, before it says that the weights do not fit.
    Folders without safetensors files are let pass.

    Raises:
        ValueError: in one line, naming a tensor and the fields that ask for it; or if the weights files or the index
            are damaged.
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
        asked = _shapes(config, auto_class, trust_remote_code)
    except Exception as error:  # not even the shapes can be formed, from whatever a stranger's config says
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
        f"the weights in {folder} do not fit its config.json, which asks for {total:,} parameters and they are "
        f"{held:,}: {name!r} is {there}, but {because or 'the config'} asks for {list(asked[name])}; correct "
        "config.json, or take the weights that belong to it"
    )


def check_layers(config: Any, count: int, where: str) -> None:
    """Raises ValueError for a config of more layers than there are tensors: each layer has some.

    Many layers take long to build. `count` is the number of tensors, `where` where they are.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > max(count, 128):
        raise ValueError(
            f"the weights in {where} do not fit its config.json: they are {count:,} tensors in all, but "
            f"num_hidden_layers={layers} asks for more; correct it, or take the weights that belong to it"
        )


def _shapes(config: PretrainedConfig, auto_class: Any, trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the parameters of the model of `config`; tied ones count once."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # a kernel of the Hub, if it asks for one, is not needed here
    with torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=trust_remote_code)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
