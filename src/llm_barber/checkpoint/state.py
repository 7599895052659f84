"""What a run has finished, kept in its work folder: enough to go on after it was killed at any moment.

A finished layer is durable once its shard is, and then this state. The activations that the next layer starts from
become so while that one is computed: a run that was killed before makes them from those before, in one pass through the
finished layer. The last two files of activations, and states, are kept.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llm_barber.checkpoint.digests import DIGEST, has_its_digest, with_digest
from llm_barber.errors import OutputError

STATE_NAME, STATE_BEFORE = "state.json", "state-before.json"
STATE_VERSION = 6
ACTIVATIONS_KEPT = 2
START_AGAIN = "start again with --overwrite"
ACTIVATION_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # those computed in
SAMPLES, SAMPLE_BYTES = 64, 4096


class Shard(BaseModel):
    """A written shard: its sha256, its tensors' names, their bytes unpacked; of a packed one the file it unpacks to."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    tensors: tuple[str, ...]
    bytes: int
    file: str = ""
    file_sha256: str = ""


class Activations(BaseModel):
    """A file with what the streams held after some layers."""

    model_config = ConfigDict(frozen=True)

    layers: int
    file: str
    sha256: str


class Used(BaseModel):
    """What finished layers were computed with: the most memory, in bytes, sequences together, and the machine.

    `off_device`: activations had to leave the device, whose memory was too small. `written`: when each file of the
    model was, in ns.
    """

    model_config = ConfigDict(frozen=True)

    peak_memory: int = 0
    peak_device_memory: int | None = None
    batch_size: PositiveInt | None = None
    machine: str = ""
    off_device: bool = False
    written: dict[str, int] = {}


class RunState(BaseModel):
    """All that is finished. `key`: what the run's result depends on. `layers`: a record each. `seconds`: by stage.

    `sparsities`: by linear, where they were allocated.
    """

    model_config = ConfigDict(frozen=True)

    version: int = STATE_VERSION
    key: dict[str, Any]
    shards: dict[str, Shard] = {}
    layers: tuple[dict[str, Any], ...] = ()
    sparsities: dict[str, float] | None = None
    seconds: dict[str, float] = {}
    used: Used = Used()
    activations: tuple[Activations, ...] = ()

    @property
    def begun(self) -> bool:
        """Is there anything to go on with?"""
        return bool(self.layers) or self.sparsities is not None

    def of_first_layers(self, count: int) -> "RunState":
        """As it was when so many layers were finished; their shards come after those outside the layers."""
        outside = len(self.shards) - len(self.layers)
        shards = dict(list(self.shards.items())[: outside + count])
        activations = tuple(one for one in self.activations if one.layers <= count)
        found = {"shards": shards, "layers": self.layers[:count], "activations": activations}
        return self.model_copy(update=found)


def read_state(folder: Path) -> RunState | None:
    """The state in a work folder, or the one before it where that is damaged or gone; None if there is none.

    Raises:
        OutputError: all there is is damaged, cannot be read, or is of another version.
    """
    path, before = folder / STATE_NAME, folder / STATE_BEFORE
    if not path.exists() and not before.exists():
        return None
    state = _read(path) or _read(before)
    if state is None:
        raise OutputError(f"{path} is damaged", START_AGAIN)
    if state.version != STATE_VERSION:
        raise OutputError(f"{path} has version {state.version}, this program goes on with {STATE_VERSION}", START_AGAIN)
    return state


def mend_state(folder: Path) -> None:
    """Put the state before in the place of a damaged one, which would else be the one before the next."""
    if _read(folder / STATE_NAME) is None and _read(folder / STATE_BEFORE) is not None:
        remove(folder / STATE_NAME)
        (folder / STATE_BEFORE).rename(folder / STATE_NAME)


def unfinished_run(folder: Path, key: Mapping[str, Any], overwrite: bool, resume: bool) -> RunState | None:
    """The state of a run in a work folder that one of this key goes on with, or clears away; None: there is none.

    Raises:
        OutputError: there is one, which is to be neither gone on with nor overwritten, or cannot be.
    """
    left = None if overwrite and not resume else read_state(folder)
    if left is not None and left.layers and not resume:
        raise OutputError(
            f"{folder} has an unfinished run with {len(left.layers)} finished layers",
            "add --resume to go on with it, or --overwrite to start again",
        )
    if left is not None and resume:
        check_key(left, key)
    return left


