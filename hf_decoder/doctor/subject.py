"""A `Subject` is the checkpoint under examination. It loads model and tokenizer on first use.

Nothing here writes into the checkpoint. Weights are read from safetensors only. Code of the folder runs only if
the caller trusts it.
"""

from __future__ import annotations

import copy
import gc
import inspect
import os
import re
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import hf_decoder  # noqa: F401  (registers the model type)
from hf_decoder.doctor.code import Code, Origin, code_of, values_of
from hf_decoder.interop.adapters import is_adapter
from hf_decoder.interop.checkpoint import download, local_folder, read_config_values
from hf_decoder.interop.families import OURS
from hf_decoder.interop.untrusted_files import check_folder
from hf_decoder.interop.weight_sizes import check_sizes
from hf_decoder.safety.limits import bound_templates
from hf_decoder.safety.quiet import quiet
from hf_decoder.safety.terminal import first_line

# Files that may hold a pickle, and weights in formats besides safetensors: reported by name, and not downloaded.
PICKLES = {".bin", ".pt", ".pt2", ".pth", ".ckpt", ".pkl", ".pk", ".pickle", ".joblib", ".npy", ".npz", ".dill"}
OTHER_WEIGHTS = {".h5", ".msgpack", ".onnx", ".tflite", ".ot"}
# Folders that no loader reads: checkpoints of a training, records of git and huggingface_hub.
PASSED_OVER = re.compile(r"checkpoint-\d+|\.git|\.cache/huggingface")
PROBE_TOKENS = 72
LONGEST_WINDOW = 496


class Unloadable(Exception):
    """The model or the tokenizer cannot be loaded; the text says why."""


