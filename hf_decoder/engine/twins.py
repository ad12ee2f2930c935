"""The fast classes. Each one extends a plain class of the model and replaces the few methods that decide what runs.

This module alone says what the engine replaces. A twin has the name and module of its plain class and no state of its
own, so that transformers saves, copies code and records outputs as for the plain class. `attach` gives the modules of
a live model their twins; `detach` takes them away.
"""

import copyreg
import sys
from contextlib import nullcontext
from functools import cache, partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from hf_decoder.engine.assumptions import register
from hf_decoder.engine.attention.choice import measure_for_graphs
from hf_decoder.engine.bitsandbytes import settle_layers, settle_tied_head, unpack_layers
from hf_decoder.engine.decoding.generation import OPTIONS, Decoding
from hf_decoder.engine.decoding.products import logits_of_row
from hf_decoder.engine.decoding.row_batches import generate_batch
from hf_decoder.engine.loading import check_loaded_sizes
from hf_decoder.engine.operators import runs_as_written
from hf_decoder.engine.route import Route
from hf_decoder.engine.stock import FAMILIES, check_stock, fields_of, is_stock
from hf_decoder.engine.switches import settings
from hf_decoder.engine.threads import release_threads
from hf_decoder.engine.training.fast_products import fast_products
from hf_decoder.engine.training.loss import linear_causal_lm_loss
from hf_decoder.model import modeling_hf_decoder as plain
from hf_decoder.model.loss_hf_decoder import softcap
from hf_decoder.model.modeling_hf_decoder import CACHE_NAME

# Reads a GGUF file; registration gives it, since this room knows none above itself.
read_gguf: Any = None
# Arguments that a decode step or prefill without the modules supports; a call with any other runs the plain class.
TAKEN = {"return_dict", "cache", "past_key_values", *OPTIONS}
LOSS_KWARGS = ("num_items_in_batch", "ignore_index", "shift_labels")  # that transformers' loss reads


class _TwinClass(type):
    """The type of twins, which are pickled by their plain class."""


def _reduce_class(kind: type) -> Any:
    """Pickles a twin by its plain class, and a user's class over a twin by its name, as usual."""
    return (twin_of, (plain_of(kind),)) if is_twin(kind) else kind.__qualname__


copyreg.pickle(_TwinClass, _reduce_class)  # type: ignore[arg-type]


class _Layer:
    """A decoder layer that computes with the operators of the call's route, if there is one."""

    def forward(self, hidden_states, *args, route: Route | None = None, **kwargs):
        if route is None:
            with fast_products(hidden_states, getattr(self.mlp, "down_proj", None)):
                return super().forward(hidden_states, *args, **kwargs)
        return route.run_layer(self, super().forward, hidden_states, *args, **kwargs)


