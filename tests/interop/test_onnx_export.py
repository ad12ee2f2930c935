"""What leaves as ONNX or through torch.export computes in its own runtime what the model computes."""

import onnx
import pytest
import torch
from stock_models import LLAMA3, SHAPE, ids, randomise, rope
from transformers import AutoTokenizer, GenerationConfig
from transformers.exporters import DynamoConfig, DynamoExporter
from transformers.exporters.utils import decompose_for_generation

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.interop import onnx_export
from hf_decoder.interop.conversion import convert
from hf_decoder.interop.onnx_export import OnnxModel
from hf_decoder.interop.verification import VerificationError

pytestmark = pytest.mark.peers

CASES = {
    "tied, QK-norm": {"tie_word_embeddings": True, "qk_norm": True},
    "window and NoPE": {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "no_rope_layers": [0, 1],
        "final_logit_softcapping": 5.0,
    },
    "biases, one key/value head": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "Llama 3": LLAMA3,
}
PARAMETERS = [pytest.param(case, marks=[pytest.mark.slow] if i > 1 else []) for i, case in enumerate(CASES)]


def ours(**fields) -> HfDecoderForCausalLM:
    return randomise(HfDecoderForCausalLM(HfDecoderConfig(**{**SHAPE, "num_hidden_layers": 2, **fields})))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer):
    """A bfloat16 checkpoint with a tokenizer, and the folder that it became."""
    folder = tmp_path_factory.mktemp("onnx")
    model = ours(**CASES["tied, QK-norm"], vocab_size=len(tokenizer)).to(torch.bfloat16)
    model.save_pretrained(folder / "ours")
    tokenizer.save_pretrained(folder / "ours")
    assert convert(str(folder / "ours"), folder / "onnx", to="onnx") == "ONNX"
    return model.float(), folder


def test_frequencies_that_change_with_the_length_are_refused(tmp_path):
    ours(**rope("dynamic", factor=2.0)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="cannot express rope_type='dynamic'"):
        convert(str(tmp_path / "ours"), tmp_path / "onnx", to="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@torch.no_grad()
def test_onnxruntime_continues_a_text_with_its_own_cache(exported):
    """One prompt of another length and batch than the export saw, then step by step, against no cache at all."""
    model, folder = exported
    runtime = OnnxModel(folder / "onnx", model.config)
    tokens = ids(3, 11, vocab_size=model.config.vocab_size)
    mask = torch.ones_like(tokens)
    runtime.start(3)
    logits = runtime(tokens, mask)
    for _ in range(6):
        expected = model(tokens, use_cache=False).logits
        torch.testing.assert_close(logits[:, -1], expected[:, -1], rtol=0.0, atol=1e-4)
        tokens = torch.cat([tokens, expected[:, -1:].argmax(-1)], dim=1)
        mask = torch.ones_like(tokens)
        logits = runtime(tokens[:, -1:], mask)


def test_the_folder_is_whole(exported):
    model, folder = exported
    onnx.checker.check_model(folder / "onnx" / "model.onnx")
    assert AutoTokenizer.from_pretrained(folder / "onnx")("the end")["input_ids"]
    assert {path.name for path in folder.iterdir()} == {"ours", "onnx"}
    held = (folder / "onnx" / "model.onnx.data").stat().st_size
    assert held < 1.1 * 4 * sum(p.numel() for p in model.parameters())  # a tied table is stored once


def test_a_changed_weight_is_noticed(exported):
    model, folder = exported
    onnx_export.verify(model, folder / "onnx")
    scale = model.model.layers[1].post_attention_layernorm.weight
    scale.data.mul_(1.01)
    try:
        with pytest.raises(VerificationError, match=r"differ from the source's by .* in prefill"):
            onnx_export.verify(model, folder / "onnx")
    finally:
        scale.data.div_(1.01)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES)[1:])
def test_every_trait_is_verified(case: str, tmp_path):
    """The verification runs past the window, with padding, in prefill and in cached steps."""
    ours(**CASES[case]).save_pretrained(tmp_path / "ours")
    convert(str(tmp_path / "ours"), tmp_path / "onnx", to="onnx")


def test_a_result_that_differs_is_not_kept(tmp_path, monkeypatch):
    ours().save_pretrained(tmp_path / "ours")

    def differs(*_):
        raise VerificationError("logits differ")

    monkeypatch.setattr(onnx_export, "export", lambda _, folder: folder.mkdir())
    monkeypatch.setattr(onnx_export, "verify", differs)
    with pytest.raises(VerificationError):
        convert(str(tmp_path / "ours"), tmp_path / "onnx", to="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_bad_input(tmp_path, monkeypatch):
    from stock_models import build

    build("llama").save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"first convert"):
        convert(str(tmp_path / "stock"), tmp_path / "onnx", to="onnx")
    with pytest.raises(ValueError, match="does not fit --to onnx"):
        convert(str(tmp_path / "stock"), tmp_path / "x.gguf", to="onnx")
    find_spec = onnx_export.importlib.util.find_spec
    monkeypatch.setattr(onnx_export.importlib.util, "find_spec", lambda n: None if n == "onnxscript" else find_spec(n))
    with pytest.raises(ValueError, match=r"needs onnxscript: pip install 'hf-decoder\[onnx\]'"):
        convert(str(tmp_path / "stock"), tmp_path / "onnx", to="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]


@torch.no_grad()
@pytest.mark.parametrize("case", PARAMETERS)
def test_torch_export_with_a_static_cache(case: str):
    """transformers' exporter, prefill and decode over a cache of fixed length, against the model without a cache."""
    model = ours(**CASES[case])
    prompt = ids(2, 7)
    settings = GenerationConfig(cache_implementation="static", max_cache_len=24, pad_token_id=0, eos_token_id=None)
    exported = DynamoExporter().export_for_generation(
        model,
        {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)},
        DynamoConfig(),
        generation_config=settings,
    )
    # a dictionary in transformers 5.17
    programs = getattr(exported, "components", exported)
    other = ids(2, 7, seed=1)
    stages = decompose_for_generation(
        model, {"input_ids": other, "attention_mask": torch.ones_like(other)}, generation_config=settings
    )
    whole = other
    for name in ("prefill", "decode"):
        _, inputs = stages[name]
        new = inputs["input_ids"]
        whole = new if name == "prefill" else torch.cat([whole, new], dim=1)
        settings_of_the_trace = ("use_cache", "return_dict")
        inputs = {key: value for key, value in inputs.items() if key not in settings_of_the_trace}
        outputs = getattr(programs[name], "program", programs[name]).module()(**inputs)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        expected = model(whole, use_cache=False).logits[:, -logits.shape[1] :]
        torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-4)
    assert whole.shape[1] == 8


@torch.no_grad()
@pytest.mark.slow
def test_executorch():
    """transformers' exporter for ExecuTorch, run by its own runtime on XNNPACK."""
    pytest.importorskip("executorch", reason="executorch is not installed: pip install executorch")
    from transformers.exporters import ExecutorchConfig, ExecutorchExporter

    model, sample = ours(**CASES["tied, QK-norm"]), ids(1, 12)
    program = ExecutorchExporter().export(model, {"input_ids": sample, "use_cache": False}, ExecutorchConfig())
    other = ids(1, 12, seed=1)
    torch.testing.assert_close(program(input_ids=other).logits, model(other).logits, rtol=0.0, atol=1e-4)
