"""The decode step gives what the modules give, and leaves models with hooks or changes to the modules."""

import copy
from types import SimpleNamespace

import pytest
import torch
from generating import NEW_TOKENS, VARIANTS, generated, through_modules, tiny_model
from peft import LoraConfig, get_peft_model
from tiny_models import padded, random_ids
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from hf_decoder.engine.decoding import generation, products
from hf_decoder.engine.decoding.products import Weights, multiply, multiply_row
from hf_decoder.engine.decoding.step import DecodingStep, FewCalls, RowOperators
from hf_decoder.engine.int8 import Int8Weights
from hf_decoder.engine.switches import settings as engine
from hf_decoder.model.modeling_hf_decoder import HfDecoderRMSNorm

FP32_WAYS = {"one row": "in parts", "rows in fp32": "turned"}


@pytest.fixture
def steps(monkeypatch) -> list[torch.Tensor]:
    """Collects the logits of every step that is taken directly."""
    taken: list[torch.Tensor] = []
    step = DecodingStep.next_logits

    def recorded(self, *inputs, **kwargs):
        logits = step(self, *inputs, **kwargs)
        if logits is not None:
            taken.append(logits)
        return logits

    monkeypatch.setattr(DecodingStep, "next_logits", recorded)
    return taken


@pytest.fixture
def without_kernels():
    """Leaves rows on a static cache to the step in torch, as if the C++ step did not support them."""
    with engine.override(kernels=False):
        yield


def test_a_tokenizer_that_generate_hands_on_to_the_model_changes_nothing(steps, without_kernels):
    model, ids = tiny_model(), random_ids(1, 9)
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **settings)
    taken = len(steps)
    assert taken and torch.equal(model.generate(ids, tokenizer=SimpleNamespace(), **settings), expected)
    assert len(steps) == 2 * taken


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_step_gives_the_tokens_and_logits_of_the_modules(variant: str, cache: str | None, steps):
    model = tiny_model(**VARIANTS[variant])
    ids, mask = padded(3, 9)
    slow = {"attention_mask": mask}
    fast = {**slow, "cache_implementation": cache, "disable_compile": True} if cache else slow
    for inputs, settings in ((ids[:1], {}), (ids, {"attention_mask": mask})):
        expected = through_modules(model, inputs, **settings)
        assert not steps
        tokens, logits = generated(
            model, inputs, **(fast | settings if len(inputs) > 1 else {**fast, "attention_mask": None})
        )
        torch.testing.assert_close(logits, expected[1], rtol=0, atol=2e-5)
        torch.testing.assert_close(tokens, expected[0])
        windowed = "windows" in variant
        assert len(steps) == (0 if cache and windowed else NEW_TOKENS - 1)
        steps.clear()


def test_other_caches_and_searches_give_the_same_tokens(steps):
    model = tiny_model()
    ids, mask = padded(2, 9)
    for settings in (
        {"num_beams": 3},
        {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
        {"past_key_values": "without config"},
    ):
        runs = []
        for run in (through_modules, generated):
            torch.manual_seed(3)
            own = {"past_key_values": DynamicCache()} if "past_key_values" in settings else settings
            runs.append(run(model, ids, attention_mask=mask, **own)[0])
            assert bool(steps) == (run is generated)
        assert torch.equal(*runs)
        steps.clear()


@pytest.mark.parametrize("cache", [None, "static"])
def test_prompts_as_embeddings(cache: str | None, steps):
    model = tiny_model()
    ids = random_ids(1, 9)
    settings = {"cache_implementation": cache, "disable_compile": True} if cache else {}
    tokens, _ = generated(model, ids, **settings)
    steps.clear()
    embedded, _ = generated(model, None, inputs_embeds=model.get_input_embeddings()(ids), **settings)
    assert torch.equal(embedded, tokens[:, 9:]) and len(steps) == NEW_TOKENS - 1


def test_masks_that_are_prepared_already_are_not_for_the_step(steps, monkeypatch):
    model = tiny_model()
    ids, mask = padded(3, 9)
    settings = {"attention_mask": mask, "cache_implementation": "static", "disable_compile": True}
    expected = generated(model, ids, **settings)[0]
    steps.clear()
    monkeypatch.setattr(generation.Decoding, "prepare_inputs", lambda *inputs, **others: None)
    assert torch.equal(generated(model, ids, **settings)[0], expected) and not steps


def test_a_hook_is_called_for_every_token(steps):
    model, calls = tiny_model(), []
    hook = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *inputs: calls.append(1))
    model.generate(random_ids(1, 5), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    assert len(calls) == NEW_TOKENS and not steps
    hook.remove()
    model.generate(random_ids(1, 5), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    assert len(calls) == NEW_TOKENS and len(steps) == NEW_TOKENS - 1


def hang_lora(model):
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))


