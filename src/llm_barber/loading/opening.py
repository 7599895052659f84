"""Open a checkpoint's configuration, tokenizer and empty model, and check that they belong together."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig

from llm_barber.checkpoint.hub import local_path
from llm_barber.checkpoint.locations import FLOAT_DTYPES, Location
from llm_barber.checkpoint.packed_configuration import KEY, names_packed
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import CalibrationError, ModelError, first_line
from llm_barber.loading.naming import find_locations
from llm_barber.messages import SettingName, message
from llm_barber.model.architecture import Architecture
from llm_barber.model.buffers import stored_buffer_names
from llm_barber.model.device import experts_per_token
from llm_barber.model.empty import untie_head
from llm_barber.model.experts import Experts
from llm_barber.model.skeleton import Skeleton
from llm_barber.progress import Progress
from llm_barber.text.windows import beginning_of_texts

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def make_skeleton(
    config: PreTrainedConfig, architecture: Architecture, device: torch.device, dtype: torch.dtype, model: str
) -> Skeleton:
    """Empty model of a configuration.

    Raises:
        ModelError: the configuration does not describe a model.
    """
    try:
        skeleton = Skeleton(config, architecture, device, dtype)
        _check_layers(skeleton)
        return skeleton
    except ModelError:
        raise
    except Exception as error:  # transformers raises whatever odd settings make it raise
        reason = first_line(error)
    raise ModelError(f"config.json of {model} does not describe a model: {reason}", "get the file again")


def _check_layers(skeleton: Skeleton) -> None:
    experts = max((len(module) for module in skeleton.model.modules() if isinstance(module, Experts)), default=0)
    chosen = experts_per_token(skeleton.model.config)
    if experts and not 1 <= chosen <= experts:
        raise ValueError(f"it chooses {chosen} experts for a token, of {experts}")
    if not len(skeleton.layers):
        raise ValueError("it has no decoder layers")
    for name, other in skeleton.names_in_other_layers():
        raise ModelError(
            f"{skeleton.layers_prefix}{name} and {skeleton.layers_prefix}{other} are one weight",
            "models whose layers share weights cannot be pruned yet: open an issue that names it",
        )


def open_skeleton(
    source: CheckpointSource,
    config: PreTrainedConfig,
    architecture: Architecture,
    device: torch.device,
    dtype: torch.dtype,
) -> Skeleton:
    """Empty model of a checkpoint; `source.locations` has the location of each parameter afterwards.

    Raises:
        ModelError: the configuration does not describe a model.
    """
    skeleton = make_skeleton(config, architecture, device, dtype, source.model)
    source.locations = find_locations(skeleton.model, source.tensors)
    untie_head(skeleton.model, {name: location.tensor for name, location in source.locations.items()})
    return skeleton


def check_tensors(skeleton: Skeleton, source: CheckpointSource, with_head: bool) -> None:
    """Refuse a checkpoint whose parameters or layers are not the configuration's, or are quantised.

    Args:
        skeleton: the empty model.
        source: the checkpoint.
        with_head: the run needs the output head, too.

    Raises:
        ModelError: a parameter or layer does not fit.
    """
    needed = list(skeleton.outside_names_and_head if with_head else skeleton.outside_names)
    count = len(skeleton.layers)
    for index in range(count):
        needed += [skeleton.layer_prefix(index) + name for name in skeleton.layer_names(index)]
    stored: dict[str, Tensor] = {name: skeleton.model.get_parameter(name) for name in needed}
    for name in stored_buffer_names(skeleton.model):
        if name in source.locations:
            stored[name] = skeleton.model.get_buffer(name)
    for name, tensor in stored.items():
        shape, expected = source.shape(name), tuple(tensor.shape)
        if shape != expected:
            raise ModelError(
                f"{name} of {source.model} has shape {shape}, its config.json says {expected}",
                "config.json and the weights do not belong together",
            )
        path = name.rpartition(".")[0]
        check_stored(source, name, skeleton.model.get_submodule(path.rpartition(".")[0].rpartition(".")[0]))
    last = source.location(needed[-1]).tensor
    layers = last[: last.index(f".{count - 1}.") + 1]
    beyond = {name.removeprefix(layers).partition(".")[0] for name in source.tensors if name.startswith(layers)}
    text_config = skeleton.model.config.get_text_config()
    more = getattr(text_config, "num_nextn_predict_layers", None) or 0  # layers that transformers leaves out
    unknown = sorted(beyond - {str(index) for index in range(count + more)})
    if unknown:
        raise ModelError(
            f"{source.model} has decoder layer {unknown[0]}, config.json says that there are {count}",
            "config.json and the weights do not belong together",
        )


def check_stored(source: CheckpointSource, name: str, experts: nn.Module | None = None) -> None:
    """Refuse a parameter whose tensor has no floating-point numbers, or is a stack of another number of experts.

    Args:
        source: the checkpoint.
        name: of the parameter.
        experts: module that the parameter's expert is in, if it is one's.

    Raises:
        ModelError: the tensor does not fit.
    """
    location = source.location(name)
    info = source.tensors[location.tensor]
    if info.dtype not in FLOAT_DTYPES:
        raise ModelError(
            f"{name} is {info.dtype}; {', '.join(FLOAT_DTYPES)} are understood",
            "start from the checkpoint before it was quantised",
        )
    if location.part is not None and isinstance(experts, Experts) and info.shape[:1] != (len(experts),):
        raise ModelError(
            f"{location.tensor} of {source.model} has shape {info.shape}, its config.json says {len(experts)} experts",
            "config.json and the weights do not belong together",
        )


def layer_locations(skeleton: Skeleton, source: CheckpointSource, index: int) -> dict[str, Location]:
    """Locations of a layer's parameters and stored buffers, by their names in the layer."""
    prefix = skeleton.layer_prefix(index)
    parameters = {name: source.location(prefix + name) for name in skeleton.layer_names(index)}
    buffers = {name: source.locations.get(prefix + name) for name in skeleton.buffer_names(index)}
    return parameters | {name: location for name, location in buffers.items() if location is not None}