class Subject:
    """A folder or Hub name under examination. `adapter` also allows an adapter's folder, for the rows about files.

    Raises:
        ValueError: if there is no such folder or name, or it holds no model.
    """

    def __init__(
        self,
        name: str | Path,
        *,
        trust_remote_code: bool = False,
        revision: str | None = None,
        adapter: bool = False,
    ):
        self.name = str(name)
        self.trust_remote_code = trust_remote_code
        self.text: str | None = None  # from the caller, to measure the model on
        # Measured by the first row that needs them.
        self.context_effect: float | None = None
        self.has_numbers: bool | None = None
        self.folder, self.files, self.passed_over = _open(self.name, revision)
        self.is_adapter = is_adapter(self.folder)
        if self.is_adapter and adapter:
            return
        if self.is_adapter:
            raise ValueError(f"{name} is an adapter and no model; merge it into its base, and examine the result")
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"folder {name} holds no model: it has no config.json")

    @cached_property
    def values(self) -> dict[str, Any]:
        """The content of config.json; empty if it is damaged."""
        try:
            return read_config_values(self.folder)
        except ValueError:
            return {}

    @property
    def is_ours(self) -> bool:
        return self.values.get("model_type") == OURS

    @property
    def is_quantized(self) -> bool:
        return bool(self.values.get("quantization_config"))

    @property
    def is_stock_class(self) -> bool:
        """Whether the model's class is part of transformers."""
        return type(self.model).__module__.startswith("transformers.models.")

    @cached_property
    def code(self) -> Code:
        """Whose code lies in the folder."""
        return code_of(self.folder, self.files)

    @property
    def may_run_code(self) -> bool:
        """Whether code of the folder may run: it is ours to the byte, or the caller trusts it."""
        return self.trust_remote_code or self.code.origin is Origin.OWN

    @cached_property
    def config(self) -> Any:
        try:
            read_config_values(self.folder)
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # a stranger's config may raise anything
            raise Unloadable(f"config.json cannot be read: {first_line(error)}") from None

    def load(self, dtype: torch.dtype = torch.float32, folder: Path | None = None) -> tuple[Any, dict[str, Any]]:
        """Loads the model anew on the CPU, in evaluation mode. Also returns transformers' report on its tensors.

        Raises:
            Unloadable: if transformers cannot load it.
        """
        kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": self.trust_remote_code}
        kwargs |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        if not self.trust_remote_code and type(self.config) not in AutoModelForCausalLM._model_mapping:
            raise Unloadable(f"a {self.config.model_type!r} model is no causal language model known to transformers")
        auto_class: Any = AutoModelForCausalLM
        with quiet():
            try:
                check_folder(self.folder)
                check_sizes(folder or self.folder, self.config, trust_remote_code=self.trust_remote_code)
                try:
                    model, info = auto_class.from_pretrained(folder or self.folder, **self._with("sdpa"), **kwargs)
                except ValueError as error:
                    if "scaled_dot_product_attention" not in str(error):
                        raise
                    model, info = auto_class.from_pretrained(folder or self.folder, **self._with("eager"), **kwargs)
            except Exception as error:  # damaged weights, missing code, a class that fails
                raise Unloadable(first_line(error)) from None
        return model.eval(), info

    def _with(self, attention: str) -> dict[str, Any]:
        """The config with this attention. Its own choice may be a kernel of the Hub."""
        config = copy.deepcopy(self.config)
        config._attn_implementation = attention
        return {"config": config, "attn_implementation": attention}

    @cached_property
    def _loaded(self) -> tuple[Any, dict[str, Any]] | Unloadable:
        try:
            return self.load()
        except Unloadable as error:  # kept, so that not every row tries again
            return error

    @property
    def model(self) -> Any:
        """The model in fp32. A check leaves it as it was."""
        if isinstance(self._loaded, Unloadable):
            raise self._loaded
        return self._loaded[0]

    @property
    def loading_info(self) -> dict[str, Any]:
        if isinstance(self._loaded, Unloadable):
            raise self._loaded
        return self._loaded[1]

    def release_model(self) -> None:
        """Frees the model's memory. The next use loads it again."""
        self.__dict__.pop("_loaded", None)
        gc.collect()

    def renew_quantized(self) -> None:
        """Loads quantized weights again on next use. bitsandbytes, for one, changes them while it computes."""
        if self.is_quantized:
            self.release_model()

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, or None if there is none.

        Raises:
            Unloadable: if its files are damaged.
        """
        if not any(Path(file).name in ("tokenizer_config.json", "tokenizer.json") for file in self.files):
            return None
        with quiet():
            try:
                check_folder(self.folder)
                bound_templates()
                return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
            except Exception as error:  # tokenizers raises bare Exception for a damaged file
                raise Unloadable(first_line(error)) from None

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The default settings of `generate`: those of generation_config.json, or else of the config."""
        if (self.folder / "generation_config.json").is_file():
            with quiet():
                return GenerationConfig.from_pretrained(self.folder)
        return GenerationConfig.from_model_config(self.config)

    def values_of(self, file: str) -> dict[str, Any]:
        """The object in a JSON file of the folder; empty where it is absent or damaged."""
        return values_of(self.folder / file)

    # ------------------------------------------------------------------------------------------ inputs

    @property
    def probe_tokens(self) -> int:
        """The length of the rows that the model is tried on. It reaches past a short sliding window."""
        config = self.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        length = PROBE_TOKENS
        if isinstance(window, int) and window <= LONGEST_WINDOW:
            length = max(length, window + 16)
        rope = getattr(config, "rope_parameters", None) or {}
        limits = [getattr(config, "max_position_embeddings", None)]
        if rope.get("rope_type") in ("dynamic", "longrope"):  # beyond it the frequencies depend on the length
            limits.append(rope.get("original_max_position_embeddings"))
        return min([length, *(limit for limit in limits if limit)])

    def ids(self, rows: int, length: int | None = None, seed: int = 0) -> torch.Tensor:
        """Random token ids (rows, length) without special tokens."""
        config = self.config.get_text_config()
        special = set()
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(config, name, None)
            special |= set(value if isinstance(value, list | tuple) else [value])
        allowed = torch.tensor([i for i in range(config.vocab_size) if i not in special])
        generator = torch.Generator().manual_seed(seed)
        return allowed[torch.randint(len(allowed), (rows, length or self.probe_tokens), generator=generator)]

    @property
    def cache_argument(self) -> str | None:
        """The name of the cache argument of the model's forward; None if it has none."""
        names = ("cache", "past_key_values")  # from transformers 5.24 on, and before
        return next((name for name in names if self.accepts(name)), None)

    def accepts(self, argument: str) -> bool:
        """Whether the model's forward names this argument. A forward that passes all on is judged by its parent's."""
        classes: tuple[Any, ...] = type(self.model).__mro__
        for model_class in classes:
            parameters = inspect.signature(model_class.forward).parameters
            if "input_ids" in parameters:
                return argument in parameters
        return False


def _open(name: str, revision: str | None) -> tuple[Path, list[str], list[str]]:
    """The local folder, the posix paths of all files of the checkpoint, and the folders that were passed over."""
    if (folder := local_folder(name)) is not None:
        return folder, *_files_in(folder)
    from huggingface_hub import HfApi

    others = sorted({*PICKLES, *OTHER_WEIGHTS, ".gguf"})
    path = download(name, revision, ignore_patterns=[f"*{suffix}" for suffix in others])
    files, passed_over = _files_in(path)
    # Offline, the cache is all there is. Online, the commit that was downloaded lists all its files.
    with suppress(OSError):
        commit = path.name if re.fullmatch(r"[0-9a-f]{40}", path.name) else revision
        files = sorted({*files, *HfApi().list_repo_files(name, revision=commit)})
    return path, files, passed_over


def _files_in(folder: Path) -> tuple[list[str], list[str]]:
    """The files below a folder, where a link to a folder counts as one, and the folders passed over."""
    files, passed_over = [], []
    for place, folders, names in os.walk(folder):
        here = Path(place).relative_to(folder)
        for name in list(folders):
            inner = (here / name).as_posix()
            if (folder / inner).is_symlink():
                files.append(inner)
            elif PASSED_OVER.fullmatch(inner):
                passed_over.append(f"{inner}/")
                folders.remove(name)
        files.extend((here / name).as_posix() for name in names)
    return sorted(files), sorted(passed_over)
