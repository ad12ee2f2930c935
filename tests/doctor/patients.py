"""Checkpoints for the doctor: healthy ones, and a class that computes wrong in one way that its config names."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_decoder.doctor import CHECKS, Row, run_doctor

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# A model

```python
from transformers import pipeline
generate = pipeline("text-generation", model="a-model")
```
"""
# Rows that start another process, and rows that train.
PROCESS_ROWS = ("reload", "remote_code", "save_again")
TEXT_ROWS = ("likelihood",)  # need a text, or a figure in the card
TRAINING_ROWS = ("learns", "gradients", "checkpointing", "accumulation", "resume")
ROWS = tuple(check.name for check in CHECKS if check.name not in (*PROCESS_ROWS, *TRAINING_ROWS, *TEXT_ROWS))


def shape(tokenizer) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }


def randomise(model: nn.Module) -> nn.Module:
    """Gives every parameter a random value that the output feels."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.25 * noise)
    return model


def save(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


def train(model: nn.Module, tokenizer: Any, text: str, steps: int = 200) -> nn.Module:
    """Learns a text well enough for a mistake in the weights to show."""
    torch.manual_seed(0)
    rows = torch.tensor(tokenizer(text)["input_ids"]).unfold(0, 32, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        ids = rows[torch.randint(len(rows), (16,))]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


class CachedLinear(nn.Linear):
    """Keeps the weights of its first call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "kept"):
            self.kept = self.weight.detach().clone()
        return nn.functional.linear(x, self.kept)


class FixedRotaryEmbedding(LlamaRotaryEmbedding):
    """Knows one base, whatever the config says."""

    @staticmethod
    def compute_default_rope_parameters(config, *args, **kwargs):  # transformers 5.17 passes the device, too
        dim = config.hidden_size // config.num_attention_heads
        return 500.0 ** -(torch.arange(0, dim, 2, dtype=torch.float) / dim), 1.0


class DoubledBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class PatientConfig(LlamaConfig):
    model_type = "doctor_patient"
    defect: str = "none"


class PatientForCausalLM(LlamaForCausalLM):
    """Llama with the defect that the config names."""

    config_class = PatientConfig

    def __init__(self, config):
        super().__init__(config)
        self.rows_seen = 0
        if config.defect == "merge":
            for layer in self.model.layers:
                layer.self_attn.q_proj.__class__ = CachedLinear
        if config.defect == "rope":
            self.model.rotary_emb = FixedRotaryEmbedding(config)
        if config.defect == "unused":
            self.unused = nn.Parameter(torch.ones(3))
        if config.defect == "detached":
            for layer in self.model.layers:
                layer.self_attn.v_proj.register_forward_hook(lambda module, args, output: output.detach())
        if config.defect == "dropout":
            for layer in self.model.layers:
                layer.mlp.register_forward_hook(lambda module, args, out: nn.functional.dropout(out, 0.1, True))

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, labels=None,
                use_cache=None, **kwargs):  # fmt: skip
        past_key_values = kwargs.pop("cache", past_key_values)  # its name from transformers 5.24 on
        defect = self.config.defect
        if defect == "padding" and attention_mask is not None:
            attention_mask = torch.ones_like(attention_mask)
        if defect == "packing" and past_key_values is None:
            position_ids = None
        if (defect == "dynamic" and type(past_key_values) is DynamicCache) or (
            defect == "static" and isinstance(past_key_values, StaticCache)
        ):
            position_ids = torch.arange(input_ids.shape[1])[None]  # as if nothing came before
        if defect == "shift" and labels is not None:
            labels = labels.roll(-1, dims=1)
        seen = kwargs.get("num_items_in_batch")
        if defect == "accumulation":
            kwargs.pop("num_items_in_batch", None)
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        logits = outputs.logits
        if defect == "future":
            logits = logits + torch.cat([logits[:, 1:], torch.zeros_like(logits[:, :1])], dim=1)
        elif defect == "batch":
            logits = logits - 0.1 * logits.mean(0, keepdim=True) * (len(logits) > 1)
        elif defect == "eager" and self.config._attn_implementation == "eager":
            logits = logits * 1.01
        elif defect == "nan" and attention_mask is not None and attention_mask.ndim == 2:
            if logits.dtype != torch.float32:
                logits = logits / (attention_mask.sum(-1) > 0)[:, None, None]
        elif defect == "overflow":
            logits = logits * 1e5
        elif defect == "context":  # says the same whatever came before
            logits = self.lm_head(self.model.embed_tokens(input_ids))
        elif defect == "gradient":
            logits = DoubledBackward.apply(logits)
        elif defect == "checkpointing" and self.training and self.model.gradient_checkpointing:
            logits = logits * 1.1
        outputs.logits = logits
        if labels is not None:
            outputs.loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            if defect == "forgetful" and seen is not None and self.training:
                outputs.loss = outputs.loss * (1 + self.rows_seen // 4)
                self.rows_seen += len(input_ids)
        return outputs

    def generate(self, *args, **kwargs):
        if self.config.defect == "penalty":
            kwargs.setdefault("repetition_penalty", 5.0)
        return super().generate(*args, **kwargs)


AutoConfig.register("doctor_patient", PatientConfig, exist_ok=True)
AutoModelForCausalLM.register(PatientConfig, PatientForCausalLM, exist_ok=True)


def patient(tokenizer: Any, folder: Path, defect: str, **fields: Any) -> Path:
    """A checkpoint whose class has `defect`."""
    torch.manual_seed(0)
    return save(
        randomise(PatientForCausalLM(PatientConfig(**shape(tokenizer), defect=defect, **fields))), tokenizer, folder
    )


def examine(folder: Path, rows: tuple[str, ...] = ROWS, **kwargs: Any) -> dict[str, Row]:
    """The rows of these names, by name."""
    return {row.name: row for row in run_doctor(folder, rows=rows, **kwargs).rows}


def of(status: str, rows: dict[str, Row]) -> dict[str, str]:
    """Name -> detail of the rows of a status."""
    return {name: row.detail for name, row in rows.items() if row.status == status}


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def edit_json(path: Path, **changes: Any) -> None:
    """Sets fields of a JSON file; `...` takes one out."""
    values = json.loads(path.read_text(encoding="utf-8"))
    for name, value in changes.items():
        if value is ...:
            values.pop(name)
        else:
            values[name] = value
    path.write_text(json.dumps(values), encoding="utf-8")


def edit_weights(folder: Path, change: Any) -> None:
    """Calls `change` with the dictionary of tensors, and writes it back."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
