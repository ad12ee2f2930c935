"""`quantization_config=` on load: the same model as the stock class quantized by the same library, saved and trained.

The oracle is Llama with the same weights, quantized in the same way: its logits must be ours bit for bit.
"""

import pytest
import torch
from llama_pairs import new_model, stock_model
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    QuantoConfig,
    TorchAoConfig,
)
from transformers.utils import logging

from hf_decoder import HfDecoderForCausalLM
from hf_decoder.engine.precision import FAST_HALF_PRECISION

SHAPE = {"hidden_size": 128, "intermediate_size": 192, "initializer_range": 0.1, "eos_token_id": None}
# name -> config, class of the weights that it makes, largest growth of the perplexity, whether transformers saves it
METHODS = {
    "torchao int8": (lambda **_: TorchAoConfig(Int8WeightOnlyConfig(), **_), "Int8Tensor", 1.02, True),
    "torchao int4": (
        lambda **_: TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False), **_),
        "Int4OpaqueTensor",
        1.25,
        False,
    ),
    "bitsandbytes int8": (lambda **_: BitsAndBytesConfig(load_in_8bit=True, **_), "Int8Params", 1.02, True),
    "bitsandbytes nf4": (
        lambda **_: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, **_
        ),
        "Params4bit",
        1.25,
        True,
    ),
    "quanto int8": (lambda **_: QuantoConfig(weights="int8", **_), "WeightQBytesTensor", 1.02, False),
    "quanto int4": (lambda **_: QuantoConfig(weights="int4", **_), "WeightQBitsTensor", 1.35, False),
}
# quanto compiles C++ code of its own before it first reads int4, which takes a minute.
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name == "quanto int4" else []) for name in METHODS]
SAVING = [name for name, method in METHODS.items() if method[3]]


