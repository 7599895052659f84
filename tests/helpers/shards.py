"""Split the file of a tiny checkpoint."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from llm_barber.checkpoint.hub import INDEX_NAME


def split_in_two_shards(folder: Path) -> list[Path]:
    """Replace a checkpoint's single file by two and an index, and return the two files."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, members in files.items() for name in members}, "metadata": {}}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return [folder / file for file in files]
