"""Limits of the layers and experts in a configuration.

transformers makes all modules of a configuration before it misses a weight: a wrong number would fill the memory.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llm_barber.errors import ModelError

LAYERS = re.compile(r"(layers?|blocks?|depths?)$")
EXPERTS = re.compile(r"experts?$")
LABELS = re.compile(r"labels?$")
OPTIONAL_MIXTURES = {"doge": "is_moe"}  # model types that make experts only if this setting is true
# Limits for a configuration without weights: several times the counts of the largest models.
MOST_LAYERS, MOST_EXPERTS, MOST_LABELS, MOST_EXPERTS_IN_LAYERS = 2**11, 2**14, 2**20, 2**17
# With weights, allowances for parts of a model that a checkpoint leaves out, such as a vision tower, and for layers
# without experts.
LAYERS_NOT_STORED, EXPERTS_NOT_STORED, LAYERS_A_MIXTURE = 2**8, 2**10, 8


def check_counts(configuration: Mapping[str, Any], model: str, shapes: Iterable[tuple[int, ...]] | None = None) -> None:
    """Refuse a configuration with more layers or experts than a model can have.

    The check comes before transformers makes them.

    Args:
        configuration: content of config.json, with the configurations in it.
        model: the user's name for it, for messages.
        shapes: of the checkpoint's tensors; None: there are no weights.

    Raises:
        ModelError: a count is higher than the weights allow, or, without weights, higher than in any model.
    """
    layers_limit, mixture_limit, reason = MOST_LAYERS, MOST_EXPERTS_IN_LAYERS, "no model has so many"
    hint = "get the configuration again"
    if shapes is not None:
        shapes = list(shapes)
        layers_limit = min(MOST_LAYERS, LAYERS_NOT_STORED + len(shapes))
        mixture_limit = EXPERTS_NOT_STORED + LAYERS_A_MIXTURE * sum(map(_matrices, shapes))
        reason, hint = f"its weights are {len(shapes)} tensors", "config.json and the weights do not belong together"
    for section, settings in _sections(configuration):
        layers_name, layers = _largest(settings, LAYERS)
        is_mixture = settings.get(OPTIONAL_MIXTURES.get(str(settings.get("model_type")), ""), True)
        experts_name, experts = _largest(settings if is_mixture else {}, EXPERTS)
        labels_name, labels = _largest(settings, LABELS)
        counts = (
            (layers_name, layers, layers_limit),
            (experts_name, experts, MOST_EXPERTS),
            (labels_name, labels, MOST_LABELS),
            (f"{layers_name} times {experts_name}", layers * experts, mixture_limit),
        )
        for name, count, limit in counts:
            if count > limit:
                raise ModelError(f"the configuration of {model} says {section}{name}: {count:,}, but {reason}", hint)


def _matrices(shape: tuple[int, ...]) -> int:
    """Number of matrices in a tensor; checkpoints may keep a layer's experts in one tensor."""
    return max(1, min(math.prod(shape[:-2]), math.prod(shape)))


def _sections(configuration: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A configuration and all configurations in it, each with the prefix of its settings' names."""
    pending: list[tuple[str, Any]] = [("", configuration)]
    while pending:
        section, content = pending.pop()
        if isinstance(content, Mapping):
            yield section, content
            pending += [(f"{section}{name}.", inner) for name, inner in content.items()]
        elif isinstance(content, list):
            pending += [(section, inner) for inner in content if isinstance(inner, Mapping | list)]


def _largest(settings: Mapping[str, Any], names: re.Pattern[str]) -> tuple[str, int]:
    """The setting with the largest number among those of matching names, and that number; at least 1."""
    largest = ("", 1)
    for name, value in settings.items():
        if names.search(str(name)):  # transformers' own mappings, of labels, have numbers as names
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and not isinstance(number, bool) and number > largest[1]:
                    largest = name, math.ceil(min(number, 1e18))
    return largest
