"""To the Hub and back: which files of a folder go there, the upload, and the proof that a stranger can load them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

import hf_decoder.receiver
from hf_decoder.adapters import ADAPTER_CONFIG, base_of, is_adapter
from hf_decoder.fresh_process import run_fresh
from hf_decoder.modelcard import pin_load_lines, pinned_revision

CARD = "README.md"
# Pickles run code where they are loaded; the states of a training are nobody else's business, and some hold paths.
LEFT_OUT_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".pyc", ".part", ".tmp", ".lock")
LEFT_OUT_NAMES = ("trainer_state.json", "complete.json")
LEFT_OUT_FOLDERS = ("__pycache__", "runs", "logs")
# What an earlier push may have left and `from_pretrained` would look at: its weights, in another number of files.
STALE = ["model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors"]
RECEIVE_TIMEOUT = 3600  # seconds
# Of the HTTP client, httpx in one version of huggingface_hub and httpx2 in another: what no server answered, too.
HttpError: Any = HfHubHTTPError.__bases__[0]


@dataclass(frozen=True)
class Pushed:
    """What a push left on the Hub. `commit` holds everything, `pr_url` is None without `create_pr`."""

    repo_id: str
    commit: str
    url: str
    pr_url: str | None
    files: int
    bytes: int


def files_to_push(folder: str | Path) -> list[Path]:
    """The files of a model folder that belong on the Hub: all but pickles, training states, checkpoints, hidden files.

    Raises:
        ValueError: if the folder does not exist, or holds no config or no weights in safetensors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder {folder} does not exist")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_shared(path.relative_to(folder))]
    names = {path.relative_to(folder).as_posix() for path in files}
    config = ADAPTER_CONFIG if is_adapter(folder) else "config.json"
    if config not in names:
        raise ValueError(f"{folder} holds neither config.json nor {ADAPTER_CONFIG}: give the folder of a saved model")
    if not any(name.endswith(".safetensors") and "/" not in name for name in names):
        raise ValueError(
            f"{folder} holds no weights in safetensors, the one form that runs no code where it is loaded; save the "
            "model again with save_pretrained"
        )
    return files


def _is_shared(path: Path) -> bool:
    parts = path.parts
    hidden = any(part.startswith(".") for part in parts)
    left_out = any(part in LEFT_OUT_FOLDERS or part.startswith("checkpoint-") for part in parts[:-1])
    return not (hidden or left_out or path.name in LEFT_OUT_NAMES or path.name.endswith(LEFT_OUT_SUFFIXES))


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    base_model: str | None = None,
) -> Pushed:
    """Examines a model, uploads it, and proves that what arrived computes what was sent; or an adapter, unexamined.

    The card goes last, with the commit before it in the lines that load the model. An upload that was cut short is
    made up for by pushing again: files that have arrived are not sent twice.

    Args:
        folder: of `save_pretrained`, of Trainer, or of PEFT.
        repo_id: `user/name`; made if it does not exist.
        private: makes a new repo private; one that exists must be private already.
        revision: branch to push to, made if it does not exist; the default branch if None.
        create_pr: opens a pull request instead of changing the branch.
        commit_message: title of the commit.
        base_model: Hub name of an adapter's base, where its config names a folder.

    Raises:
        ValueError: for a folder that the doctor finds fault with, a name or token that will not do, or a server that
            cannot be reached.
        RuntimeError: if what arrived is not what was sent or cannot be loaded.
    """
    _check_name(repo_id)
    if create_pr and revision is not None:
        raise ValueError("--create_pr opens a pull request against the default branch; leave --revision out")
    files = files_to_push(folder)
    with tempfile.TemporaryDirectory() as scratch, _explained(repo_id):
        sent = Path(scratch) / "sent"
        base = _stage(Path(folder), files, sent, base_model)
        if base is None:  # the doctor examines whole models; an adapter's base had its own examination
            _examine(sent, folder)
        _check_card(sent / CARD)
        api = HfApi()
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ValueError(
                f"{repo_id} exists and is public; make it private on the Hub first, or leave out --private"
            )
        if base is not None:
            _pin_base(api, sent / ADAPTER_CONFIG, base)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        pushed = _upload(api, sent, repo_id, revision, create_pr, commit_message or f"Upload {Path(folder).name}")
        _receive(hf_decoder.receiver.Job(str(sent), repo_id, pushed.commit, base), Path(scratch))
    return pushed


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(str(error)) from None
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} names no owner; give user/name or organisation/name")