class _PreTrained:
    """The base of all twins of models: twins inside, checked sizes, quantized layers that train and save."""

    def __init__(self, config):
        super().__init__(config)
        _give_twins(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, gguf_file=None, **kwargs):
        """As in transformers; the weights of a GGUF file stay packed on a CPU."""
        load = super().from_pretrained
        try:
            if gguf_file is None:
                return load(pretrained_model_name_or_path, *args, **kwargs)
            from hf_decoder.engine.quantized.loading import HELD, load_gguf  # with transformers' quantizers

            if cls.__name__ != HELD or args:
                said = f"{cls.__name__} reads no GGUF file; {HELD}.from_pretrained(folder, gguf_file=...) does"
                raise ValueError(said)
            return load_gguf(load, read_gguf, pretrained_model_name_or_path, gguf_file, **kwargs)
        finally:
            release_threads()  # another thread may generate

    @classmethod
    def is_remote_code(cls) -> bool:
        # FSDP2 puts a class of torch over a sharded model, and transformers would save torch's files as its code
        return super().is_remote_code() and not cls.__module__.startswith("torch.")

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """Loads the weights, and refuses them if their sizes do not fit the config."""
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        if state_dict is None:
            where = load_config.pretrained_model_name_or_path
            check_loaded_sizes(model, loaded[0], f"{where}", load_config.ignore_mismatched_sizes)
        return loaded

    def train(self, mode: bool = True):
        """As in torch; also prepares the layers of bitsandbytes for the mode. `from_pretrained` calls it last.

        A model in training mode may be compiled next, and nothing can be measured within a graph.
        """
        if mode and settings.attention and self.device.type == "cpu":
            measure_for_graphs(self.config, self.dtype)
        settle_tied_head(self)
        settle_layers(self, training=mode)
        return super().train(mode)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers; also removes code files of older versions from the folder."""
        unpack_layers(self)
        if any(hasattr(module, "format_name") for module in self.modules()):
            raise ValueError(
                "these weights stay packed as they are in their GGUF file, and are saved in no other form; "
                "`hf-decoder convert FILE.gguf FOLDER` unpacks them"
            )
        if not self.is_remote_code():
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            custom_object_save(plain.HfDecoderPreTrainedModel, save_directory)
        if kwargs.get("state_dict") is not None:  # tied weights that were gathered from shards are copies
            tied, state = self.all_tied_weights_keys, kwargs["state_dict"]
            kwargs["state_dict"] = {name: value for name, value in state.items() if tied.get(name) not in state}
        super().save_pretrained(save_directory, *args, **kwargs)
        remove_former_code(Path(save_directory))


class _Routed:
    """A decoder that gives a route in place of masks."""

    def layer_masks(self, inputs_embeds, attention_mask, position_ids, cache, structure=None):
        route = Route.of(self, inputs_embeds, attention_mask, position_ids, cache, structure)
        if route is None:
            return super().layer_masks(inputs_embeds, attention_mask, position_ids, cache)
        if route.masks is None or not {*fields_of(self.config).layer_types} <= route.masks.keys():
            masks = super().layer_masks(inputs_embeds, attention_mask, position_ids, cache)
            route.masks = {**masks, **(route.masks or {})}  # its own attention is for some types of layer
        return route


class _Model(_Routed, _PreTrained):
    """The decoder, which chooses a route for each call."""

    def run_layers(self, hidden_states, masks, **kwargs):
        if not isinstance(masks, Route):
            return super().run_layers(hidden_states, masks, **kwargs)
        kinds = self.config.layer_types
        for layer_idx, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden_states = layer(hidden_states, attention_mask=masks[kinds[layer_idx]], route=masks, **kwargs)
        return masks.norm(self.norm, hidden_states)


class _Generating:
    """A language model that runs prefill and decode steps without the modules where a call allows it."""

    @wraps(plain.HfDecoderForCausalLM.forward)
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, *args, **kwargs):
        if settings.decoding and not args and input_ids is not None and kwargs.keys() <= TAKEN:
            outputs = self._past_the_modules(input_ids, attention_mask, position_ids, **kwargs)
            if outputs is not None:
                return outputs
        return super().forward(input_ids, attention_mask, position_ids, *args, **kwargs)

    def _past_the_modules(self, input_ids, attention_mask, position_ids, logits_to_keep=0, **kwargs):
        """The outputs of a call, computed without the modules; None if they must run."""
        given = {name: value for name, value in kwargs.items() if value is not None}
        if given.get("return_dict") is False or type(logits_to_keep) is not int:  # indices may repeat a place
            return None
        cache = given.get("cache", given.get("past_key_values"))
        inputs = input_ids, attention_mask, position_ids, cache, given.get("use_cache", self.config.use_cache)
        found = Decoding.of_call(self, *inputs, logits_to_keep)
        if found is None:
            return None
        logits, cache = found
        return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: cache})

    @wraps(plain.HfDecoderForCausalLM.generate)
    def generate(self, *args, **kwargs):
        with Decoding(self) if settings.decoding else nullcontext():
            return super().generate(*args, **kwargs)

    @wraps(plain.HfDecoderForCausalLM.generate_batch)
    def generate_batch(self, inputs, *args, **kwargs):
        outputs = generate_batch(self, inputs, *args, **kwargs) if settings.decoding else None
        return super().generate_batch(inputs, *args, **kwargs) if outputs is None else outputs

    @wraps(plain.HfDecoderForCausalLM.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        inputs = None
        if not args and (decoding := Decoding.of(self)) is not None:
            inputs = decoding.prepare_inputs(input_ids, **kwargs)
        if inputs is None:
            inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        # PEFT replaces this method by its own, which, up to 0.21, knows only the cache's older name
        if "prepare_inputs_for_generation" in self.__dict__ and CACHE_NAME in inputs:
            inputs["past_key_values"] = inputs.pop(CACHE_NAME)
        return inputs

    @wraps(plain.HfDecoderForCausalLM._sample)
    def _sample(self, *args, **kwargs):
        if (decoding := Decoding.of(self)) is not None:
            return decoding.sample(super()._sample, *args, **kwargs)
        return super()._sample(*args, **kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        whole_model = super()._valid_auto_compile_criteria(model_kwargs, generation_config)
        if (decoding := Decoding.of(self)) is not None:
            if whole_model:
                if not generation_config.compile_config and decoding.has_static_step(model_kwargs.get(CACHE_NAME)):
                    return False
                decoding.step = None  # transformers compiles the modules and prepares their masks
            elif self.device.type == "cpu" and not generation_config.disable_compile:  # our step compiles itself
                decoding.compiles = True
                decoding.has_static_step(model_kwargs.get(CACHE_NAME))
        return whole_model


class _ForCausalLM(_Generating, _PreTrained):
    """The language model, which in training forms the loss without holding the logits."""

    def linear_loss(self, hidden_states, labels, **kwargs):
        if not settings.training:
            return super().linear_loss(hidden_states, labels, **kwargs)
        cap = self.config.final_logit_softcapping
        kwargs = {"z_loss_coef": self.z_loss_coef, "final_logit_softcapping": cap, **kwargs}
        return linear_causal_lm_loss(hidden_states, self.lm_head, labels, **kwargs)

    def compute_logits(self, hidden_states):
        row = logits_of_row(self.lm_head, hidden_states)
        if row is not None:
            return softcap(row, self.config.final_logit_softcapping)
        with fast_products(hidden_states, self.lm_head):
            return super().compute_logits(hidden_states)


class _StockAttention:
    """An attention of transformers that takes our masks, and has what the fast paths ask of ours."""

    use_rope, use_qk_norm, sliding_window = True, False, None
    attend = plain.HfDecoderAttention.attend

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        forward = super().forward
        if isinstance(attention_mask, plain.LayerMask):
            forward = partial(plain.HfDecoderAttention.forward, self)
        return forward(hidden_states, position_embeddings, attention_mask, **kwargs)


class _Qwen3Attention(_StockAttention):
    use_qk_norm = True


class _MistralAttention(_StockAttention):
    sliding_window = property(lambda self: self.config.sliding_window)


class _StockLayer(_Layer):
    """A layer that takes its mask from the route."""

    def forward(self, hidden_states, *args, route: Route | None = None, **kwargs):
        if route is not None and route.masks is not None:
            (kwargs["attention_mask"],) = route.masks.values()
        return super().forward(hidden_states, *args, route=route, **kwargs)


class _StockMasks:
    """Gives a decoder of transformers the masks that ours makes, which are those of its own `forward`."""

    def layer_masks(self, *inputs):
        return plain.HfDecoderModel.layer_masks(SimpleNamespace(config=fields_of(self.config)), *inputs)


class _StockModel(_Routed, _StockMasks):
    """A decoder of transformers, which hands the route of a call to its layers."""

    @plain.takes_either_cache_name
    @wraps(plain.HfDecoderModel.forward)
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        route = None
        if (input_ids is None) != (inputs_embeds is None) and runs_as_written() and kwargs.get("is_causal", True):
            if inputs_embeds is None:
                input_ids, inputs_embeds = None, self.embed_tokens(input_ids)
            caches = self.config.use_cache if use_cache is None else use_cache
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                caches = False
            # only with neither a mask nor a cache does transformers look for documents
            documents = position_ids if attention_mask is None and not caches else None
            route = Route.of(self, inputs_embeds, attention_mask, documents, cache)
        if route is not None:
            kinds, masks = {*fields_of(self.config).layer_types}, route.masks or {}
            if not kinds <= masks.keys():  # transformers makes those of all layers
                route.masks = None
            elif len(kinds) > 1:  # transformers gives each layer the one of its type
                attention_mask, route.masks = dict(masks), None
            else:  # four dimensions keep transformers from making one, and the layers take the route's
                attention_mask = inputs_embeds.new_empty(1, 1, 1, 1)
            kwargs["route"] = route
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, CACHE_NAME: cache}
        return super().forward(input_ids, inputs_embeds=inputs_embeds, use_cache=use_cache, **inputs, **kwargs)


class _StockForCausalLM(_Generating):
    """A language model of transformers, which in training forms the loss without holding the logits, as ours does."""

    @wraps(plain.HfDecoderForCausalLM.forward)
    def forward(self, *args, skip_logits: bool | None = None, **kwargs):
        if self._skips_logits(skip_logits, **kwargs):
            return plain.HfDecoderForCausalLM.forward(self, *args, skip_logits=True, **kwargs)
        return super().forward(*args, **kwargs)

    def _skips_logits(
        self, wanted, labels=None, shift_labels=None, logits_to_keep=0, return_dict=None, ignore_index=-100, **kwargs
    ) -> bool:
        wanted = self.training if wanted is None else wanted
        if not (wanted and settings.training and labels is not None) or self.loss_function is not ForCausalLMLoss:
            return False
        if type(logits_to_keep) is not int or logits_to_keep or return_dict is False or not self.config.return_dict:
            return False
        entries = getattr(self.lm_head, "out_features", None)
        if self.config.vocab_size != entries:  # transformers' loss raises the error
            return False
        targets = labels[..., 1:] if shift_labels is None else shift_labels
        return not runs_as_written() or bool((targets != ignore_index).any())  # else transformers' loss is 0 / 0

    def linear_loss(self, hidden_states, labels, **kwargs):
        known = {name: kwargs[name] for name in LOSS_KWARGS if name in kwargs}
        return linear_causal_lm_loss(hidden_states, self.lm_head, labels, **known)


REPLACED = {
    "HfDecoderLayer": _Layer,
    "HfDecoderModel": _Model,
    "HfDecoderForCausalLM": _ForCausalLM,
    "HfDecoderForSequenceClassification": _PreTrained,
    "HfDecoderForTokenClassification": _PreTrained,
    "HfDecoderForQuestionAnswering": _PreTrained,
}
_STOCK_PARTS = {
    "Attention": _StockAttention,
    "DecoderLayer": _StockLayer,
    "Model": _StockModel,
    "ForCausalLM": _StockForCausalLM,
}
STOCK: dict[str, type] = {
    f"{family}{part}": kind for family, _ in FAMILIES.values() for part, kind in _STOCK_PARTS.items()
} | {"Qwen3Attention": _Qwen3Attention, "MistralAttention": _MistralAttention}


@cache
def twin_of(plain_class: type) -> type:
    """The fast class of a plain one: of this package, of a checkpoint's copy, or of transformers."""
    names = {"__module__": plain_class.__module__, "__qualname__": plain_class.__qualname__}
    bases = [(REPLACED | STOCK)[plain_class.__name__], plain_class]
    if GenerationMixin in plain_class.__bases__:  # where transformers looks for it
        bases.append(GenerationMixin)
    twin = _TwinClass(plain_class.__name__, tuple(bases), names)
    register(sys.modules[plain_class.__module__], twin, without=STOCK)
    return twin


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Gives the modules of a live model their fast classes in place, and returns the model. `detach` is the inverse.

    model: of this package, or transformers' LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or
        Qwen3ForCausalLM. In training mode one of these, too, returns no logits with its loss, unless called with
        `skip_logits=False`.

    Raises:
        ValueError: for a model of another class or another version of its code, for one that is sharded or has an
            adapter, and for a stock one that the fast paths do not hold, by the field of its config.
    """
    name = type(model).__name__
    inside = list(model.modules())
    if any(isinstance(module, FSDPModule) for module in inside) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    ):
        raise ValueError(f"this {name} is sharded; call attach(model) before it is sharded")
    if any(type(module).__module__.partition(".")[0] == "peft" for module in inside):
        raise ValueError(f"this {name} has an adapter; call attach(model) on the base model, before get_peft_model")
    if is_stock(plain_of(type(model)) if is_twin(type(model)) else type(model)):
        check_stock(model)
    elif name not in REPLACED or not isinstance(model, PreTrainedModel):
        names = ", ".join(f"{family}ForCausalLM" for family, _ in FAMILIES.values())
        raise ValueError(
            f"{name} is no model of this package, and none of transformers' {names}; load one of these, or convert a "
            "checkpoint to ours"
        )
    elif not is_plain_code(sys.modules[type(model).__module__]):
        raise ValueError(
            f"this {name} came with another version of this package's code; import hf_decoder and load the checkpoint "
            "again, which takes the installed classes"
        )
    _give_twins(model)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Gives the modules of a model their plain classes back in place, and returns the model."""
    for module in model.modules():
        if is_twin(type(module)):
            module.__class__ = plain_of(type(module))
    return model


