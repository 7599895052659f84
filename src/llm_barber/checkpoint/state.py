"""The state of a run in its work folder: enough to go on after the run was killed at any moment.

A finished layer is durable once its shard is, and then this state; both are written while the next layer is computed.
Activations are written after some layers. The state names a file of them once the file is durable and the state has the
layers before it. A run that resumes makes later activations from that file, in a pass through the layers finished
since. The last two files of activations and the last two states are kept.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt

from llm_barber.checkpoint.activations import Activations
from llm_barber.checkpoint.digests import DIGEST, has_its_digest, with_digest
from llm_barber.checkpoint.durable import remove, write_durably
from llm_barber.errors import OutputError, UnfinishedRunError

STATE_NAME, STATE_BEFORE = "state.json", "state-before.json"
STATE_VERSION = 7
READ_VERSIONS = (6, STATE_VERSION)  # in version 6, files of activations have another digest
ACTIVATIONS_KEPT = 2
MOST_ACTIVATION_FILES = ACTIVATIONS_KEPT + 1  # at once: the next one is written before the oldest is removed
START_AGAIN = "start again with --overwrite and without --resume"


class Shard(BaseModel):
    """A written shard: its sha256, the names of its tensors, and their bytes, unpacked.

    `file` and `file_sha256`: of a packed shard, the file that it unpacks to.
    """

    model_config = ConfigDict(frozen=True)

    sha256: str
    tensors: tuple[str, ...]
    bytes: int
    file: str = ""
    file_sha256: str = ""


class Used(BaseModel):
    """Resources that the finished layers were computed with.

    `peak_memory` and `peak_device_memory`: bytes. `batch_size`: sequences computed together. `machine`: the processor
    or GPU (`usage.machine`). `off_device`: activations had to leave the device, whose memory was too small. `written`:
    modification time of each file of the model, ns.
    """

    model_config = ConfigDict(frozen=True)

    peak_memory: int = 0
    peak_device_memory: int | None = None
    batch_size: PositiveInt | None = None
    machine: str = ""
    off_device: bool = False
    written: dict[str, int] = {}


class RunState(BaseModel):
    """All that is finished.

    `key`: the settings and files on which the result depends. `layers`: the record of each finished layer.
    `sparsities`: by linear, if they were allocated. `channel_order`: sha256 of `channel-order.json`, if channels were
    reordered. `seconds`: by stage.
    """

    model_config = ConfigDict(frozen=True)

    version: int = STATE_VERSION
    key: dict[str, Any]
    shards: dict[str, Shard] = {}
    layers: tuple[dict[str, Any], ...] = ()
    sparsities: dict[str, float] | None = None
    channel_order: str | None = None
    seconds: dict[str, float] = {}
    used: Used = Used()
    activations: tuple[Activations, ...] = ()

    @property
    def begun(self) -> bool:
        """Tell whether another run can go on from here."""
        return bool(self.layers) or self.sparsities is not None or self.channel_order is not None

    def of_first_layers(self, count: int) -> "RunState":
        """The state as it was after the first `count` layers.

        The shards of layers come after the shards of the tensors outside the layers.
        """
        outside = len(self.shards) - len(self.layers)
        shards = dict(list(self.shards.items())[: outside + count])
        activations = tuple(saved for saved in self.activations if saved.layers <= count)
        return self.model_copy(
            update={"shards": shards, "layers": self.layers[:count], "activations": activations},
        )


def read_state(folder: Path) -> RunState | None:
    """The state in a work folder; None: it has none.

    The previous state stands in for a damaged or missing one.

    Raises:
        UnfinishedRunError: both are damaged, or the state is of another version.
        OutputError: the state cannot be read.
    """
    path, before = folder / STATE_NAME, folder / STATE_BEFORE
    if not path.exists() and not before.exists():
        return None
    state = _read(path) or _read(before)
    if state is None:
        raise UnfinishedRunError(f"{path} is damaged", START_AGAIN)
    if state.version not in READ_VERSIONS:
        raise UnfinishedRunError(
            f"{path} has version {state.version}, this program goes on with {STATE_VERSION}", START_AGAIN
        )
    return state.model_copy(update={"version": STATE_VERSION})


def write_state(folder: Path, state: RunState) -> None:
    """Write the state, durably; the previous state stays beside it."""
    if (folder / STATE_NAME).exists():
        (folder / STATE_NAME).rename(folder / STATE_BEFORE)
    content = with_digest(json.loads(state.model_dump_json()))
    write_durably(folder / STATE_NAME, json.dumps(content).encode())


def mend_state(folder: Path) -> None:
    """Replace a damaged state by the previous one.

    Else the next write would keep the damaged state as the previous one.
    """
    if _read(folder / STATE_NAME) is None and _read(folder / STATE_BEFORE) is not None:
        remove(folder / STATE_NAME)
        (folder / STATE_BEFORE).rename(folder / STATE_NAME)


def _read(path: Path) -> RunState | None:
    """A state; None: it is missing, damaged, no file, or was changed after it was written."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        if (DIGEST in content or content.get("version") in READ_VERSIONS) and not has_its_digest(content):
            return None
        return RunState.model_validate(content)
    except (ValueError, TypeError, AttributeError, RecursionError):  # pydantic's errors are ValueErrors
        return None
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error}", "check the disk") from error
