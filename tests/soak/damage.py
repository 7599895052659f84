"""Damage to files, chosen at random: bits, lengths, JSON values, whole files."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any


def flip_bit(path: Path, chance: random.Random) -> str:
    """Flip one bit anywhere in a file; an empty file gets one byte."""
    content = bytearray(path.read_bytes()) or bytearray(1)
    place = chance.randrange(len(content))
    content[place] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return f"a bit of byte {place} of {path.name} flipped"


def truncate(path: Path, chance: random.Random) -> str:
    """Cut a file short."""
    size = chance.randrange(max(1, path.stat().st_size))
    os.truncate(path, size)
    return f"{path.name} cut to {size} bytes"


def extend(path: Path, chance: random.Random) -> str:
    """Append some bytes to a file."""
    with path.open("ab") as file:
        file.write(chance.randbytes(chance.randint(1, 99)))
    return f"{path.name} extended"


def remove(path: Path, chance: random.Random) -> str:
    """Delete a file."""
    path.unlink()
    return f"{path.name} deleted"


def overwrite(path: Path, chance: random.Random) -> str:
    """Overwrite a range of a file with zeros or random bytes."""
    content = bytearray(path.read_bytes()) or bytearray(1)
    start = chance.randrange(len(content))
    length = min(len(content) - start, chance.randint(1, 4096))
    content[start : start + length] = bytes(length) if chance.random() < 0.5 else chance.randbytes(length)
    path.write_bytes(content)
    return f"{length} bytes of {path.name} overwritten from {start}"


def make_pipe(path: Path, chance: random.Random) -> str:
    """Put a named pipe in the place of a file: whoever opens it waits for ever."""
    path.unlink()
    os.mkfifo(path)
    return f"{path.name} is a pipe"


def make_folder(path: Path, chance: random.Random) -> str:
    """Put a folder in the place of a file."""
    path.unlink()
    path.mkdir()
    return f"{path.name} is a folder"


DAMAGES: tuple[Callable[[Path, random.Random], str], ...] = (
    flip_bit,
    truncate,
    extend,
    remove,
    overwrite,
    make_pipe,
    make_folder,
)


def damage(path: Path, chance: random.Random) -> str:
    """Damage a file in any way; JSON, if it is whole, in half of the cases by a value that stays JSON.

    Returns:
        What was done, for a report.
    """
    if path.suffix == ".json" and chance.random() < 0.5 and is_json(path):
        return edit_json(path, chance)
    return chance.choice(DAMAGES)(path, chance)


def is_json(path: Path) -> bool:
    """Test whether a file holds a JSON object; an earlier damage may have left something else."""
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except ValueError:
        return False


def edit_json(path: Path, chance: random.Random) -> str:
    """Change one value of a JSON file, or a name or an element, so that another object is read."""
    content = json.loads(path.read_text())
    before = json.dumps(content, sort_keys=True)
    while json.dumps(content, sort_keys=True) == before:
        where = _edit(content, chance)
    path.write_text(json.dumps(content))
    return f"{where} of {path.name} edited"


def _edit(content: Any, chance: random.Random) -> str:
    """Change something in an object or a list; returns its path."""
    parent, trail = content, []
    while True:
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        if not keys:
            _add(parent)
            return ".".join([*trail, "unknown"])
        key = chance.choice(keys)
        trail.append(str(key))
        value = parent[key]
        if not isinstance(value, dict | list) or chance.random() < 0.05:
            break
        parent = value
    action = chance.random()
    if action < 0.8:
        parent[key] = _other(value, chance)
    elif action < 0.9:
        del parent[key]
    else:
        _add(parent)
    return ".".join(trail)


def _add(parent: Any) -> None:
    if isinstance(parent, dict):
        parent["unknown"] = 1
    else:
        parent.append(1)


def _other(value: Any, chance: random.Random) -> Any:
    """Another value, mostly of the same kind."""
    if chance.random() < 0.1:
        return chance.choice([None, -1, 1e300, "", [], {}, "\ud800", True])
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + chance.choice([-1, 1, 10**6])
    if isinstance(value, float):
        return value * chance.choice([0.9, 1.1, -1])
    if isinstance(value, str) and value:
        place = chance.randrange(len(value))
        return value[:place] + chr((ord(value[place]) + 1) % 128) + value[place + 1 :]
    return 0
