"""Resolve the user's name of a model to a local folder: a folder, a GGUF file, or a hub id."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_barber.checkpoint.durable import is_full
from llm_barber.checkpoint.gguf import converted_gguf
from llm_barber.checkpoint.untrusted import check_all_regular, check_regular
from llm_barber.errors import HubError, ModelError
from llm_barber.messages import as_option
from llm_barber.progress import Progress

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # files that travel with the weights
HUB_PATTERNS = [
    "*.safetensors",
    INDEX_NAME,
    *(f"*{suffix}" for suffix in COMPANIONS),
    "LICEN*",
    "NOTICE*",
    "USE_POLICY*",
]
CHAT_TEMPLATES = "additional_chat_templates"  # the only folder that travels
PICKLED_PATTERNS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
READ_SUFFIXES = (*COMPANIONS, ".safetensors", ".bin")  # files that this program or transformers opens
HUB_NOT_NEEDED = ["consolidated*", "*/*"]  # the same weights in other layouts


def resolve_model(model: str, revision: str | None = None, pickled: bool = False) -> Path:
    """The local folder of a model: the folder itself, a converted GGUF file, or a download from the hub.

    Args:
        model: a folder, a GGUF file or a hub id.
        revision: of a hub id.
        pickled: download pickled weights, too.

    Raises:
        ModelError: there is no such folder, and the name cannot be a hub id; or a file in the folder is no regular
            file.
        HubError: the hub cannot be reached or does not have the model.
    """
    path = local_path(model)
    if path is not None:
        return path if path.is_dir() else converted_gguf(path)
    name, _, pinned = model.partition("@")
    return _download(name, pinned or revision, HUB_PATTERNS + (PICKLED_PATTERNS if pickled else []))


def local_path(model: str) -> Path | None:
    """The folder or GGUF file of a model; None: the name is a hub id, which nobody has looked up.

    Raises:
        ModelError: as `resolve_model`.
    """
    try:
        path = Path(model).expanduser()
        is_folder, is_file = bool(model) and path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"no such model: {model} ({error})", "give a folder, a GGUF file or a hub id") from error
    if is_folder:
        check_folder(path)
        return path
    if model:  # "" would be the current folder
        check_regular(path)
    if is_file:
        if path.suffix == ".gguf":
            return path
        raise ModelError(f"{model} is a file, not a model", "give the folder of a checkpoint, a GGUF file or a hub id")
    if not is_hub_id(model):
        raise ModelError(f"no such model: {model}", "give the folder of a checkpoint, a GGUF file or a hub id")
    return None


def is_hub_id(model: str) -> bool:
    """Test whether a name can be a hub id, `name`, `org/name` or `org/name@revision`."""
    pattern = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?"
    return re.fullmatch(pattern, model) is not None and not model.endswith(".gguf")


def warn_of_revision(setting: str, revision: str | None, model: str, progress: Progress) -> None:
    """Warn of a revision of a model that is no hub id; `setting`: its name."""
    if revision is not None and local_path(model) is not None:
        progress.warn(f"{as_option(setting)} {revision} counts for nothing: {model} is not a hub id")


def check_folder(folder: Path) -> None:
    """Refuse a checkpoint's folder in which a file to be opened is a named pipe, a socket or a device.

    Raises:
        ModelError: a file is not regular.
    """
    check_all_regular(folder, READ_SUFFIXES)
    if (folder / CHAT_TEMPLATES).is_dir():
        check_all_regular(folder / CHAT_TEMPLATES, READ_SUFFIXES)


def hub_configuration(model: str, revision: str | None = None) -> Path:
    """Download the config.json, and no other file, of a hub id; errors as of `hub_file`."""
    return hub_file(model, "config.json", revision)


def hub_file(model: str, file: str, revision: str | None = None) -> Path:
    """Download one file of a hub id: `org/name` or `org/name@revision`.

    Raises:
        ModelError: the name is not a hub id.
        HubError: the hub cannot be reached, or does not have the model or the file.
    """
    name, _, pinned = model.partition("@")
    with _explained(name, pinned or revision):
        from huggingface_hub import snapshot_download  # hf_hub_download would try an unreachable hub for 40 s

        path = Path(snapshot_download(name, revision=pinned or revision, allow_patterns=[file])) / file
    if not path.is_file():
        raise HubError(
            f"{name} has no {file} on the hub, or the hub cannot be reached and its cache here lacks the file",
            "check the name, --revision and the connection (HF_HUB_OFFLINE, proxies)",
        )
    return path


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    with _explained(model, revision):
        from huggingface_hub import snapshot_download

        snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=HUB_NOT_NEEDED)
        return Path(snapshot_download(model, revision=revision, allow_patterns=[f"{CHAT_TEMPLATES}/*.jinja"]))


@contextmanager
def _explained(model: str, revision: str | None) -> Iterator[None]:
    """Turn the hub's errors into errors that say what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise HubError(f"{model} is gated on the hub", "accept its terms there, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"no such model: {model} is neither a folder here nor on the hub",
            "check the name; a private model needs `hf auth login`",
        ) from error
    except HFValidationError as error:
        raise ModelError(f"no such model: {model}", "give a folder, a GGUF file or a hub id (org/name)") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{model} has no revision {revision!r} on the hub", "check --revision") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, *HfHubHTTPError.__bases__) as error:  # of the transport, too
        if isinstance(error, OSError) and (is_full(error) or error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)):
            raise HubError(
                f"{model} cannot be downloaded: {error}",
                "free some space for the hub's cache, or set HF_HOME to a folder that you can write",
            ) from error
        raise HubError(
            f"no such model: {model} is not a folder here, and the hub cannot be reached",
            "check the path, or the connection (HF_HUB_OFFLINE, proxies); a folder or GGUF file needs no hub",
        ) from error
