"""Digests that tell changed files: of the JSON files that this program writes, and of a model's files."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

DIGEST = "digest"
SAMPLES, SAMPLE_BYTES = 64, 4096  # of each file, for `files_key`


def content_digest(content: Mapping[str, Any]) -> str:
    """sha256 of a JSON object without its `digest`; white space and the order of names do not count.

    Example: {"a": 1, "digest": "…"} and {"digest": "…", "a": 1} have the digest of '{"a":1}'.
    """
    plain = {name: value for name, value in content.items() if name != DIGEST}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """Add the digest of a JSON object at its end."""
    plain = {name: value for name, value in content.items() if name != DIGEST}
    return {**plain, DIGEST: content_digest(plain)}


def has_its_digest(content: Mapping[str, Any]) -> bool:
    """True if the `digest` of a JSON object fits its content; False: it was changed or has no digest."""
    return content.get(DIGEST) == content_digest(content)


def files_key(paths: Iterable[Path]) -> str:
    """sha256 of a model's files: their names, their sizes, and samples spread over each file.

    Weights are not read whole: a run should not read them twice.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(0, (size - SAMPLE_BYTES) * sample // (SAMPLES - 1)))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