def replace_forward(model):
    norm = model.model.layers[0].input_layernorm
    norm.forward = lambda x: 2 * type(norm).forward(norm, x)


def replace_module(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    old = model.model.layers[0].mlp.up_proj
    new = Doubled(old.in_features, old.out_features, bias=False)
    new.load_state_dict(old.state_dict())
    model.model.layers[0].mlp.up_proj = new


def hang_everywhere(model):
    return nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)


def replace_forward_of_a_class(model):
    patch, forward = pytest.MonkeyPatch(), HfDecoderRMSNorm.forward
    patch.setattr(HfDecoderRMSNorm, "forward", lambda self, *inputs: 0.5 * forward(self, *inputs))
    return SimpleNamespace(remove=patch.undo)


CHANGES = [hang_lora, replace_forward, replace_module, hang_everywhere, replace_forward_of_a_class]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules_are_called(change, steps):
    model = tiny_model()
    generated(model, random_ids(1, 5))  # a step was made before the change
    assert steps
    steps.clear()
    handle = change(model)
    try:
        tokens, logits = generated(model, random_ids(1, 5))
        whole = model(tokens, use_cache=False).logits[:, -NEW_TOKENS - 1 : -1]
    finally:
        if handle is not None:
            handle.remove()
    assert not steps
    torch.testing.assert_close(logits, whole, rtol=0, atol=2e-5)


def test_what_a_caller_asks_for_beside_logits_comes_from_the_modules(steps):
    model = tiny_model()
    out = model.generate(
        random_ids(1, 5), max_new_tokens=4, eos_token_id=None, output_hidden_states=True, return_dict_in_generate=True
    )
    assert not steps and [len(states) for states in out.hidden_states] == [3] * 4
    generated(model, random_ids(1, 5))  # transformers' recorders stay on the modules but record nothing now
    assert len(steps) == NEW_TOKENS - 1


def test_new_weights_are_seen(steps):
    model = tiny_model()
    ids = random_ids(1, 5)
    generated(model, ids)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(3)
        model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(
            torch.randn_like(model.model.layers[1].self_attn.q_proj.weight)
        )
    expected = through_modules(model, ids)
    steps.clear()
    assert torch.equal(generated(model, ids)[0], expected[0]) and steps


@torch.no_grad()
def test_half_precision_is_no_further_from_the_truth_than_the_modules_are(steps):
    model = tiny_model(qk_norm=True)
    ids = random_ids(1, 5)
    errors = []
    tokens, _ = generated(model, ids)
    truth = model(tokens, use_cache=False).logits[:, -NEW_TOKENS - 1 : -1]
    half = copy.deepcopy(model).bfloat16()
    for run in (generated, through_modules):
        forced = {"prefix_allowed_tokens_fn": lambda row, seen: [int(tokens[0, len(seen)])]}  # the same text for both
        errors.append((run(half, ids, **forced)[1].float() - truth).square().mean().sqrt())
    assert errors[0] <= 1.1 * errors[1]
    assert torch.backends.mkldnn.enabled


