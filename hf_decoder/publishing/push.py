"""Pushes a model to the Hub. The doctor examines it first, and a fresh process loads what arrived."""

from __future__ import annotations

import contextlib
import glob
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from hf_decoder.doctor.code import Code, Origin, code_of
from hf_decoder.interop.adapters import ADAPTER_CONFIG, base_of, is_adapter
from hf_decoder.publishing import verified_download
from hf_decoder.publishing.files import CARD, STALE, files_to_push, left_out, matches
from hf_decoder.publishing.verified_download import Job
from hf_decoder.reporting.model_card import pin_load_lines, pinned_revision
from hf_decoder.safety.fresh_process import run_fresh
from hf_decoder.training.checkpoints import file_digest

RECEIVE_TIMEOUT = 3600  # seconds
LARGE_SUFFIXES = (".safetensors", ".gguf", ".onnx", ".data", ".onnx_data")  # linked; all other files are copied
# The HTTP client is httpx or httpx2, by the version of huggingface_hub. Its error also covers a server out of reach.
HttpError: Any = HfHubHTTPError.__bases__[0]


@dataclass(frozen=True)
class Pushed:
    """The result of a push. `commit` holds everything; `pr_url` is None without `create_pr`.

    `foreign` are the files of the repo that this push neither sent nor looked at.
    """

    repo_id: str
    commit: str
    url: str
    pr_url: str | None
    files: int
    bytes: int
    foreign: tuple[str, ...] = ()


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    base_model: str | None = None,
    trust_remote_code: bool = False,
) -> Pushed:
    """Examines a model or an adapter, uploads it, and proves that what arrived computes the same.

    The card goes last. Its lines load the commit before it. Pushing again completes an upload that was cut short:
    files that have arrived are not sent twice. Standard error names each file that is no part of a model and stays.

    Args:
        folder: a folder that `save_pretrained`, Trainer or PEFT wrote.
        repo_id: `user/name`; made if it does not exist.
        private: makes a new repo private; an existing one must be private already.
        revision: branch to push to, made if it does not exist; the default branch if None.
        create_pr: opens a pull request instead of changing the branch.
        commit_message: title of the commit.
        base_model: Hub name of an adapter's base, where its config names a folder.
        trust_remote_code: runs the code of an adapter's base where it is not this package's own.

    Raises:
        ValueError: if the doctor finds fault with the folder or it changes meanwhile, if a name or token does not do,
            if the base's code is not trusted, or if the server cannot be reached.
        RuntimeError: if what arrived differs from what was sent, or cannot be loaded.
    """
    check_name(repo_id)
    if create_pr and revision is not None:
        raise ValueError("--create_pr opens a pull request against the default branch; leave --revision out")
    folder = Path(folder)
    files = files_to_push(folder)
    if rest := left_out(folder, files):
        print(f"not sent, as it is no part of a model: {', '.join(rest)}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch, explained(repo_id):
        sent, cache = Path(scratch) / "sent", Path(scratch) / "cache"
        base = _stage(folder, files, sent, base_model)
        digests = {name: file_digest(sent / name) for name in _names(sent)}
        rewritten = _name_base(sent, base)
        job = Job(str(sent), repo_id, "", base, trust_remote_code=_code(sent).origin is Origin.OWN)
        _examine(sent, folder)
        _check_card(sent / CARD)
        api = HfApi()
        if base is not None:
            job.trust_remote_code = _pin_base(api, sent / ADAPTER_CONFIG, base, trust_remote_code, cache)
        _check_unchanged(folder, digests)
        _prepare_repo(api, repo_id, private, revision)
        pushed = _upload(api, sent, repo_id, revision, create_pr, commit_message or f"Upload {folder.name}")
        # Files that were rewritten here, the card among them, have new digests.
        digests |= {name: file_digest(sent / name) for name in (*rewritten, CARD) if (sent / name).is_file()}
        job.revision = pushed.commit
        _receive(api, job, digests, cache)
        there = api.list_repo_files(repo_id, revision=pushed.commit)
    return replace(pushed, foreign=tuple(sorted({*there} - {*digests, ".gitattributes"})))


def check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(str(error)) from None
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} names no owner; give user/name or organisation/name")


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _stage(folder: Path, files: list[Path], sent: Path, base_model: str | None) -> str | None:
    """Copies into `sent` what is uploaded, weights as links. Returns the Hub name of an adapter's base, else None."""
    for path in files:
        target = sent / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in LARGE_SUFFIXES:
            target.symlink_to(path.resolve())
        else:
            shutil.copyfile(path, target)
    if not is_adapter(folder):
        if base_model is not None:
            raise ValueError(f"--base_model goes with an adapter, and {folder} holds a whole model")
        return None
    base = base_model or base_of(folder)
    try:
        check_name(base)
        is_folder = Path(base).exists()
    except ValueError:
        is_folder = True
    if is_folder:
        raise ValueError(
            f"the adapter in {folder} was made for {base}, a folder that nobody else has; push that model first, and "
            "name it by --base_model user/name"
        )
    return base