def sentences(rows: int, seed: int) -> torch.Tensor:
    """Rows of a made-up language: the next token follows from the last one, most of the time."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (rows, 48), generator=generator)
    for i in range(1, 48):
        known = torch.rand(rows, generator=generator) < 0.9
        ids[:, i] = torch.where(known, 3 + 7 * ids[:, i - 1] % 31, ids[:, i])
    return ids


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    """A checkpoint that has learned its language."""
    logging.disable_progress_bar()
    model = new_model(**SHAPE, tie_word_embeddings=request.param)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        ids = sentences(16, step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("quantization") / "model"
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def load(folder, method: str | None = None, auto_class=AutoModelForCausalLM, **settings):
    kwargs = {} if method is None else {"quantization_config": METHODS[method][0](**settings)}
    return auto_class.from_pretrained(folder, dtype=torch.bfloat16, **kwargs).eval()


@pytest.fixture(scope="module")
def stock(folder, tmp_path_factory):
    """The same weights as a Llama checkpoint."""
    model = stock_model(load(folder)).to(torch.bfloat16)
    path = tmp_path_factory.mktemp("stock") / "model"
    model.save_pretrained(path)
    return path


@torch.no_grad()
def perplexity(model) -> float:
    ids = sentences(16, 999)
    logits = model(ids).logits.float()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp().item()


@pytest.mark.peers
@torch.no_grad()
@pytest.mark.parametrize("method", NAMES)
def test_quantized_on_load_as_the_stock_class_is(method: str, folder, stock, monkeypatch):
    for dtype in FAST_HALF_PRECISION:  # torch's own products, as in the stock class, whatever this CPU has
        monkeypatch.setitem(FAST_HALF_PRECISION, dtype, True)
    plain, model, theirs = load(folder), load(folder, method), load(stock, method)
    assert isinstance(model, HfDecoderForCausalLM) and isinstance(theirs, LlamaForCausalLM)
    ids = sentences(2, 1000)
    assert torch.equal(model(ids).logits, theirs(ids).logits)
    prompt = {"input_ids": ids[:, :8], "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**prompt, **settings), theirs.generate(**prompt, **settings))
    assert perplexity(plain) < 20  # of 96 tokens
    assert perplexity(model) < METHODS[method][2] * perplexity(plain)

    kinds = {n: type(m.weight).__name__ for n, m in model.model.layers.named_modules() if n.endswith("_proj")}
    assert len(kinds) == 14 and set(kinds.values()) == {METHODS[method][1]}


@pytest.mark.parametrize("method", NAMES)
def test_embeddings_and_head_stay_as_they_are(method: str, folder):
    plain, model = load(folder), load(folder, method)
    for part in ("model.embed_tokens", "lm_head", "model.norm"):
        assert torch.equal(model.get_submodule(part).weight, plain.get_submodule(part).weight), part
    is_tied = plain.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied == model.config.tie_word_embeddings


@torch.no_grad()
@pytest.mark.parametrize("method", SAVING)
def test_saved_and_loaded_again(method: str, folder, tmp_path):
    model = load(folder, method)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    ids = sentences(2, 1000)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == model.config.tie_word_embeddings
    sizes = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (tmp_path / "saved", folder)]
    matrices = sum(p.numel() for n, p in load(folder).model.layers.named_parameters() if p.ndim == 2)
    saved_bytes = 1.5 * matrices if "nf4" in method else 1.0 * matrices
    assert sizes[1] - sizes[0] > 0.85 * saved_bytes  # scales and the library's notes take some of it


@torch.no_grad()
@pytest.mark.parametrize("double", [False, True], ids=["scales in fp32", "scales quantized"])
def test_saved_after_a_forward_pass(double: bool, folder, tmp_path):
    """On some CPUs bitsandbytes packs 4-bit weights in the first one; saving must undo that."""
    model, ids = load(folder, "bitsandbytes nf4", bnb_4bit_use_double_quant=double), sentences(2, 1000)
    before = model(ids).logits
    model.save_pretrained(tmp_path / "saved")
    tolerance = {"rtol": 0.0, "atol": 0.05 * before.float().std().item()}  # scales rounded to bf16, or quantized again
    torch.testing.assert_close(model(ids).logits, before, **tolerance)
    again = load(tmp_path / "saved")
    torch.testing.assert_close(again(ids).logits, before, **tolerance)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in SAVING])
def test_what_cannot_be_saved_says_so(method: str, folder, tmp_path):
    with pytest.raises(ValueError, match=r"not serializable|Unsupported tensor type"):
        load(folder, method).save_pretrained(tmp_path / "saved")


@pytest.mark.peers
@pytest.mark.parametrize("folder", [True], indirect=True, ids=["tied"])
def test_a_receiver_without_the_package_loads_it(folder, tmp_path, run_python):
    model = load(folder, "bitsandbytes nf4")
    model.save_pretrained(tmp_path / "saved")
    ids = sentences(1, 1000)
    code = """
    import sys
    from transformers import AutoModelForCausalLM
    import torch
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
    ids = torch.tensor([[int(i) for i in sys.argv[2].split(",")]])
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)[0].tolist()
    print(type(model.model.layers[0].mlp.up_proj).__name__, tokens)
    """
    output = run_python(code, tmp_path / "saved", ",".join(map(str, ids[0, :8].tolist())), hide=("hf_decoder",))
    expected = model.generate(ids[:, :8], max_new_tokens=6, do_sample=False)[0].tolist()
    assert f"Linear4bit {expected}" in output.splitlines()


@torch.no_grad()
@pytest.mark.parametrize("method", ["bitsandbytes nf4", "bitsandbytes int8", "quanto int8", "torchao int8"])
def test_a_head_that_is_quantized_by_request_still_gives_the_loss(method: str, folder):
    """A list of modules to leave out replaces the default one, so that an empty list quantizes the head too."""
    settings = {"llm_int8_skip_modules" if "bits" in method else "modules_to_not_convert": []}
    model = load(folder, method, **settings)
    is_tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
    assert (type(model.lm_head.weight).__name__ == METHODS[method][1]) == (not is_tied)
    ids = sentences(4, 1000)
    logits = model.train()(ids, skip_logits=False).logits.float()  # the weights of an evaluation may be packed
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    # a CPU without products of half precision forms the loss from fp32 logits, which are rounded here
    tolerance = 1e-4 if FAST_HALF_PRECISION[torch.bfloat16] else 1e-3
    torch.testing.assert_close(model(ids, labels=ids).loss, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.peers
@pytest.mark.parametrize("method", ["bitsandbytes nf4", "bitsandbytes int8", "torchao int8", "quanto int8"])
def test_lora_on_a_quantized_base_trains(method: str, folder, tmp_path):
    def base():
        model = load(folder, method)
        return model if "quanto" in method else prepare_model_for_kbit_training(model)  # quanto's dtype is fixed

    model = base()
    modules = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
    before = {name: _values(module.weight).clone() for name, module in modules.items()}
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8)).train()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    ids = (sentences(8, 5) + 40) % 93 + 3  # another language than the one the base knows
    losses = []
    for _ in range(15):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    for name, values in before.items():
        assert torch.equal(_values(modules[name].weight), values), name

    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    again.train().eval()  # as the model was, so that the 4-bit weights of neither are packed, with rounded scales
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("evaluated", ["never", "in between", "before any training"])
@pytest.mark.parametrize("double", [False, True], ids=["scales in fp32", "scales quantized"])
def test_gradients_on_a_4_bit_base_are_those_on_its_dequantized_weights(evaluated: str, double: bool, folder):
    """An evaluation must not change them: what bitsandbytes packs for inference has no gradient."""
    from bitsandbytes.functional import dequantize_4bit

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=double,
    )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in base.named_modules():
        if hasattr(getattr(module, "weight", None), "quant_state"):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data = weight.to(torch.float32)
    ids = sentences(4, 1000)

    def adapted(model):
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, init_lora_weights=False)).train()

    def evaluate(model):
        with torch.no_grad():
            model.eval()(ids)

    if evaluated == "before any training":
        evaluate(base)
    base, plain = adapted(base), adapted(plain)
    if evaluated == "in between":
        evaluate(base)
    losses = [model.train()(ids, labels=ids).loss for model in (base, plain)]
    for loss in losses:
        loss.backward()
    # an evaluation before any training has rounded the scales to bf16
    rounded = evaluated == "before any training"
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=5e-3 if rounded else 1e-6)
    for (name, ours), theirs in zip(base.named_parameters(), plain.parameters(), strict=True):
        if ours.requires_grad:
            error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
            assert error < (0.1 if rounded else 1e-5), f"{name}: {error}"


@torch.no_grad()
def test_layers_that_no_packed_block_divides(tmp_path):
    shape = {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    new_model(**SHAPE | shape).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load(tmp_path, "bitsandbytes nf4")
    assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == "Params4bit"
    ids = sentences(2, 1000)
    whole = model.train()(ids, skip_logits=False).logits
    tolerance = {"rtol": 0.0, "atol": 0.03 * whole.float().std().item()}
    again = load(tmp_path, "bitsandbytes nf4")
    torch.testing.assert_close(again(ids).logits, whole, **tolerance)
    assert again.generate(ids[:1, :8], max_new_tokens=4, do_sample=False).shape == (1, 12)


def _values(weight: torch.Tensor) -> torch.Tensor:
    """The stored values of a quantized weight, or the dequantized ones."""
    return weight.detach() if isinstance(weight, nn.Parameter) and weight.dtype.itemsize == 1 else weight.dequantize()
