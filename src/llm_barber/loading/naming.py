"""Map a model's parameters to their locations in a checkpoint, by transformers' conversions."""

import re
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from llm_barber.checkpoint.locations import Location
from llm_barber.errors import ModelError
from llm_barber.model.empty import language_model_prefix
from llm_barber.model.experts import DOWN, GATE, GATE_UP, UP, Experts

# Stacked parameter of experts -> the linears of each expert that it is made of, in order, in checkpoints that keep
# experts one by one.
MEMBERS = {GATE_UP: (GATE, UP), UP: (UP,), DOWN: (DOWN,)}
MERGES = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


def find_locations(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, Location]:
    """Locations of parameters and buffers by the model's names, experts one by one.

    Args:
        model: each of its experts has linears of its own (`experts.py`).
        stored: names of the checkpoint's tensors.

    Raises:
        ModelError: transformers converts a tensor in a way that cannot be undone.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    parameters = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    experts = {path: module for path, module in model.named_modules() if isinstance(module, Experts)}
    base, language_model = f"{model.base_model_prefix}.", language_model_prefix(model)
    locations: dict[str, Location] = {}
    for key in stored:
        renamed, pattern = rename_source_key(key, renamings, converters)
        candidates = (renamed, base + renamed, renamed.removeprefix(base))
        names = [name for name in candidates if _is_known(name, parameters, experts)]
        if not names:
            continue  # not in the model: it is written as it was read
        converter = next((candidate for candidate in converters if pattern in candidate.source_patterns), None)
        if names[0] in parameters:
            if converter is None:
                locations.setdefault(names[0], Location(key))
            elif names[0].startswith(language_model):  # the rest, of images, is written as it was read
                raise _conversion_error(converter, key)
            continue
        path, _, leaf = names[0].rpartition(".")
        if converter is None or pattern is None:
            for part in experts[path].parts(leaf):
                locations[f"{path}.{part.name}"] = Location(key, part)
        else:
            number = re.findall(r"\.(\d+)(?=\.)", key)[-1]
            linear = _member(converter, pattern, leaf, experts[path], key)
            locations[f"{path}.{number}.{linear}.weight"] = Location(key)
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in locations:  # a tied parameter may be stored under its other name only
            locations.setdefault(first[id(parameter)], locations[name])
    return locations


def check_conversions(model: PreTrainedModel, layers: str) -> None:
    """Refuse the conversions that `find_locations` refuses, without a checkpoint.

    Args:
        model: each of its experts has linears of its own.
        layers: path of the decoder layers.

    Raises:
        ModelError: a parameter of a layer is made by a conversion that cannot be undone.
    """
    # The skeleton has experts one by one; transformers stacks them, and names them without a number.
    names = [re.sub(r"\.\d+\.", ".", name) for name, _ in model.get_submodule(layers).named_parameters()]
    for conversion in get_model_conversion_mapping(model):
        if isinstance(conversion, WeightConverter) and _steps(conversion) not in MERGES:
            for target in conversion.target_patterns:
                if any(target in name for name in names):
                    raise _conversion_error(conversion, f"the tensors of {target}")


def unexpected(names: Iterable[str], expected: Iterable[str] | None) -> list[str]:
    """The names that no pattern of `expected`, as transformers lists them, is found in."""
    patterns = [re.compile(pattern) for pattern in expected or ()]
    return [name for name in names if not any(pattern.search(name) for pattern in patterns)]


def _is_known(name: str, parameters: set[str], experts: dict[str, Experts]) -> bool:
    path, _, leaf = name.rpartition(".")
    return name in parameters or (path in experts and f"{path}.{experts[path].parts(leaf)[0].name}" in parameters)


def _member(converter: WeightConverter, pattern: str, leaf: str, experts: nn.Module, key: str) -> str:
    """Linear of an expert whose weight a tensor of the checkpoint is."""
    members = MEMBERS.get(leaf, ())
    sources = converter.source_patterns
    assert isinstance(experts, Experts)
    if _steps(converter) not in MERGES or len(members) != len(sources) or not hasattr(experts[0], members[0]):
        raise _conversion_error(converter, key)
    return str(members[sources.index(pattern)])


def _steps(converter: WeightConverter) -> list[str]:
    return [type(operation).__name__ for operation in converter.operations]


def _conversion_error(converter: WeightConverter, key: str) -> ModelError:
    steps = ", ".join(_steps(converter))
    return ModelError(
        f"transformers converts {key} when it loads it ({steps}), and this program cannot turn that back",
        "such models are not supported yet: open an issue that names it",
    )
