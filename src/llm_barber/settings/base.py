"""Base of every command's settings, and kinds of values that several commands take."""

import os
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from pathlib import Path
from reprlib import repr as shortened
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
    field_validator,
)

from llm_barber.checkpoint.in_use import folder_in_use
from llm_barber.checkpoint.untrusted import is_utf8
from llm_barber.errors import SettingsError
from llm_barber.masking.granularity import Granularity
from llm_barber.model.architecture import Block, StructureOptions
from llm_barber.settings.presets import RELEASED_GRANULARITIES, RELEASED_RATIOS
from llm_barber.settings.targets import read_blocks

P = ParamSpec("P")
T = TypeVar("T")
MODEL = "Folder, hub id (org/name, org/name@revision) or GGUF file"
NEEDS_REBUILD = "--granularity and --rebuild-ratio need the rebuild"
USUAL_SAMPLES, USUAL_SEQLEN = 128, 2048  # calibration windows, and tokens of each, as in the paper


class Settings(BaseModel):
    """A frozen set of settings; the first wrong one raises a `SettingsError` that names it as the command line does.

    A field with a title is an argument of the command, by that name: `OUT`. Other fields are options.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise self._refusal(error.errors()[0]) from None

    @field_validator("*", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        texts = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(text, str) and not text.strip() for text in texts):
            raise ValueError("the value is empty; is a variable of the shell not set?")
        if not all(is_utf8(text) for text in texts if isinstance(text, str | Path)):
            raise ValueError("is not valid UTF-8: check the encoding of the shell, or rename the file or folder")
        return value

    @field_validator("model", "dense", "pruned", "against", "calibration", mode="before", check_fields=False)
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @classmethod
    def typed(cls, name: str) -> str:
        """A setting as the user of the command line writes it: `--samples`, or `OUT` for an argument."""
        return cls.model_fields[name].title or f"--{name.replace('_', '-')}"

    @classmethod
    def _refusal(cls, problem: Any) -> SettingsError:
        """Make the error of a problem that pydantic found.

        Example: "--samples: '0' should be greater than or equal to 1", with the setting's description as hint.
        """
        name = str(problem["loc"][0])
        if name not in cls.model_fields:
            return SettingsError(f"there is no setting {name}", f"{cls.__name__} has {', '.join(cls.model_fields)}")
        said = problem["msg"].partition(", unable to")[0].removeprefix("Value error, ")
        if problem["type"] == "missing":
            said = "is missing"
        elif said.startswith("Input "):
            said = f"{shortened(problem['input'])} {said.removeprefix('Input ')}"
        return SettingsError(
            f"{cls.typed(name)}: {said}", f"{cls.typed(name)}: {cls.model_fields[name].description or ''}"
        )


def refuse_if(wrong: bool, problem: str, hint: str) -> None:
    """Raise a `SettingsError` if settings do not go together."""
    if wrong:
        raise SettingsError(problem, hint)


def takes(kind: type[Settings]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a public function whose first argument is its settings: anything else raises a `SettingsError`.

    Args:
        kind: class of the settings.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            config = args[0] if args else kwargs.get("config")
            if not isinstance(config, kind):
                required = [f"{name}=…" for name, field in kind.model_fields.items() if field.is_required()]
                required.sort(key=lambda name: name == "output=…")
                raise SettingsError(
                    f"{function.__name__} takes settings of type {kind.__name__}, not {type(config).__name__}",
                    f"call {function.__name__}({kind.__name__}({', '.join(required)}))",
                )
            return function(*args, **kwargs)

        return checked

    return decorate


def check_apart(output: Path, model: str, name: str) -> None:
    """Refuse an output that is, contains or lies in the folder of a model, as the disk has them.

    Args:
        output: absolute path of the output.
        model: folder or hub id of the model.
        name: of the model in the error, for example "MODEL".

    Raises:
        SettingsError: the output would change the model.
    """
    try:
        source = Path(model).expanduser().resolve(strict=True)
        shards = [path.resolve() for path in source.glob("*.safetensors")]
    except (RuntimeError, OSError, ValueError):  # a hub id, or an error that opening the model will name
        return
    if _lies_in(output, source):
        relation = "is" if output.exists() and output.samefile(source) else "lies inside"
    elif any(_lies_in(path, output) for path in (source, *shards)):
        relation = "contains"
    else:
        return
    raise SettingsError(f"the output folder {output} {relation} {name}", "choose another output folder")


def _lies_in(inner: Path, outer: Path) -> bool:
    """True if a path is, or lies in, a folder that exists; a folder may have several paths, by mounts or by case."""
    return outer.exists() and any(path.exists() and path.samefile(outer) for path in (inner, *inner.parents))


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


def _split_at_commas(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if not names:
        raise ValueError(f"{value!r} names nothing: name at least one")
    return names


COMMAS = BeforeValidator(_split_at_commas)  # of a tuple that may be text, with commas between its items


class Format(StrEnum):
    """Form of the weight files; `packed` is what `pack` makes of `dense`."""

    DENSE = "dense"
    PACKED = "packed"


def _read_blocks(value: Any) -> Any:
    return read_blocks(Path(value)) if isinstance(value, str | Path) else value


class ComputeSettings(Settings):
    """Where and in what a model computes."""

    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Compute in float32, bfloat16 or float16 (default: auto, the fastest)"
    )


class StructureSettings(ComputeSettings):
    """Parts of a model's structure that a user may decide."""

    layers: str | None = Field(
        None, description="Path of the decoder layers, as model.layers (default: as known, or found)"
    )
    blocks: Annotated[tuple[Block, ...], BeforeValidator(_read_blocks)] = Field(  # or a YAML file of them
        (),
        description="YAML file of a layer's blocks, in order: NAME: {output: PATH, linears: [PATH, …]} "
        "(default: found)",
    )
    bos: bool = Field(
        True,
        description="Begin each window with BOS if the tokenizer begins texts with it; many published numbers are "
        "measured without BOS",
    )
    batch_size: int | None = Field(
        None, ge=1, description="Most windows at a time; can change bfloat16 rounding (default: by the device)"
    )

    @property
    def structure(self) -> StructureOptions:
        """The decided parts."""
        return StructureOptions(self.layers, self.blocks)


class CalibratedSettings(StructureSettings):
    """The calibration text of a run, and its rebuild."""

    granularity: Granularity | None = Field(
        None,
        description=f"Comparison group of the rebuild: {', '.join(Granularity)} (default: {RELEASED_GRANULARITIES}; "
        "with N:M output)",
    )
    rebuild_ratio: float | None = Field(
        None, gt=0, le=1, description=f"Share of the beneficial pairs to swap (default: {RELEASED_RATIOS})"
    )
    calibration: str = Field(
        "builtin",
        description="builtin, c4, wikitext2, or a .txt, .jsonl, .parquet or .safetensors file, whose windows "
        "(input_ids) are taken as they are",
    )
    samples: int = Field(USUAL_SAMPLES, ge=1, description="Windows of calibration text")
    seqlen: int = Field(USUAL_SEQLEN, ge=2, description="Tokens a window")
    revision: str | None = Field(None, description="Revision of a hub id")
