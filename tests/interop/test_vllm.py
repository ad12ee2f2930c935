"""The plugin in vLLM's hands: a stand-in with the signatures of vLLM's registry, config and loader plays its part."""

import copy
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from stock_models import LLAMA3, SHAPE, ids, longrope, randomise, rope
from torch import nn
from transformers import AutoModel, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.interop.vllm_plugin import native_config

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


class Registry:
    """`vllm.ModelRegistry`: classes by architecture, or `module:class` to be imported when it is first asked for."""

    def __init__(self):
        self.models = {}

    def get_supported_archs(self):
        return self.models.keys()

    def register_model(self, model_arch: str, model_cls: type[nn.Module] | str) -> None:
        assert isinstance(model_arch, str) and model_arch not in self.models
        assert isinstance(model_cls, type) or len(model_cls.split(":")) == 2
        self.models[model_arch] = model_cls

    def resolve(self, model_arch: str) -> type[nn.Module]:
        model_cls = self.models[model_arch]
        if isinstance(model_cls, str):
            module, name = model_cls.split(":")
            model_cls = getattr(importlib.import_module(module), name)
        return model_cls


class VllmConfig:
    """`vllm.config.VllmConfig`, as far as a model reads it."""

    def __init__(self, hf_config):
        self.model_config = SimpleNamespace(hf_config=hf_config)

    def with_hf_config(self, hf_config, architectures=None):
        if architectures is not None:
            hf_config = copy.deepcopy(hf_config)
            hf_config.architectures = architectures
        return VllmConfig(hf_config)


def native(stock_class):
    """A class as vLLM's own are: made from `vllm_config` and `prefix`; it computes what the stock class does."""

    class Native(nn.Module):
        supports_pp = True

        def __init__(self, *, vllm_config, prefix: str = ""):
            super().__init__()
            self.config = vllm_config.model_config.hf_config
            self.prefix = prefix
            self.inner = stock_class(self.config)

        def load_weights(self, weights):
            self.inner.load_state_dict(dict(weights))

        def forward(self, input_ids):
            return self.inner.eval()(input_ids).logits

    Native.__name__ = stock_class.__name__
    return Native


class TransformersForCausalLM(nn.Module):
    """vLLM's backend for classes of transformers: the base model comes from AutoModel, the head is vLLM's."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.prefix = prefix
        self.model = AutoModel.from_config(self.config)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)

    def load_weights(self, weights):
        self.load_state_dict(dict(weights))

    def forward(self, input_ids):
        logits = self.lm_head(self.model.eval()(input_ids).last_hidden_state)
        cap = self.config.final_logit_softcapping
        return torch.tanh(logits / cap) * cap if cap else logits


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in, importable as vllm."""
    registry = Registry()

    def initialize_model(vllm_config, *, prefix: str = ""):
        model_class = registry.resolve(vllm_config.model_config.hf_config.architectures[0])
        parameters = inspect.signature(model_class.__init__).parameters
        assert {"vllm_config", "prefix"} <= set(parameters)  # else vLLM takes it for a class of an older time
        return model_class(vllm_config=vllm_config, prefix=prefix)

    def init_vllm_registered_model(vllm_config, *, prefix="", hf_config=None, architectures=None):
        if hf_config is not None:
            vllm_config = vllm_config.with_hf_config(hf_config, architectures=architectures)
        return initialize_model(vllm_config, prefix=prefix)

    natives = {stock.__name__: native(stock) for stock in (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)}
    for name, model_class in natives.items():
        registry.register_model(name, model_class)
    registry.register_model("TransformersForCausalLM", TransformersForCausalLM)
    contents = {
        "vllm": {"ModelRegistry": registry},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.llama": {"LlamaForCausalLM": natives["LlamaForCausalLM"]},
        "vllm.model_executor.models.utils": {"init_vllm_registered_model": init_vllm_registered_model},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "hf_decoder.interop.vllm_class", raising=False)
    yield SimpleNamespace(registry=registry, initialize_model=initialize_model)
    sys.modules.pop("hf_decoder.interop.vllm_class", None)


def entry_point() -> str:
    """What pyproject.toml names for vLLM's group of plugins."""
    text = PYPROJECT.read_text(encoding="utf-8")
    (value,) = re.findall(r'\[project\.entry-points\."vllm\.general_plugins"\]\nhf_decoder = "([^"]+)"', text)
    return value


def load_plugin() -> None:
    """As vLLM does in each of its processes; in some of them twice."""
    module, _, function = entry_point().partition(":")
    for _ in range(2):
        getattr(importlib.import_module(module), function)()


def ours(**fields) -> HfDecoderForCausalLM:
    return randomise(
        HfDecoderForCausalLM(HfDecoderConfig(**{**SHAPE, "architectures": ["HfDecoderForCausalLM"]} | fields))
    )


CASES = {
    "Llama": ("LlamaForCausalLM", {}),
    "Llama with biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "Llama 3": ("LlamaForCausalLM", LLAMA3),
    "Qwen2": ("Qwen2ForCausalLM", {"attention_bias": "qkv"}),
    "Qwen3": ("Qwen3ForCausalLM", {"qk_norm": True, "head_dim": 10}),
    "Qwen3 with biases": ("TransformersForCausalLM", {"qk_norm": True, "attention_bias": True}),
    "a window": ("TransformersForCausalLM", {"sliding_window": 5}),
    "NoPE": ("TransformersForCausalLM", {"no_rope_layers": [1, 0, 1]}),
    "longrope": ("TransformersForCausalLM", longrope(2, partial_rotary_factor=0.5)),
    "dynamic RoPE": ("TransformersForCausalLM", rope("dynamic", factor=2.0)),
    "capped logits": ("TransformersForCausalLM", {"final_logit_softcapping": 5.0}),
    "another activation": ("TransformersForCausalLM", {"hidden_act": "gelu"}),
}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_vllm_makes_the_class_that_computes_the_same(case: str, vllm):
    name, fields = CASES[case]
    model = ours(**fields)
    load_plugin()
    made = vllm.initialize_model(VllmConfig(model.config), prefix="outer")
    assert type(made).__name__ == name and made.prefix == "outer"
    made.load_weights(model.state_dict().items())
    torch.testing.assert_close(made(ids(2, 24)), model(ids(2, 24)).logits, rtol=0.0, atol=1e-5)


def test_the_registered_class_answers_before_it_is_made(vllm):
    load_plugin()
    model_class = vllm.registry.resolve("HfDecoderForCausalLM")
    assert model_class.__name__ == "HfDecoderForCausalLM" and model_class.supports_pp
    assert issubclass(model_class, vllm.registry.resolve("LlamaForCausalLM"))


@pytest.mark.peers
def test_the_plugin_does_not_import_vllm_by_itself(run_python):
    code = """
    import sys
    from hf_decoder.interop import vllm_plugin
    print([name for name in sys.modules if name.partition(".")[0] == "vllm"])
    """
    assert run_python(code, hide=("vllm",)).strip().endswith("[]")


def test_a_config_of_another_model_has_no_equivalent_here():
    assert native_config(LlamaForCausalLM.config_class()) is None