def load_config(source: CheckpointSource) -> PreTrainedConfig:
    """The checkpoint's configuration.

    Raises:
        ModelError: transformers cannot use it, or it has a number that is not finite, or a dtype without fractions.
    """
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever a damaged file makes it raise
        raise unusable_configuration(source.model, error) from error
    forget_packed(config)
    check_finite(source.configuration, config, source.model)
    if config.dtype not in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(
            f"config.json of {source.model} says dtype {config.dtype}, in which no model is computed",
            "write the dtype that the weights have, for example bfloat16",
        )
    return config


def forget_packed(config: PreTrainedConfig) -> None:
    """Remove the entry that says that the weights are packed: what is built from `config` is an ordinary model."""
    if names_packed({KEY: getattr(config, KEY, None)}):
        delattr(config, KEY)


def check_finite(configuration: Mapping[str, Any], config: PreTrainedConfig, model: str) -> None:
    """Refuse numbers that are NaN or infinite.

    Settings whose default in transformers is not finite may be.

    Args:
        configuration: content of config.json.
        config: the same, as transformers read it; Mamba 2's default `time_step_limit` is (0, infinity).
        model: as it was named.

    Raises:
        ModelError: there is such a number.
    """
    waiting: list[tuple[str, Mapping[str, Any], PreTrainedConfig]] = [("", configuration, config)]
    while waiting:
        path, settings, described = waiting.pop()
        for name, value in settings.items():
            inner = getattr(described, name, None)
            if isinstance(value, Mapping) and isinstance(inner, PreTrainedConfig):
                waiting.append((f"{path}{name}.", value, inner))
            elif _is_finite(getattr(type(described), name, None)) and not _is_finite(value):
                raise ModelError(
                    f"config.json of {model} says {path}{name}: {value}, which is not a finite number",
                    "get the file again, or write the number that the model was trained with",
                )


def _is_finite(value: Any) -> bool:
    """Test whether all numbers of a value are finite, those in its lists and mappings included."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, float) and not math.isfinite(part):
            return False
        if isinstance(part, Mapping):
            waiting.extend(part.values())
        elif isinstance(part, list | tuple):
            waiting.extend(part)
    return True


def unusable_configuration(model: str, error: Exception) -> ModelError:
    """Error for a configuration that transformers refuses."""
    if "trust_remote_code" in str(error):
        return ModelError(
            f"the code of {model} comes with the checkpoint, and is not run",
            "architectures that transformers has itself are pruned",
        )
    return ModelError(
        f"config.json of {model} cannot be used: {first_line(error)}",
        "update transformers if it does not know the model, or get the file again if it is damaged",
    )


def load_generation_config(folder: Path) -> GenerationConfig | None:
    """Settings of text generation in a model's folder; None: it has none.

    Raises:
        ModelError: the file is damaged.
    """
    if not (folder / GENERATION_CONFIG).exists():
        return None
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever a damaged file makes it raise
        raise ModelError(
            f"{GENERATION_CONFIG} in {folder} cannot be used: {first_line(error)}",
            "get the file again, or remove it: a model is loaded without it, too",
        ) from error


def load_tokenizer(folder: Path) -> Any | None:
    """Tokenizer of a model's folder; None: the folder has none.

    Raises:
        CalibrationError: it cannot be loaded, or cannot tokenize a short text.
    """
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None  # some tokenizers would load empty instead of raising an error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        beginning_of_texts(tokenizer)
        return tokenizer
    except (KeyboardInterrupt, SystemExit, MemoryError, CalibrationError):
        raise
    except BaseException as error:  # tokenizers raise all kinds of errors; those in Rust raise a BaseException
        raise CalibrationError(
            f"the tokenizer in {folder} cannot be loaded: {first_line(error)}",
            "get the tokenizer's files again",
        ) from error


def warn_of_revision(setting: str, revision: str | None, model: str, progress: Progress) -> None:
    """Warn of a revision of a model that is no hub id; `setting`: its name."""
    if revision is not None and local_path(model) is not None:
        unused = "{setting} counts for nothing: {model} is not a hub id"
        progress.warn(message(unused, setting=SettingName(setting, revision), model=model))


def check_positions(config: PreTrainedConfig, seqlen: int, setting: str | None = "seqlen") -> None:
    """Refuse windows longer than the model's positions.

    Args:
        config: the model's.
        seqlen: tokens of a window.
        setting: name of the setting that gives this length; None: a file of tokens gives it.

    Raises:
        CalibrationError: the windows are too long.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and seqlen > positions:
        shorter = (
            message("give {setting}, or less", setting=SettingName(setting, str(positions)))
            if setting
            else f"make a file with windows of {positions} tokens or less"
        )
        raise CalibrationError(f"windows of {seqlen} tokens are beyond the model's {positions} positions", shorter)


def check_vocabulary(config: PreTrainedConfig, tokens: Tensor) -> None:
    """Refuse token ids, int64, that are outside the model's vocabulary."""
    low, high = (int(value) for value in torch.aminmax(tokens))
    if low < 0 or high >= config.vocab_size:
        raise CalibrationError(
            f"token {high if low >= 0 else low} is outside the model's vocabulary of {config.vocab_size}",
            "the tokenizer, or the token file, belongs to another model",
        )
