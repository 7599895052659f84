"""Make the empty model of a configuration, and check that a checkpoint's tensors fit it."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llm_barber.checkpoint.locations import FLOAT_DTYPES, Location
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError, first_line
from llm_barber.loading.naming import find_locations, unexpected
from llm_barber.messages import first_names
from llm_barber.model.architecture import Architecture
from llm_barber.model.device import experts_per_token
from llm_barber.model.empty import stored_buffer_names, untie_head
from llm_barber.model.experts import Experts
from llm_barber.model.skeleton import Skeleton
from llm_barber.progress import Progress


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
    for name, other in skeleton.shared_parameters():
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


def lacking_buffers(model: nn.Module, source: CheckpointSource) -> str | None:
    """Warning that names the stored buffers which the checkpoint lacks; None: it has all that transformers expects."""
    absent = (name for name in stored_buffer_names(model) if name not in source.locations)
    missing = unexpected(absent, getattr(model, "_keys_to_ignore_on_load_missing", None))
    return f"{source.model} has no {first_names(missing)}: an untrained model's values are taken" if missing else None


def warn_of_lacking_buffers(model: nn.Module, source: CheckpointSource, progress: Progress) -> None:
    """Tell of the stored buffers which the checkpoint lacks."""
    if warning := lacking_buffers(model, source):
        progress.warn(warning)


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
