"""Kinds of values that several commands take: folders to write, dtypes, sizes, lists with commas, blocks of layers."""

import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, ValidationError, WrapValidator

from llm_barber.checkpoint.in_use import folder_in_use
from llm_barber.checkpoint.untrusted import is_utf8
from llm_barber.messages import Message, SettingName, message
from llm_barber.model.architecture import Block, StructureOptions
from llm_barber.settings.checked import Settings
from llm_barber.settings.targets import read_blocks

DTYPES = ("auto", "float32", "bfloat16", "float16")


def _known_dtype(value: str) -> str:
    if value not in DTYPES:
        raise ValueError(f"{value!r} is not one of {', '.join(DTYPES)}")
    return value


Dtype = Annotated[str, AfterValidator(_known_dtype)]


def same_folder(setting: str, model: str, output: Path) -> list[Message]:
    """Problems of an output that is, contains or lies in the folder of the model that `setting` names.

    Folders are compared as the disk has them: one may have several paths, by mounts or by the case of its name.
    """
    try:
        source = Path(model).expanduser().resolve()
        if not source.exists():  # a hub id, or an error that opening the model will name
            return []
        above_source, above_output = _identities(source), _identities(output)
        shards = [path.resolve() for path in source.glob("*.safetensors")] if source.is_dir() else []
        above_shards = {identity for path in shards for identity in _identities(path.parent)}
    except (RuntimeError, OSError, ValueError):
        return []
    shown = {"made_of": SettingName(setting), "folder": output}
    own = above_output[0] if output.exists() else None
    if own is not None and own == above_source[0]:
        return [message("{output} is {made_of} itself ({folder}): choose another output folder", **shown)]
    if own is not None and own in (*above_source, *above_shards):
        return [message("{output} ({folder}) contains {made_of}: choose another output folder", **shown)]
    if above_source[0] in above_output:
        return [message("{output} ({folder}) lies inside {made_of}: choose another output folder", **shown)]
    return []


def _identities(path: Path) -> list[tuple[int, int]]:
    """Device and inode of a path and of the folders above it, as far as they exist, from the inside."""
    return [(stat.st_dev, stat.st_ino) for stat in (each.stat() for each in (path, *path.parents) if each.exists())]


def absolute_if_there(name: str) -> str:
    """The absolute path of a local file or folder; any other name, as a hub id, stays as it is."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.exists(path) else name


def absolute_folder(value: Any) -> Path:
    """The absolute path of a folder, links and `~` resolved.

    Raises:
        ValueError: the value is empty, or no path; or a name in the path is no UTF-8.
    """
    if not isinstance(value, str | Path) or not str(value).strip():
        raise ValueError("is not a folder's name")
    try:
        path = Path(value).expanduser().resolve()
    except (RuntimeError, OSError) as error:
        raise ValueError(f"cannot be a folder: {error}") from error
    if not is_utf8(path):
        raise ValueError("lies in a folder whose name is not valid UTF-8: rename it, or name another folder")
    return path


def output_folder(value: Any) -> Path:
    """An absolute path that an output may have.

    Raises:
        ValueError: the value is no path, or a folder in use.
    """
    output = absolute_folder(value)
    if use := folder_in_use(output):
        raise ValueError(f"{str(value)!r} is {use} ({output}): name a folder to write")
    return output


OutputFolder = Annotated[Path, BeforeValidator(output_folder)]


def _size(value: Any, parse: Callable[[Any], ByteSize]) -> ByteSize:
    """Bytes of "8GiB" or "500MB", of "8Gi" and "500M" too, or of a number."""
    try:
        return parse(f"{value}B" if isinstance(value, str) and value.endswith("i") else value)
    except (ValidationError, OverflowError):
        raise ValueError(f"{value!r} is not a size, like 8GiB") from None


Size = Annotated[ByteSize, Field(gt=0), WrapValidator(_size)]


class CommaSeparated:
    """Mark of a tuple that text with commas may stand for: the command line takes one value instead of several."""


def split_at_commas(value: Any) -> Any:
    """The names of a text with commas between them; other values stay as they are.

    Raises:
        ValueError: there are only commas.
    """
    if not isinstance(value, str):
        return value
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if not names:
        raise ValueError(f"{value!r} names nothing: name at least one")
    return names


COMMAS = (BeforeValidator(split_at_commas), CommaSeparated())


class Format(StrEnum):
    """Form of the weight files; `packed` is what `pack` makes of `dense`."""

    DENSE = "dense"
    PACKED = "packed"


def _read_blocks(value: Any) -> Any:
    return read_blocks(Path(value)) if isinstance(value, str | Path) else value


Blocks = Annotated[tuple[Block, ...], BeforeValidator(_read_blocks)]  # or a YAML file of them


class StructureSettings(Settings):
    """Parts of a model's structure that a user may decide."""

    layers: str | None = Field(
        default=None, description="Path of the decoder layers, as model.layers (default: as known, or found)"
    )
    blocks: Blocks = Field(
        default=(),
        description="YAML file of a layer's blocks, in order: NAME: {output: PATH, linears: [PATH, …]} "
        "(default: found)",
    )

    @property
    def structure(self) -> StructureOptions:
        """The decided parts."""
        return StructureOptions(self.layers, self.blocks)
