"""Tests what the "transformers backends" of vLLM and SGLang require of a model.

Both load the base model through `auto_map`, replace its attention, and keep keys and values outside of it. Their
conditions are in vLLM's page on custom models and in the two loaders (vllm/model_executor/models/transformers,
sglang/srt/models/transformers.py). Here a small engine with such an attention runs the model, and its hidden states
are compared with the model's.
"""

from __future__ import annotations

import inspect
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_decoder.safety.limits import bounded
from hf_decoder.safety.quiet import quiet
from hf_decoder.safety.terminal import first_line

ENGINE = "hf_decoder_engine"
# The shape in which a class is tried, in the field names of transformers.
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# How each matrix of a decoder layer is split over devices: by outputs or by inputs. Outputs of stacked matrices are
# gathered before they are cut apart.
SPLITS = {
    "colwise": ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
    "rowwise": ("o_proj", "down_proj"),
    "colwise_gather_output": ("qkv_proj", "gate_up_proj"),
}
# Names of transformers 4 that the engines know -> names of today.
OLD_STYLES = {"colwise_rep": "colwise_gather_output", "rowwise_rep": "rowwise_split_input"}
# The first gives whole outputs, the second takes whole inputs: they go together.
WHOLE = ("colwise_gather_output", "rowwise_split_input")


class Condition(NamedTuple):
    """One requirement of the engines, whether it holds, and why."""

    name: str
    ok: bool
    why: str


def backend_conditions(model: PreTrainedModel | type[PreTrainedModel]) -> list[Condition]:
    """Tries each requirement of vLLM and SGLang on a causal model, which stays as it is.

    A class is tried in a small shape with random weights. The engine runs two requests of up to 9 tokens, or just past
    the sliding window, flattened into one row, and then one more token of each: about 40 tokens in all.
    """
    if isinstance(model, type):
        torch_state = torch.random.get_rng_state()
        small: dict[str, Any] = dict(SMALL)
        model = model(model.config_class(**small))  # type: ignore[misc]
        torch.random.set_rng_state(torch_state)
    training = model.training
    model.eval()
    try:
        run = _try(model)
        with bounded("matching base_model_tp_plan"):  # which config.json may give
            split = _tp_plan(model)
        return [
            _auto_map(model),
            Condition(
                "is_backend_compatible",
                bool(model.is_backend_compatible()),
                f"{type(model).__name__}._supports_attention_backend={model.is_backend_compatible()}",
            ),
            _arguments(model),
            *run,
            split,
            _pp_plan(model),
            _head(model),
        ]
    finally:
        model.train(training)


def _auto_map(model: PreTrainedModel) -> Condition:
    """The engines find the base model's class by `auto_map`, unless it is part of transformers."""
    name = "auto_map"
    # Not by attribute: a server in this process may have put our classes into transformers.
    if type(model).__module__.partition(".")[0] == "transformers":
        return Condition(name, True, "the class is part of transformers")
    with tempfile.TemporaryDirectory() as folder, quiet():
        with torch.device("meta"):
            skeleton = type(model)(deepcopy(model.config))
        skeleton.save_pretrained(folder, state_dict={})
        auto_map = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("auto_map", {})
        reference = auto_map.get("AutoModel")
        if not reference:
            return Condition(name, False, "config.json of a saved folder names no class under auto_map.AutoModel")
        file = Path(folder) / f"{reference.rpartition('--')[2].partition('.')[0]}.py"
        if not file.is_file():
            return Condition(name, False, f"auto_map.AutoModel={reference}, but {file.name} is not saved beside it")
    return Condition(name, True, f"auto_map.AutoModel={reference}")


def _arguments(model: PreTrainedModel) -> Condition:
    """The base model's forward names the arguments whose length vLLM makes dynamic when it compiles."""
    base: Any = model.base_model
    parameters = inspect.signature(type(base).forward).parameters
    lacking = [name for name in ("input_ids", "inputs_embeds", "position_ids") if name not in parameters]
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        lacking.append("**kwargs")
    where = f"{type(base).__name__}.forward"
    return Condition("arguments", not lacking, f"{where} lacks {', '.join(lacking)}" if lacking else f"of {where}")


