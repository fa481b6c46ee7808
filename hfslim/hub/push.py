"""Push a folder to the Hub in one commit, whole or not at all."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, OfflineModeIsEnabled

from hfslim.hub.card import write_card
from hfslim.hub.edits import CARD, CardError, merge
from hfslim.hub.format import modeling_hfslim
from hfslim.hub.saved_model import SavedModel

__all__ = ["LEFT_OUT", "PushError", "check_login", "hub_errors_explained", "push"]

logger = logging.getLogger(__name__)

LEFT_OUT = (
    *(".*", "_*", "checkpoint-*", "*.lock"),
    *("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt"),
)
"""Patterns of names that are not pushed: hidden and temporary files, checkpoints, pickles."""
OURS = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("modeling_hfslim.py", "report.json", "report.md", "structure.png", "recipe.yaml"),
)
"""Patterns of names that are deleted from the repository if the folder does not have them."""
TRANSIENT = (409, 412, 429, 500, 502, 503, 504)
"""Status codes after which the same call may succeed."""
ATTEMPTS = 4


class PushError(ValueError):
    """A folder could not be pushed. The folder itself is complete."""


def check_login(token: str | None = None) -> None:
    """Check the token before hours of work; a Hub that is down passes with a warning.

    Raises:
        PushError: There is no token, the Hub refuses it, or the process is offline.
    """
    with hub_errors_explained("the Hub", token):
        try:
            HfApi().whoami(token=token)
        except Exception as error:
            if not _is_transient(error):
                raise
            logger.warning("the Hub cannot check the token now: %s", _line(error))


@contextmanager
def hub_errors_explained(
    place: str, token: str | None, folder: Path | None = None
) -> Iterator[None]:
    """Turn any error of the Hub inside the block into a `PushError` of one line.

    `place` names the repository, `token` is the one that was given, `folder` what is pushed.
    """
    try:
        yield
    except PushError:
        raise
    except Exception as error:
        raise _explained(error, place, token, folder) from error


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    create_pr: bool = False,
    also: Mapping[str, Path] | None = None,
) -> CommitInfo:
    """Push a saved model with its card and all files beside it, in one commit.

    The card is written anew for `repo_id`, and keeps the text below its marker on the Hub. The Hub
    client uploads the files, with its retries; the commit is tried again if the repository changed
    meanwhile or the Hub failed. A push that ended in an error can be repeated.

    Args:
        folder: The folder of a saved model, pushed without checkpoints, hidden files and pickles.
        repo_id: Such as `you/bert-sst2-half`; the repository is made if it does not exist.
        private: Whether a new repository is private; by default the organisation's setting.
        revision: Branch to push to, made if it does not exist; `main` by default.
        token: Token of the Hub; by default that of `hf auth login` or `HF_TOKEN`.
        commit_message: First line of the commit.
        commit_description: The rest of its message.
        create_pr: Whether to open a pull request instead.
        also: Further folders, pushed whole, by their paths in the repository.

    Returns:
        The commit.

    Raises:
        PushError: The folder holds no model, or the Hub refused it.
    """
    folder = Path(folder)
    try:
        saved = SavedModel.read(folder)
    except CardError as error:
        raise PushError(str(error)) from error
    if not any(folder.glob("*.safetensors")):
        raise PushError(f"{folder} holds no *.safetensors: save the model there first")
    api = HfApi(library_name="hfslim")
    how: dict[str, Any] = {"commit_message": commit_message, "create_pr": create_pr}
    how["commit_description"] = commit_description
    with hub_errors_explained(repr(repo_id), token, folder):
        access: dict[str, Any] = {"token": token, "exist_ok": True}
        repo_id = _patiently(api.create_repo, repo_id=repo_id, private=private, **access).repo_id
        if revision and not revision.startswith("refs/pr"):
            _patiently(api.create_branch, repo_id=repo_id, branch=revision, **access)
        place: dict[str, Any] = {"repo_id": repo_id, "revision": revision, "token": token}
        for attempt in itertools.count():
            head = _patiently(api.model_info, **place)
            present = {file.rfilename for file in head.siblings or ()}
            _write_card(folder, repo_id, token, head.sha if CARD in present else None)
            files = _files(folder, saved, also or {})
            stale = [name for name in present - files.keys() if any(fnmatch(name, o) for o in OURS)]
            additions = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
            api.preupload_lfs_files(**place, additions=additions, free_memory=False)
            deletions = [CommitOperationDelete(name) for name in stale]
            try:
                # The card of this commit was merged with that of `head`; a later edit of it must
                # not be lost.
                return api.create_commit(
                    **place, operations=[*additions, *deletions], parent_commit=head.sha, **how
                )
            except Exception as error:
                _wait_or_raise(attempt, error)
    raise AssertionError("unreachable")


def _write_card(folder: Path, repo_id: str, token: str | None, earlier: str | None) -> None:
    """Write the folder's card, with the user's part of the card at an earlier commit."""
    path = write_card(folder, name=repo_id)
    if earlier is not None:
        place = {"repo_id": repo_id, "filename": CARD, "revision": earlier}
        there = Path(_patiently(hf_hub_download, **place, token=token))
        card = path.read_text(encoding="utf-8")
        path.write_text(merge(card, there.read_text(encoding="utf-8-sig")), encoding="utf-8")


def _files(folder: Path, saved: SavedModel, also: Mapping[str, Path]) -> dict[str, Path]:
    """Return the files to push by their names in the repository."""
    files, left_out = dict[str, Path](), list[str]()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(fnmatch(part, pattern) for part in name.parts for pattern in LEFT_OUT):
            left_out.append(str(name))
        elif path.is_file():
            files[name.as_posix()] = path
    if left_out:
        logger.info("not pushed: %s", ", ".join(left_out[:8]))
    if saved.pruned:
        files.setdefault("modeling_hfslim.py", Path(modeling_hfslim.__file__))
    for place, other in also.items():
        inside = (path for path in other.rglob("*") if path.is_file())
        files |= {f"{place}/{path.relative_to(other).as_posix()}": path for path in inside}
    return files


def _patiently(call: Any, **arguments: Any) -> Any:
    for attempt in itertools.count():
        try:
            return call(**arguments)
        except EntryNotFoundError:
            raise
        except Exception as error:
            _wait_or_raise(attempt, error)
    raise AssertionError("unreachable")


def _wait_or_raise(attempt: int, error: Exception) -> None:
    """Wait longer after each attempt; raise the last error, or one that will not pass."""
    if attempt == ATTEMPTS - 1 or not _is_transient(error):
        raise error
    seconds = 2**attempt
    logger.warning("the Hub failed, trying again in %d s: %s", seconds, _line(error))
    time.sleep(seconds)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    responses = (getattr(one, "response", None) for one in _chain(error))
    return next((r.status_code for r in responses if r is not None), None)


def _is_transient(error: BaseException) -> bool:
    """Return whether the same call may succeed a little later."""
    status = _status(error)
    if status is not None:
        return status in TRANSIENT
    # The name of the client's HTTP library depends on the client's version.
    return any(type(one).__module__.partition(".")[0].startswith("httpx") for one in _chain(error))


def _line(error: BaseException) -> str:
    cause = [*_chain(error)][-1]
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:300]


def _explained(
    error: Exception, place: str, token: str | None, folder: Path | None = None
) -> PushError:
    status, chain = _status(error), list(_chain(error))
    if any(isinstance(one, OfflineModeIsEnabled) for one in chain):
        reason = "HF_HUB_OFFLINE is set: unset it to push"
    elif any(isinstance(one, HFValidationError | CardError) for one in chain):
        reason = str(error)
    elif not (token or get_token()) and not _is_transient(error):
        reason = "no token: log in with `hf auth login`, or set HF_TOKEN"
    elif status == 401:
        reason = "the Hub refused the token: log in with `hf auth login`, or set HF_TOKEN"
    elif status == 403:
        reason = "the token may not write there: use one with the role `write`"
    elif status == 404:
        reason = "there is no such repository, or the token may not see it"
    else:
        reason = _line(error)
    after = ""
    if folder is not None:
        pushed = "push again to complete it" if _is_transient(error) else "nothing was pushed"
        after = f"; {pushed}, {folder} is complete"
    return PushError(f"{place}: {reason}{after}")
