"""Chooses the fast path of each `generate()` or model call.

A decode step uses the model's `DecodingStep`, if it has one: with packed weights or with kernels of its own where that
is faster and asked for. These kernels also prefill short prompts. Other prompts and candidates use `prompt_logits`.
Everything else runs the modules. Greedy text skips transformers' loop on a CPU, where the loop takes a tenth of a
small model's token, and with such kernels on any device.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from hf_decoder.engine.assumptions import is_as_written, is_hooked
from hf_decoder.engine.calibration import taken
from hf_decoder.engine.decoding.cpp_step import CppStep
from hf_decoder.engine.decoding.growing_cache import GrowingCache
from hf_decoder.engine.decoding.static_step import Ends, StaticStep, first_seen, is_for_static_step
from hf_decoder.engine.decoding.step import DecodingStep
from hf_decoder.engine.operators import runs_as_written
from hf_decoder.engine.precision import autocast_dtype, fast_dtype
from hf_decoder.engine.threads import release_threads
from hf_decoder.model.modeling_hf_decoder import CACHE_NAME

PACKED_BYTES = 2**30  # larger weights are copied only on request
MAX_PACKED_TOKENS = 64  # of several tokens per row; with more, plain weights are as fast
STEPS_BEFORE_PACKING = 2  # packing takes about as long as three steps save
# methods that transformers' loop calls around a step and that others may replace, and arguments that we know
METHODS = {"prepare_inputs_for_generation", "_update_model_kwargs_for_generation"}
OPTIONS = {"use_cache", "logits_to_keep", "tokenizer"}  # the model has no use for the last, which is handed on to it
MODEL_KWARGS = {CACHE_NAME, "attention_mask", "position_ids", *OPTIONS}

_active: ContextVar["Decoding | None"] = ContextVar("hf_decoder_decoding", default=None)


class Decoding:
    """Chooses the fast path during one `generate()` call, or for one token per row of a model call alone."""

    def __init__(self, model: Any):
        self.model = model
        self.step = DecodingStep.of(model)
        self.compiles = False  # set if the generation config asks for a static cache, on a CPU
        self._static: StaticStep | None = None  # kernels of its own, set by `has_static_step`
        self._input_ids: torch.Tensor | None = None  # the prompt, while transformers' loop runs
        self._lasts = False  # so that buffers serve the next token
        self._room = GrowingCache([] if self.step is None else [layer.window for layer in self.step.layers])
        self._on_buffers: CppStep | None = None  # fills the buffers of `_room`
        self._steps = 0  # decode steps of several tokens
        self._packed: DecodingStep | None = None  # for this call only: weights may change before the next one

    @classmethod
    def of(cls, model: Any) -> "Decoding | None":
        """The running call of this model in this thread; None if its modules must be called."""
        if not runs_as_written():
            return None
        running = _active.get()
        return running if running is not None and running.model is model and running.step is not None else None

    @classmethod
    def of_call(
        cls,
        model: Any,
        input_ids: torch.Tensor | None,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        cache: Any,
        use_cache: bool,
        logits_to_keep: int,
    ) -> tuple[torch.Tensor, Any] | None:
        """The logits and the cache after a model call, in `generate()` or alone; None if modules must be called.

        Alone, only a step is worth the look at all modules, and only on a CPU.
        """
        if not (runs_as_written() and (cache is None or isinstance(cache, Cache))):
            return None
        # the modules raise the error for different lengths
        if input_ids is None or not _are_as_long(input_ids, attention_mask, position_ids):
            return None
        if cache is None and position_ids is not None and _hides_nothing(attention_mask) and _restart(position_ids):
            return None  # they mark documents
        decoding = _active.get()
        if decoding is None or decoding.model is not model:
            is_step = input_ids.shape[1] == 1 and cache is not None and input_ids.is_cpu
            if not is_step or torch.is_grad_enabled():
                return None
            decoding = cls(model)  # for this call only
        if cache is None and use_cache and decoding.step is not None:
            cache = DynamicCache(config=model.config)
        logits = decoding.logits(input_ids, attention_mask, position_ids, cache, logits_to_keep)
        return None if logits is None else (logits, cache)

    def logits(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Any,
        logits_to_keep: int = 0,
    ) -> torch.Tensor | None:
        """The logits of these ids by the fastest path that this call allows; None if modules must be called."""
        step = self.step
        if step is None or input_ids is None:
            return None
        if input_ids.shape[1] == 1:
            is_static = self._is_static(input_ids, cache)
        else:
            is_static = logits_to_keep == 1 and self._takes_prompt(input_ids, cache)
        if is_static:
            logits = self._static_logits(input_ids, attention_mask, position_ids, cache)
            if logits is not None:
                taken["decoding"] = "kernels"
                return logits
        elif input_ids.shape[1] == 1 or logits_to_keep == 1:
            logits = self._logits_on_buffers(input_ids, attention_mask, position_ids, cache)
            if logits is not None:
                taken["decoding"] = "C++"
                return logits
        if _is_fast_packed(input_ids, step.embedding.dtype) and self._may_pack(step, input_ids, cache):
            self._packed = self._packed or step.packed()
            step = self._packed
        inputs = input_ids, attention_mask, position_ids, cache
        logits = step.next_logits(*inputs, self._room)
        if logits is None:
            return step.prompt_logits(self.model.model, *inputs, logits_to_keep)
        taken["decoding"] = "torch"
        return logits

    def sample(
        self,
        sample: Callable,
        input_ids: torch.Tensor,
        logits_processor: Sequence[Any],
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs,
    ) -> Any:
        """Returns what transformers' loop `sample` returns; decodes greedily without that loop where it can."""
        self._input_ids = input_ids
        go_on = partial(
            sample,
            logits_processor=logits_processor,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
        cache: Any = model_kwargs.get(CACHE_NAME)
        mask = model_kwargs.get("attention_mask")
        config = generation_config
        # one row needs no pad token; transformers has already refused several rows without one
        pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
        ends, length = _ends(stopping_criteria, pad), stopping_criteria.max_length
        if (
            (config.do_sample or config.return_dict_in_generate or synced_gpus or streamer or logits_processor)
            or (config.is_assistant or config.compile_config or not _is_plain_loop(self.model, model_kwargs))
            or (ends is None or length is None or cache is None)
            # the ids must be the whole text, with nothing cached
            or (int(cache.get_seq_length()) > 0 if mask is None else mask.shape != input_ids.shape)
            or (mask is not None and first_seen(mask) is None)
            or self._changes_angles(input_ids.shape[1], length)
            or not (len(input_ids) == 1 or 0 <= pad < self.model.config.vocab_size)  # the modules raise the error
        ):
            return go_on(input_ids, stopping_criteria=stopping_criteria)
        by_kernels = self._may_be_static(config, cache, length)
        if not by_kernels and input_ids.device.type != "cpu":
            return go_on(input_ids, stopping_criteria=stopping_criteria)
        # transformers' loop runs the prefill and the first token
        first = StoppingCriteriaList([MaxLengthCriteria(input_ids.shape[1] + 1), *stopping_criteria])
        ids = go_on(input_ids, stopping_criteria=first)
        made = ids.shape[1]
        if made >= length or ends.take(ids, made - 1):
            return ids
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
        positions = model_kwargs.get("position_ids")
        if positions is not None:
            positions = positions[:, -1:] + 1
        text = ids.new_empty(len(ids), length)
        text[:, :made] = ids
        written = self._greedy(by_kernels, text, made, cache, mask, positions, ends)
        if written is not None:
            return text[:, :written].contiguous()
        # from the length of the mask transformers knows that the ids are the whole text, not only new ones
        go_on.keywords.update(attention_mask=torch.ones_like(ids) if mask is None else mask, position_ids=positions)
        return go_on(ids, stopping_criteria=stopping_criteria)

    def _greedy(self, by_kernels: bool, text: torch.Tensor, made: int, cache: Any, *rest: Any) -> int | None:
        """Does what `StaticStep.greedy` does, of any cache; None if transformers' loop must go on."""
        static = self._static
        if by_kernels and static is not None and self._is_static(text[:, made - 1 : made], cache):
            with static.lock:
                written = static.greedy(text, made, cache, *rest)
            if written is not None:
                taken["decoding"] = "kernels"
                return written
        return self._greedy_by_steps(text, made, cache, *rest) if self.step is not None and text.is_cpu else None

    def _greedy_by_steps(
        self,
        text: torch.Tensor,
        made: int,
        cache: Any,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        ends: Ends,
    ) -> int:
        """The same by any step, or by the modules for a token that no step takes."""
        rows, length = text.shape
        if mask is not None:
            mask = None if mask.all() else torch.cat((mask, mask.new_ones(rows, length - made)), 1)
        while made < length and len(ends.rows) < rows:
            seen = None if mask is None else mask[:, :made]
            written = self._greedy_on_buffers(text, made, cache, seen, positions, ends)
            if written is None:
                text[:, made] = self._likeliest(text[:, :made], cache, seen, positions)
                ends.take(text, made)
                written = made + 1
            positions = None if positions is None else positions + (written - made)
            made = written
        return made

    def _likeliest(
        self, ids: torch.Tensor, cache: Any, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """The token (B,) that follows ids (B, n), all but the last of which are cached."""
        logits = self.logits(ids[:, -1:], mask, positions, cache)
        if logits is None:
            mask = torch.ones_like(ids) if mask is None else mask
            inputs = {CACHE_NAME: cache, "attention_mask": mask, "position_ids": positions, "use_cache": True}
            inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=1, **inputs)
            logits = self.model(**inputs).logits
        return logits[:, -1].float().argmax(-1)

    def _greedy_on_buffers(self, text: torch.Tensor, made: int, cache: Any, *rest: Any) -> int | None:
        """What `StaticStep.greedy` does, on a growing cache by the C++ step, as far as its buffers have room."""
        kernels, step = self._step_on_buffers(text), self.step
        if kernels is None or step is None:
            return None
        with kernels.lock:
            buffers = self._room.buffers(cache, step.embedding.dtype)
            if buffers is None:
                return None
            written = kernels.greedy(text[:, : made + buffers.room()], made, buffers, *rest)
        if written is not None:
            taken["decoding"] = "C++"
            self._room.extend(cache, buffers, written - made)
        return written

    def _changes_angles(self, cached: int, length: int) -> bool:
        """Whether LongRoPE rotates a text of that length by other angles than the cached tokens."""
        rope = self.model.config.rope_parameters
        return rope["rope_type"] == "longrope" and cached <= rope["original_max_position_embeddings"] < length

    def _may_be_static(self, config: Any, cache: Any, length: int) -> bool:
        """Whether a step with kernels of its own may decode a text of that length."""
        if config.disable_compile or not self.has_static_step(cache):
            return False
        return min(layer.max_cache_len for layer in cache.layers) >= length - 1

    def has_static_step(self, cache: Any) -> bool:
        """Whether kernels of their own can run the steps of this call; if so, they do from now on."""
        if self.step is None or self._input_ids is None or not is_for_static_step(self.step, self._input_ids, cache):
            return False
        self._static = self.step.on_static_cache(len(self._input_ids))
        if self._static is None:
            return False
        self._static.end()
        return True

    def _is_static(self, input_ids: torch.Tensor, cache: Any) -> bool:
        return (
            self.step is not None
            and self._static is not None
            and is_for_static_step(self.step, input_ids, cache)
            and cache.layers[-1].is_initialized
            and len(input_ids) == len(cache.layers[-1].keys) == self._static.rows
            and cache.layers[-1].keys.dtype == self.step.embedding.dtype
        )

    def _takes_prompt(self, input_ids: torch.Tensor, cache: Any) -> bool:
        static = self._static
        return (
            self.step is not None
            and static is not None
            and input_ids.shape[1] > 1
            and static.takes_prompts(*input_ids.shape)
            and is_for_static_step(self.step, input_ids, cache)
            and (not cache.layers[-1].is_initialized or self._is_static(input_ids, cache))
        )

    def _takes_prompt_on_buffers(self, input_ids: torch.Tensor, cache: Any) -> bool:
        if input_ids.shape[1] == 1 or not self._room.is_before_prompt(cache):
            return False
        kernels = self._step_on_buffers(input_ids)
        return kernels is not None and kernels.takes_prompts(*input_ids.shape)

    def _static_logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Any,
    ) -> torch.Tensor | None:
        static: Any = self._static
        if (
            static is None
            or not _is_plain_mask(attention_mask)
            # the modules raise the error; on another device the check would wait
            or (input_ids.device.type == "cpu" and not _are_in(input_ids, static.vocab_size))
        ):
            return None
        with static.lock:
            if input_ids.shape[1] > 1:
                return static.prompt(input_ids, cache, attention_mask, position_ids)
            return static.logits(input_ids) if static.begin(cache, attention_mask, position_ids) else None

    def _logits_on_buffers(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Any,
    ) -> torch.Tensor | None:
        """Of a growing cache by the C++ step, once it is built: one token a row, or a short prompt."""
        kernels, step = self._step_on_buffers(input_ids), self.step
        if kernels is None or step is None or not _is_plain_mask(attention_mask):
            return None
        rows, tokens = input_ids.shape
        if not _are_in(input_ids, len(step.embedding)) or (tokens > 1 and not kernels.takes_prompts(rows, tokens)):
            return None
        with kernels.lock:
            dtype = step.embedding.dtype
            if tokens == 1:
                buffers = self._room.buffers(cache, dtype)
            else:
                buffers = self._room.for_prompt(cache, rows, step.groups, tokens, step.head_dim, dtype)
            if buffers is None:
                return None
            if attention_mask is not None and attention_mask.shape != (rows, buffers.length + tokens):
                return None
            if tokens > 1:
                logits = kernels.prompt(input_ids, buffers, attention_mask, position_ids)
            elif kernels.begin(buffers, attention_mask, position_ids):
                logits = kernels.logits(input_ids)
            else:
                logits = None
        if logits is None:
            self._lasts = False  # nor will the next token be taken, and the buffers would be filled for nothing
        else:
            self._room.extend(cache, buffers, tokens)
        return logits

    def _step_on_buffers(self, input_ids: torch.Tensor) -> CppStep | None:
        if self.step is None or not self._lasts or input_ids.dtype != torch.int64:
            return None
        if autocast_dtype(input_ids.device) is not None or torch.is_grad_enabled():
            return None
        if self._on_buffers is None or self._on_buffers.rows != len(input_ids):
            self._on_buffers = self.step.on_growing_cache(len(input_ids))
        return self._on_buffers

    def _may_pack(self, step: DecodingStep, input_ids: torch.Tensor, cache: Any) -> bool:
        """Whether to pack the weights: at once for a static cache, else after some steps if the copy is small."""
        if self.compiles and type(cache) is StaticCache:
            return input_ids.shape[1] == 1  # the steps after a prompt need no copy
        self._steps += 1
        return self._steps > STEPS_BEFORE_PACKING and step.nbytes() <= PACKED_BYTES

    def prepare_inputs(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs,
    ) -> dict | None:
        """The inputs of a step that bypasses the modules, without masks; None if transformers must prepare them."""
        step, cache = self.step, kwargs.pop(CACHE_NAME, None)
        if kwargs.keys() - OPTIONS or self._changes_angles(
            0 if cache is None else int(cache.get_seq_length()), input_ids.shape[1]
        ):
            return None
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        if is_first_iteration:
            goes_past = inputs_embeds is None and (
                self._takes_prompt(input_ids, cache) or self._takes_prompt_on_buffers(input_ids, cache)
            )
        else:
            goes_past = (
                step is not None
                and next_sequence_length == 1
                and input_ids.device == step.embedding.device
                and (step.covers(input_ids, cache) or self._is_static(input_ids, cache))
            )
        if not goes_past:
            return None
        if position_ids is not None:
            position_ids = position_ids[:, -input_ids.shape[1] :]
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask, **kwargs}
        return {**inputs, CACHE_NAME: cache}

    def __enter__(self) -> "Decoding":
        self._token = _active.set(self)
        self._lasts = True
        return self

    def __exit__(self, *exception) -> None:
        _active.reset(self._token)
        self._lasts = False
        self._room.end()
        for kernels in (self._static, self._on_buffers):
            if kernels is not None:
                kernels.end()
        if _active.get() is None:
            release_threads()  # another thread may generate next