@torch.no_grad()
@pytest.mark.parametrize("cache", ["static", None])
def test_packed_weights_of_several_rows(cache: str | None, steps, without_kernels, monkeypatch):
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("weights are packed on AVX-512 alone")
    packed = []
    pack = DecodingStep.packed
    monkeypatch.setattr(DecodingStep, "packed", lambda self: packed.append(1) or pack(self))
    monkeypatch.setattr(generation, "STEPS_BEFORE_PACKING", 2)
    model = tiny_model(attention_bias=True, tie_word_embeddings=False)
    ids, mask = padded(3, 9)
    tokens, _ = generated(model, ids, attention_mask=mask)
    forced = {"prefix_allowed_tokens_fn": lambda row, seen: [int(tokens[row, len(seen)])], "attention_mask": mask}
    _, truth = through_modules(model, ids, **forced)
    half = copy.deepcopy(model).bfloat16()
    error = [
        (run(half, ids, **forced, cache_implementation=kind)[1].float() - truth).square().mean().sqrt()
        for run, kind in ((generated, cache), (through_modules, None))
    ]
    assert packed == [1] and error[0] <= 1.1 * error[1]
    half.lm_head.weight.data.mul_(2)  # changed in a way that leaves no trace
    doubled = generated(half, ids, **forced, cache_implementation=cache)[1]
    torch.testing.assert_close(doubled.float(), 2 * truth, rtol=0, atol=2 * 6 * float(error[1]))
    assert packed == [1, 1]
    monkeypatch.setattr(generation, "PACKED_BYTES", 10)
    generated(half, ids, **forced, cache_implementation=cache)
    assert packed == ([1, 1] if cache is None else [1, 1, 1])


def test_packed_weights_with_a_bias_that_is_not_contiguous():
    x, weight, bias = torch.randn(2, 3, 16), torch.randn(8, 16), torch.randn(16)[::2]
    product = multiply(x, products.packed_weights(Weights(weight, bias)))
    torch.testing.assert_close(product, torch.nn.functional.linear(x, weight, bias))


def test_quantized_weights_are_not_packed():
    """For example torchao's int4, which cannot be joined or packed."""

    class Quantized(torch.Tensor):
        pass

    several = [products.Weights(torch.ones(2, 4).as_subclass(Quantized), None) for _ in range(3)]
    assert all(products.packed_weights(weights) is weights for weights in several)
    assert products.joined(several) == tuple(several)


def test_the_kernels_are_given_back_when_a_step_fails(monkeypatch):
    model = tiny_model().bfloat16()

    def fail(*inputs):
        raise KeyError("broken")

    monkeypatch.setattr(RowOperators, "norm", fail)
    with pytest.raises(KeyError):
        generated(model, random_ids(1, 5))
    assert torch.backends.mkldnn.enabled


