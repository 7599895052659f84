"""Settings in a record, and whether those of another run have the same effect."""

from collections.abc import Iterator
from os.path import abspath, expanduser
from typing import Any

from llm_barber.checkpoint.unfinished import both_values
from llm_barber.errors import SettingsError
from llm_barber.record.report import RunReport
from llm_barber.run.resume_key import LEFT_TO_PRESET, NOT_IN_KEY
from llm_barber.settings.base import absolute_if_there
from llm_barber.settings.prune import PruneConfig, RunSettings
from llm_barber.text.calibration import BUILTIN, HUB_SETS

MODELS = {"model": "revision", "dense": "revision", "pruned": "pruned_revision"}  # each with its revision
TEXT = ("calibration", "samples", "seqlen", "bos", "seed")
# Settings that decide the steps together: each has the same effect as given and as left to the preset.
STEPS = {
    "preset", "initial", "rebuild", "refine", "reconstruct", "allocation", "reorder", "sparsity", "guard",
}  # fmt: skip


def recorded_settings(config: RunSettings) -> dict[str, Any]:
    """A run's settings as JSON, as given, but for local models and texts: these have absolute paths."""
    settings = config.model_dump(mode="json")
    names: list[str] = [name for name in MODELS if name in settings]
    if config.calibration not in BUILTIN.keys() | HUB_SETS.keys():
        names.append("calibration")
    return settings | {name: absolute_if_there(settings[name]) for name in names}


def other_settings(record: RunReport, config: RunSettings) -> Iterator[str]:
    """Settings whose effect is another than in the finished run, but for those of models and text."""
    given = recorded_settings(config)
    names = (given.keys() | record.settings.keys()) - NOT_IN_KEY - {*TEXT, *MODELS, *MODELS.values()}
    differing = {name for name in names if not _is_as_recorded(name, given.get(name), record, config)}
    if differing <= STEPS | LEFT_TO_PRESET | {"target_mix"} and _leads_to_same_steps(record, config):
        used = {name for name in differing if given.get(name) == record.resolved.get(name)}
        if config.prunes_head:  # the head has a default mix of its own, which a given mix replaces
            used.discard("target_mix")
        if record.pattern == "mixed":  # linears with N:M have a default of their own, which a given value replaces
            used.discard("granularity")
        differing -= STEPS | used
    yield from (both_values(name, record.settings.get(name), given.get(name)) for name in sorted(differing))


def differing_text(record: RunReport, config: RunSettings) -> list[str]:
    """Settings of the calibration text that differ from the record's."""
    given, recorded = recorded_settings(config), record.settings
    spelled = {given["calibration"], abspath(expanduser(config.calibration))}
    differing = [name for name in TEXT[1:] if recorded.get(name) != given[name]]
    if recorded.get("calibration") not in spelled:
        differing.insert(0, "calibration")
    return [both_values(name, recorded.get(name), given[name]) for name in differing]


def _is_as_recorded(name: str, given: Any, record: RunReport, config: RunSettings) -> bool:
    """Compare a setting with the record, in which one that was added since has its default."""
    if name not in record.settings:
        return bool(getattr(config, name) == type(config).model_fields[name].get_default())
    recorded = record.settings[name]
    if isinstance(recorded, dict) and isinstance(given, dict):  # the first match counts
        return list(recorded.items()) == list(given.items())
    return bool(recorded == given)


def _leads_to_same_steps(record: RunReport, config: RunSettings) -> bool:
    """Tell whether the settings that the record has lead to the same steps and the same target as `config`."""
    before = {name: value for name, value in record.settings.items() if name in type(config).model_fields}
    try:
        return _steps(type(config)(**before | {"output": config.output})) == _steps(config)
    except SettingsError:  # of another version, which allowed what is refused now
        return False


def _steps(config: RunSettings) -> tuple[Any, ...]:
    """Collect what the settings in `STEPS` decide together, as far as it is known before a model is opened."""
    initial = (config.method, config.target) if isinstance(config, PruneConfig) else (getattr(config, "initial", None),)
    improved = (config.rebuilds, config.refinement, config.reconstruction, config.held_out_share)
    return (config.preset_name, config.allocated_by, config.reorders, *initial, *improved)
