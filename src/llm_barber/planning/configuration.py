"""Read a model's configuration without weights: from a folder, config.json, GGUF file or the hub."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from llm_barber.checkpoint.companions import refuse_adapter, refuse_quantised
from llm_barber.checkpoint.counts import check_counts
from llm_barber.checkpoint.gguf import DTYPE as GGUF_DTYPE
from llm_barber.checkpoint.hub import check_folder, hub_configuration
from llm_barber.checkpoint.untrusted import check_regular, read_json
from llm_barber.errors import ModelError
from llm_barber.loading.configuration import check_finite, forget_packed, unusable_configuration

NOT_FOUND_HINT = "give a folder with config.json, a config.json, a GGUF file or a hub id"
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


def read_configuration(model: str, revision: str | None = None) -> PreTrainedConfig:
    """Read the configuration of a model by any name that `plan` takes.

    Raises:
        ModelError: there is no configuration, transformers cannot use it, or the model is quantised or absurd.
        HubError: the hub cannot be reached or does not have the model.
    """
    path, options = _find(model, revision)
    content = {} if options else read_json(path)
    refuse_quantised(content, model)
    check_counts(content, model)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path, trust_remote_code=False, local_files_only=True, **options
        )
    except Exception as error:  # a damaged file can raise anything in transformers
        raise unusable_configuration(model, error) from error
    forget_packed(config)
    check_finite(content, config, model)
    for size in SIZES:
        value = getattr(config.get_text_config(), size, 1)
        if isinstance(value, int) and value < 1:
            raise ModelError(
                f"the configuration of {model} says {size}: {value}", "get it again; nothing has that size"
            )
    if options:
        check_counts(config.to_dict(), model)
        config.dtype = GGUF_DTYPE  # of its weights, once they are converted
    return config


def _find(model: str, revision: str | None) -> tuple[Path, dict[str, Any]]:
    """Find a configuration: the path that transformers reads, and options that it needs with it."""
    try:
        path = Path(model).expanduser()
        is_folder, is_file = bool(model) and path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"no such model: {model} ({error})", NOT_FOUND_HINT) from error
    if is_folder:
        check_folder(path)
        refuse_adapter(path, model)
        if not (path / "config.json").is_file():
            raise ModelError(f"{model} has no config.json", NOT_FOUND_HINT)
        return path / "config.json", {}
    if model:  # the path of "" is the present folder
        check_regular(path)
    if is_file and path.suffix == ".gguf":
        return path.parent, {"gguf_file": path.name}
    if is_file and path.suffix == ".json":
        return path, {}
    if is_file:
        raise ModelError(f"{model} is neither a config.json nor a GGUF file", NOT_FOUND_HINT)
    if model.endswith((".json", ".gguf")) or model.startswith((".", "/", "~")):
        raise ModelError(f"no such model: {model}", NOT_FOUND_HINT)
    return hub_configuration(model, revision), {}
