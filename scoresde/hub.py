"""Runs on the Hugging Face hub: download a run by its address, upload the files of one.

The address of a run is `hf://user/name`, or `hf://user/name@revision` with a branch, a tag or a commit. The environment
variable HF_ENDPOINT names another server with the same interface, HF_TOKEN a token (or log in by `hf auth login`), and
HF_HOME the folder of the downloads. Only the configuration and files of tensors are downloaded: nothing that executes
code.
"""

import importlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ADDRESS = re.compile(r"hf:/{1,2}(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>\S+))?")
SERVER = "https://huggingface.co"


def is_address(path: str | Path) -> bool:
    """Return whether a path is the address of a run on the hub; `pathlib` writes it with one slash."""
    return str(path).startswith("hf:/")


def check_local(path: str | Path) -> Path:
    """Return the directory of a run to write as a path; raise ValueError if it is an address on the hub."""
    if is_address(path):
        raise ValueError(f"the run must be written to a local directory; got {path}: upload it later by push_to_hub")
    return Path(path)


def download(address: str | Path, files: Sequence[str]) -> Path:
    """Download files of a run, as far as they exist and are not there yet, and return their folder.

    Without a network, the files of an earlier download are used.

    Args:
        address: `hf://user/name` or `hf://user/name@revision`.
        files: names of files; the repository must have the first.

    Raises:
        ImportError: huggingface_hub is not installed.
        ValueError: the address has another form.
        FileNotFoundError: there is no such repository or revision, or it has no first file.
        PermissionError: the repository may not be read with this token.
        ConnectionError: the server does not answer, and there is no earlier download.
    """
    match = ADDRESS.fullmatch(str(address))
    if match is None:
        raise ValueError(f"the address of a run must be hf://user/name or hf://user/name@revision; got {address}")
    repo, revision = match["repo"], match["revision"]
    with _explained(repo, revision):
        folder = Path(_api().snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    if not (folder / files[0]).is_file():
        raise FileNotFoundError(f"{address} must be a run of scoresde; got a repository without {files[0]}")
    return folder


def upload(
    folder: Path,
    repo: str,
    private: bool = False,
    message: str = "Upload a run",
    token: Any = None,
    optional: Sequence[str] = (),
) -> str:
    """Upload a folder to a repository of models, made if it does not exist; return the address of the commit's page.

    Files of the repository whose names are in `optional` are deleted if the folder lacks them; all others stay.

    Raises:
        ImportError: huggingface_hub is not installed.
        ValueError: `repo` is not of the form "user/name".
        PermissionError: there is no token, or it does not allow to write to this repository.
        ConnectionError: the server does not answer.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"repo must be 'user/name'; got {repo!r}")
    with _explained(repo, None):
        api = _api(token)
        api.create_repo(repo, private=private, exist_ok=True)
        settings = {"commit_message": message, "delete_patterns": list(optional)}
        return str(api.upload_folder(repo_id=repo, folder_path=folder, **settings).commit_url)


def _api(token: Any = None) -> Any:
    return _library("huggingface_hub").HfApi(endpoint=_server(), token=token, library_name="scoresde")


def _server() -> str:
    return os.environ.get("HF_ENDPOINT", SERVER).rstrip("/")


def _library(name: str) -> Any:
    """Return huggingface_hub or a module of it; raise ImportError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"runs on the Hugging Face hub need the package huggingface_hub: pip install 'scoresde[hub]' ({error})"
        ) from error


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Raise the errors of huggingface_hub as built-in ones, with what to do."""
    errors = _library("huggingface_hub.errors")
    login = "log in by `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo} on {_server()} has no revision {revision!r}: choose another one") from error
    except errors.GatedRepoError as error:
        raise PermissionError(f"access to {repo} must be granted by its owner: ask on {_server()}/{repo}") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"no repository {repo} on {_server()}, or it is private: correct the name, or {login}"
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise PermissionError(f"{_server()} needs a token to write to {repo}; got none: {login}") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise PermissionError(f"{_server()} does not allow this for {repo} ({status}): {login}") from error
        raise ConnectionError(f"{_server()} answered a request for {repo} with an error: {error}") from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise ConnectionError(
            f"{repo} cannot be reached on {_server()}, and was not downloaded before: check the network, and the "
            "variables HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from error