class _Held:
    """The keys and values of one layer, (G, K, E) each, held for each request as an engine does."""

    def __init__(self, window: int | None):
        self.window = window
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.calls = 0
        self.masked = False

    def attend(self, request: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float):
        """Attends from the newest S tokens: query (H, S, E), key and value (G, S, E) -> (S, H, E)."""
        if request in self.keys:
            key = torch.cat([self.keys[request], key], dim=1)
            value = torch.cat([self.values[request], value], dim=1)
        self.keys[request], self.values[request] = key, value
        past = key.shape[1] - query.shape[1]
        rows = torch.arange(query.shape[1], device=query.device)[:, None] + past
        columns = torch.arange(key.shape[1], device=query.device)
        allowed = columns <= rows
        if self.window is not None:
            allowed &= columns > rows - self.window
        groups = query.shape[0] // key.shape[0]
        key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
        return functional.scaled_dot_product_attention(query, key, value, allowed, scale=scale).transpose(0, 1)


def _engine_attention(
    module: nn.Module,
    query: torch.Tensor,  # (1, H, S, E)
    key: torch.Tensor,  # (1, G, S, E)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    attention_instances: dict[int, _Held] | None = None,
    requests: dict[int, slice] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if attention_instances is None or requests is None:
        raise LookupError("keyword arguments of the base model do not reach the attention function")
    held = attention_instances[module.layer_idx]  # type: ignore[index]
    held.calls += 1
    held.masked |= attention_mask is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = [held.attend(r, query[0, :, s], key[0, :, s], value[0, :, s], scale) for r, s in requests.items()]
    return torch.cat(rows)[None], None


@contextmanager
def _engine(config: Any) -> Iterator[None]:
    """Replaces the config's attention by the engine's within the block."""
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[ENGINE] = _engine_attention
    config._attn_implementation = ENGINE
    try:
        yield
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[ENGINE]


@torch.no_grad()
def _try(model: PreTrainedModel) -> list[Condition]:
    """Runs two requests through the engine, then one more token of each, and compares with the model alone."""
    base: Any = model.base_model
    config: Any = base.config
    window = getattr(config, "sliding_window", None)
    # A config without layer_types, such as Mistral's, has one kind for all layers.
    only_kind = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or [only_kind] * config.num_hidden_layers
    instances = {i: _Held(window if kind == "sliding_attention" else None) for i, kind in enumerate(kinds)}
    length = min(9 if window is None or window > 500 else max(9, window + 4), config.max_position_embeddings - 1)
    lengths = {0: length, 1: max(1, length // 2)}
    ids = {r: torch.arange(3 + r, 4 + r + n, device=model.device) % config.vocab_size for r, n in lengths.items()}
    alone = {r: base(input_ids=row[None], use_cache=False).last_hidden_state[0] for r, row in ids.items()}

    def step(tokens: dict[int, torch.Tensor], positions: list[torch.Tensor]) -> torch.Tensor:
        requests, start = {}, 0
        for request, row in tokens.items():
            requests[request] = slice(start, start + len(row))
            start += len(row)
        return base(
            input_ids=torch.cat(list(tokens.values()))[None],
            position_ids=torch.cat(positions)[None].to(model.device),
            use_cache=False,
            return_dict=False,
            attention_instances=instances,
            requests=requests,
        )[0][0]

    interface, kwargs = "attention interface", "keyword arguments"
    try:
        with _engine(config):
            first = step({r: row[:-1] for r, row in ids.items()}, [torch.arange(n) for n in lengths.values()])
            second = step({r: row[-1:] for r, row in ids.items()}, [torch.tensor([n]) for n in lengths.values()])
    except LookupError as error:
        return [Condition(interface, True, "used"), Condition(kwargs, False, str(error))]
    except Exception as error:  # a foreign model may raise anything
        return [Condition(interface, False, f"a forward pass fails: {first_line(error)}")]
    calls = [held.calls for held in instances.values()]
    if calls != [2] * len(calls):
        why = f"layers called it {calls} times in two passes; each must look it up in ALL_ATTENTION_FUNCTIONS"
        return [Condition(interface, False, why)]
    masked = [i for i, held in instances.items() if held.masked]
    used = "every layer calls the attention function of the engine once"
    if masked:
        used = f"layer {masked[0]} passes a mask to the engine, which makes its own"
    ours = torch.cat([torch.cat([alone[r][:-1] for r in ids]), torch.stack([alone[r][-1] for r in ids])]).float()
    difference = (torch.cat([first, second]).float() - ours).abs().max().item()
    limit = max(1e-4, 32 * torch.finfo(model.dtype).eps) * max(1.0, ours.abs().max().item())
    return [
        Condition(interface, not masked, used),
        Condition(kwargs, True, "they reach every attention function"),
        Condition(
            "hidden states",
            difference <= limit,
            f"flattened requests with keys and values outside of the model differ by {difference:.1e}, at most "
            f"{limit:.1e} is allowed",
        ),
    ]


def _tp_plan(model: PreTrainedModel) -> Condition:
    """The plan splits every matrix of a layer in the right way, and every pattern of it matches something."""
    name = "tensor parallel plan"
    base: Any = model.base_model
    plan = {pattern.removeprefix("model."): style for pattern, style in (base.config.base_model_tp_plan or {}).items()}
    if not plan:
        return Condition(name, False, f"{type(base.config).__name__}.base_model_tp_plan is empty")
    modules = dict(base.named_modules())
    # Experts of a mixture are parameters without modules.
    places = [*modules, *(parameter for parameter, _ in base.named_parameters())]
    for pattern in plan:
        parents = [modules[place] for place in modules if re.fullmatch(pattern.rpartition(".")[0], place)]
        # A plan for experts also names the matrices of dense layers, which the model may lack.
        elsewhere = any(hasattr(parent, "experts") for parent in parents)
        if not elsewhere and not any(re.fullmatch(pattern, place) for place in places):
            return Condition(name, False, f"{pattern!r} matches no module")
    styles: dict[str, str] = {}
    for module_name, module in modules.items():
        if isinstance(module, nn.Linear):
            style = next((plan[pattern] for pattern in plan if re.match(pattern, module_name)), "none")
            styles[module_name] = OLD_STYLES.get(style, style)
    for module_name, style in styles.items():
        parent, _, last = module_name.rpartition(".")
        wanted = next((wanted for wanted, names in SPLITS.items() if last in names), None)
        if wanted is not None and style.partition("_")[0] != wanted.partition("_")[0]:
            return Condition(name, False, f"{module_name} is {style}; must be {wanted}")
        if wanted in WHOLE and style != wanted:
            return Condition(name, False, f"{module_name} is {style}, and stacked; must be {wanted}")
        if wanted == "rowwise":
            before = {n: s for n, s in styles.items() if n.rpartition(".")[0] == parent and s.startswith("colwise")}
            odd = [n for n, s in before.items() if (s in WHOLE) != (style in WHOLE)]
            if odd:
                return Condition(name, False, f"{odd[0]} is {before[odd[0]]}, but {module_name} is {style}")
    return Condition(name, True, f"{len(plan)} patterns split every matrix of the layers")


def _pp_plan(model: PreTrainedModel) -> Condition:
    """The plan names direct children of the base model in order of their calls, with one list of layers."""
    name = "pipeline parallel plan"
    base: Any = model.base_model
    plan = base.config.base_model_pp_plan or {}
    children = dict(base.named_children())
    foreign = [part for part in plan if part not in children]
    lists = [part for part in plan if isinstance(children.get(part), nn.ModuleList)]
    if not plan or foreign or len(lists) != 1:
        reason = f"{foreign[0]!r} is not a child of {type(base).__name__}" if foreign else f"lists of layers: {lists}"
        return Condition(name, False, reason if plan else f"{type(base.config).__name__}.base_model_pp_plan is empty")
    parameters = {part for part, child in children.items() if any(True for _ in child.parameters())}
    if parameters - set(plan):
        return Condition(name, False, f"it leaves {sorted(parameters - set(plan))[0]!r} out, which has weights")
    return Condition(name, True, ", ".join(plan))


@torch.no_grad()
def _head(model: PreTrainedModel) -> Condition:
    """Output embeddings, `logit_scale` and `final_logit_softcapping` give the logits, as the engines compute them."""
    name = "head"
    config: Any = model.config
    head = model.get_output_embeddings()
    if head is None:
        return Condition(name, False, f"{type(model).__name__} has no output embeddings")
    ids = torch.arange(3, 8, device=model.device)[None] % config.vocab_size
    expected = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    expected = expected * (getattr(config, "logit_scale", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        expected = torch.tanh(expected / cap) * cap
    difference = (model(input_ids=ids, use_cache=False).logits.float() - expected).abs().max().item()
    limit = max(1e-4, 32 * torch.finfo(model.dtype).eps) * max(1.0, expected.abs().max().item())
    return Condition(name, difference <= limit, f"logits computed outside of the model differ by {difference:.1e}")
