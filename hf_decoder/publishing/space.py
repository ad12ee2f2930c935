"""Makes a Space of a pushed model: a page to talk to it, with the model's commit and all versions pinned."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError

from hf_decoder.doctor.code import Origin, code_of
from hf_decoder.interop.adapters import is_adapter
from hf_decoder.interop.checkpoint import read_config_values
from hf_decoder.publishing import space_check
from hf_decoder.publishing.push import Pushed, check_name, explained
from hf_decoder.safety.fresh_process import run_fresh
from hf_decoder.training.checkpoints import file_digest

APP = Path(__file__).with_name("space_app.py")
PACKAGES = ("gradio", "transformers", "torch")
CHECK_TIMEOUT = 3600  # seconds


def check_space(folder: Path, space: str, *, private: bool = False) -> None:
    """Raises ValueError where `folder` or the name will not do for a Space; with `private`, also for a public one."""
    check_name(space)
    if is_adapter(folder):
        raise ValueError(f"--space takes a whole model, and {folder} holds an adapter; merge it with its base first")
    architectures = read_config_values(folder).get("architectures") or []
    if not all(str(name).endswith("ForCausalLM") for name in architectures):
        raise ValueError(f"--space takes a model that writes text, and {folder} holds {', '.join(architectures)}")
    with explained(space), contextlib.suppress(RepositoryNotFoundError):
        if private and not HfApi().space_info(space).private:
            raise ValueError(
                f"the Space {space} exists and is public; make it private on the Hub first, or leave out --private"
            )


def push_space(folder: Path, model: Pushed, space: str, *, private: bool = False) -> str:
    """Makes or updates the Space of a model that was pushed from `folder`; returns its address.

    The page first answers on this machine, in a fresh process without this package and without a token. Then the
    three files that are written here go to the Space, nothing of `folder`, and are compared with what arrived.

    Raises:
        ValueError: for a name or token that will not do, or a server that cannot be reached.
        RuntimeError: if the page does not answer, or what arrived is not what was sent.
    """
    with tempfile.TemporaryDirectory() as scratch, explained(space):
        sent = Path(scratch) / "sent"
        sent.mkdir()
        _write(sent, folder, model, space)
        job = json.dumps({"app": str(sent / "app.py"), "folder": str(folder.resolve())})
        try:
            run_fresh(
                Path(space_check.__file__), job, hidden=True, hub_cache=Path(scratch) / "cache", timeout=CHECK_TIMEOUT
            )
        except RuntimeError as error:
            raise RuntimeError(f"no Space was made: its page does not answer with {folder}: {error}") from None
        api = HfApi()
        api.create_repo(space, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
        done = api.upload_folder(
            repo_id=space, repo_type="space", folder_path=sent, commit_message=f"A page for {model.repo_id}"
        )
        for path in sent.iterdir():
            arrived = api.hf_hub_download(
                space, path.name, repo_type="space", revision=done.oid, local_dir=Path(scratch) / "arrived"
            )
            if file_digest(Path(arrived)) != file_digest(path):
                raise RuntimeError(f"{space} is uploaded, but {path.name} is not the file that was sent")
        return f"{api.endpoint}/spaces/{space}"


def _write(sent: Path, folder: Path, model: Pushed, space: str) -> None:
    names = [path.name for path in folder.iterdir() if path.is_file()]
    trust = code_of(folder, names).origin is Origin.OWN
    line = f"MODEL, REVISION, TRUST_REMOTE_CODE = {model.repo_id!r}, {model.commit!r}, {trust}"
    app, count = re.subn(r"(?m)^MODEL, REVISION, .*$", lambda _: line, APP.read_text(encoding="utf-8"))
    assert count == 1
    (sent / "app.py").write_text(app, encoding="utf-8")
    pins = {name: version(name).partition("+")[0] for name in PACKAGES}
    (sent / "requirements.txt").write_text("".join(f"{name}=={pin}\n" for name, pin in pins.items()), "utf-8")
    head: dict[str, Any] = {
        "title": space.partition("/")[2],
        "emoji": "\U0001f4ac",
        "colorFrom": "blue",
        "colorTo": "gray",
    }
    head |= {"sdk": "gradio", "sdk_version": pins["gradio"], "python_version": "{}.{}".format(*sys.version_info)}
    head |= {"app_file": "app.py", "models": [model.repo_id]}
    (sent / "README.md").write_text(
        "---\n"
        + "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in head.items())
        + "---\n\n"
        f"A page to talk to [{model.repo_id}]({constants.ENDPOINT}/{model.repo_id}), at commit `{model.commit}`.\n",
        encoding="utf-8",
    )
