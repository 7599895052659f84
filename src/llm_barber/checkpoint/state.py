"""The state of a run in its work folder: enough to go on after the run was killed at any moment.

A finished layer is durable once its shard is, and then this state, which names both; they are written while the next
layer is computed. Activations are not kept: a run that resumes embeds the text again and passes it through the finished
layers.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt

from llm_barber.checkpoint.digests import has_its_digest, with_digest
from llm_barber.checkpoint.durable import write_durably
from llm_barber.errors import OutputError, UnfinishedRunError

STATE_NAME = "state.json"
STATE_VERSION = 8
START_AGAIN = "start again with --overwrite and without --resume"


class Shard(BaseModel):
    """A written shard: its sha256, the names of its tensors, and their bytes, unpacked."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    tensors: tuple[str, ...]
    bytes: int


class Used(BaseModel):
    """Resources that the finished layers were computed with.

    `peak_memory` and `peak_device_memory`: bytes. `batch_size`: sequences computed together. `machine`: the processor
    or GPU (`usage.machine`). `written`: modification time of each file of the model, ns.
    """

    model_config = ConfigDict(frozen=True)

    peak_memory: int = 0
    peak_device_memory: int | None = None
    batch_size: PositiveInt | None = None
    machine: str = ""
    written: dict[str, int] = {}


class RunState(BaseModel):
    """All that is finished.

    `key`: the settings and files on which the result depends. `layers`: the record of each finished layer. `updated`:
    sha256 of each file of weights that a method updated and the output lacks. `sparsities`: by linear, if they were
    allocated. `channel_order`: sha256 of `channel-order.json`, if channels were reordered. `seconds`: by stage.
    """

    model_config = ConfigDict(frozen=True)

    version: int = STATE_VERSION
    key: dict[str, Any]
    shards: dict[str, Shard] = {}
    layers: tuple[dict[str, Any], ...] = ()
    updated: dict[str, str] = {}
    sparsities: dict[str, float] | None = None
    channel_order: str | None = None
    seconds: dict[str, float] = {}
    used: Used = Used()

    @property
    def begun(self) -> bool:
        """True if another run can go on from here."""
        return bool(self.layers) or self.sparsities is not None or self.channel_order is not None

    @property
    def outside(self) -> int:
        """Number of shards before the first layer's: those of the tensors outside the layers."""
        return len(self.shards) - len(self.layers)

    def of_first_layers(self, count: int) -> "RunState":
        """The state as it was after the first `count` layers."""
        shards = dict(list(self.shards.items())[: self.outside + count])
        updated = {name: digest for name, digest in self.updated.items() if name < updated_name(count)}
        return self.model_copy(update={"shards": shards, "layers": self.layers[:count], "updated": updated})


def updated_name(index: int) -> str:
    """Name of the file of a layer's updated weights in the work folder."""
    return f"updated-{index:05d}.safetensors"


def read_state(folder: Path) -> RunState | None:
    """The state in a work folder; None: it has none.

    Raises:
        UnfinishedRunError: the state is damaged, or of another version.
        OutputError: the state cannot be read.
    """
    path = folder / STATE_NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else None
        if isinstance(content, dict) and has_its_digest(content):
            if content.get("version") != STATE_VERSION:
                raise UnfinishedRunError(
                    f"{path} has version {content.get('version')}, this program goes on with {STATE_VERSION}",
                    START_AGAIN,
                )
            return RunState.model_validate(content)
    except (ValueError, TypeError, RecursionError):  # pydantic's errors are ValueErrors
        pass
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error}", "check the disk") from error
    raise UnfinishedRunError(f"{path} is damaged", START_AGAIN)


def write_state(folder: Path, state: RunState) -> None:
    """Write the state, durably."""
    content = with_digest(json.loads(state.model_dump_json()))
    write_durably(folder / STATE_NAME, json.dumps(content).encode())
