"""The entry by which the config.json of a packed folder names its format.

transformers finds this package's reader by it (`runtime/registry.py`). Without the package, transformers names
`quant_method` as unknown and then finds no weights. The entry is put into the file's bytes and taken out again, so that
`unpack` gives back the config.json that was packed, bit for bit.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

CONFIGURATION = "config.json"
KEY = "quantization_config"
QUANT_METHOD = "llm-barber"
WEIGHTS = "weights"  # key of the entry: a shard, by which transformers finds the folder
ENTRY_KEYS = {"quant_method", WEIGHTS, "needs"}
NEEDS = (
    "pip install llm-barber, and in Python before from_pretrained: import llm_barber; llm_barber.register(). "
    "Or make an ordinary checkpoint of it: llm-barber unpack FOLDER DENSE"
)
# The entry is recognised by its bytes: they are not to be changed.
BEGIN = f'\n  "{KEY}": {{\n    "quant_method": "{QUANT_METHOD}",\n    "{WEIGHTS}": "'.encode()
END = f'",\n    "needs": "{NEEDS}"\n  }}'.encode()
ENTRY = re.compile(re.escape(BEGIN) + rb"[\w.-]+" + re.escape(END) + rb"\Z")


def names_packed(configuration: Mapping[str, Any]) -> bool:
    """Tell whether a configuration says that the weights are packed by this program."""
    entry = configuration.get(KEY)
    return isinstance(entry, Mapping) and entry.get("quant_method") == QUANT_METHOD


def packed_configuration(content: bytes, shards: Iterable[str]) -> bytes:
    """Add the entry, as the last, to the bytes of a config.json.

    Example: b'{"a": 1}' -> b'{"a": 1,\\n  "quantization_config": {…}}'.

    Args:
        content: of the file, with or without the entry.
        shards: the folder's packed shards.
    """
    body, end = _split(plain_configuration(content))
    return body + (b"" if body.endswith(b"{") else b",") + BEGIN + min(shards).encode() + END + end


def plain_configuration(content: bytes) -> bytes:
    """Take the entry out of the bytes of a config.json; without the entry they stay as they are.

    A file that was written anew since has the entry in other bytes: it is written anew without the entry.
    """
    body, end = _split(content)
    entry = ENTRY.search(body)
    if entry:
        return body[: entry.start()].removesuffix(b",") + end
    try:
        configuration = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if not isinstance(configuration, dict) or not names_packed(configuration):
        return content
    del configuration[KEY]
    return (json.dumps(configuration, indent=2, ensure_ascii=False) + "\n").encode()


def _split(content: bytes) -> tuple[bytes, bytes]:
    """Split an object's JSON before the white space and brace at its end."""
    before = content.rstrip()
    body = before.removesuffix(b"}").rstrip() if before.endswith(b"}") else content
    return body, content[len(body) :]
