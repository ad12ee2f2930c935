"""What the fast paths assume of a model: one list, checked once per call. Any other model runs its plain modules.

Everything that the `forward` methods of the plain modules read is handled in one of three ways. It is compared with
what the fast paths were written for; it is part of the state that identifies a decode step, so that a change makes a
new step; or the fast paths read it from the live module as the plain ones do.
"""

from collections.abc import Collection, Iterable
from itertools import chain
from operator import attrgetter, itemgetter
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_decoder.engine.stock import fields_of
from hf_decoder.model import modeling_hf_decoder

PLAIN = (torch.Tensor, nn.Parameter)  # tensors without behaviour of their own
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SILU = (type(ACT2FN["silu"]), nn.SiLU)
METHODS = ("forward", "attend", "layer_masks", "run_layers", "compute_logits", "linear_loss")
# Names in a module's own attributes if somebody has replaced a method of its class.
OWN = {*METHODS, "_compiled_call_impl"}
# Hooks that change nothing: transformers' recorders act only on calls that ask for outputs, which run the modules.
HARMLESS_HOOKS = "transformers.utils.output_capturing"
FSDP_HOOKS = "torch.distributed.fsdp"

# What identifies a decode step besides weights: attributes of each kind of module, and fields of the config.
ATTENTION = ("layer_idx", "head_dim", "num_key_value_groups", "scaling", "is_causal", "use_rope", "use_qk_norm")
ROTARY = ("attention_scaling", "rope_type", "max_seq_len_cached", "original_max_seq_len")
CONFIG = ("num_hidden_layers", "layer_types", "sliding_window", "final_logit_softcapping", "rope_parameters")
_attention_values, _rotary_values, _config_values = (attrgetter(*names) for names in (ATTENTION, ROTARY, CONFIG))
_HOOKS = tuple(itemgetter(f"_{way}_hooks") for way in ("forward", "forward_pre", "backward", "backward_pre"))
_PARAMETERS = itemgetter("_parameters")

_as_written: dict[type, tuple] = {}


def register(room: ModuleType, *twins: type, without: Collection[str] = ()) -> None:
    """Remembers the methods of the classes of a module of model code, and of their twins, as the original ones.

    without: names of classes that lack what the fast paths ask of their twins.
    """
    classes = [kind for kind in vars(room).values() if isinstance(kind, type) and kind.__module__ == room.__name__]
    for kind in (*(kind for kind in classes if kind.__name__ not in without), *twins):
        if issubclass(kind, nn.Module):
            _as_written.setdefault(kind, _methods(kind))


def _methods(kind: type) -> tuple:
    return tuple(getattr(kind, name, None) for name in METHODS)


def is_as_written(kind: type) -> bool:
    """Whether the fast paths know this class and nobody has replaced its methods."""
    if issubclass(kind, FSDPModule):  # FSDP2 makes a class over the one that it shards
        kind = kind.__bases__[1]
    return _as_written.get(kind) == _methods(kind)


class Structure(NamedTuple):
    """Properties that all layers of a decoder share, for the operators between their linear maps."""

    plain_attention_inputs: bool  # query, key and value maps are torch's own, which only multiply their input
    plain_mlp_inputs: bool
    has_silu: bool


