"""Whether a model's modules do no more than their classes say, so that their functions may be called without them."""

from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import nn

PLAIN_KINDS = (nn.Linear, nn.Embedding)
OWN = {"forward", "_compiled_call_impl"}  # what stands among a module's own attributes if someone has put it there
_HOOKS = itemgetter("_forward_hooks"), itemgetter("_forward_pre_hooks")
_PARAMETERS = itemgetter("_parameters")


def parts_of(model: Any) -> tuple[list[int], list[Any]] | None:
    """What an `HfDecoderForCausalLM` is made of, tensors and modules by identity, and the settings of its layers.

    None where the decoder's modules may not be passed by, which they may if they are plain ones, without hooks, on one
    device, in evaluation mode.
    """
    # Asked at each call of `generate()`, of every module: in a few calls that go through all of them, with as little
    # of Python for each as can be, it takes 0.08 ms of 40M parameters, module by module 0.29.
    config, decoder, head = model.config, model.model, model.lm_head
    if model.training or torch.nn.modules.module._has_any_global_hook() or config._attn_implementation != "sdpa":
        return None
    if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
        return None
    modules = modules_below(decoder, head)
    if not _are_plain(modules):
        return None
    attributes = list(map(vars, modules))
    may_be_hooked = any(any(map(hooks, attributes)) for hooks in _HOOKS)
    if (may_be_hooked or not all(map(OWN.isdisjoint, attributes))) and any(map(is_hooked, modules)):
        return None
    weights = (decoder.embed_tokens.weight, decoder.norm.weight, head.weight)
    if len({weight.device for weight in weights}) > 1:
        return None
    tensors = chain.from_iterable(map(dict.values, map(_PARAMETERS, attributes)))
    identities = [*map(id, modules), *map(id, tensors)]
    attentions = [of for of in attributes if "use_rope" in of]
    settings: list[Any] = [(of["use_qk_norm"], of["use_rope"], of["sliding_window"]) for of in attentions]
    sizes = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    return identities, [*settings, *sizes, config.final_logit_softcapping]


def modules_below(*roots: nn.Module) -> list[nn.Module]:
    """These and all below them, one that two share twice: a tenth of the time that `modules()` takes."""
    modules = [*roots]
    for module in modules:
        if children := module.__dict__["_modules"]:
            modules += [child for child in children.values() if child is not None]
    return modules


def _are_plain(modules: list[nn.Module]) -> bool:
    """Whether all are of torch's classes that a decoder has, or of this package's, or an activation of an MLP.

    And compute what these classes were written to: nobody has put a function of their own in place of a `forward`.
    """
    package = __name__.rpartition(".")[0]
    kinds: set[Any] = set(map(type, modules)) - {nn.ModuleList}  # which is never called
    others = {kind for kind in kinds if kind not in PLAIN_KINDS and kind.__module__.rpartition(".")[0] != package}
    if any(kind.forward.__module__ != kind.__module__ for kind in kinds - others):
        return False
    activations = {id(module.__dict__["_modules"].get("act_fn")) for module in modules} if others else set()
    return all(type(module) not in others or id(module) in activations for module in modules)


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of this module does more, or something else, than its class says."""
    if not OWN.isdisjoint(module.__dict__):
        return True
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    # transformers leaves its recorders of hidden states on the modules; a step that records goes through these
    foreign = [hook for hook in hooks if getattr(hook, "__module__", "") != "transformers.utils.output_capturing"]
    return bool(foreign)


__all__ = ["is_hooked", "modules_below", "parts_of"]