def _name_base(sent: Path, base: str | None) -> list[str]:
    """Writes the base's Hub name into an adapter's config and card. Returns the names of the files it may change."""
    if base is None:
        return []
    _replace(sent / ADAPTER_CONFIG, {"base_model_name_or_path": base})
    if (sent / CARD).is_file():
        card = ModelCard.load(sent / CARD)
        card.data.base_model = base  # type: ignore[attr-defined]
        card.save(sent / CARD)
    return [ADAPTER_CONFIG, CARD]


def _code(sent: Path) -> Code:
    return code_of(sent, _names(sent))


def _check_card(path: Path) -> None:
    """Has the server validate the card's metadata. Raises ValueError with what it objects to."""
    if not path.is_file():
        return
    try:
        ModelCard(path.read_text(encoding="utf-8")).validate()
    except ValueError as error:
        said = str(error)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = "; ".join(problem["message"] for problem in json.loads(said)["errors"])
        raise ValueError(f"the metadata of {CARD} is refused by {constants.ENDPOINT}: {said}") from None
    except HttpError:  # huggingface_hub 1 asks huggingface.co whatever HF_ENDPOINT says; the upload validates again
        return


def _pin_base(api: HfApi, path: Path, base: str, trust_remote_code: bool, cache: Path) -> bool:
    """Writes the base's present commit into an adapter's config. Returns whether the base's code may run.

    Raises:
        ValueError: if the base is not on the Hub, or brings foreign code that the user does not trust.
    """
    given = json.loads(path.read_text(encoding="utf-8")).get("revision")
    try:
        commit = api.model_info(base, revision=given).sha
    except RepositoryNotFoundError:
        raise ValueError(f"the adapter's base {base} is not on {constants.ENDPOINT}; push it first") from None
    _replace(path, {"revision": commit})
    files = api.list_repo_files(base, revision=commit)
    folder = api.snapshot_download(base, revision=commit, cache_dir=cache, allow_patterns=["*.json", "*.py"])
    code = code_of(Path(folder), files)
    if code.elsewhere is not None:
        raise ValueError(f"nothing was pushed: the adapter's base {base} cannot be run as it is: {code.elsewhere}")
    if code.origin in (Origin.OLDER, Origin.FOREIGN) and not trust_remote_code:
        raise ValueError(
            f"nothing was pushed: the adapter's base {base} brings code that is not this package's own, "
            f"{code.detail}; read it at {api.endpoint}/{base}/tree/{commit}, then pass --trust_remote_code to run it"
        )
    return code.origin is not Origin.NONE


def _check_unchanged(folder: Path, digests: dict[str, str]) -> None:
    """Raises ValueError if a file of `folder` is no longer the one that was copied."""
    for name, digest in digests.items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise ValueError(f"nothing was pushed: {folder / name} changed while the folder was examined")


def _prepare_repo(api: HfApi, repo_id: str, private: bool, revision: str | None) -> None:
    """Makes the repo and the branch if they do not exist. Raises ValueError for a public repo if `private`."""
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} exists and is public; make it private on the Hub first, or leave out --private")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _examine(sent: Path, folder: str | Path) -> None:
    """Has the doctor examine the files to send. Raises ValueError, naming the rows that fail."""
    from hf_decoder.doctor import FAIL, examine_adapter, run_doctor

    rows = examine_adapter(sent) if is_adapter(sent) else run_doctor(sent, level="quick").rows
    failures = [row for row in rows if row.status == FAIL]
    if failures:
        first = failures[0]
        way_out = first.remedy if is_adapter(sent) else f"`hf-decoder doctor {folder}` says how to fix it"
        raise ValueError(
            f"nothing was pushed: the doctor finds fault with {folder}, {', '.join(row.name for row in failures)}; "
            f"{first.name}: {first.detail.replace(str(sent), str(folder))}; {way_out}"
        )


