"""The route of a call changes no number and skips nothing that a user attached to a module."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generating import VARIANTS, tiny_model
from peft import LoraConfig, get_peft_model
from tiny_models import CPP, padded, random_ids
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.utils import ModelOutput

from hf_decoder import HfDecoderForCausalLM
from hf_decoder.engine import route
from hf_decoder.engine.switches import settings
from hf_decoder.engine.training import kernels
from hf_decoder.model import modeling_hf_decoder as plain

IDS = random_ids(2, 9)
FUSED = ("fused_rms_norm", "fused_rotation", "fused_gate")
CASTING = "fused_rms_norm, which casts for several readers"
OF_A_LAYER = [CASTING, "fused_rotation", CASTING, "fused_gate"]


@pytest.fixture(autouse=True)
def in_cpp(cpp_library):
    """However short tensors are."""
    with settings.override(ways=CPP):
        yield


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the fused functions, as they are called."""
    calls: list[str] = []
    for name in FUSED:
        function = getattr(route, name)

        def call(*args: Any, function: Callable = function, name: str = name) -> Any:
            calls.append(CASTING if name == "fused_rms_norm" and len(args) > 3 else name)
            return function(*args)

        monkeypatch.setattr(route, name, call)
    return calls


def train(model: Any, autocast: bool = True, **inputs: Any) -> list[torch.Tensor]:
    """The loss and all gradients."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False, **inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_trains_as_plain(model: Any, autocast: bool = True, **inputs: Any) -> None:
    """The loss and gradients are those of the plain modules; in half precision they are rounded no more than those."""
    found = train(model, autocast, **inputs)
    with settings.override(all=False):
        expected = train(model, autocast, **inputs)
        exact = train(model, False, **inputs) if autocast else expected
    assert len(found) == len(expected) > 2
    ours, theirs = (
        [float((one - true).norm() / true.norm()) for one, true in zip(ones, exact, strict=True)]
        for ones in (found, expected)
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert mine <= (1.5 * other + 5e-3 if autocast else 1e-5)
    assert sum(ours) <= 1.15 * sum(theirs) or not autocast


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("variant", ["plain", "qk-norm", "biases", "nope", "partial-rotary", "windows"])
def test_a_training_step_goes_by_fused_functions(variant: str, autocast: bool, fused):
    model = tiny_model(**VARIANTS[variant]).train()
    assert_trains_as_plain(model, autocast)
    assert {*fused} == {*FUSED, *([CASTING] if autocast else [])}
    if variant == "plain" and autocast:
        assert fused == [*2 * OF_A_LAYER, "fused_rms_norm"]


def test_checkpointed_layers_are_run_again(fused):
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    assert_trains_as_plain(model)
    assert fused.count("fused_gate") == 4


@pytest.mark.parametrize("part", ["training", "attention", "decoding"])
def test_a_part_can_be_turned_off(part: str, fused):
    model = tiny_model().train()
    with settings.override(**{part: False}):
        assert_trains_as_plain(model)
    assert bool(fused) == (part != "training")


def test_a_part_that_is_unknown_is_named():
    with pytest.raises(TypeError, match="drawing"), settings.override(drawing=False):
        pass


class Seen(list):
    """Counts the calls of hooks and replaced methods."""

    def hook(self, *inputs: Any) -> None:
        self.append("called")


def hooked(path: str, kind: str = "forward") -> Callable[[Any, Seen], Any]:
    def change(model: Any, seen: Seen) -> None:
        getattr(model.get_submodule(path), f"register_{kind}_hook")(seen.hook)

    return change


def replaced_forward(path: str) -> Callable[[Any, Seen], Any]:
    """Replaces a module's forward, as accelerate does."""

    def change(model: Any, seen: Seen) -> None:
        module = model.get_submodule(path)
        forward = module.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.append("called")
            return forward(*args, **kwargs)

        module.forward = watched

    return change


def subclassed(path: str) -> Callable[[Any, Seen], Any]:
    def change(model: Any, seen: Seen) -> None:
        module = model.get_submodule(path)

        class Watched(type(module)):  # type: ignore[misc]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                seen.append("called")
                return super().forward(*args, **kwargs)

        module.__class__ = Watched

    return change


