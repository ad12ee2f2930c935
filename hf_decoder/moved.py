"""Old import paths of version 0.1: an ImportError says where each module is now. Goes with version 0.3."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

MOVED = {
    "accounting": "costs.accounting",
    "adapters": "interop.adapters",
    "benchmarking": "evaluation.benchmarking",
    "checkpoints": "training.checkpoints",
    "classification": "evaluation.classification",
    "completion": "evaluation.batch_generation",
    "corpus": "data.documents",
    "crossvalidation": "tuning.crossvalidation",
    "examples": "data.records",
    "finetuning": "tuning.finetuning",
    "fresh_process": "safety.fresh_process",
    "guards": "training.stop_conditions",
    "hub": "publishing.push",
    "judgment": "evaluation.blind_comparison",
    "launch": "training.launch",
    "layouts": "training.checkpoint_formats",
    "modelcard": "reporting.model_card",
    "ngrams": "tuning.ngrams",
    "pace": "training.throughput",
    "packing": "data.packing",
    "planning": "training.planning",
    "preparation": "training.run_rows",
    "presets": "costs.presets",
    "quantization": "interop.quantization",
    "reading": "data.reading",
    "receiver": "publishing.verified_download",
    "recipe": "training.optimizers",
    "results": "training.run_report",
    "sizes": "interop.weight_sizes",
    "sources": "data.sources",
    "streamed_rows": "training.streamed_rows",
    "streamed_text": "data.streamed_text",
    "streaming": "data.streaming",
    "tokenization": "data.tokenization",
    "tokenizer_report": "data.tokenizer_report",
}


class _OldPaths(MetaPathFinder):
    """Asked last, when no module of that name was found."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        package, _, name = fullname.rpartition(".")
        if package == "hf_decoder" and name in MOVED:
            raise ModuleNotFoundError(f"{fullname} is now hf_decoder.{MOVED[name]}", name=fullname)


def explain_old_paths() -> None:
    """Has imports of moved modules fail with their new path."""
    if not any(type(finder).__name__ == _OldPaths.__name__ for finder in sys.meta_path):
        sys.meta_path.append(_OldPaths())


def names_went_to(module: str) -> Callable[[str], Any]:
    """Gives the `__getattr__` of a room that bears the name of a former module, whose names are in `module` now."""
    room = module.rpartition(".")[0]

    def explain(name: str) -> Any:
        is_old = not name.startswith("_") and find_spec(f"{room}.{name}") is None
        if is_old and hasattr(importlib.import_module(module), name):
            raise ImportError(f"{room}.{name} is now {module}.{name}", name=room)
        raise AttributeError(f"module {room!r} has no attribute {name!r}")

    return explain


__all__ = ["explain_old_paths", "names_went_to"]
