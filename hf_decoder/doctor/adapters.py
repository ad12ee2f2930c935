"""The row about LoRA: attach, merge, remove."""

from __future__ import annotations

from typing import Any

import torch

from hf_decoder.doctor.numerics import TOLERANCE, difference
from hf_decoder.doctor.report import Check, Finding, failed, passed, warned
from hf_decoder.doctor.subject import Subject
from hf_decoder.safety.quiet import quiet
from hf_decoder.safety.terminal import first_line


def check_lora(subject: Subject) -> Finding:
    """A LoRA adapter changes the logits, keeps them when merged, and restores the old ones when removed."""
    from peft import LoraConfig, get_peft_model

    ids = subject.ids(2)
    subject.release_model()
    model, _ = subject.load()

    @torch.inference_mode()
    def logits(of: Any) -> torch.Tensor:
        return of(ids, use_cache=False).logits

    base = logits(model)
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    found = None
    torch_state = torch.random.get_rng_state()
    with quiet():
        try:
            tuned: Any = get_peft_model(model, LoraConfig(**settings))
        except ValueError:
            found = warned(
                "PEFT does not know which modules to change; target_modules='all-linear' works",
                "name target_modules in every LoraConfig",
            )
            try:
                tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", **settings))
            except ValueError as error:
                return warned(f"PEFT has no LoRA for this class: {first_line(error)}", "train all weights instead")
    torch.random.set_rng_state(torch_state)
    tuned.eval()
    adapted = logits(tuned)
    if not difference(base, adapted) > TOLERANCE:
        return failed("a random adapter does not change the logits")
    with tuned.disable_adapter():
        steps = {"switched off": (base, logits(tuned))}
    if not subject.is_quantized:  # quantized weights round what is merged into them
        tuned.merge_adapter()
        steps["merged"] = (adapted, logits(tuned))
        tuned.unmerge_adapter()
        steps["taken apart again"] = (adapted, logits(tuned))
    steps["removed"] = (base, logits(tuned.unload()))
    for step, (expected, now) in steps.items():
        gap = difference(expected, now)
        if not gap <= TOLERANCE:
            return failed(f"{step}, the adapter's logits differ by {gap:.1e} of the largest")
    modules = sorted({name.rpartition(".")[2] for name in tuned.targeted_module_names})
    done = "removed" if subject.is_quantized else "merged, taken apart and removed"
    return found or passed(f"on {', '.join(modules)}; {done} within {TOLERANCE:.0e}")


CHECKS = (
    Check(
        "lora",
        "LoRA attaches, merges, restores",
        "fine-tuning an adapter fails, or the merged model is not the tuned one",
        "the class uses its weights without calling the modules that hold them: train all weights instead",
        check_lora,
        needs="logits",
        level="default",
    ),
)
