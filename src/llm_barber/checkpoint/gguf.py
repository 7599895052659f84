"""Turn a GGUF file into an ordinary checkpoint folder, once, in the user's cache."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import torch
from safetensors import SafetensorError

from llm_barber.checkpoint.counts import check_counts
from llm_barber.checkpoint.durable import sync_file, sync_folder
from llm_barber.errors import ModelError, OutputError, first_line
from llm_barber.messages import first_names

DTYPE = torch.bfloat16
CONVERTER_VERSION = 1  # part of the cache's key: raise it when the result changes


def cache_folder() -> Path:
    """Folder of converted models: `$LLM_BARBER_CACHE`, else `llm-barber` in the user's cache folder."""
    if named := os.environ.get("LLM_BARBER_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-barber"


def converted_gguf(path: Path) -> Path:
    """The folder of an ordinary bfloat16 checkpoint with the GGUF file's dequantised weights.

    The conversion takes a fraction of a minute and is done once for a file's content.

    Raises:
        ModelError: transformers cannot read the file.
        OutputError: the cache cannot be written.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache_folder() / f"{path.stem}-{digest[:16]}-v{CONVERTER_VERSION}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A folder of its own for each process: the cache may be shared by machines.
        with TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.", suffix=".partial") as partial:
            converted = Path(partial) / target.name
            converted.mkdir()
            _convert(path, converted)
            for written in converted.iterdir():
                sync_file(written)
            sync_folder(converted)
            try:
                converted.rename(target)
            except OSError:
                if not target.is_dir():  # no other process was faster
                    raise
            sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"the converted model cannot be written to {target.parent}: {error}",
            "free some space there, or set LLM_BARBER_CACHE to another folder",
        ) from error
    return target


def _convert(path: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source, name = str(path.parent), path.name
    try:
        with _parsed_once():
            config = AutoConfig.from_pretrained(source, gguf_file=name)
            check_counts(config.to_dict(), str(path))
            model, loading = AutoModelForCausalLM.from_pretrained(
                source, config=config, gguf_file=name, dtype=DTYPE, output_loading_info=True, **_dequantized()
            )
            _refuse_missing(path, loading)
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    except ModelError:
        raise
    except Exception as error:  # the reader raises whatever its parts raise
        raise ModelError(
            f"{path} cannot be read as GGUF: {first_line(error)}",
            "it is damaged, or transformers does not support its architecture or quantisation",
        ) from error
    # The weights are plain now, but the GGUF quantiser stays attached, and then `save_pretrained` refuses.
    for owner in (model.config, model):
        for attribute in ("quantization_config", "hf_quantizer", "is_quantized", "quantization_method"):
            if hasattr(owner, attribute):
                try:
                    delattr(owner, attribute)
                except AttributeError:
                    setattr(owner, attribute, None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _add_rope_theta(folder / "config.json")


def _dequantized() -> dict[str, Any]:
    """Arguments that ask transformers for plain weights; its releases before 5.25 give no others."""
    import transformers

    quantization = getattr(transformers, "GgufConfig", None)
    return {} if quantization is None else {"quantization_config": quantization(dequantize=True)}


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers parse a GGUF file's metadata, and make its table of names, once within the context.

    It parses the file for the configuration, for the weights and for the tokenizer, which takes seconds each time, and
    it makes the table for each module of the model.
    """
    import gguf

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        """Reader whose slices are plain arrays: each slice of a memory map costs several times as much."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(numpy.ndarray) if isinstance(value, numpy.memmap) else value)

    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(Reader), cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map


def _refuse_missing(path: Path, loading: Mapping[str, Any]) -> None:
    """Refuse a file that lacks weights: transformers would make them up.

    Raises:
        ModelError: a parameter is missing, or has another shape.
    """
    missing = [*sorted(loading["missing_keys"]), *map(str, loading.get("mismatched_keys", ()))]
    if missing:
        raise ModelError(
            f"{path} has no weights, or weights of another shape, for {first_names(missing, 1)}",
            "the file is incomplete; get it again, whole",
        )


def _add_rope_theta(path: Path) -> None:
    """Write `rope_theta` where transformers 4 looks for it.

    Without it, transformers 4 takes 10000 and computes a wrong model.
    """
    configuration = json.loads(path.read_text(encoding="utf-8"))
    theta = (configuration.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None and "rope_theta" not in configuration:
        configuration["rope_theta"] = theta
        path.write_text(json.dumps(configuration, indent=2, sort_keys=True) + "\n", encoding="utf-8")