def _is_fast_packed(input_ids: torch.Tensor, dtype: torch.dtype) -> bool:
    tokens = input_ids.numel()
    return (
        tokens > 1
        and (input_ids.shape[1] == 1 or tokens <= MAX_PACKED_TOKENS)
        and dtype == torch.bfloat16
        and autocast_dtype(input_ids.device) is None
        and fast_dtype(input_ids.device, dtype) == dtype
        and torch._C._get_mkldnn_enabled()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def _is_plain_loop(model: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether every step of transformers' loop would call only our code and nothing that others have replaced."""
    return (
        is_as_written(type(model))
        and not is_hooked(model)
        and not METHODS & vars(model).keys()
        and model_kwargs.keys() <= MODEL_KWARGS
    )


def _is_plain_mask(attention_mask: Any) -> bool:
    """Whether this is no mask, or one (B, K), and not the masks that transformers prepares per layer type."""
    return attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2)


def _are_as_long(input_ids: torch.Tensor, attention_mask: Any, position_ids: torch.Tensor | None) -> bool:
    """Whether there are as many positions as ids, and a plain mask is no shorter."""
    length = input_ids.shape[1]
    if attention_mask is not None and _is_plain_mask(attention_mask) and attention_mask.shape[1] < length:
        return False
    return position_ids is None or position_ids.shape[-1] == length


def _restart(position_ids: torch.Tensor) -> bool:
    """Whether positions may not go up by one everywhere; off the CPU always, because a check would wait."""
    return not position_ids.is_cpu or bool((position_ids.diff(dim=-1) != 1).any())


def _hides_nothing(attention_mask: Any) -> bool:
    return attention_mask is None or (_is_plain_mask(attention_mask) and bool(attention_mask.all()))


def _are_in(input_ids: torch.Tensor, vocab_size: int) -> bool:
    return all(0 <= token < vocab_size for row in input_ids.tolist() for token in row)


def _ends(criteria: Sequence[Any], pad: int) -> Ends | None:
    """What ends a text; None if anything but tokens and a length may end it."""
    for criterion in criteria:
        if type(criterion) not in (MaxLengthCriteria, EosTokenCriteria):
            return None
        # transformers warns beyond it
        limit = getattr(criterion, "max_position_embeddings", None)
        if limit is not None and criterion.max_length > limit + 1:
            return None
    of_tokens = [criterion.eos_token_id for criterion in criteria if type(criterion) is EosTokenCriteria]
    return Ends(frozenset(int(token) for tokens in of_tokens for token in tokens.flatten().tolist()), pad)


__all__ = ["Decoding"]
