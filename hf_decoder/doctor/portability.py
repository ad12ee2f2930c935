"""Rows about the checkpoint elsewhere: in a new process, without the package, as another class, in another engine."""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from hf_decoder.doctor.code import Origin
from hf_decoder.doctor.numerics import difference, logits_of
from hf_decoder.doctor.report import Check, Finding, failed, passed, skipped, warned
from hf_decoder.doctor.subject import Subject
from hf_decoder.engine.switches import settings
from hf_decoder.interop.backends import backend_conditions
from hf_decoder.interop.families import FAMILIES, OURS, obstacle, read_config
from hf_decoder.safety.fresh_process import run_fresh
from hf_decoder.safety.quiet import quiet

CHILD = Path(__file__).with_name("child.py")
MAX_SECONDS = 1800


def _fresh_logits(subject: Subject, folder: Path, ids: torch.Tensor, *, hidden: bool) -> torch.Tensor:
    """The logits that a new process computes from `folder`. With `hidden` it cannot find this package.

    Raises:
        RuntimeError: if the process fails, with its last line.
    """
    with tempfile.TemporaryDirectory() as scratch:
        task = Path(scratch, "task.json")
        output = Path(scratch, "logits.safetensors")
        task.write_text(
            json.dumps(
                {
                    "folder": str(folder.absolute()),
                    "ids": ids.tolist(),
                    "threads": torch.get_num_threads(),
                    "attention": subject.model.config._attn_implementation,
                    "trust_remote_code": subject.trust_remote_code or (hidden and subject.may_run_code),
                    "register": subject.is_ours and not hidden,
                    "output": str(output),
                }
            ),
            encoding="utf-8",
        )
        run_fresh(CHILD, str(task), hidden=hidden, hub_cache=Path(constants.HF_HUB_CACHE), timeout=MAX_SECONDS)
        return load_file(output)["logits"]


def _compare(subject: Subject, folder: Path, where: str, *, hidden: bool = False) -> Finding:
    """Compares the logits of this process with those of a new process that loads `folder`."""
    ids = subject.ids(2)
    subject.renew_quantized()
    # Without the package only the plain modules run, which add in another order than the engine.
    with settings.override(all=False) if hidden else nullcontext():
        here = logits_of(subject, ids)
        if not torch.equal(here, logits_of(subject, ids)):
            return failed("the same call gives other logits the second time, in this process")
    try:
        there = _fresh_logits(subject, folder, ids, hidden=hidden)
    except RuntimeError as error:
        return failed(f"{where}: {error}")
    if not torch.equal(here, there):
        return failed(f"{where}: logits differ by {difference(here, there):.1e} of the largest")
    return passed(f"{where}: identical to the bit")


def check_reload(subject: Subject) -> Finding:
    """A new process that loads the folder computes the same logits, bit for bit."""
    return _compare(subject, subject.folder, "a fresh process")


def check_remote_code(subject: Subject) -> Finding:
    """A new process without hf_decoder loads the folder by the code in it, and computes the same logits."""
    code = subject.code
    if code.origin is Origin.NONE:
        if not subject.is_ours:
            return skipped("the class is part of transformers, so no code is needed")
        return failed("the folder holds no model code")
    if not subject.may_run_code:
        return skipped(f"the code is not the installed package's ({code.detail}); --trust_remote_code would run it")
    return _compare(subject, subject.folder, "a fresh process without the package", hidden=True)


def check_save_again(subject: Subject) -> Finding:
    """`save_pretrained` into another folder gives a checkpoint with the same logits."""
    with tempfile.TemporaryDirectory() as folder:
        subject.renew_quantized()
        with quiet():
            try:
                subject.model.save_pretrained(folder)
            except NotImplementedError:
                if not subject.is_quantized:
                    raise
                return skipped("transformers cannot save weights that are quantized like this")
        return _compare(subject, Path(folder), "saved again")


def check_export(subject: Subject) -> Finding:
    """A stock class computes the same. The row names it, and what stands in the way of others."""
    try:
        config, family = read_config(subject.folder)
    except ValueError as error:
        return warned(f"cannot be read as our family: {str(error).replace(f'{subject.folder}/', '')}")
    if family is not None:
        return passed(f"{family.model_class} already; hf-decoder convert makes it {OURS}")
    reasons = {name: obstacle(target, config) for name, target in FAMILIES.items()}
    open_to = [name for name, reason in reasons.items() if reason is None]
    closed = {name: reason for name, reason in reasons.items() if reason is not None and name in ("llama", "qwen3")}
    why = "; ".join(f"not {name}: {reason}" for name, reason in closed.items())
    if not open_to:
        return warned(f"no stock class computes this ({why})")
    return passed(f"as {', '.join(open_to)}" + (f" ({why})" if why else ""))


def check_backends(subject: Subject) -> Finding:
    """The model meets what vLLM and SGLang ask before they run it with their attention and cache."""
    with quiet():
        conditions = backend_conditions(subject.model)
    broken = [condition for condition in conditions if not condition.ok]
    if broken:
        return warned(
            f"{len(broken)} of {len(conditions)} conditions fail: {broken[0].name}: {broken[0].why}",
            "serve it with `transformers serve`, or convert it to a class that the engine knows",
        )
    return passed(f"{len(conditions)} conditions hold: {', '.join(condition.name for condition in conditions)}")


CHECKS = (
    Check(
        "reload",
        "same logits in a fresh process",
        "what you measured here is not what others get",
        "a weight or buffer is missing from the files: find what loading computes or draws, and save it",
        check_reload,
        needs="logits",
    ),
    Check(
        "remote_code",
        "same logits without the package",
        "a user who has only transformers cannot load it, or gets another model",
        "load it here and save_pretrained it into a new folder: that writes the code beside the weights",
        check_remote_code,
        needs="logits",
        level="default",
    ),
    Check(
        "save_again",
        "saved again, the same logits",
        "further training loses something when it saves",
        "compare the tensors of both folders; what is missing must become a parameter or a persistent buffer",
        check_save_again,
        needs="logits",
        level="default",
    ),
    Check(
        "export",
        "leaves for a stock class",
        "tools that know only stock classes cannot load it",
        "hf-decoder convert says more; GGUF or another shape may help",
        check_export,
    ),
    Check(
        "backends",
        "vLLM and SGLang can run it",
        "these engines refuse it",
        "see which condition fails, and use another engine until it holds",
        check_backends,
    ),
)
