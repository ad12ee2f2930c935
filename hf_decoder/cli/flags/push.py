"""The flags of `hf-decoder push`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli.flags import flag, needed

DESCRIPTION = (
    "Checks a saved model or adapter with the doctor, uploads its files, and names the files that stay. Then it "
    "downloads them into an empty cache, compares each, and compares the logits in a fresh process without this "
    "package and without a token. The token is HF_TOKEN, or what `hf auth login` saved. HF_ENDPOINT names another "
    "server than the Hub."
)


@dataclass(kw_only=True)
class PushArguments:
    """What is uploaded, and where to."""

    folder: str = needed("Folder of a saved model or adapter.", positional=True, metavar="FOLDER")
    repo_id: str | None = flag(
        None,
        "user/name on the Hub, made if it does not exist. As --space if not given.",
        positional=True,
        metavar="USER/NAME",
    )
    space: str | None = flag(None, "user/name of a Space to make of the model: a page to talk to it.")
    private: bool = flag(False, "Make the new repo private.")
    revision: str | None = flag(None, "Branch to push to, made if it does not exist.")
    create_pr: bool = flag(False, "Open a pull request instead of changing the branch.")
    commit_message: str | None = flag(None, "Title of the commit.")
    base_model: str | None = flag(None, "Hub name of an adapter's base, if it was trained on a folder.")
    trust_remote_code: bool = flag(False, "Run the code of an adapter's base even if it is not this package's own.")


ARGUMENTS = (PushArguments,)
