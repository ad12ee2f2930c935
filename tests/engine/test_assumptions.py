"""Nothing that the plain modules read is passed over: each attribute is changed on a live model, in turn.

The attributes are found in the source of the plain modules, ours and a stock family's, so that a new one is looked at
as soon as it is read. The plain classes with the same change are the oracle: the fast ways honour it or step aside.
"""

import ast
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from same_results import WAYS, check_same
from tiny_models import OUR_WAYS, SHAPE, randomise, tiny_model
from torch import nn
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3 import modeling_qwen3

from hf_decoder.engine import attach, detach
from hf_decoder.engine import settings as engine_settings
from hf_decoder.model import modeling_hf_decoder

MODELS = {
    "plain": {},
    "rich": {
        "qk_norm": True,
        "attention_bias": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"],
        "no_rope_layers": [1, 0],
        "final_logit_softcapping": 3.0,
        "z_loss_coef": 1e-3,
        "num_hidden_layers": 2,
    },
    "stock": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
}
# Functions that a forward pass runs, besides the `forward`s; `module` is an attention in those outside of classes.
RUN = {
    "forward",
    "attend",
    "layer_masks",
    "run_layers",
    "compute_logits",
    "linear_loss",
    "loss_function",
    "z_loss_coef",
}
OF_ATTENTION = {"eager_attention_forward"}
# What a forward pass reads of no module of ours, or what no value can be changed of: methods, torch's own.
METHODS = {*RUN, "_loss_function", "training"}
# Values for attributes that cannot take an arbitrary number.
OTHERS: dict[str, Any] = {
    "_attn_implementation": "eager",
    "is_causal": False,
    "layer_types": ["sliding_attention", "sliding_attention"],
    "sliding_window": 3,
    "final_logit_softcapping": 0.5,
    "rope_type": "dynamic",
    "num_hidden_layers": 1,
    "use_cache": False,
}
CONFIG_IN_WRAPPERS = {"is_causal", "use_cache", "output_hidden_states", "return_dict"}  # transformers' decorators


def reads(function: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    """The (owner, attribute) pairs that a function reads from its module and from the config."""
    for node in ast.walk(function):
        if not isinstance(node, ast.Attribute):
            continue
        owner = ast.unparse(node.value)
        if owner in ("config", "self.config", "module.config"):
            yield "config", node.attr
        elif owner in ("self", "module"):
            yield "module", node.attr


def attributes(variant: str = "plain") -> list[tuple[str, str]]:
    """The (class or "config", attribute) pairs in the source of the plain modules."""
    found = {("config", name) for name in CONFIG_IN_WRAPPERS}
    room, family = (modeling_qwen3, "Qwen3") if variant == "stock" else (modeling_hf_decoder, "HfDecoder")
    attention = f"{family}Attention"
    for node in ast.parse(inspect.getsource(room)).body:
        if isinstance(node, ast.ClassDef):
            kind = getattr(room, node.name)
            functions = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name in RUN]
            if not issubclass(kind, nn.Module) or (node.name.startswith(f"{family}For") and "Causal" not in node.name):
                continue
        elif isinstance(node, ast.FunctionDef) and node.name in OF_ATTENTION:
            functions, kind = [node], getattr(room, attention)
        else:
            continue
        for function in functions:
            for owner, name in reads(function):
                if name not in METHODS and not (owner == "module" and name == "config"):
                    found.add(("config" if owner == "config" else kind.__name__, name))
    # what stock functions read of an attention that is handed to them
    found |= {(attention, name) for name in ("is_causal", "num_key_value_groups")}
    return sorted(found)


class Louder(nn.Module):
    """A user's wrapper of a module."""

    def __init__(self, inside: nn.Module):
        super().__init__()
        self.inside = inside

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inside"), name)

    def forward(self, *args, **kwargs):
        return louder(self.inside(*args, **kwargs))