def structure_of(decoder: Any) -> Structure | None:
    """The structure of a decoder; None if its layers must be called as modules.

    Layers, norms, attention and MLP must be unchanged and without hooks. The linear maps may be of any kind.
    """
    implementation = decoder.config._attn_implementation
    if implementation != "sdpa" and not implementation.startswith("flash"):  # others can return attention weights
        return None
    if torch.nn.modules.module._has_any_global_hook():
        return None
    # Every call asks for every layer. The dictionaries of a module take a fifth of the time of its attributes.
    inputs_of_attention: list[Any] = []
    inputs_of_mlp: list[Any] = []
    modules, norms, activations = [], [decoder.norm], []
    layers = list(decoder.layers)[: decoder.config.num_hidden_layers]
    blocks = [layer.__dict__["_modules"] for layer in layers]
    containers = [*layers, *(parts.get(name) for parts in blocks for name in ("self_attn", "mlp"))]
    if not all(map(is_as_written, set(map(type, containers)))):  # before their parts are asked for
        return None
    for layer, parts in zip(layers, blocks, strict=True):
        attention, mlp = parts["self_attn"], parts["mlp"]
        of_attention, of_mlp = attention.__dict__["_modules"], mlp.__dict__["_modules"]
        modules += [layer, attention, mlp, of_mlp.get("act_fn")]
        norms += map(parts.get, ("input_layernorm", "post_attention_layernorm"))
        if attention.use_qk_norm:
            norms += map(of_attention.get, ("q_norm", "k_norm"))
        inputs_of_attention += map(of_attention.get, ("q_proj", "k_proj", "v_proj"))
        inputs_of_mlp += map(of_mlp.get, ("gate_proj", "up_proj"))
        activations.append(of_mlp.get("act_fn"))
    kinds = set(map(type, [*modules, *norms])) - set(map(type, activations))
    if not all(map(is_as_written, kinds)) or _any_hooked([*modules, *norms]):
        return None
    device = decoder.norm.weight.device
    is_sharded = any(issubclass(kind, FSDPModule) for kind in kinds)  # its hooks gather what a layer needs
    for norm in norms:
        weight = norm.__dict__["_parameters"]["weight"]
        if weight.device != device or not (is_sharded or type(weight) in PLAIN):
            return None
    return Structure(
        _are_torchs_own(inputs_of_attention),
        _are_torchs_own(inputs_of_mlp),
        all(type(activation) in SILU for activation in activations),
    )


def _are_torchs_own(maps: Iterable[nn.Module]) -> bool:
    """Whether all are torch's own: an adapter or a quantizer casts by itself, and a hook may change its input."""
    return all(type(module) is nn.Linear and not module._forward_pre_hooks for module in maps)


def attends_as_stock(decoder: Any) -> bool:
    """Whether attention is causal and torch's own, so that another kernel gives the same result."""
    config = fields_of(decoder.config)
    if config._attn_implementation != "sdpa" or ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:
        return False
    has_windows = config.sliding_window is not None and getattr(decoder, "has_sliding_layers", True)
    if "sliding_attention" in config.layer_types and not has_windows:  # the plain masks raise the error
        return False
    attentions: list[Any] = [getattr(layer, "self_attn", None) for layer in decoder.layers[: config.num_hidden_layers]]
    return getattr(config, "is_causal", True) is True and all(
        getattr(attention, "is_causal", False) is True
        and _heads_fit(attention)
        and not (decoder.training and attention.attention_dropout)
        for attention in attentions
    )


def _heads_fit(attention: Any) -> bool:
    """Whether the number of query heads is that of the repeated keys."""
    maps = (getattr(attention, name, None) for name in ("q_proj", "k_proj"))
    queries, keys = (getattr(of, "out_features", -1) for of in maps)
    return queries == keys * getattr(attention, "num_key_value_groups", 0)


