"""How many layers and experts a configuration may ask for: transformers makes every one before a weight is missed."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llm_barber.errors import ModelError

LAYERS = re.compile(r"(layers?|blocks?|depths?)$")
EXPERTS = re.compile(r"experts?$")
LABELS = re.compile(r"labels?$")
# Without weights to compare with: several times what the largest models have.
MOST_LAYERS, MOST_EXPERTS, MOST_LABELS, MOST_EXPERTS_IN_LAYERS = 2**11, 2**14, 2**20, 2**17
# With weights: for parts of a model that a checkpoint leaves out, such as a vision tower, and layers without experts.
LAYERS_NOT_STORED, EXPERTS_NOT_STORED, LAYERS_A_MIXTURE = 2**8, 2**10, 8


def check_counts(configuration: Mapping[str, Any], model: str, shapes: Iterable[tuple[int, ...]] | None = None) -> None:
    """Refuse a configuration with more layers or experts than there can be, before transformers makes them.

    Args:
        configuration: as config.json has it, with the configurations in it.
        model: what a user calls it.
        shapes: of the checkpoint's tensors; None: there are no weights.

    Raises:
        ModelError: there are more than the weights have, or, without weights, than any model has.
    """
    layers_limit, mixture_limit, known = MOST_LAYERS, MOST_EXPERTS_IN_LAYERS, "no model has so many"
    hint = "get the configuration again"
    if shapes is not None:
        shapes = list(shapes)
        layers_limit = min(MOST_LAYERS, LAYERS_NOT_STORED + len(shapes))
        mixture_limit = EXPERTS_NOT_STORED + LAYERS_A_MIXTURE * sum(map(_matrices, shapes))
        known, hint = f"its weights are {len(shapes)} tensors", "config.json and the weights do not belong together"
    for section, settings in _sections(configuration):
        layers_name, layers = _largest(settings, LAYERS)
        experts_name, experts = _largest(settings, EXPERTS)
        labels_name, labels = _largest(settings, LABELS)
        counts = (
            (layers_name, layers, layers_limit),
            (experts_name, experts, MOST_EXPERTS),
            (labels_name, labels, MOST_LABELS),
            (f"{layers_name} times {experts_name}", layers * experts, mixture_limit),
        )
        for name, count, most in counts:
            if count > most:
                raise ModelError(f"the configuration of {model} says {section}{name}: {count:,}, but {known}", hint)


def _matrices(shape: tuple[int, ...]) -> int:
    """How many matrices a tensor holds; checkpoints may keep a layer's experts in one."""
    return max(1, min(math.prod(shape[:-2]), math.prod(shape)))


def _sections(configuration: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A configuration and all that are in it, with what their settings' names begin with."""
    waiting: list[tuple[str, Any]] = [("", configuration)]
    while waiting:
        section, content = waiting.pop()
        if isinstance(content, Mapping):
            yield section, content
            waiting += [(f"{section}{name}.", inner) for name, inner in content.items()]
        elif isinstance(content, list):
            waiting += [(section, inner) for inner in content if isinstance(inner, Mapping | list)]


def _largest(settings: Mapping[str, Any], names: re.Pattern[str]) -> tuple[str, int]:
    """The setting with the largest number whose name ends so, and that number; at least 1."""
    largest = ("", 1)
    for name, value in settings.items():
        if names.search(str(name)):  # transformers' own mappings, of labels, have numbers as names
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and not isinstance(number, bool) and number > largest[1]:
                    largest = name, math.ceil(min(number, 1e18))
    return largest