def louder(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(louder(part) for part in output)
    return output * 1.1 if isinstance(output, torch.Tensor) else output


def as_subclass(module: nn.Module) -> None:
    kind = type(module)

    def forward(self, *args, **kwargs):
        return louder(kind.forward(self, *args, **kwargs))

    module.__class__ = type(f"Own{kind.__name__}", (kind,), {"forward": forward})


def as_wrapped(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: louder(forward(*args, **kwargs))


MODULE_CHANGES: dict[str, Callable[[nn.Module, str], None]] = {
    "replaced": lambda parent, name: setattr(parent, name, Louder(getattr(parent, name))),
    "subclass": lambda parent, name: as_subclass(getattr(parent, name)),
    "wrapped": lambda parent, name: as_wrapped(getattr(parent, name)),
    "hook": lambda parent, name: getattr(parent, name).register_forward_hook(lambda m, i, output: louder(output)),
    "pre-hook": lambda parent, name: getattr(parent, name).register_forward_pre_hook(lambda m, args: louder(args)),
}


def changed_value(name: str, value: Any) -> Any:
    if name in OTHERS:
        return OTHERS[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 3 + 0.01
    if isinstance(value, dict):
        return {key: changed_value(key, inner) for key, inner in value.items()}
    return value


def changes(owner: Any, name: str) -> dict[str, Callable[[Any], None]]:
    """Name -> function that changes this attribute of its owner."""
    value = getattr(owner, name, None)
    if isinstance(value, nn.ModuleList):
        return {"reversed": lambda owner: setattr(owner, name, nn.ModuleList(reversed(getattr(owner, name))))}
    if isinstance(value, nn.Module):
        return {way: lambda owner, change=change: change(owner, name) for way, change in MODULE_CHANGES.items()}
    if isinstance(value, nn.Parameter):
        return {
            "in place": lambda owner: getattr(owner, name).data.mul_(1.3),
            "other data": lambda owner: setattr(getattr(owner, name), "data", getattr(owner, name).data * 1.3),
            "other": lambda owner: setattr(owner, name, nn.Parameter(getattr(owner, name).data * 1.3)),
        }
    if isinstance(value, torch.Tensor):
        return {
            "in place": lambda owner: getattr(owner, name).mul_(1.3),
            "other": lambda owner: setattr(owner, name, getattr(owner, name) * 1.3),
        }
    return {"value": lambda owner: setattr(owner, name, changed_value(name, getattr(owner, name, None)))}


def owners(model: Any, kind: str) -> list[Any]:
    if kind == "config":
        return [model.config]
    return [module for module in model.modules() if type(module).__name__ == kind]


def fast_model(variant: str) -> Any:
    if variant != "stock":
        return tiny_model(attn_implementation="sdpa", **MODELS[variant])
    return attach(randomise(Qwen3ForCausalLM(Qwen3Config(**SHAPE, **MODELS[variant]))).eval())


def cases() -> list[Any]:
    found = []
    for variant in MODELS:
        model = fast_model(variant)
        for kind, name in attributes(variant):
            all_owners = owners(model, kind)
            for way in changes(all_owners[-1], name):
                found.append(pytest.param(variant, kind, name, way, id=f"{variant}-{kind}.{name}-{way}"))
    return found


@pytest.fixture
def short_is_long():
    """Fused operators and tiles for the few tokens of these tests."""
    with engine_settings.override(ways=OUR_WAYS):
        yield


def pair(variant: str) -> tuple[Any, Any]:
    """The same model by its fast and by its plain classes; the fast one has generated before."""
    fast = fast_model(variant)
    plain = detach(copy.deepcopy(fast))
    for way in WAYS.values():
        way(fast)
    return fast, plain


def test_the_list_is_not_empty():
    assert len(attributes()) > 40
    assert {("HfDecoderRMSNorm", "variance_epsilon"), ("HfDecoderAttention", "scaling"), ("config", "is_causal")} <= {
        *attributes()
    }


@pytest.mark.parametrize("variant", MODELS)
def test_nothing_changed(variant, short_is_long):
    check_same(*pair(variant))


@pytest.mark.kernels
@pytest.mark.parametrize("variant, kind, name, way", cases())
def test_a_changed_attribute_is_honoured(variant, kind, name, way, short_is_long):
    fast, plain = pair(variant)
    for model in (fast, plain):
        owner = owners(model, kind)[-1]
        changes(owner, name)[way](owner)
    check_same(fast, plain)


@pytest.mark.parametrize("change", ["forward", "sdpa", "global hook", "class"])
def test_what_is_changed_for_all_models_is_honoured(change, short_is_long, monkeypatch):
    fast, plain = pair("plain")
    if change == "forward":
        for model in (fast, plain):
            as_wrapped(model.model.layers[0])
    elif change == "sdpa":
        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def quieter(*args, **kwargs):
            output, weights = stock(*args, **kwargs)
            return output * 0.5, weights

        monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", quieter)
    elif change == "global hook":
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: louder(output) if isinstance(module, nn.Linear) else None
        )
        try:
            check_same(fast, plain)
        finally:
            handle.remove()
        return
    else:
        kind = modeling_hf_decoder.HfDecoderMLP
        forward = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) * 1.1)
    check_same(fast, plain)


def test_a_wrapped_forward_that_names_no_argument(short_is_long):
    """Then transformers makes no positions for padded rows; both models count them alike."""
    fast, plain = pair("plain")
    for model in (fast, plain):
        forward = model.forward
        model.forward = lambda *args, forward=forward, **kwargs: forward(*args, **kwargs)
    check_same(fast, plain)


def test_an_attached_model_honours_changes_as_a_built_one_does(short_is_long):
    _, plain = pair("rich")
    again = attach(copy.deepcopy(plain))
    check_same(again, plain)
    for model in (again, plain):
        model.model.layers[1].input_layernorm.variance_epsilon = 0.5
    check_same(again, plain)
