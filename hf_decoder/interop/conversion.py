"""Converts a checkpoint of any supported family to any other. Tensors are read lazily, under our names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from hf_decoder import HfDecoderForCausalLM, HfDecoderPreTrainedModel
from hf_decoder.interop import checkpoint, gguf_read, gguf_write, ollama, onnx_export, verification
from hf_decoder.interop.checkpoint import LazyTensor, Tensors
from hf_decoder.interop.families import FAMILIES, OURS, BuiltConfig, Family, fused_names, read_config, to_stock
from hf_decoder.interop.untrusted_files import check_folder
from hf_decoder.interop.weight_sizes import check_layers, parameter_shapes
from hf_decoder.model.configuration_hf_decoder import AUTO_MAP
from hf_decoder.reporting.model_card import DIFFERENCE, NOT_MEASURED, write_conversion_card

GGUF, ONNX = "gguf", "onnx"
TARGETS = ("auto", OURS, *FAMILIES, GGUF, ONNX)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Bytes for configs, code and index, besides tensors and copied files.
SMALL_FILES = 1 << 20


@dataclass(frozen=True)
class Source:
    """A checkpoint of any family, with our names. `family` is None for our own and for GGUF."""

    path: Path
    config: BuiltConfig
    family: Family | None
    tensors: Tensors
    write_tokenizer: Callable[[Path], None]

    @property
    def is_gguf(self) -> bool:
        return self.path.is_file()

    @property
    def kind(self) -> str:
        """What the source is, in Markdown."""
        if self.is_gguf:
            return "a GGUF file"
        return f"`{HfDecoderForCausalLM.__name__ if self.family is None else self.family.model_class}`"

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def open_source(name: str, revision: str | None = None) -> Source:
    """Reads config and tensor table of a folder, a Hub name or a .gguf file, but no weights yet.

    Raises:
        ValueError: if it is damaged or not supported.
    """
    file = Path(name).expanduser()
    if file.suffix == ".gguf" and file.is_file():
        config, tensors, write_tokenizer = gguf_read.read(file)
        source = Source(file, config, None, tensors, write_tokenizer)
    else:
        folder = checkpoint.locate(name, revision)
        config, family = read_config(folder)
        check_folder(folder)
        stored = {n: t for n, t in checkpoint.read_tensors(folder).items() if not checkpoint.IGNORED.fullmatch(n)}
        tensors = stored if family is None else _under_our_names(family, config, stored, str(folder))

        def copy(destination: Path) -> None:
            checkpoint.copy_side_files(folder, destination)
            if family is not None:
                _name_tokenizer_class(destination, family)

        source = Source(folder, config, family, tensors, copy)
    return _checked(source)


def read_gguf(path: Path) -> tuple[BuiltConfig, Tensors]:
    """Config and tensor table of a GGUF file, whatever its tokenizer is; no weights yet.

    Raises:
        ValueError: if anything about it is wrong or not held here, in one line.
    """
    config, tensors, _ = gguf_read.read_model(path)
    source = _checked(Source(path, config, None, tensors, lambda folder: None))
    return source.config, source.tensors


def _checked(source: Source) -> Source:
    """The source, if it has the tensors that its config asks for, without the copy of a tied head."""
    config = source.config
    check_layers(config, len(source.tensors), str(source.path))
    tensors = _without_tied_head(source)
    checkpoint.check(tensors, _shapes(HfDecoderForCausalLM, config), str(source.path))
    if config.dtype is None:
        config.dtype = tensors[EMBEDDING].dtype
    return Source(source.path, config, source.family, tensors, source.write_tokenizer)


class SourceName(NamedTuple):
    """The source as the caller named it: a folder, a file or a Hub name."""

    name: str
    revision: str | None

    def describe(self, source: Source) -> dict[str, str]:
        """The words of a card about the source. Of a path it shows only the last part."""
        if source.path == Path(self.name).expanduser():
            return {"source": source.path.resolve().name}
        commit = source.path.name if source.path.parent.name == "snapshots" else self.revision
        return {"source": self.name, "base_model": self.name} | ({"revision": commit} if commit else {})


def _no_progress(_title: str, _total: int) -> Any:
    return tqdm(disable=True)


def convert(
    name: str,
    destination: Path,
    *,
    to: str = "auto",
    outtype: str = "f16",
    max_shard_size: str = "5GB",
    verify: bool = True,
    revision: str | None = None,
    progress: Callable[[str, int], Any] = _no_progress,
) -> str:
    """Converts the checkpoint `name` into a new folder or .gguf file, and returns the kind of the result.

    `to="auto"` turns other families into ours, and ours into the stock class that expresses it. With `verify`, the
    logits of a folder or ONNX are compared with the source's, and a GGUF file is read back number by number. What
    comes from GGUF is not compared. A folder gets a model card. `progress(title, total)` returns an object whose
    `update(bytes)` each tensor calls.

    Raises:
        ValueError: if the source is damaged or not supported, the target cannot express it, or the disk is full.
        verification.VerificationError: if the result computes something else. Then no destination is left.
    """
    if to not in TARGETS:
        raise ValueError(f"--to {to!r} is unknown; choose one of: {', '.join(TARGETS)}")
    if (to == GGUF) != (destination.suffix == ".gguf"):
        raise ValueError(
            f"{destination} does not fit --to {to}: a name that ends in .gguf is a GGUF file, any other a folder"
        )
    if to == GGUF:
        gguf_write.require_package()
    if to == ONNX:
        onnx_export.require_packages()
    max_bytes = checkpoint.parse_size(max_shard_size)
    source = open_source(name, revision)
    is_ours = source.family is None and not source.is_gguf
    named = SourceName(name, revision)
    if to == "auto":
        to = "auto" if is_ours else OURS
    elif to == (OURS if is_ours else source.family and source.family.model_type):
        raise ValueError(f"{name} is already a {to} checkpoint; there is nothing to convert")
    if to == GGUF:
        return _write_gguf(source, destination, outtype, progress, verify=verify)
    if to == ONNX:
        if not is_ours:
            raise ValueError(f"--to onnx takes our own checkpoints; first convert {name} without --to")
        return _write_onnx(source, named, destination, verify=verify)
    if to == OURS:
        compared = verify and not source.is_gguf
        _write_folder(source, named, destination, None, source.config, max_bytes, progress, verify=compared)
        return HfDecoderForCausalLM.__name__
    family, stock_config = to_stock(source.config, to)
    _write_folder(source, named, destination, family, stock_config, max_bytes, progress, verify=verify)
    return family.model_class


def _write_gguf(
    source: Source, destination: Path, outtype: str, progress: Callable[[str, int], Any], *, verify: bool
) -> str:
    plan = gguf_write.plan(source.config, source.tensors, outtype)
    vocabulary = gguf_write.read_vocabulary(source.path, source.config)
    modelfile = ollama.modelfile(destination.name, source.path, source.config.max_position_embeddings)
    with checkpoint.written_aside(destination, plan.num_bytes + SMALL_FILES + vocabulary.num_bytes) as aside:
        bar = progress("writing", plan.num_bytes)
        gguf_write.write(aside, destination.stem, plan, vocabulary, bar.update)
        bar.close()
        if verify:
            gguf_read.verify(aside, plan, source.tensors, source.path)
    recipe = destination.with_name("Modelfile")
    if recipe.exists():  # of another GGUF file
        recipe = destination.with_suffix(".Modelfile")
    recipe.write_text(modelfile, encoding="utf-8")
    return f"{plan.architecture} in GGUF, {outtype}; `ollama create NAME -f {recipe}` makes it a model of Ollama"


def _write_card(
    source: Source, named: SourceName, folder: Path, title: str, kind: str, difference: float | None
) -> None:
    words = {"title": title, "kind": kind, "source_kind": source.kind, **named.describe(source)}
    card = source.path / "README.md" if not source.is_gguf else None
    parameters = sum(math.prod(tensor.shape) for tensor in source.tensors.values())
    write_conversion_card(
        folder,
        words,
        parameters=parameters,
        context_length=source.config.max_position_embeddings,
        measured={DIFFERENCE: f"{difference:.1e} (fp32)" if difference is not None else NOT_MEASURED},
        source_card=card,
    )


def _write_onnx(source: Source, named: SourceName, destination: Path, *, verify: bool) -> str:
    onnx_export.check_config(source.config)
    num_bytes = sum(tensor.num_bytes // tensor.dtype.itemsize for tensor in source.tensors.values()) * 4
    side = sum((source.path / path).stat().st_size for path in checkpoint.side_files(source.path))
    with checkpoint.written_aside(destination, num_bytes + side + SMALL_FILES) as aside:
        model = onnx_export.load(source.path)
        onnx_export.export(model, aside)
        source.write_tokenizer(aside)
        difference = onnx_export.verify(model, aside) if verify else None
        _write_card(source, named, aside, destination.name, "onnx", difference)
    return "ONNX"


def _write_folder(
    source: Source,
    named: SourceName,
    destination: Path,
    family: Family | None,
    config: Any,
    max_bytes: int,
    progress: Callable[[str, int], Any],
    *,
    verify: bool,
) -> None:
    tensors = source.tensors if family is None else _under_their_names(family, source.tensors)
    if family is not None:
        model_class = getattr(transformers, family.model_class)
        checkpoint.check(tensors, _shapes(model_class, config), family.model_class)
    side = sum((source.path / path).stat().st_size for path in checkpoint.side_files(source.path))
    with checkpoint.written_aside(destination, source.num_bytes + side + SMALL_FILES) as aside:
        aside.mkdir()
        bar = progress("writing", source.num_bytes)
        checkpoint.write_tensors(aside, tensors, max_bytes, bar.update)
        bar.close()
        source.write_tokenizer(aside)
        if not (aside / checkpoint.GENERATION_NAME).is_file():
            GenerationConfig.from_model_config(config).save_pretrained(aside)
        if family is None:
            _save_our_config(config, aside)
        else:
            config.save_pretrained(aside)
        difference = verification.verify(source.path, aside) if verify else None
        kind = HfDecoderForCausalLM.__name__ if family is None else family.model_class
        _write_card(source, named, aside, destination.name, kind, difference)


def _save_our_config(config: BuiltConfig, folder: Path) -> None:
    """Writes config and code as the model's `save_pretrained` does."""
    config.architectures = [HfDecoderForCausalLM.__name__]
    config.auto_map = dict(AUTO_MAP)
    custom_object_save(HfDecoderPreTrainedModel, folder)
    config.save_pretrained(folder)