def _stage(folder: Path, files: list[Path], sent: Path, base_model: str | None) -> str | None:
    """Lays out in `sent` what is uploaded; returns the Hub name of the base model of an adapter."""
    for path in files:
        target = sent / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path.resolve())
    if not is_adapter(folder):
        if base_model is not None:
            raise ValueError(f"--base_model goes with an adapter, and {folder} holds a whole model")
        return None
    base = base_model or base_of(folder)
    try:
        _check_name(base)
        is_folder = Path(base).exists()
    except ValueError:
        is_folder = True
    if is_folder:
        raise ValueError(
            f"the adapter in {folder} was made for {base}, a folder that nobody else has; push that model first and "
            "name it: --base_model user/name"
        )
    _replace(sent / ADAPTER_CONFIG, {"base_model_name_or_path": base})
    if (sent / CARD).is_file():
        card = ModelCard.load(sent / CARD)
        card.data.base_model = base  # type: ignore[attr-defined]
        (sent / CARD).unlink()
        card.save(sent / CARD)
    return base


def _check_card(path: Path) -> None:
    """Asks the server whether the card's metadata is in order, before anything is sent.

    Raises:
        ValueError: with what the server says.
    """
    if not path.is_file():
        return
    try:
        ModelCard(path.read_text(encoding="utf-8")).validate()
    except ValueError as error:
        said = str(error)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = "; ".join(problem["message"] for problem in json.loads(said)["errors"])
        raise ValueError(f"the metadata of {CARD} is refused by {constants.ENDPOINT}: {said}") from None
    except HttpError:  # huggingface_hub 1 asks huggingface.co whatever HF_ENDPOINT says; the upload asks once more
        return


def _pin_base(api: HfApi, path: Path, base: str) -> None:
    """Writes the commit that the base model is at into an adapter's config, unless it names one."""
    try:
        commit = api.model_info(base).sha
    except RepositoryNotFoundError:
        raise ValueError(f"the adapter's base {base} is not on {constants.ENDPOINT}; push it first") from None
    _replace(path, {"revision": json.loads(path.read_text(encoding="utf-8")).get("revision") or commit})


def _examine(sent: Path, folder: str | Path) -> None:
    """Asks the doctor about the files that would be sent. Raises ValueError naming the rows that fail."""
    from hf_decoder.doctor import run_doctor

    failures = run_doctor(sent, level="quick").failures
    if failures:
        first = failures[0]
        raise ValueError(
            f"nothing was pushed: the doctor finds fault with {folder}, {', '.join(row.name for row in failures)}; "
            f"{first.name}: {first.detail.replace(str(sent), str(folder))}; `hf-decoder doctor {folder}` says how to "
            "mend it"
        )


def _replace(path: Path, values: dict[str, Any]) -> None:
    content = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.unlink()
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _upload(api: HfApi, sent: Path, repo_id: str, revision: str | None, create_pr: bool, message: str) -> Pushed:
    before = api.model_info(repo_id, revision=revision).sha
    common: dict[str, Any] = {"repo_id": repo_id, "folder_path": sent, "commit_message": message}
    done = api.upload_folder(
        **common, revision=revision, create_pr=create_pr, ignore_patterns=CARD, delete_patterns=STALE
    )
    pr_url, revision = done.pr_url, done.pr_revision or revision
    card = sent / CARD
    if card.is_file():
        pin = (_pinned_before(api, repo_id, done.oid) if done.oid == before else None) or done.oid
        text = pin_load_lines(card.read_text(encoding="utf-8"), repo_id, pin)
        card.unlink()
        card.write_text(text, encoding="utf-8")
        # a change of the card alone may have no pull request yet
        done = api.upload_folder(
            **common, revision=revision, create_pr=create_pr and pr_url is None, allow_patterns=CARD
        )
        pr_url = pr_url or done.pr_url
    sizes = [path.stat().st_size for path in sent.rglob("*") if path.is_file()]
    return Pushed(repo_id, done.oid, f"{api.endpoint}/{repo_id}", pr_url, len(sizes), sum(sizes))


