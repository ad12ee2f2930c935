"""`hf-decoder push FOLDER user/name`: checks a model, uploads it, and proves that a stranger can load it."""

from __future__ import annotations

import sys
from pathlib import Path

from hf_decoder.cli import check_package
from hf_decoder.cli.arguments import takes_argv
from hf_decoder.cli.flags.push import PushArguments
from hf_decoder.safety.interrupts import going_on


@takes_argv
def main(args: PushArguments) -> int:
    """Pushes a model. Exit code 1 says that what arrived differs from what was sent."""
    from hf_decoder.publishing.push import push
    from hf_decoder.publishing.space import check_space, push_space

    folder, repo_id, page = Path(args.folder).expanduser(), args.repo_id or args.space, None
    if repo_id is None:
        raise ValueError("name the place on the Hub: user/name, or --space user/name")
    if args.space is not None:
        check_package("gradio", "demo")
        check_space(folder, args.space, private=args.private)
    try:
        with going_on(lambda: "; the same command goes on: what has arrived is not sent twice"):
            pushed = push(
                folder,
                repo_id,
                private=args.private,
                revision=args.revision,
                create_pr=args.create_pr,
                commit_message=args.commit_message,
                base_model=args.base_model,
                trust_remote_code=args.trust_remote_code,
            )
            if args.space is not None:
                page = push_space(folder, pushed, args.space, private=args.private)
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
            f"warning: {pushed.repo_id} holds {len(pushed.foreign)} other files, which this push neither sent nor "
            f"looked at: {', '.join(pushed.foreign)}",
            file=sys.stderr,
        )
    else:
        print("downloaded into an empty cache and loaded without hf_decoder: every file and every logit is the same")
    if page is not None:
        print(f"{page}: a page to talk to {repo_id} at commit {pushed.commit[:12]}")
        if args.private:
            print("the model is private: add a token that may read it as the secret HF_TOKEN in the Space's settings")
    return 0