def _under_our_names(family: Family, config: BuiltConfig, stored: Tensors, where: str) -> Tensors:
    """Splits the matrices that the family fuses. A tensor out of place keeps its name, and is reported later."""
    shapes = _shapes(HfDecoderForCausalLM, config)
    tensors = dict(stored)
    for whole, parts in fused_names(family, list(shapes)).items():
        if len(parts) == 1:
            continue
        if whole not in tensors:
            raise ValueError(f"{where} lacks {whole!r}, which its config.json asks for")
        tensor, sizes = tensors.pop(whole), [shapes[part][0] for part in parts]
        wanted = [sum(sizes), *shapes[parts[0]][1:]]
        if list(tensor.shape) != wanted:
            raise ValueError(
                f"{whole!r} in {where} is of shape {list(tensor.shape)}; its config.json asks for {wanted}"
            )
        tensors |= zip(parts, checkpoint.split_rows(tensor, sizes), strict=True)
    return tensors


def _under_their_names(family: Family, tensors: Tensors) -> Tensors:
    def stacked(names: list[str]) -> LazyTensor:
        parts = [tensors[name] for name in names]
        return parts[0] if len(parts) == 1 else checkpoint.stack_rows(parts)

    return {whole: stacked(names) for whole, names in fused_names(family, list(tensors)).items()}


def _without_tied_head(source: Source) -> Tensors:
    """The source's tensors without the copy of a tied head."""
    tensors = dict(source.tensors)
    if source.config.tie_word_embeddings and {HEAD, EMBEDDING} <= set(tensors):
        if not torch.equal(tensors[HEAD].load(), tensors[EMBEDDING].load()):
            raise ValueError(
                f"{source.path} has tie_word_embeddings=true, but {HEAD} differs from {EMBEDDING}; if the head is "
                "meant to be separate, set tie_word_embeddings to false in config.json"
            )
        del tensors[HEAD]
    return tensors


def _shapes(model_class: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors in a checkpoint of this model."""
    return parameter_shapes(lambda: model_class(config))


def _name_tokenizer_class(folder: Path, family: Family) -> None:
    """Writes the tokenizer's class into its config. Older checkpoints leave it to the model type, which changes."""
    path = folder / "tokenizer_config.json"
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        name = TOKENIZER_MAPPING_NAMES.get(family.model_type)
        if not values.get("tokenizer_class") and isinstance(name, str):
            path.write_text(json.dumps(values | {"tokenizer_class": name}, indent=2) + "\n", encoding="utf-8")