def _pinned_before(api: HfApi, repo_id: str, commit: str) -> str | None:
    """The commit that the card on the Hub pins; it still holds what was just found to be there already."""
    if not api.file_exists(repo_id, CARD, revision=commit):
        return None
    with tempfile.TemporaryDirectory() as scratch:
        path = api.hf_hub_download(repo_id, CARD, revision=commit, local_dir=scratch)
        return pinned_revision(Path(path).read_text(encoding="utf-8"), repo_id)


def _receive(job: hf_decoder.receiver.Job, scratch: Path) -> None:
    """Runs the receiver with an empty cache and without this package.

    Raises:
        RuntimeError: if it cannot load the model, or finds a difference.
    """
    if shutil.disk_usage(scratch).free < 2 * sum(path.stat().st_size for path in Path(job.sent).rglob("*")):
        raise RuntimeError(f"{job.repo_id} is uploaded, but {scratch} has no room to download and check it")
    package = str(Path(__file__).resolve().parent.parent)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", package)]
    caches = {name: str(scratch / name.lower()) for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_XET_CACHE")}
    env = {**os.environ, **caches, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "0"}
    if token := get_token():
        env["HF_TOKEN"] = token
    where = f"{job.repo_id} at {job.revision[:12]} is uploaded, but"
    program, argument = Path(hf_decoder.receiver.__file__), json.dumps(asdict(job))
    try:
        said = run_fresh(program, argument, hidden=True, folder=scratch, environment=env, timeout=RECEIVE_TIMEOUT)
    except RuntimeError as error:
        raise RuntimeError(f"{where} a process with nothing but transformers cannot load it: {error}") from None
    figures = json.loads(said.strip().splitlines()[-1])
    if figures["differing_files"]:
        raise RuntimeError(f"{where} {figures['differing_files'][0]} is not the file that was sent")
    if figures["max_difference"] != 0.0 or not figures["package_hidden"]:
        raise RuntimeError(f"{where} its logits differ from the folder's by up to {figures['max_difference']:.3g}")


@contextlib.contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turns what the client or the server refuses into a ValueError of one line with the way out."""
    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except LocalTokenNotFoundError:
        raise ValueError(f"no token to push to {repo_id} with; {login}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        said = (error.server_message or str(error)).strip().splitlines()[0]
        if status == 401:
            what = "does not accept the token" if get_token() else "was given no token"
            raise ValueError(f"{constants.ENDPOINT} {what} for {repo_id}; {login}") from None
        if status in (403, 404):
            raise ValueError(
                f"the token does not let you write to {repo_id} ({status}: {said}); check the owner's name, and that "
                "the token may write there"
            ) from None
        raise ValueError(f"{constants.ENDPOINT} refuses the push to {repo_id} ({status}: {said})") from None
    except (HttpError, ConnectionError, RuntimeError) as error:
        # LFS uploads wrap what went wrong; the Xet client tells everything in one text
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, HttpError | ConnectionError):
            raise
        if "xet-write-token" in str(cause) and "404" in str(cause):
            raise ValueError(
                f"{constants.ENDPOINT} does not speak Xet; set HF_HUB_DISABLE_XET=1 to upload over plain HTTP"
            ) from None
        said = " ".join(str(cause).split()) or type(cause).__name__
        raise ValueError(
            f"{constants.ENDPOINT} cannot be reached ({said}); push again when it can: what arrived is not sent twice"
        ) from None
