"""Where a checkpoint keeps each parameter of a model: transformers knows what it converts names and experts to."""

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

# Experts that a checkpoint keeps one by one: the linears of each that a stacked parameter is made of, in order.
MEMBERS = {GATE_UP: (GATE, UP), UP: (UP,), DOWN: (DOWN,)}
MERGES = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


def find_locations(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, Location]:
    """Parameters and buffers by the model's names, experts one by one, and where they lie.

    Args:
        model: its experts have linears of their own (`experts.py`).
        stored: the checkpoint's names.

    Raises:
        ModelError: transformers makes a parameter from the checkpoint's tensors in a way that cannot be turned back.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    own = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    experts = {path: module for path, module in model.named_modules() if isinstance(module, Experts)}
    base, beside = f"{model.base_model_prefix}.", language_model_prefix(model)
    locations: dict[str, Location] = {}
    for key in stored:
        renamed, pattern = rename_source_key(key, renamings, converters)
        names = [one for one in (renamed, base + renamed, renamed.removeprefix(base)) if _known(one, own, experts)]
        if not names:
            continue  # of something else: it is written as it was read
        converter = next((one for one in converters if pattern in one.source_patterns), None)
        if names[0] in own:
            if converter is None:
                locations.setdefault(names[0], Location(key))
            elif names[0].startswith(beside):  # of images: it is written as it was read
                raise _converted(converter, key)
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
        if name in locations:  # tied parameters may be there under the other name only
            locations.setdefault(first[id(parameter)], locations[name])
    return locations


def check_conversions(model: PreTrainedModel, layers: str) -> None:
    """Refuse what `find_locations` would, before a checkpoint is there: conversions that cannot be turned back.

    Args:
        model: its experts have linears of their own.
        layers: path of the decoder layers.

    Raises:
        ModelError: a parameter of a layer comes of one.
    """
    # Experts are one by one there, where transformers has them in one.
    names = [re.sub(r"\.\d+\.", ".", name) for name, _ in model.get_submodule(layers).named_parameters()]
    for one in get_model_conversion_mapping(model):
        if isinstance(one, WeightConverter) and _steps(one) not in MERGES:
            for target in one.target_patterns:
                if any(target in name for name in names):
                    raise _converted(one, f"the tensors of {target}")


def _known(name: str, own: set[str], experts: dict[str, Experts]) -> bool:
    return name in own or name.rpartition(".")[0] in experts


def _member(converter: WeightConverter, pattern: str, leaf: str, experts: nn.Module, key: str) -> str:
    """The linear of an expert that a checkpoint's tensor is the weight of."""
    members = MEMBERS.get(leaf, ())
    sources = converter.source_patterns
    assert isinstance(experts, Experts)
    if _steps(converter) not in MERGES or len(members) != len(sources) or not hasattr(experts[0], members[0]):
        raise _converted(converter, key)
    return str(members[sources.index(pattern)])


def _steps(converter: WeightConverter) -> list[str]:
    return [type(one).__name__ for one in converter.operations]


def _converted(converter: WeightConverter, key: str) -> ModelError:
    steps = ", ".join(_steps(converter))
    return ModelError(
        f"transformers converts {key} when it loads it ({steps}), and this program cannot turn that back",
        "such models are not supported yet: open an issue that names it",
    )
