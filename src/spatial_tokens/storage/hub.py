"""The Hugging Face Hub: repositories read as folders, and folders written as repositories."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from spatial_tokens import __version__
from spatial_tokens.checks import as_path
from spatial_tokens.errors import MissingExtraError, SpatialTokensError, reason, shown

CARD = "README.md"
_SECONDS = 10  # to wait for an answer of the Hub
_PART = r"[A-Za-z0-9_][\w.-]*"
_NOT_HERE = "neither a folder here nor in Hugging Face's cache, and it could not be downloaded from the Hugging Face Hub"
_LIBRARY = {"library_name": "spatial-tokens", "library_version": __version__}


def is_repository(source: object) -> bool:
    """Whether a source can only be "user/name" on the Hub: a string like that, and no folder here."""
    return isinstance(source, str) and re.fullmatch(f"{_PART}/{_PART}", source) is not None and not os.path.isdir(source)


def folder_of(source: str | os.PathLike[str], names: Sequence[str], revision: str | None = None) -> Path:
    """The folder that holds these files: the given one, or "user/name" on the Hub, downloaded into Hugging Face's cache.

    Without a connection, what the cache holds is taken.

    Args:
        source: A folder's path, or, where there is no folder of that name, a repository.
        names: The files.
        revision: A branch, tag or commit of the repository; its main branch when None.

    Raises:
        SpatialTokensError: If the repository, its revision or a file cannot be downloaded, or a revision is given with a folder.
    """
    path = as_path(source)
    if not is_repository(source):
        if revision is not None:
            raise SpatialTokensError(f"revision is for a repository on the Hugging Face Hub, but {path} is a path; leave it out")
        return path
    hub = _huggingface_hub()
    try:
        found = Path(hub.snapshot_download(source, revision=revision, allow_patterns=list(names), **_LIBRARY))
    except hub.errors.RevisionNotFoundError as error:
        raise SpatialTokensError(f"{source} on the Hugging Face Hub has no revision {shown(revision)}") from error
    except hub.errors.RepositoryNotFoundError as error:
        raise SpatialTokensError(
            f"{source} is neither a folder here nor a repository on the Hugging Face Hub that you can read; check the name, or log "
            "in with 'hf auth login' and accept the repository's terms"
        ) from error
    except Exception as error:  # what the client raises without a connection depends on its version
        raise SpatialTokensError(f"{source} is {_NOT_HERE}: {reason(error)}") from error
    missing = [name for name in names if not (found / name).is_file()]
    if missing:
        raise SpatialTokensError(f"{source} on the Hugging Face Hub has no {' and no '.join(missing)}")
    return found


def name_or_cached_folder(name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """A model's name, for another library to load; the folder in the cache instead, if the Hub does not answer.

    Asked once here: those libraries ask five times for each file, for minutes in all.

    Raises:
        ConnectionError: If the Hub does not answer, and the model is neither a folder here nor in the cache.
    """
    repo_id = os.fspath(name)
    if os.path.exists(repo_id) or not re.fullmatch(f"({_PART}/)?{_PART}", repo_id):
        return name
    hub = _huggingface_hub()
    try:
        _ask(hub)
    except Exception as error:  # as above
        cache = Path(hub.constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
        if (cache / "refs" / "main").is_file():
            return cache / "snapshots" / (cache / "refs" / "main").read_text()
        raise ConnectionError(f"{repo_id} is {_NOT_HERE}: {reason(error)}") from error
    return name


def push(
    save: Callable[[str], None],
    repo_id: str,
    make_card: Callable[[], str],
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Uploads what a function saves, in one commit; a repository is made if it is not there, and keeps the card that it has.

    Args:
        save: Writes the files into a folder; of a model that is sharded over processes, in the first of them alone.
        repo_id: The repository, "user/name".
        make_card: Gives the text of its card; called before anything is sent.
        private: Whether a new repository is private.
        token: For an account other than the one that is logged in.
        revision: The branch, made if it is not there; the main one when None.
        commit_message: Of the commit.

    Returns:
        The repository's address; "" in a process that saves nothing.

    Raises:
        SpatialTokensError: If the files cannot be saved or sent.
    """
    if not isinstance(repo_id, str) or not re.fullmatch(f"({_PART}/)?{_PART}", repo_id):
        raise SpatialTokensError(f"repo_id must be a repository of the Hugging Face Hub, 'user/name', got {shown(repo_id)}")
    hub = _huggingface_hub()
    api, card = hub.HfApi(token=token, **_LIBRARY), make_card()
    with TemporaryDirectory() as folder:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            with _sending_to(repo_id):  # before a long save
                _ask(hub)
        save(folder)
        if not os.listdir(folder):
            return ""
        with _sending_to(repo_id):
            address = str(api.create_repo(repo_id, private=private, exist_ok=True))
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            if not api.file_exists(repo_id, CARD, revision=revision):
                (Path(folder) / CARD).write_text(card, encoding="utf-8")
            api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
    return address


def _ask(hub: Any) -> None:
    """Raises what the client does if the Hub does not answer."""
    hub.get_session().head(hub.constants.ENDPOINT, timeout=_SECONDS)


@contextmanager
def _sending_to(repo_id: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # as above
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = "; log in with 'hf auth login', or give token=" if status in (401, 403) else ""
        raise SpatialTokensError(f"cannot push to {repo_id} on the Hugging Face Hub: {reason(error)}{hint}") from error


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "hf") from error
    return huggingface_hub
