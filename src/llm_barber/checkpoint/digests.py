"""Digests of JSON files that this program writes: a file whose digest does not fit was changed or damaged."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

DIGEST = "digest"


def content_digest(content: Mapping[str, Any]) -> str:
    """sha256 of a JSON object without its `digest`; white space and the order of names do not count.

    Example: {"a": 1, "digest": "…"} and {"digest": "…", "a": 1} have the digest of '{"a":1}'.
    """
    plain = {name: value for name, value in content.items() if name != DIGEST}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its digest at the end."""
    plain = {name: value for name, value in content.items() if name != DIGEST}
    return {**plain, DIGEST: content_digest(plain)}


def has_its_digest(content: Mapping[str, Any]) -> bool:
    """Does the object have the digest of its content?"""
    return content.get(DIGEST) == content_digest(content)