def patched_class(name: str) -> Callable[[Any, Seen], Any]:
    def change(model: Any, seen: Seen) -> Any:
        patch, kind = pytest.MonkeyPatch(), getattr(plain, name)
        forward = kind.forward
        patch.setattr(kind, "forward", lambda *args, **kwargs: seen.append("called") or forward(*args, **kwargs))
        return SimpleNamespace(remove=patch.undo)

    return change


def global_hook(model: Any, seen: Seen) -> Any:
    return nn.modules.module.register_module_forward_hook(seen.hook)


LAYER = "model.layers.1"
WATCHED: dict[str, Callable[[Any, Seen], Any]] = {
    "layer": hooked(LAYER),
    "input of a layer": hooked(LAYER, "forward_pre"),
    "gradient of a layer": hooked(LAYER, "full_backward"),
    "attention": hooked(f"{LAYER}.self_attn"),
    "MLP": hooked(f"{LAYER}.mlp"),
    "activation": hooked(f"{LAYER}.mlp.act_fn"),
    "norm": hooked(f"{LAYER}.input_layernorm"),
    "last norm": hooked("model.norm"),
    "norm of heads": hooked(f"{LAYER}.self_attn.q_norm", "forward_pre"),
    "all modules": global_hook,
    "forward of a layer": replaced_forward(LAYER),
    "forward of attention": replaced_forward(f"{LAYER}.self_attn"),
    "forward of an MLP": replaced_forward(f"{LAYER}.mlp"),
    "forward of a norm": replaced_forward(f"{LAYER}.post_attention_layernorm"),
    "class of a layer": subclassed(LAYER),
    "class of attention": subclassed(f"{LAYER}.self_attn"),
    "class of an MLP": subclassed(f"{LAYER}.mlp"),
    "class of a norm": subclassed(f"{LAYER}.input_layernorm"),
    "forward of all MLPs": patched_class("HfDecoderMLP"),
    "forward of all norms": patched_class("HfDecoderRMSNorm"),
    "forward of all attentions": patched_class("HfDecoderAttention"),
}


class OwnAttention(nn.Module):
    is_causal = True

    def __init__(self, width: int):
        super().__init__()
        self.map = nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return self.map(hidden_states), None


@torch.no_grad()
def test_attention_without_our_maps_is_called():
    model, ids = tiny_model(), random_ids(1, 40)
    model.model.layers[1].self_attn = OwnAttention(model.config.hidden_size)
    with settings.override(ways={"attention": "tiles of 64"}):
        found = model(ids).logits
    with settings.override(all=False):
        assert found.equal(model(ids).logits)


@pytest.mark.parametrize("what", WATCHED)
def test_who_watches_what_is_passed_by_sees_all_of_it(what: str, fused):
    model, seen = tiny_model(qk_norm=True).train(), Seen()
    handle = WATCHED[what](model, seen)
    try:
        counts = []
        for engine in (True, False):
            seen.clear()
            with settings.override(all=engine):
                train(model)
            counts.append(len(seen))
        assert counts[0] == counts[1] > 0
        assert not fused
        assert_trains_as_plain(model)
    finally:
        if handle is not None:
            handle.remove()


MAPS: dict[str, Callable[[Any, Seen], Any]] = {
    "input of a map": hooked(f"{LAYER}.self_attn.k_proj", "forward_pre"),
    "map": hooked(f"{LAYER}.mlp.up_proj"),
    "forward of a map": replaced_forward(f"{LAYER}.mlp.down_proj"),
    "class of a map": subclassed(f"{LAYER}.self_attn.v_proj"),
}


@pytest.mark.parametrize("what", MAPS)
def test_linear_maps_are_called_as_they_are(what: str, fused):
    """Only the operators between them are fused."""
    model, seen = tiny_model().train(), Seen()
    MAPS[what](model, seen)
    assert_trains_as_plain(model)
    assert len(seen) == 3 and {"fused_rms_norm", "fused_rotation", "fused_gate"} <= {*fused}