def test_a_token_out_of_range_is_named():
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), generation.Decoding(model):
        model(random_ids(1, 5), past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="vocabulary ends at"):
            model(torch.tensor([[10**6]]), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("kernels", [True, False])
def test_a_switch_that_is_saved_with_the_model(kernels: bool, steps, tmp_path, monkeypatch):
    """Rows on a static cache, in texts of all sizes; nothing is compiled by torch."""
    monkeypatch.setattr(torch, "compile", lambda *inputs, **options: pytest.fail("compiled"))
    model = tiny_model(qk_norm=True, attention_bias=True)
    ids, mask = padded(3, 9)
    model.generation_config = GenerationConfig(cache_implementation="static", pad_token_id=0, do_sample=False)
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    calls = [(ids[:1], None, 9), (ids, mask, 9), (ids[:1, :4], None, 20), (ids[:2], mask[:2], 30), (ids, None, 5)]
    for inputs, inputs_mask, count in calls:
        settings = {"attention_mask": inputs_mask, "max_new_tokens": count}
        expected = through_modules(model, inputs, **settings, cache_implementation=None)
        steps.clear()
        with engine.override(kernels=kernels, ways=FP32_WAYS):
            tokens, logits = generated(model, inputs, **settings)
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(logits, expected[1], rtol=0, atol=2e-5)
        assert len(steps) == (0 if kernels else count - 1)


@pytest.mark.parametrize("cache", [None, "static"])
def test_int8_weights(cache: str | None, steps, without_kernels, monkeypatch):
    torchao = pytest.importorskip("torchao.quantization")
    multiplied = []
    int8_linear = products.int8_linear
    monkeypatch.setattr(products, "int8_linear", lambda *inputs: multiplied.append(1) or int8_linear(*inputs))
    model = tiny_model(attention_bias=True)
    torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
    ids, mask = padded(3, 9)
    for inputs, inputs_mask in ((ids[:1], None), (ids, mask), (ids[:1], None)):
        tokens, logits = generated(model, inputs, attention_mask=inputs_mask, cache_implementation=cache)
        assert len(steps) == NEW_TOKENS - 1
        expected = through_modules(model, inputs, attention_mask=inputs_mask)
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(logits, expected[1], rtol=0, atol=5e-5)
        steps.clear()
    assert multiplied


@torch.no_grad()
def test_int8_weights_in_half_precision(steps):
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_model(attention_bias=True).bfloat16()
    ids = random_ids(1, 9)
    torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
    exact = copy.deepcopy(model)  # what was quantized, computed with in fp32
    for module in exact.modules():
        if type(module) is nn.Linear and type(module.weight) is not nn.Parameter:
            module.weight = nn.Parameter(module.weight.qdata.float() * module.weight.scale)
    exact.float()
    tokens, truth = through_modules(exact, ids)
    forced = {"prefix_allowed_tokens_fn": lambda row, seen: [int(tokens[row, len(seen)])]}
    settings: list[dict] = [{}, {"cache_implementation": "static"}]
    errors = [(generated(model, ids, **forced, **more)[1].float() - truth).square().mean().sqrt() for more in settings]
    assert len(steps) == NEW_TOKENS - 1  # those on the static cache use the C++ step
    slow = (through_modules(model, ids, **forced)[1].float() - truth).square().mean().sqrt()
    assert max(errors) <= 1.1 * slow


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("columns", [32, 44, 48])
def test_int8_products_of_rows_of_any_length(columns, rows, dtype):
    values = torch.randint(-127, 128, (34, columns), dtype=torch.int8)
    x, scales = torch.randn(rows, 1, columns).to(dtype), torch.rand(34, 1).to(dtype)
    expected = x.double() @ (values.double() * scales.double()).T
    found = multiply(x, Int8Weights(values, scales, None)).double()
    assert (found - expected).abs().max() <= 0.01 * expected.abs().max()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 16, 17])
@pytest.mark.parametrize("outputs", [8, 10])
@pytest.mark.parametrize("ways", [{}, FP32_WAYS], ids=["torch", "ours"])
def test_fp32_products_of_a_few_rows(ways, outputs, rows, bias):
    torch.manual_seed(0)
    module = torch.nn.Linear(40, outputs, bias=bias)
    x = torch.randn(rows, 1, 40)
    exact = torch.nn.functional.linear(x.double(), module.weight.double(), module.bias.double() if bias else None)
    apart = torch.empty(40, outputs).copy_(module.weight.detach().t()).t()
    for weight in (module.weight, apart):
        weights = Weights(weight, module.bias)
        with engine.override(ways=ways):
            found = [multiply(x, weights)]
            if rows == 1:
                found.append(multiply_row(x.view(-1), weights).view(1, 1, -1))
        for product in found:
            assert product.shape == exact.shape and product.is_contiguous()
            torch.testing.assert_close(product.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_in_few_calls_are_the_modules(dtype):
    norm = tiny_model().to(dtype).model.norm
    hidden = (3 * torch.randn(5, 1, norm.weight.shape[0])).to(dtype)
    for x in (hidden, torch.zeros_like(hidden), hidden * float("nan")):
        found = [FewCalls().norm(norm, x)]
        found.append(torch.stack([RowOperators().norm(norm, row.view(-1)) for row in x]).view(x.shape))
        for normed in found:
            assert normed.dtype == dtype
            torch.testing.assert_close(normed, norm(x), equal_nan=True)


@pytest.mark.parametrize("search", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("prompt", [5, 16, 20])
def test_longrope_past_its_switch_gives_the_text_without_a_cache(prompt: int, search: dict):
    """The keys of the first 16 tokens are rotated again once there are more."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [1.1, 9.0, 9.0, 9.0]}
    model = tiny_model(rope_parameters=rope, max_position_embeddings=64, head_dim=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4 if parameter.ndim > 1 else 1
    for seed in range(4):
        ids = random_ids(1, prompt, seed=seed)
        options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
        expected = model.generate(ids, use_cache=False, **{**options, "num_beams": search.get("num_beams", 1)})
        assert model.generate(ids, **options, **search).equal(expected)