def undamaged(folder: Path, left: RunState) -> tuple[RunState, list[str]]:
    """What of a state is there, whole, and the names of shards that are not.

    Those outside the layers are copied again; of layers those from the first one on whose shard is damaged are pruned
    again.
    """
    lost = []
    outside, finished = len(left.shards) - len(left.layers), len(left.layers)
    for number, (name, shard) in enumerate(left.shards.items()):
        path = folder / name
        if path.is_file() and sync_file(path) == shard.sha256:
            continue
        lost.append(name)
        if number >= outside:
            finished = number - outside
            break
    return left.of_first_layers(finished), lost


def _read(path: Path) -> RunState | None:
    """A state; None if it is damaged, changed since it was written, no file, or not there."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        if (DIGEST in content or content.get("version") == STATE_VERSION) and not has_its_digest(content):
            return None
        return RunState.model_validate(content)
    except (ValueError, TypeError, AttributeError, RecursionError):  # pydantic's errors are ValueErrors
        return None
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error}", "check the disk") from error


def write_state(folder: Path, state: RunState) -> None:
    """Write the state, durably, beside the one before it."""
    if (folder / STATE_NAME).exists():
        (folder / STATE_NAME).rename(folder / STATE_BEFORE)
    content = with_digest(json.loads(state.model_dump_json()))
    write_durably(folder / STATE_NAME, json.dumps(content).encode())


def check_key(state: RunState, key: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings, another model or another calibration text.

    Raises:
        OutputError: something differs; all that does is named.
    """
    wanted = json.loads(json.dumps(key))
    given = _differing(wanted.pop("given", {}), _mapping(state.key.get("given")))
    differing = _differing(wanted, {name: value for name, value in state.key.items() if name != "given"})
    if "settings" in differing:
        differing.remove("settings")
        differing = sorted(
            {*differing, *(given or _differing(wanted["settings"], _mapping(state.key.get("settings"))))}
        )
    if differing:
        raise OutputError(
            f"the unfinished run was started with another {', '.join(differing)}",
            f"give what it was started with, or {START_AGAIN}",
        )


def _mapping(value: Any) -> Mapping[str, Any]:
    """A part of a key; a damaged state may have something else there, which is like nothing."""
    return value if isinstance(value, Mapping) else {}


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of what is not the same in both, in order."""
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def save_activations(folder: Path, layers: int, tensors: Mapping[str, Tensor]) -> Activations:
    """Write activations, durably."""
    path = folder / f"activations-{layers:05d}.safetensors"
    temporary = path.with_name(f"{path.name}.tmp")
    save_tensors(tensors, temporary)
    digest = sync_file(temporary)
    temporary.rename(path)
    sync_folder(folder)
    return Activations(layers=layers, file=path.name, sha256=digest)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, for whom the user's other files are: safetensors makes it the owner's alone.

    Raises:
        OSError: the disk is full, or whatever else the operating system says; safetensors wraps that in its own error.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata)
        if path.stat().st_mode != mode:
            path.chmod(mode)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def load_activations(folder: Path, kept: Activations) -> dict[str, Tensor] | None:
    """What was saved, mapped from the file; None if that is missing or damaged.

    Not `load_file`: it takes as much private memory as the file is large, which a run within a limit may not have.
    """
    path = folder / kept.file
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != kept.sha256:
                return None
        return _mapped(path)
    except OSError:
        return None


def _mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file that `save_activations` has written, not to be written to."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    content = torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
    found = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        found[name] = content[start + first : start + last].view(ACTIVATION_DTYPES[entry["dtype"]]).view(entry["shape"])
    return found


def files_key(paths: Iterable[Path]) -> str:
    """sha256 that tells the files of a model from other files: names, sizes, and samples spread over each file.

    Weights are not read whole: a run should not read them twice.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(0, (size - SAMPLE_BYTES) * sample // (SAMPLES - 1)))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def is_full(error: OSError) -> bool:
    """Has a disk no room left, or the user none on it?"""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def sync_file(path: Path) -> str:
    """Make a file durable; returns its sha256, computed while the disk works."""
    with path.open("rb") as file, ThreadPoolExecutor(1, "to disk") as pool:
        durable = pool.submit(os.fsync, file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        durable.result()
        return digest


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a folder's names durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file so that it is whole or as before."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_folder(path.parent)
