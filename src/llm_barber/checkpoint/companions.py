"""Files beside a checkpoint's weights: its configuration, and the files that travel with the weights."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_barber.checkpoint.hub import CHAT_TEMPLATES, COMPANIONS, INDEX_NAME
from llm_barber.checkpoint.packed_format import PACKED_INDEX, names_packed
from llm_barber.checkpoint.state import STATE_NAME
from llm_barber.checkpoint.untrusted import check_regular, is_utf8
from llm_barber.errors import ModelError

RECORD_NAME = "barber.json"
CARD_NAME = "README.md"
PAGE_NAME = "report.html"
LOCK_NAME = "llm-barber.lock"  # marks a work folder of this program
EVALUATION_NAME = "evaluation.json"
REPLACED = "llm-barber.replaced"  # marks a folder that a finished output has replaced
OWN_JSON = (RECORD_NAME, EVALUATION_NAME)
# Files with a companion's suffix that do not travel with a checkpoint: indices, and files that this program writes.
NO_COMPANIONS = (
    *OWN_JSON,
    STATE_NAME,
    PACKED_INDEX,
    INDEX_NAME,
    "adapter_config.json",
    "pytorch_model.bin.index.json",
)
LICENCES = ("license", "licence", "notice", "use_policy")


def refuse_adapter(folder: Path, model: str) -> None:
    """Raise `ModelError` for the folder of a PEFT adapter, which has no weights of the model."""
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{model} is a PEFT adapter, not a whole model",
            "merge it into its base model first: peft's merge_and_unload(), then save_pretrained()",
        )


def refuse_quantised(configuration: Mapping[str, Any], model: str) -> None:
    """Raise `ModelError` for a config.json that says that another program quantised the weights."""
    quantization = configuration.get("quantization_config")
    if quantization and not names_packed(configuration):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ModelError(
            f"{model} is quantised ({method or 'unknown method'}); pruning needs its plain weights",
            "start from the unquantised checkpoint, or dequantise it: model.dequantize(), then save_pretrained()",
        )


def companions(folder: Path) -> list[Path]:
    """The files of a checkpoint's folder that travel with its weights.

    Raises:
        ModelError: a file is a named pipe, a socket, a device or a link to nothing, or its name is no UTF-8.
    """
    plain = (
        path
        for path in folder.iterdir()
        if (path.suffix in COMPANIONS or path.name.lower().startswith(LICENCES)) and path.name not in NO_COMPANIONS
    )
    files = sorted(path for path in (*plain, *folder.glob(f"{CHAT_TEMPLATES}/*.jinja")) if not path.is_dir())
    for path in files:
        check_regular(path)
        if path.is_symlink() and not path.exists():
            raise ModelError(f"{path} is a link to nothing", "remove it, or close the editor that made it as its lock")
        if not is_utf8(path.name):
            shown = os.fsencode(path).decode("utf-8", "backslashreplace")
            raise ModelError(f"the name of {shown} is not valid UTF-8", "rename the file")
    return files
