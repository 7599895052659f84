"""Load a checkpoint's configuration, and its settings of text generation, and refuse what cannot be used."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from llm_barber.checkpoint.packed_format import KEY, names_packed
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import CalibrationError, ModelError, first_line
from llm_barber.messages import as_option

GENERATION_CONFIG = "generation_config.json"


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
            f"give {as_option(setting)} {positions}, or less"
            if setting
            else f"make a file with windows of {positions} tokens or less"
        )
        raise CalibrationError(f"windows of {seqlen} tokens are beyond the model's {positions} positions", shorter)
