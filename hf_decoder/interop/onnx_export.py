"""Exports one ONNX graph for prefill and cached steps by transformers' exporter, and runs it in onnxruntime.

Inputs of the graph: `input_ids` and `position_ids` (B, S), `attention_mask` (B, P + S) with 0 for padding, and keys
and values of the P earlier tokens, (B, G, P, E) each, where P starts at 0. Outputs: logits (B, S, V), and keys and
values of all P + S tokens. All is fp32.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

from hf_decoder.interop.verification import TOLERANCE, VerificationError
from hf_decoder.model.modeling_hf_decoder import CACHE_NAME
from hf_decoder.safety.quiet import quiet

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FILE = "model.onnx"
# onnxruntime adds in another order than torch in every layer.
ROUNDING = 10 * TOLERANCE


def require_packages() -> None:
    """Raises ValueError unless the packages of exporter and check are installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--to onnx needs {', '.join(missing)}: pip install 'hf-decoder[onnx]'")


def check_config(config: Any) -> None:
    """Raises ValueError for RoPE frequencies that are not constant."""
    if config.rope_parameters["rope_type"] == "dynamic":
        raise ValueError(
            "--to onnx cannot express rope_type='dynamic': its frequencies change with the length of the text"
        )


def load(folder: Path) -> PreTrainedModel:
    """Loads a checkpoint folder for export: fp32, in evaluation mode."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
        ).eval()


def export(model: PreTrainedModel, folder: Path) -> None:
    """Writes model.onnx, its weights beside it, and config.json into the new `folder`."""
    from transformers.exporters import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    # Two rows of different length: no size becomes a constant, and the mask stays an input.
    ids = _ids(model, 2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with _quiet_exporters():
        stages = decompose_for_generation(model, {"input_ids": ids, "attention_mask": mask}, multi_token_decode=True)
        step: Any
        step, inputs = stages["decode"]
        program: Any = OnnxExporter().export(step, inputs, OnnxConfig(dynamic=True))
        if hasattr(program, "save_pretrained"):
            program.save_pretrained(folder)
        else:  # an older exporter gives torch's own program
            folder.mkdir(exist_ok=True)
            program.save(folder / FILE, external_data=True)
            model.config.save_pretrained(folder)


class OnnxModel:
    """An exported folder in onnxruntime on the CPU. It keeps keys and values between calls."""

    def __init__(self, folder: Path, config: Any):
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)
        self.session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.config = config
        self.state: dict[str, torch.Tensor] = {}

    def start(self, rows: int) -> None:
        """Starts `rows` new texts."""
        nothing = torch.zeros(rows, self.config.num_key_value_heads, 0, self.config.head_dim)
        # A layer with a window keeps its length as state.
        window = torch.tensor(self.config.sliding_window or 0)
        names = [name.removeprefix("input.") for name in self.inputs if name.startswith("input.")]
        self.state = {name: nothing if name.endswith((".keys", ".values")) else window for name in names}

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits (B, S, V) of the next S tokens; `attention_mask` (B, P + S) is of all tokens so far."""
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
        given |= {f"input.{name}": tensor for name, tensor in self.state.items()}
        results = self.session.run(None, {name: given[name].numpy() for name in self.inputs})
        outputs = {name: torch.from_numpy(value) for name, value in zip(self.outputs, results, strict=True)}
        self.state = {name: outputs.get(f"output.{name}", tensor) for name, tensor in self.state.items()}
        return outputs["logits"]


@torch.inference_mode()
def verify(model: PreTrainedModel, folder: Path) -> float:
    """Compares prefill and three cached steps in onnxruntime with `model`, with and without padding.

    The lengths differ from those of the export, and reach past a short sliding window. Returns the largest difference
    of two logits.

    Raises:
        VerificationError: if a logit differs by more than `ROUNDING` of the largest.
    """
    config: Any = model.config
    runtime = OnnxModel(folder, config)
    window = getattr(config, "sliding_window", None)
    largest = 0.0
    length = min(19 if window is None or window > 64 else max(19, window + 5), config.max_position_embeddings - 3)
    for padding in (0, 3):
        ids = _ids(model, 3, length + 3)
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        cache = DynamicCache(config=config)
        runtime.start(len(ids))
        for start, stop in ((0, length), (length, length + 1), (length + 1, length + 2), (length + 2, length + 3)):
            positions = (mask[:, :stop].cumsum(-1) - 1).clamp(min=0)[:, start:]
            expected = model(
                ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, **{CACHE_NAME: cache}
            ).logits
            logits = runtime(ids[:, start:stop], mask[:, :stop])
            seen = mask[:, start:stop].bool()  # the logits of padding mean nothing
            difference = (logits - expected)[seen].abs().max().item()
            limit = ROUNDING * max(1.0, expected.abs().max().item())
            if not difference <= limit:  # also when it is not a number
                what = "prefill" if start == 0 else f"the cached step at position {start}"
                raise VerificationError(
                    f"logits of the ONNX model differ from the source's by {difference:.2e} in {what}"
                    f"{' with padding' if padding else ''}; rounding explains {limit:.2e}"
                )
            largest = max(largest, difference)
    return largest


def _ids(model: PreTrainedModel, *shape: int) -> torch.Tensor:
    config: Any = model.config
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def _quiet_exporters() -> Iterator[None]:
    """Silences the exporters, which print every stage, and warn of every size by loggers without a common name."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