def is_twin(kind: type) -> bool:
    """Whether this is a fast class itself, not a subclass of one."""
    return kind.__bases__[0] in _MIXINS


def plain_of(twin: type) -> type:
    """The plain class of a fast one."""
    return twin.__bases__[1]


def is_plain_code(module: Any) -> bool:
    """Whether the files of a module of model code equal this package's."""
    theirs = Path(module.__file__).parent
    return all(
        (theirs / file.name).is_file() and (theirs / file.name).read_text("utf-8") == file.read_text("utf-8")
        for file in code_files()
    )


def code_files() -> list[Path]:
    """The files that travel with a checkpoint."""
    return sorted(Path(plain.__file__).parent.glob("*_hf_decoder.py"))


def remove_former_code(folder: Path) -> None:
    """Removes code files beside a checkpoint that older versions of this package left there."""
    names = {file.name for file in code_files()}
    for file in folder.glob("*_hf_decoder.py"):
        if file.name not in names:
            file.unlink()


def _give_twins(model: nn.Module) -> None:
    for module in model.modules():
        kind = type(module)
        if kind.__name__ in REPLACED | STOCK and kind.__module__ == type(model).__module__ and not is_twin(kind):
            module.__class__ = twin_of(kind)


_MIXINS = {*REPLACED.values(), *STOCK.values()}
for name in REPLACED:  # now, before anybody can replace methods of the plain classes
    twin_of(getattr(plain, name))


__all__ = ["REPLACED", "attach", "code_files", "detach", "is_twin", "plain_of", "remove_former_code", "twin_of"]