def state_of(model: Any) -> tuple[list[int], list[Any]] | None:
    """The state that identifies a decode step of a language model; None if the modules must be called.

    It holds all modules and tensors by identity, and all values that their `forward` methods read. Modules must be
    unchanged, plain, without hooks, on one device, in evaluation mode.
    """
    # Every call of `generate()` asks for every module, so this makes few calls over all of them.
    config, decoder, head = model.config, model.model, model.lm_head
    if model.training or torch.nn.modules.module._has_any_global_hook() or not attends_as_stock(decoder):
        return None
    if not getattr(config, "return_dict", True) or decoder.config is not config:
        return None
    if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
        return None
    modules = modules_below(decoder, head)
    layers = decoder.layers[: config.num_hidden_layers]
    kinds = set(map(type, modules)) - {nn.ModuleList}  # a ModuleList is never called
    strange = {kind for kind in kinds if issubclass(kind, FSDPModule) or not is_as_written(kind)}
    if strange:
        activations = {id(layer.mlp.act_fn) for layer in layers if hasattr(layer, "mlp")}
        if any(type(module) in strange and id(module) not in activations for module in modules):
            return None
    if _any_hooked(modules):
        return None
    attributes = list(map(vars, modules))
    if decoder.embed_tokens.max_norm is not None or not _fit_together(layers):
        return None
    weights = (decoder.embed_tokens.weight, decoder.norm.weight, head.weight)
    if len({weight.device for weight in weights}) > 1:
        return None
    tensors = chain.from_iterable(map(dict.values, map(_PARAMETERS, attributes)))
    identities = [*map(id, modules), *map(id, map(type, modules)), *map(id, tensors)]
    values: list[Any] = [of["variance_epsilon"] for of in attributes if "variance_epsilon" in of]
    values += [_attention_values(layer.self_attn) for layer in layers]
    rotary = decoder.rotary_emb
    values += [*_rotary_values(rotary), _numbers(rotary.inv_freq), repr(_config_values(fields_of(config)))]
    return identities, values


def _numbers(inv_freq: torch.Tensor) -> Any:
    """A value that changes whenever the frequencies change; it reads no numbers of a GPU, which would have to wait."""
    if inv_freq.is_cpu:
        return inv_freq.tolist()
    return id(inv_freq), 0 if inv_freq.is_inference() else inv_freq._version


def _fit_together(layers: Iterable[Any]) -> bool:
    """Whether all layers have heads of one shape and scale, and `layer_idx` is right."""
    shapes = set()
    for index, layer in enumerate(layers):
        own = vars(layer.__dict__["_modules"]["self_attn"])
        queries, keys, values = (outputs_of(own["_modules"][name]) for name in ("q_proj", "k_proj", "v_proj"))
        if own["layer_idx"] != index or queries != keys * own["num_key_value_groups"] or keys != values:
            return False
        shapes.add((own["head_dim"], queries, keys, own["scaling"]))
    return len(shapes) == 1


def outputs_of(module: Any) -> int:
    """How many numbers a linear map gives; packed weights have rows to fill their last tile."""
    own = vars(module)
    return own["out_features"] if "format_name" in own else own["_parameters"]["weight"].shape[0]


def modules_below(*roots: nn.Module) -> list[nn.Module]:
    """These modules and all below them, shared ones twice; takes a tenth of the time of `modules()`."""
    modules = [*roots]
    for module in modules:
        if children := module.__dict__["_modules"]:
            modules += [child for child in children.values() if child is not None]
    return modules


def _any_hooked(modules: list[nn.Module]) -> bool:
    attributes = list(map(vars, modules))
    may_be = any(any(map(hooks, attributes)) for hooks in _HOOKS) or not all(map(OWN.isdisjoint, attributes))
    return may_be and any(map(is_hooked, modules))


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks or replaced methods change what a call of this module does."""
    if not OWN.isdisjoint(module.__dict__) and any(module.__dict__.get(name) is not None for name in OWN):
        return True
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    harmless = (HARMLESS_HOOKS, FSDP_HOOKS) if isinstance(module, FSDPModule) else (HARMLESS_HOOKS,)
    return any(not (getattr(hook, "__module__", None) or "").startswith(harmless) for hook in hooks)


register(modeling_hf_decoder)
for kind in (nn.Linear, nn.Embedding, *SILU):
    _as_written[kind] = _methods(kind)


__all__ = [
    "DTYPES",
    "PLAIN",
    "SILU",
    "Structure",
    "attends_as_stock",
    "is_as_written",
    "is_hooked",
    "modules_below",
    "outputs_of",
    "register",
    "state_of",
    "structure_of",
]