def _replace(path: Path, values: dict[str, Any]) -> None:
    content = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _upload(api: HfApi, sent: Path, repo_id: str, revision: str | None, create_pr: bool, message: str) -> Pushed:
    """Uploads `sent`, the card in a second commit, and deletes stale files of earlier pushes.

    Raises:
        ValueError: for an adapter over a whole model, or the other way round.
    """
    before = api.model_info(repo_id, revision=revision).sha
    there = api.list_repo_files(repo_id, revision=before)
    other = "config.json" if is_adapter(sent) else ADAPTER_CONFIG
    if other in there:
        kinds = ("an adapter", "a whole model")
        here, is_there = kinds if is_adapter(sent) else kinds[::-1]
        raise ValueError(
            f"{repo_id} holds {other} of {is_there}, which would load together with {here}; push to another name, or "
            "delete that file on the Hub first"
        )
    stale = [glob.escape(name) for name in there if matches(name, STALE)]
    common: dict[str, Any] = {"repo_id": repo_id, "folder_path": sent, "commit_message": message}
    done = api.upload_folder(
        **common, revision=revision, create_pr=create_pr, ignore_patterns=CARD, delete_patterns=stale
    )
    pr_url, revision = done.pr_url, done.pr_revision or revision
    card = sent / CARD
    if card.is_file():
        pin = (_pinned_before(api, repo_id, done.oid) if done.oid == before else None) or done.oid
        text = pin_load_lines(card.read_text(encoding="utf-8"), repo_id, pin)
        card.write_text(text, encoding="utf-8")
        # Where only the card changed, the first upload opened no pull request.
        done = api.upload_folder(
            **common, revision=revision, create_pr=create_pr and pr_url is None, allow_patterns=CARD
        )
        pr_url = pr_url or done.pr_url
    sizes = [path.stat().st_size for path in sent.rglob("*") if path.is_file()]
    return Pushed(repo_id, done.oid, f"{api.endpoint}/{repo_id}", pr_url, len(sizes), sum(sizes))


def _pinned_before(api: HfApi, repo_id: str, commit: str) -> str | None:
    """The commit that the card on the Hub pins. It still holds the same files where an upload changed nothing."""
    if not api.file_exists(repo_id, CARD, revision=commit):
        return None
    with tempfile.TemporaryDirectory() as scratch:
        path = api.hf_hub_download(repo_id, CARD, revision=commit, local_dir=scratch)
        return pinned_revision(Path(path).read_text(encoding="utf-8"), repo_id)


def _receive(api: HfApi, job: Job, digests: dict[str, str], cache: Path) -> None:
    """Downloads what arrived, compares it with what was sent, and has a process without this package load it.

    This process downloads, with the owner's token. The process that loads has no token and is offline.

    Raises:
        RuntimeError: if a file differs, and then nothing is loaded; if the model cannot be loaded; or if its logits
            differ.
    """
    sent = Path(job.sent)
    if shutil.disk_usage(sent).free < 2 * sum((sent / name).stat().st_size for name in digests):
        raise RuntimeError(f"{job.repo_id} is uploaded, but {sent.parent} has no room to download and check it")
    where = f"{job.repo_id} at {job.revision[:12]} is uploaded, but"
    files = [glob.escape(name) for name in digests]
    received = Path(api.snapshot_download(job.repo_id, revision=job.revision, cache_dir=cache, allow_patterns=files))
    for name, expected in digests.items():
        if not (received / name).is_file() or file_digest(received / name) != expected:
            raise RuntimeError(f"{where} {name} is not the file that was sent")
    if job.base is not None:
        commit = json.loads((sent / ADAPTER_CONFIG).read_text(encoding="utf-8"))["revision"]
        wanted = ["*.json", "*.py", "*.safetensors"]
        api.snapshot_download(job.base, revision=commit, cache_dir=cache, allow_patterns=wanted)
    program, argument = Path(verified_download.__file__), json.dumps(asdict(job))
    try:
        said = run_fresh(program, argument, hidden=True, hub_cache=cache, timeout=RECEIVE_TIMEOUT)
    except RuntimeError as error:
        why = "; ".join(filter(None, (str(error), _code(sent).detail)))
        raise RuntimeError(f"{where} a process with nothing but transformers cannot load it: {why}") from None
    figures = json.loads(said.strip().splitlines()[-1])
    if figures["max_difference"] != 0.0 or not figures["package_hidden"]:
        raise RuntimeError(f"{where} its logits differ from the folder's by up to {figures['max_difference']:.3g}")


@contextlib.contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Turns errors of the client and the server into a ValueError of one line with the way out."""
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
        # LFS uploads wrap the cause; the Xet client puts everything into one text.
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
