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
from hf_decoder.reporting.model_card import pin_load_lines, pinned_revision
from hf_decoder.safety.fresh_process import run_fresh
from hf_decoder.training.checkpoints import file_digest

RECEIVE_TIMEOUT = 3600  # seconds
LARGE_SUFFIXES = (".safetensors", ".gguf", ".onnx", ".data", ".onnx_data")  # linked where the rest is copied
# Of the HTTP client, httpx in one version of huggingface_hub and httpx2 in another: what no server answered, too.
HttpError: Any = HfHubHTTPError.__bases__[0]


@dataclass(frozen=True)
class Pushed:
    """What a push left on the Hub. `commit` holds everything, `pr_url` is None without `create_pr`.

    `foreign` are the files of the repo that this push did not send: nobody examined or compared them.
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
    """Examines a model or an adapter, uploads it, and proves that what arrived computes what was sent.

    The card goes last, with the commit before it in the lines that load the model. An upload that was cut short is
    made up for by pushing again: files that have arrived are not sent twice. What is no part of a model is named on
    standard error and stays.

    Args:
        folder: of `save_pretrained`, of Trainer, or of PEFT.
        repo_id: `user/name`; made if it does not exist.
        private: makes a new repo private; one that exists must be private already.
        revision: branch to push to, made if it does not exist; the default branch if None.
        create_pr: opens a pull request instead of changing the branch.
        commit_message: title of the commit.
        base_model: Hub name of an adapter's base, where its config names a folder.
        trust_remote_code: run the code of an adapter's base where it is not this package's own.

    Raises:
        ValueError: for a folder that the doctor finds fault with or that changes meanwhile, a name or token that will
            not do, a base whose code is not trusted, or a server that cannot be reached.
        RuntimeError: if what arrived is not what was sent or cannot be loaded.
    """
    _check_name(repo_id)
    if create_pr and revision is not None:
        raise ValueError("--create_pr opens a pull request against the default branch; leave --revision out")
    folder = Path(folder)
    files = files_to_push(folder)
    if rest := left_out(folder, files):
        print(f"not sent, as it is no part of a model: {', '.join(rest)}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch, _explained(repo_id):
        sent, cache = Path(scratch) / "sent", Path(scratch) / "cache"
        base = _stage(folder, files, sent, base_model)
        digests = {name: file_digest(sent / name) for name in _names(sent)}
        rewritten = _name_base(sent, base)
        own = _code(sent).origin is Origin.OWN
        job = verified_download.Job(str(sent), repo_id, "", base, trust_remote_code=own)
        _examine(sent, folder)
        _check_card(sent / CARD)
        api = HfApi()
        if base is not None:
            job.trust_remote_code = _pin_base(api, sent / ADAPTER_CONFIG, base, trust_remote_code, cache)
        now = {name: file_digest(folder / name) if (folder / name).is_file() else None for name in digests}
        changed = [name for name in digests if now[name] != digests[name]]
        if changed:
            raise ValueError(f"nothing was pushed: {folder / changed[0]} changed while the folder was examined")
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ValueError(
                f"{repo_id} exists and is public; make it private on the Hub first, or leave out --private"
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        pushed = _upload(api, sent, repo_id, revision, create_pr, commit_message or f"Upload {folder.name}")
        # what was written here, the card's commit among it, has digests of its own
        digests |= {name: file_digest(sent / name) for name in (*rewritten, CARD) if (sent / name).is_file()}
        job.revision = pushed.commit
        _receive(api, job, digests, cache)
        there = api.list_repo_files(repo_id, revision=pushed.commit)
    return replace(pushed, foreign=tuple(sorted({*there} - {*digests, ".gitattributes"})))


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(str(error)) from None
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} names no owner; give user/name or organisation/name")


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _stage(folder: Path, files: list[Path], sent: Path, base_model: str | None) -> str | None:
    """Lays out in `sent` what is uploaded, weights as links; returns the Hub name of the base model of an adapter."""
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
        _check_name(base)
        is_folder = Path(base).exists()
    except ValueError:
        is_folder = True
    if is_folder:
        raise ValueError(
            f"the adapter in {folder} was made for {base}, a folder that nobody else has; push that model first and "
            "name it: --base_model user/name"
        )
    return base


def _name_base(sent: Path, base: str | None) -> list[str]:
    """Writes the base's name on the Hub into an adapter's config and card; returns the names of both."""
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


def _pin_base(api: HfApi, path: Path, base: str, trust_remote_code: bool, cache: Path) -> bool:
    """Writes the commit that the base is at into an adapter's config; returns whether the base's code may run.

    Raises:
        ValueError: if the base is not on the Hub, or brings code that is not this package's own and nobody trusts.
    """
    given = json.loads(path.read_text(encoding="utf-8")).get("revision")
    try:
        commit = api.model_info(base, revision=given).sha
    except RepositoryNotFoundError:
        raise ValueError(f"the adapter's base {base} is not on {constants.ENDPOINT}; push it first") from None
    _replace(path, {"revision": commit})
    files = api.list_repo_files(base, revision=commit)
    looked_at = ["*.json", "*.py"]
    folder = api.snapshot_download(base, revision=commit, cache_dir=cache, allow_patterns=looked_at)
    code = code_of(Path(folder), files)
    if code.elsewhere is not None:
        raise ValueError(f"nothing was pushed: the adapter's base {base} cannot be run as it is: {code.elsewhere}")
    if code.origin in (Origin.OLDER, Origin.FOREIGN) and not trust_remote_code:
        raise ValueError(
            f"nothing was pushed: the adapter's base {base} brings code that is not this package's own, "
            f"{code.detail}; read it at {api.endpoint}/{base}/tree/{commit}, then pass --trust_remote_code to run it"
        )
    return code.origin is not Origin.NONE


def _examine(sent: Path, folder: str | Path) -> None:
    """Asks the doctor about the files that would be sent. Raises ValueError naming the rows that fail."""
    from hf_decoder.doctor import FAIL, examine_adapter, run_doctor

    rows = examine_adapter(sent) if is_adapter(sent) else run_doctor(sent, level="quick").rows
    failures = [row for row in rows if row.status == FAIL]
    if failures:
        first = failures[0]
        way_out = first.remedy if is_adapter(sent) else f"`hf-decoder doctor {folder}` says how to mend it"
        raise ValueError(
            f"nothing was pushed: the doctor finds fault with {folder}, {', '.join(row.name for row in failures)}; "
            f"{first.name}: {first.detail.replace(str(sent), str(folder))}; {way_out}"
        )


def _replace(path: Path, values: dict[str, Any]) -> None:
    content = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _upload(api: HfApi, sent: Path, repo_id: str, revision: str | None, create_pr: bool, message: str) -> Pushed:
    before = api.model_info(repo_id, revision=revision).sha
    there = api.list_repo_files(repo_id, revision=before)
    other = "config.json" if is_adapter(sent) else ADAPTER_CONFIG
    if other in there:
        kinds = ("an adapter", "a whole model")
        here, is_there = kinds if is_adapter(sent) else kinds[::-1]
        raise ValueError(
            f"{repo_id} holds {other}: it is of {is_there}, and here is {here}, which would load together; push to "
            "another name, or delete that file on the Hub first"
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


def _receive(api: HfApi, job: verified_download.Job, digests: dict[str, str], cache: Path) -> None:
    """Downloads what arrived, compares it with what was examined, and has it loaded where this package is not found.

    The download is done here, with the owner's token; the process that loads has no token and asks nobody.

    Raises:
        RuntimeError: if a file differs, which is then not loaded; if the process cannot load the model; or if its
            logits differ.
    """
    sent = Path(job.sent)
    if shutil.disk_usage(sent).free < 2 * sum((sent / name).stat().st_size for name in digests):
        raise RuntimeError(f"{job.repo_id} is uploaded, but {sent.parent} has no room to download and check it")
    where = f"{job.repo_id} at {job.revision[:12]} is uploaded, but"
    patterns = [glob.escape(name) for name in digests]
    received = Path(
        api.snapshot_download(job.repo_id, revision=job.revision, cache_dir=cache, allow_patterns=patterns)
    )
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
