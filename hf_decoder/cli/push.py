"""`hf-decoder push FOLDER user/name`: checks a model, uploads it, and proves that a stranger can load it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_decoder.cli import name_positionals, parse_arguments
from hf_decoder.interrupts import going_on

DESCRIPTION = (
    "Checks a saved model or adapter with the doctor, uploads what belongs to it, names the rest, downloads it into "
    "an empty cache, and compares every file, and its logits in a fresh process that has transformers but neither "
    "this package nor a token. The token is HF_TOKEN or the one that `hf auth login` saved; HF_ENDPOINT names another "
    "server than the Hub."
)


@dataclass
class PushArguments:
    """What is uploaded, and where to."""

    folder: str = field(metadata={"help": "Folder of a saved model or adapter."})
    repo_id: str = field(metadata={"help": "user/name on the Hub; made if it does not exist."})
    private: bool = field(default=False, metadata={"help": "Make the new repo private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to; made if it does not exist."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of changing the branch."})
    commit_message: str | None = field(default=None, metadata={"help": "Title of the commit."})
    base_model: str | None = field(
        default=None, metadata={"help": "Hub name of an adapter's base, where it was trained on a folder."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code of an adapter's base where it is not this package's own."}
    )


def main(argv: Sequence[str]) -> int:
    """Parses the flags and pushes; exit code 1 when what arrived is not what was sent."""
    (args,) = parse_arguments("push", (PushArguments,), name_positionals(argv, ("--folder", "--repo_id")), DESCRIPTION)
    from hf_decoder.hub import push

    try:
        with going_on(lambda: "; the same command goes on: what has arrived is not sent twice"):
            pushed = push(
                Path(args.folder).expanduser(),
                args.repo_id,
                private=args.private,
                revision=args.revision,
                create_pr=args.create_pr,
                commit_message=args.commit_message,
                base_model=args.base_model,
                trust_remote_code=args.trust_remote_code,
            )
    except RuntimeError as error:
        print(f"hf-decoder push: failed: {error}", file=sys.stderr)
        return 1
    print(f"{pushed.url}: {pushed.files} files, {pushed.bytes / 1e6:,.1f} MB, commit {pushed.commit}")
    if pushed.pr_url is not None:
        print(f"pull request: {pushed.pr_url}")
    if pushed.foreign:
        print(
            f"downloaded into an empty cache and loaded without hf_decoder: the {pushed.files} files that were sent, "
            "and every logit, are the same"
        )
        print(
            f"warning: {pushed.repo_id} holds {len(pushed.foreign)} files besides, which this push neither sent nor "
            f"looked at: {', '.join(pushed.foreign)}",
            file=sys.stderr,
        )
    else:
        print("downloaded into an empty cache and loaded without hf_decoder: every file and every logit is the same")
    return 0