def test_a_map_that_writes_into_its_input_has_one_of_its_own(fused):
    model = tiny_model().train()
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    assert_trains_as_plain(model)
    assert CASTING not in fused


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["o_proj", "down_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_adapters(targets: Any, autocast: bool, fused):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), LoraConfig(r=3, target_modules=targets, init_lora_weights=False)).train()
    assert_trains_as_plain(model, autocast)
    assert {"fused_rms_norm", "fused_rotation", "fused_gate"} <= {*fused}
    assert (CASTING in fused) == (autocast and "o_proj" in targets)  # an adapter casts in its own way


@pytest.mark.parametrize(
    ("overrides", "lacking"),
    [({"hidden_act": "gelu"}, {"fused_gate"}), ({"attn_implementation": "eager"}, {*FUSED})],
    ids=["gelu", "eager"],
)
def test_other_models(overrides: dict, lacking: set[str], fused):
    attention = overrides.pop("attn_implementation", "sdpa")
    model = tiny_model(**overrides).train()
    model.set_attn_implementation(attention)
    assert_trains_as_plain(model)
    assert {*fused} - {CASTING} == {*FUSED} - lacking


def test_other_types_and_devices(fused):
    model = tiny_model().train().double()
    assert_trains_as_plain(model, autocast=False)
    model.to("meta")(IDS.to("meta"), use_cache=False)
    assert not fused


def test_weights_that_are_more_than_their_numbers(fused):
    class Marked(torch.Tensor):
        pass

    model = tiny_model().eval()
    expected = model(IDS).logits
    fused.clear()
    norm = model.model.layers[0].input_layernorm
    norm.weight = nn.Parameter(norm.weight.detach().as_subclass(Marked), requires_grad=False)
    torch.testing.assert_close(torch.Tensor(model(IDS).logits), expected)
    assert not fused


@pytest.mark.kernels
def test_what_looks_inside_finds_the_plain_modules(fused):
    model = tiny_model()
    expected = model(IDS, use_cache=False).logits
    fused.clear()

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, use_cache=False).logits

    close = torch.testing.assert_close
    close(torch.func.vmap(logits)(IDS[None])[0], expected)
    with torch.no_grad():
        model.requires_grad_(False)
        close(torch.jit.trace(logits, IDS, check_trace=False)(IDS), expected)
        model.requires_grad_(True)
        exported = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False)
        close(exported.module()(IDS, use_cache=False).logits, expected)
    close(torch.compile(logits, backend="eager", fullgraph=True)(IDS), expected)
    parameters = dict(model.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (IDS,)).logits.sum())(parameters)
    assert not fused
    of_plain = torch.autograd.grad(model(IDS).logits.sum(), [*parameters.values()])
    for mine, other in zip(gradients.values(), of_plain, strict=True):
        close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.kernels
def test_no_compiler_is_led_into_the_question_for_kernels(monkeypatch):
    """Asking launches a kernel, and would break a graph."""
    model = tiny_model().train()
    monkeypatch.setattr(kernels, "kernels_run_on", lambda device: pytest.fail("asked within a graph"))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(IDS, use_cache=False).logits.isfinite().all()


# -- calls without gradients


def caches_of(config: Any) -> list[Any]:
    """Caches of the eight tokens that the calls below continue."""
    return [DynamicCache(config=config), DynamicCache(), StaticCache(config=config, max_cache_len=20)]


