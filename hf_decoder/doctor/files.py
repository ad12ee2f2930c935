"""Rows about the files of a checkpoint: formats, code, weights, model card."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_decoder.doctor.code import Origin
from hf_decoder.doctor.report import Check, Finding, failed, passed, skipped, warned
from hf_decoder.doctor.subject import OTHER_WEIGHTS, PICKLES, Subject
from hf_decoder.interop.adapters import ADAPTER_WEIGHTS
from hf_decoder.interop.checkpoint import INDEX_NAME, WEIGHTS_NAME, read_tensors
from hf_decoder.safety.terminal import first_line

# A pickle of protocol 2 or later starts like this. torch.save wraps a pickle into a zip.
PICKLE_START = re.compile(rb"\x80[\x02-\x05]")
ZIP_START = b"PK\x03\x04"
PLACEHOLDERS = ("[More Information Needed]", "{{", "TODO")


def check_formats(subject: Subject) -> Finding:
    """No file is a pickle, by its name and its first bytes, and the weights are in safetensors."""
    pickles = [file for file in subject.files if _is_pickle(subject.folder / file)]
    if pickles:
        remedy = None
        if not any(PurePosixPath(file).suffix.lower() == ".bin" and "model" in file for file in pickles):
            remedy = f"delete {' '.join(pickles)}: loading the model needs none of them"
        return failed(f"reading them can run code: {', '.join(pickles)}", remedy)
    weights = [file for file in subject.files if file.endswith(".safetensors")]
    if not weights:
        return failed("the folder holds no safetensors file")
    others = [file for file in subject.files if PurePosixPath(file).suffix.lower() in OTHER_WEIGHTS]
    if others:
        return warned(f"the same weights again in another format: {', '.join(others)}", "delete them if not needed")
    apart = f"; not examined: {', '.join(subject.passed_over)}" if subject.passed_over else ""
    return passed(f"{len(weights)} safetensors file{'s' if len(weights) > 1 else ''}, no pickle{apart}")


def _is_pickle(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        return True
    if not path.is_file() or suffix in (".safetensors", ".json", ".md", ".txt", ".py"):
        return False
    with path.open("rb") as file:
        start = file.read(4)
    return bool(PICKLE_START.match(start)) or start == ZIP_START


def check_code(subject: Subject) -> Finding:
    """The only code is the model's own, unchanged, and no JSON file fetches code from elsewhere."""
    code = subject.code
    if code.elsewhere is not None:
        return failed(code.elsewhere)
    if code.origin is Origin.OLDER:
        remedy = "load it and save it again with this version of hf_decoder, or install the version that wrote it"
        return warned(code.detail, remedy) if subject.trust_remote_code else failed(code.detail, remedy)
    if code.origin is Origin.FOREIGN:
        if subject.trust_remote_code and not subject.is_ours:
            listed = ", ".join(code.files)
            return warned(f"trusted by --trust_remote_code: {listed}", "read these files before every new revision")
        return failed(code.detail)
    if code.origin is Origin.OWN:
        return passed(f"{len(code.files)} files, all equal to the installed package's")
    if subject.is_ours:
        return warned(
            "no code: other users need the hf_decoder package",
            "load it and save_pretrained it into a new folder: that writes the code beside the weights",
        )
    return passed("no code" if subject.is_adapter else "no code: the class is part of transformers")


def check_weights(subject: Subject) -> Finding:
    """Every file of the index exists, can be read, and holds the tensors that the index places in it."""
    if subject.is_quantized:
        return skipped("quantized weights: the loader of that method checks them")
    if subject.is_adapter:
        return _check_adapter_weights(subject.folder / ADAPTER_WEIGHTS)
    shards = [file for file in subject.files if file.endswith(".safetensors") and "/" not in file]
    index = (subject.folder / INDEX_NAME).is_file()
    named = {WEIGHTS_NAME}
    if index:
        named = set(map(str, (subject.values_of(INDEX_NAME).get("weight_map") or {}).values()))
    try:
        tensors = read_tensors(subject.folder)
    except ValueError as error:
        return failed(str(error).replace(f"{subject.folder}/", ""))
    surplus = sorted(set(shards) - named)
    if surplus:
        return failed(f"weights that nothing refers to: {', '.join(surplus)}", f"delete {' '.join(surplus)}")
    for name, tensor in tensors.items():
        if not bool(tensor.load().isfinite().all()):
            return failed(
                f"{name} holds values that are not finite",
                "training diverged or a file is damaged: go back to an earlier checkpoint",
            )
    size = sum(tensor.num_bytes for tensor in tensors.values())
    return passed(f"{len(tensors)} tensors, {size / 1e6:,.1f} MB, all values finite")


def _check_adapter_weights(path: Path) -> Finding:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        return failed(f"{path.name} is absent, damaged or cut short: {first_line(error)}")
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            return failed(f"{name} holds values that are not finite")
    return passed(f"{len(tensors)} tensors, all values finite")


def check_card(subject: Subject) -> Finding:
    """README.md names licence, library and task, says how to load the model, and has no placeholders left."""
    from huggingface_hub import ModelCard

    path = subject.folder / "README.md"
    if not path.is_file():
        return failed("there is no README.md")
    try:
        card = ModelCard.load(path)
    except Exception as error:  # errors of YAML, and of the checks of ModelCard
        return failed(f"the metadata at the top of README.md cannot be read: {' '.join(str(error).split())}")
    text, data = card.text, card.data.to_dict()
    lacking = [field for field in ("library_name", "pipeline_tag") if not data.get(field)]
    if lacking:
        return failed(f"its metadata lacks {', '.join(lacking)}")
    for placeholder in PLACEHOLDERS:
        if placeholder in text:
            return failed(f"it still holds the placeholder {placeholder!r}")
    if "from_pretrained(" not in text and "pipeline(" not in text:
        return failed("it does not show how to load the model")
    absent = [link for link in local_links(text) if link not in subject.files]
    if absent:
        return failed(f"it refers to {absent[0]}, which is not in the folder")
    if not data.get("license"):
        return warned("it names no licence: nobody may use the model", "set `license:` in its metadata")
    measured = len(data.get("model-index") or [])
    return passed(f"licence {data['license']}, " + ("with measured results" if measured else "no measured results"))


def local_links(text: str) -> list[str]:
    """The files of the card's own folder that it refers to."""
    links = re.findall(r"\]\(([^()\s]+)\)", text)  # without "(", so that each letter is looked at once
    return [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#|/", link)]


CHECKS = (
    Check(
        "formats",
        "safetensors only, no pickle",
        "a pickle runs its author's code on the machine of everyone who loads it",
        "load it once, if you trust it, and save_pretrained it: that writes safetensors",
        check_formats,
        needs="",
    ),
    Check(
        "code",
        "no code but the model's own",
        "with trust_remote_code=True a user would run it",
        "read it; then delete it, or pass --trust_remote_code if you trust it",
        check_code,
        needs="",
    ),
    Check(
        "weights",
        "weights whole and finite",
        "the model does not load, or computes with damaged weights",
        "copy or download the weights again",
        check_weights,
        needs="",
    ),
    Check(
        "card",
        "model card complete",
        "a reader does not learn what the model is, what it may be used for, or how to load it",
        "write README.md, as hf-decoder pretrain, finetune and convert do; see https://hf.co/docs/hub/model-cards",
        check_card,
        needs="",
    ),
)
