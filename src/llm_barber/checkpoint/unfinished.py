"""Take up an unfinished run: check that it is the same run, and keep the part of it that is whole."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_barber.checkpoint.channel_order import ORDER_NAME
from llm_barber.checkpoint.companions import LOCK_NAME
from llm_barber.checkpoint.durable import sync_file
from llm_barber.checkpoint.output import clear
from llm_barber.checkpoint.state import START_AGAIN, STATE_NAME, RunState, read_state, updated_name
from llm_barber.errors import OutputError, UnfinishedRunError
from llm_barber.messages import as_option


def take_up(folder: Path, key: Mapping[str, Any], overwrite: bool, resume: bool) -> tuple[RunState | None, list[str]]:
    """Go on with the unfinished run in a work folder, refuse it, or clear it away.

    Returns:
        The state to go on with, None to begin; names of the files that the unfinished run had finished, and that are
        missing or damaged.

    Raises:
        OutputError: as `unfinished_run`.
    """
    state = unfinished_run(folder, key, overwrite, resume)
    lost: list[str] = []
    if not resume:
        state = None
    elif state is not None:
        state, lost = undamaged(folder, state)
    elif any(folder.glob("*.safetensors")):
        lost = [STATE_NAME]
    if state is not None and not state.begun:  # then all is made again
        state = None
    kept_names = {LOCK_NAME}
    if state is not None:
        kept_names |= {STATE_NAME, *state.shards, *state.updated}
        if state.channel_order is not None:
            kept_names.add(ORDER_NAME)
    clear(folder, {name for name in kept_names if (folder / name).is_file()})
    return state, lost


def unfinished_run(folder: Path, key: Mapping[str, Any], overwrite: bool, resume: bool) -> RunState | None:
    """The state of the unfinished run in a work folder; None: there is none.

    With `resume` the new run goes on with it, with `overwrite` it is cleared away.

    Raises:
        OutputError: there is an unfinished run, and neither `resume` nor `overwrite` is set.
        UnfinishedRunError: its key differs, or its state is damaged.
    """
    state = None if overwrite and not resume else read_state(folder)
    if state is not None and state.begun and not resume:
        finished = f"{len(state.layers)} finished layers" if state.layers else "no finished layer yet"
        go_on = "add --resume to go on with it, or" if key else "choose another output folder, or add"
        raise OutputError(f"{folder} has an unfinished run with {finished}", f"{go_on} --overwrite to start again")
    if state is not None and resume:
        check_key(state, key)
    return state


def undamaged(folder: Path, state: RunState) -> tuple[RunState, list[str]]:
    """The part of a state whose files are whole, and the names of the files that are missing or damaged.

    A damaged shard of tensors outside the layers is copied again. From the first layer with a damaged file on, layers
    are pruned again.
    """

    def is_whole(name: str, digest: str) -> bool:
        return (folder / name).is_file() and sync_file(folder / name) == digest

    shards = list(state.shards.items())
    lost = [name for name, shard in shards[: state.outside] if not is_whole(name, shard.sha256)]
    for index, (name, shard) in enumerate(shards[state.outside :]):
        updated = updated_name(index)
        if not is_whole(name, shard.sha256):
            return state.of_first_layers(index), [*lost, name]
        if updated in state.updated and not is_whole(updated, state.updated[updated]):
            return state.of_first_layers(index), [*lost, updated]
    return state, lost


def check_key(state: RunState, key: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings, another model or another calibration text.

    Raises:
        UnfinishedRunError: the keys differ; the message names every difference, and both values of a setting.
    """
    expected = json.loads(json.dumps(key))
    given, given_before = expected.pop("given", {}), _mapping(state.key.get("given"))
    differing = differing_names(expected, {name: value for name, value in state.key.items() if name != "given"})
    differences = [name for name in differing if name != "settings"]
    if "settings" in differing:
        settings, before = expected["settings"], _mapping(state.key.get("settings"))
        names = differing_names(given, given_before)
        for name in names:
            values = before.get(name), settings.get(name)
            if values[0] == values[1]:  # the same by default and as given, but other settings depend on what is given
                values = given_before.get(name), given.get(name)
            differences.append(both_values(name, *values))
        if not names:
            differences.extend(differing_names(settings, before))
    if differences:
        raise UnfinishedRunError(
            f"the unfinished run was started with another {', '.join(differences)}",
            f"repeat the settings and files that it was started with, or {START_AGAIN}",
        )


def both_values(setting: str, before: Any, given: Any) -> str:
    """A setting with its value in an earlier run and its value in this one; None or empty: the default."""
    words = ["the default" if value in (None, [], {}) else value for value in (before, given)]
    return f"{as_option(setting)} (then {words[0]}, now {words[1]})"


def _mapping(value: Any) -> Mapping[str, Any]:
    """A part of a key; in a damaged state it may be of another type, and counts as empty."""
    return value if isinstance(value, Mapping) else {}


def differing_names(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Sorted names whose values differ, or that only one mapping has."""
    return [name for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)]
