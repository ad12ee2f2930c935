"""The flags of `hf-decoder assistant`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_decoder.cli.flags import flag

OUTPUT_DIR = "runs/assistant"
RECIPES = ("quickstart", "one_gpu", "eight_gpus")
DESCRIPTION = (
    "Makes an assistant from raw text: tokenizer, pretrain, sft, preference or grpo, tests after each, and a report. "
    "Each stage is a folder ready for the Hub and a verb with its flags, which --config FILE.yaml names under the "
    "stage. What is done is skipped, what was cut short goes on. With no arguments: the Python standard library, in "
    "about a quarter of an hour on two cores."
)


@dataclass
class AssistantArguments:
    """Which stages, each with the flags of its verb (in --config a mapping, on the command line JSON)."""

    recipe: str | None = flag(
        None, "Stages that come with the package; quickstart if no stage is given.", choices=RECIPES
    )
    output_dir: str = flag(OUTPUT_DIR, "Folder for the folders of all stages.")
    overwrite_output_dir: bool = flag(False, "Run stages again that were run with other settings.")
    num_processes: int | None = flag(None, "Processes of a training, one a GPU; 1 if the recipe says nothing.")
    data: dict[str, Any] | str | None = flag(
        None,
        "Rows that the stages read as {data}/NAME: standard_library, or by NAME dataset_name, dataset_config_name, "
        "split and max_rows of a data set of the Hub.",
        metavar="ROWS",
    )
    tokenizer: dict[str, Any] | str | None = flag(None, "Flags of `tokenizer`.", metavar="FLAGS")
    pretrain: dict[str, Any] | str | None = flag(None, "Flags of `pretrain`.", metavar="FLAGS")
    sft: dict[str, Any] | str | None = flag(None, "Flags of `finetune --task sft`.", metavar="FLAGS")
    preference: dict[str, Any] | str | None = flag(None, "Flags of `finetune --task preference`.", metavar="FLAGS")
    kto: dict[str, Any] | str | None = flag(None, "Flags of `finetune --task kto`.", metavar="FLAGS")
    grpo: dict[str, Any] | str | None = flag(None, "Flags of `finetune --task grpo`.", metavar="FLAGS")
    rloo: dict[str, Any] | str | None = flag(None, "Flags of `finetune --task rloo`.", metavar="FLAGS")
    eval: dict[str, Any] | str | None = flag(
        None, "Tests by name, each with flags of `eval`; each training is measured.", metavar="FLAGS"
    )


ARGUMENTS = (AssistantArguments,)
