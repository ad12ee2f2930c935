"""Loads a GGUF file into our model, with its weights packed as they are in the file.

transformers' own loader does the rest, as for any quantized checkpoint: it is given a config, the file's tensors and a
quantizer that puts packed layers in the place of the plain ones. What it does by itself with `gguf_file` is to unpack
all weights on a CPU.
"""

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file, logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_decoder.engine.quantized.formats import FORMATS, tiled
from hf_decoder.engine.quantized.layers import PackedEmbedding, PackedLinear
from hf_decoder.engine.quantized.products import obstacle
from hf_decoder.engine.switches import settings

logger = logging.get_logger(__name__)

METHOD = "hf_decoder_gguf"
OF_THE_HUB = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
HELD = "HfDecoderForCausalLM"
# Fields of a config that the tensors of a file decide.
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "qk_norm", "attention_bias", "mlp_bias", "tie_word_embeddings"),
)
_CPU = {"cpu", torch.device("cpu")}

# Reads a file: our config, and by our names tensors that `load()` numbers and, if they have a `format_name`,
# `load_blocks()`.
Reader = Callable[[Path], tuple[Any, Mapping[str, Any]]]


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """Says which weights are packed: names of tensors, and of their formats."""

    def __init__(self, formats: dict[str, str] | None = None, **kwargs: Any):
        self.quant_method: Any = METHOD
        self.formats = formats or {}

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Makes room for packed weights, which are then loaded as they are."""

    quantization_config: PackedConfig
    requires_calibration = False
    is_trainable = True  # adapters on top of them
    is_compileable = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        formats = dict(self.quantization_config.formats)
        for target, source in (model._tied_weights_keys or {}).items():
            if model.config.tie_word_embeddings and source in formats:
                formats[target] = formats[source]
        for tensor, name in formats.items():
            place = tensor.removesuffix(".weight")
            of: Any = model.get_submodule(place)
            with torch.device("meta"):
                if isinstance(of, nn.Embedding):
                    packed: nn.Module = PackedEmbedding(of.num_embeddings, of.embedding_dim, name, of.weight.dtype)
                else:
                    packed = PackedLinear(of.in_features, of.out_features, name, of.bias is not None)
            model.set_submodule(place, packed)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False


def load_gguf(load: Callable[..., Any], read: Reader | None, name: Any, gguf_file: str, **kwargs: Any) -> Any:
    """The model of a GGUF file.

    Args:
        load: the `from_pretrained` of its class.
        read: reads a file.
        name: folder or Hub name that holds it.
        gguf_file: its name there, or a path.
        kwargs: other arguments of `from_pretrained`.

    Raises:
        ValueError: if the file is damaged or not held here, in one line.
        OSError: if it is not there.
    """
    if read is None:
        raise ValueError("GGUF files are read by the package hf_decoder; import it first")
    path = _locate(name, gguf_file, {key: kwargs.pop(key) for key in OF_THE_HUB if key in kwargs})
    config, tensors = read(path)
    asked, own = kwargs.pop("quantization_config", None), kwargs.pop("config", None)
    unpacks = asked.get("dequantize") if isinstance(asked, dict) else getattr(asked, "dequantize", None)
    if asked is not None and unpacks is None:
        raise ValueError(
            f"{path} is quantized already; leave quantization_config away, or GgufConfig(dequantize=True)"
        )
    if own is not None:
        config = _with_sizes_of(config, own, path)
    device = kwargs.get("device_map")
    if not unpacks and torch.accelerator.is_available() and not _CPU.issuperset(_devices(device)):
        logger.warning_once(f"{path} is unpacked: its weights are multiplied as they are on a CPU, not on {device}")
        unpacks = True
    formats = {} if unpacks else _formats(path, tensors)
    dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
    kwargs.pop("dtype", None)
    if dtype in (None, "auto"):
        dtype = torch.float32 if formats else config.dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    state = {
        key: tiled(tensor.load_blocks(), FORMATS[formats[key]]) if key in formats else tensor.load().to(dtype)
        for key, tensor in tensors.items()
    }
    if formats:
        kwargs["quantization_config"] = PackedConfig(formats)
    found = load(None, config=config, state_dict=state, dtype=dtype, **kwargs)
    model = found[0] if isinstance(found, tuple) else found
    model.config.name_or_path = model.name_or_path = str(name)
    return found


def _with_sizes_of(config: Any, own: Any, path: Path) -> Any:
    """The caller's own config, if the file's tensors have its sizes."""
    for field in SIZES:
        found, asked = getattr(config, field), getattr(own, field, None)
        if asked != found:
            raise ValueError(f"{path} has {field}={found}; the given config has {asked}")
    own = copy.deepcopy(own)
    own.__dict__.pop("quantization_config", None)  # of another file
    return own


def _locate(name: Any, gguf_file: str, of_the_hub: dict[str, Any]) -> Path:
    if os.path.isfile(gguf_file):
        return Path(gguf_file)
    found = cached_file(str(name), gguf_file, **of_the_hub)
    if found is None:
        raise OSError(f"{name} holds no {gguf_file}")
    return Path(found)


def _devices(device_map: Any) -> list[Any]:
    return list(device_map.values()) if isinstance(device_map, dict) else [] if device_map is None else [device_map]


def _formats(path: Path, tensors: Mapping[str, Any]) -> dict[str, str]:
    """The matrices that stay packed, with their formats; what does not is said once."""
    stored = {key: tensor.format_name for key, tensor in tensors.items() if hasattr(tensor, "format_name")}
    formats = {key: kind for key, kind in stored.items() if kind in FORMATS}
    others = sorted({*stored.values()} - FORMATS.keys())
    if others:
        count = len(stored) - len(formats)
        logger.warning_once(f"{count} tensors of {path} are unpacked, of types not held packed: {', '.join(others)}")
    reason = obstacle() if settings.kernels else "compiled kernels are switched off"
    if formats and reason is not None:
        logger.warning_once(f"{path} is unpacked, which takes several times its memory: {reason}")
        return {}
    return formats


__all__ = ["PackedConfig", "PackedQuantizer", "load_gguf"]
