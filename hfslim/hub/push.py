"""Push a folder to the Hub in one commit, whole or not at all."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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

    Args:
        place: The name of the repository, for the message.
        token: The token that was given.
        folder: The folder that is pushed.
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
    repository = _Repository(HfApi(library_name="hfslim"), repo_id, token, revision)
    with hub_errors_explained(repr(repo_id), token, folder):
        repository.make(private)
        return repository.commit(
            folder,
            saved,
            also or {},
            commit_message=commit_message,
            commit_description=commit_description,
            create_pr=create_pr,
        )


@dataclass
class _Repository:
    """A branch of a repository on the Hub."""

    api: HfApi
    repo_id: str
    token: str | None
    revision: str | None

    def make(self, private: bool | None) -> None:
        """Make the repository and the branch if they do not exist."""
        place: dict[str, Any] = {"token": self.token, "exist_ok": True}
        url = _patiently(self.api.create_repo, repo_id=self.repo_id, private=private, **place)
        self.repo_id = url.repo_id
        if self.revision and not self.revision.startswith("refs/pr"):
            branch = {"repo_id": self.repo_id, "branch": self.revision}
            _patiently(self.api.create_branch, **branch, **place)

    def commit(
        self, folder: Path, saved: SavedModel, also: Mapping[str, Path], **how: Any
    ) -> CommitInfo:
        """Commit a folder on top of the branch; again if the branch changes meanwhile."""
        place: dict[str, Any] = {"repo_id": self.repo_id, "token": self.token}
        place["revision"] = self.revision
        for attempt in range(ATTEMPTS):
            head = _patiently(self.api.model_info, **place)
            present = {file.rfilename for file in head.siblings or ()}
            self._write_card(folder, head.sha if CARD in present else None)
            files = dict(_files(folder))
            if saved.pruned:
                files.setdefault("modeling_hfslim.py", Path(modeling_hfslim.__file__))
            for name, other in also.items():
                inside = (path for path in other.rglob("*") if path.is_file())
                files |= {f"{name}/{path.relative_to(other).as_posix()}": path for path in inside}
            stale = [name for name in present - files.keys() if any(fnmatch(name, o) for o in OURS)]
            additions = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
            self.api.preupload_lfs_files(**place, additions=additions, free_memory=False)
            try:
                return self.api.create_commit(
                    **place,
                    operations=[*additions, *(CommitOperationDelete(name) for name in stale)],
                    **how,
                    # The card of this commit was merged; a later edit must not be lost.
                    parent_commit=head.sha,
                )
            except Exception as error:
                if attempt == ATTEMPTS - 1 or not _is_transient(error):
                    raise
                _wait(attempt, error)
        raise AssertionError("unreachable")

    def _write_card(self, folder: Path, earlier: str | None) -> None:
        """Write the folder's card, with the user's part of the card at an earlier commit."""
        path = write_card(folder, name=self.repo_id)
        if earlier is not None:
            place = {"repo_id": self.repo_id, "filename": CARD, "revision": earlier}
            there = Path(_patiently(hf_hub_download, **place, token=self.token))
            card = path.read_text(encoding="utf-8")
            path.write_text(merge(card, there.read_text(encoding="utf-8-sig")), encoding="utf-8")


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    left_out = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(fnmatch(part, pattern) for part in name.parts for pattern in LEFT_OUT):
            left_out.append(str(name))
        elif path.is_file():
            yield name.as_posix(), path
    if left_out:
        logger.info("not pushed: %s", ", ".join(left_out[:8]))


def _patiently(call: Any, **arguments: Any) -> Any:
    for attempt in range(ATTEMPTS):
        try:
            return call(**arguments)
        except EntryNotFoundError:
            raise
        except Exception as error:
            if attempt == ATTEMPTS - 1 or not _is_transient(error):
                raise
            _wait(attempt, error)
    raise AssertionError("unreachable")


def _wait(attempt: int, error: BaseException) -> None:
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