PADDED_IDS, MASK = padded(2, 9)
STEADY = torch.arange(9)[None].expand(2, -1)
PACKED = STEADY % 4
CALLS: dict[str, dict[str, Any]] = {
    "ids": {},
    "without a cache": {"use_cache": False},
    "padding": {"attention_mask": MASK},
    "padding and positions": {"attention_mask": MASK, "position_ids": (MASK.cumsum(-1) - 1).clamp(min=0)},
    "a mask of booleans": {"attention_mask": MASK.bool()},
    "positions": {"position_ids": STEADY + 3},
    "documents": {"position_ids": PACKED},
    "documents of one row": {"position_ids": PACKED[:1]},
    "documents and a mask of ones": {"position_ids": PACKED, "attention_mask": torch.ones_like(MASK)},
    "documents and padding": {"position_ids": PACKED, "attention_mask": MASK},
    "four-dimensional mask": {"attention_mask": torch.ones(9, 9).tril().bool()[None, None].expand(2, 1, -1, -1)},
    "labels": {"labels": IDS.masked_fill(IDS % 3 == 0, -100)},
    "labels alone": {"labels": IDS, "skip_logits": True},
    "shifted labels": {"shift_labels": IDS},
    "a share of a batch": {"labels": IDS, "num_items_in_batch": 40},
    "the last": {"logits_to_keep": 1},
    "the last three": {"logits_to_keep": 3},
    "some": {"logits_to_keep": torch.tensor([0, 4])},
    "tuple": {"return_dict": False},
    "dictionary": {"return_dict": True},
    "hidden states": {"output_hidden_states": True},
}


def flat(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    if hasattr(output, "layers"):  # a cache
        return [tensor for layer in output.layers for tensor in (layer.keys, layer.values)]
    parts = output.to_tuple() if isinstance(output, ModelOutput) else output
    return [tensor for part in parts for tensor in flat(part)]


def assert_equal_calls(model: Any, *args: Any, **kwargs: Any) -> None:
    """Values, types, caches and errors are those of the plain model."""
    found = []
    for engine in (True, False):
        inputs = copy.deepcopy(kwargs)
        with settings.override(all=engine), torch.no_grad():
            try:
                output = model(*args, **inputs)
            except Exception as error:
                found.append((type(error), str(error)))
            else:
                caches = [value for value in inputs.values() if hasattr(value, "layers")]
                keys = [*output.keys()] if isinstance(output, ModelOutput) else []
                found.append((type(output), keys, [*flat(output), *(t for cache in caches for t in flat(cache))]))
    assert found[0][:2] == found[1][:2]
    if len(found[0]) > 2:
        for mine, other in zip(found[0][2], found[1][2], strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=5e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_calls_of_the_model(variant: str):
    model = tiny_model(**VARIANTS[variant])
    for settings_of_call in CALLS.values():
        assert_equal_calls(model, IDS, **settings_of_call)
    assert_equal_calls(model, inputs_embeds=model.model.embed_tokens(IDS).detach())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("new", [1, 3])
def test_calls_that_go_on_from_a_cache(variant: str, new: int):
    model = tiny_model(**VARIANTS[variant])
    for cache in caches_of(model.config):
        with settings.override(all=False), torch.no_grad():
            model(PADDED_IDS[:, :8], attention_mask=MASK[:, :8], past_key_values=cache, use_cache=True)
        mask = torch.cat((MASK[:, :8], MASK.new_ones(2, new)), 1)
        for more in (
            {},
            {"attention_mask": mask},
            {"attention_mask": mask, "position_ids": mask.cumsum(-1)[:, -new:]},
        ):
            assert_equal_calls(model, IDS[:, :new], past_key_values=cache, use_cache=True, **more)
        assert_equal_calls(model, IDS[:, :new], past_key_values=cache, position_ids=torch.full((2, new), 8))


@pytest.mark.parametrize(
    "wrong",
    [
        {"attention_mask": MASK[:, :5]},
        {"position_ids": STEADY[:, :5]},
        {"labels": IDS[:, :5]},
        {"labels": IDS, "logits_to_keep": 3},
        {"labels": IDS + 100},
        {"input_ids": IDS + 100},
        {"input_ids": IDS[:0]},
        {"no_such_argument": 1},
        {"input_ids": None},
    ],
    ids=str,
)
def test_what_is_wrong_with_a_call_is_said_alike(wrong: dict):
    assert_equal_calls(tiny_model(), **{"input_ids": IDS, **wrong})


def test_a_call_in_inference_mode_and_one_with_gradients():
    model = tiny_model()
    with torch.inference_mode():
        fast = model(IDS).logits
    slow = model(IDS).logits
    assert slow.requires_grad and not fast.requires_grad
    torch.testing.assert_close(fast.clone(), slow.detach(), rtol=0, atol=2e-5)
    assert isinstance(model, HfDecoderForCausalLM)
