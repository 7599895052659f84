"""Let transformers' `from_pretrained` load packed folders.

transformers finds `PackedQuantizer` by the entry in the folder's config.json (`checkpoint/packed_format.py`). It
builds the empty model, opens a packed shard, and would initialise what it does not find there. `PackedQuantizer` turns
the initialisation off, and afterwards gives every parameter and buffer its value (`filling.py`), or raises an error.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, modeling_utils
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llm_barber.checkpoint.hub import hub_file, resolve_model
from llm_barber.checkpoint.packed_format import (
    DAMAGED,
    ENTRY_KEYS,
    KEY,
    PACKED_INDEX,
    QUANT_METHOD,
    WEIGHTS,
    names_packed,
    read_index,
)
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.checkpoint.untrusted import check_file_name
from llm_barber.errors import ModelError, SettingsError
from llm_barber.progress import Silent
from llm_barber.record.verification import verify_folder
from llm_barber.runtime.choice import KeepPacked
from llm_barber.runtime.choice import check as check_keep_packed
from llm_barber.runtime.filling import Filling, fill
from llm_barber.runtime.packed_linear import PackedLinear

UNPACK = "make an ordinary checkpoint of it: llm-barber unpack FOLDER DENSE"
IGNORED = ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected")


@register_quantization_config(QUANT_METHOD)
class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Settings with which `from_pretrained` loads a packed folder.

    Example: `from_pretrained(PACKED, quantization_config=PackedConfig(…))`.

    A dict of the same settings is taken, too.

    Args:
        keep_packed: as of `load`.
        verify: as of `load`.
        stored: the folder's entry in its config.json.

    Raises:
        SettingsError: `keep_packed` has no such value; there is no such setting.
    """

    def __init__(self, keep_packed: KeepPacked = False, verify: bool = False, **stored: Any) -> None:
        check_keep_packed(keep_packed, torch.device("cpu"))  # the value; `fill` checks the device
        if unknown := stored.keys() - ENTRY_KEYS:
            raise SettingsError(f"PackedConfig has no setting {min(unknown)!r}", "it has keep_packed and verify")
        register()
        self.quant_method = QUANT_METHOD
        self.keep_packed = keep_packed
        self.verify = verify
        self.weights: str | None = stored.get(WEIGHTS)


@register_quantizer(QUANT_METHOD)
class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """transformers' hooks around the loading of a packed folder."""

    quantization_config: PackedConfig
    _source: CheckpointSource
    _dtype: torch.dtype

    def update_attn_implementation(self, config: Any) -> Any:
        """Name a packed shard as the weights to load, before transformers looks for weights."""
        config.transformers_weights = self._weights(config.name_or_path)
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """Do the same in versions of transformers that have no `update_attn_implementation`."""
        return self.update_attn_implementation(config)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Note the dtype of the weights."""
        self._dtype = dtype
        return dtype

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse a device map by which weights are moved or read while the model runs.

        Raises:
            SettingsError: it has a disk, or both CPU and GPU.
        """
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            part = "disk" if "disk" in devices else "cpu"
            raise SettingsError(
                f"device_map offloads a part of the packed model to {part}",
                f"give a device that holds the model (keep_packed=True takes the least memory), or {UNPACK}",
            )

    def _weights(self, folder: str) -> str:
        """Name of a shard of the folder.

        Raises:
            ModelError: the folder is not packed, or what names the shard is damaged.
        """
        name = self.quantization_config.weights
        if name is None:  # an earlier program wrote the folder
            if folder and not Path(folder).is_dir():
                folder = str(hub_file(folder, PACKED_INDEX).parent)
            if not folder or not (Path(folder) / PACKED_INDEX).is_file():
                raise ModelError(
                    f"{folder or 'the folder'} has no {PACKED_INDEX}, so that it is not packed",
                    "leave quantization_config out; load old packed folders by AutoModelForCausalLM",
                )
            name = min(read_index(Path(folder))[1].values())
        check_file_name(name, "config.json")
        if not name.endswith(".safetensors"):
            raise ModelError(f"config.json names {name!r} as a packed shard", DAMAGED)
        return name

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        """Open the folder, and keep transformers from initialising what `fill` will fill."""
        if not checkpoint_files:
            raise ModelError("a packed folder is loaded from its files, without state_dict", "leave state_dict out")
        folder = Path(checkpoint_files[0]).parent
        if folder.parent.name == "snapshots":  # of the hub's cache: transformers has got one shard
            folder = resolve_model(model.config.name_or_path, folder.name)
        self._source = CheckpointSource(folder)
        if not self._source.packed:
            raise ModelError(f"{folder} is not packed", "leave quantization_config out")
        for module in model.modules():
            module._is_hf_initialized = True
        self._ignored = {name: getattr(model, name) for name in IGNORED}
        for name in IGNORED:
            setattr(model, name, {"."})

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Fill the model."""
        if getattr(model, "_tp_size", None) is not None:
            raise SettingsError("a packed model is not distributed over processes", UNPACK)
        for name, patterns in self._ignored.items():
            setattr(model, name, patterns)
        del model.config.transformers_weights
        delattr(model.config, KEY)
        if self.quantization_config.verify:
            verify_folder(self._source, Silent())
        keep_packed = self.quantization_config.keep_packed
        fill(model, self._source, Filling(self._dtype, None, keep_packed, Silent()))
        mark(model, self)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Unpack every linear that stayed packed; parameters take gradients again."""
        for path, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                parent, _, last = path.rpartition(".")
                setattr(model.get_submodule(parent), last, module.dense())
        model.requires_grad_(True)
        return model if dtype in (None, model.config.dtype) else model.to(dtype)

    def is_serializable(self) -> bool:
        """Refuse `save_pretrained`, which would write a folder that nothing loads.

        Raises:
            SettingsError: always.
        """
        raise SettingsError(
            "a model whose linears stay packed in memory cannot be saved: model.dequantize() unpacks them",
            "call model.dequantize() first; or copy the packed folder",
        )

    @property
    def is_trainable(self) -> bool:
        """False: packed weights have no gradient."""
        return False


def mark(model: PreTrainedModel, quantizer: PackedQuantizer) -> None:
    """Tell transformers that a model has packed linears, if it has; otherwise make it an ordinary model."""
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        model.requires_grad_(False)  # products that are differentiated unpack their weight
        model.hf_quantizer = quantizer
        model.is_quantized = True
        model.quantization_method = QUANT_METHOD
        model.config.quantization_config = quantizer.quantization_config
        return
    conversions = getattr(model, "_weight_conversions", None)
    quantizer.remove_quantization_config(model)
    if conversions is not None:
        model._weight_conversions = conversions  # by which `save_pretrained` gives tensors the names that they had
    model.__dict__.pop("is_quantized", None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("_is_quantized", None)


def register() -> None:
    """Let transformers' `from_pretrained`, and what is built on it, load packed folders in this process.

    A second call does nothing.
    """
    # Folders that earlier versions packed have no entry in config.json, and transformers does not hand its arguments
    # over to quantisers that it does not know.
    find = getattr(modeling_utils, "get_hf_quantizer", None)
    if find is not None and not hasattr(find, "of_llm_barber"):
        modeling_utils.get_hf_quantizer = _with_packed(find)


def _with_packed(find: Callable[..., Any]) -> Callable[..., Any]:
    """Add packed folders to transformers' search for a quantiser."""

    @wraps(find)
    def find_quantizer(config: Any, quantization_config: Any, *arguments: Any, **settings: Any) -> Any:
        entry: Any = getattr(config, KEY, None)
        if isinstance(entry, PackedConfig):  # the configuration of a model that was loaded
            entry = config.quantization_config = entry.to_dict()
        elif names_packed({KEY: entry}):
            entry = config.quantization_config = _folder_entry(entry)
        elif not entry and _is_packed_folder(config.name_or_path):
            entry = config.quantization_config = {"quant_method": QUANT_METHOD}
        if names_packed({KEY: entry}):
            if isinstance(quantization_config, Mapping) and _is_of_packed(quantization_config):
                quantization_config = PackedConfig(**quantization_config)
            if isinstance(quantization_config, PackedConfig):
                chosen = {name: value for name, value in quantization_config.to_dict().items() if value is not None}
                config.quantization_config = {**entry, **chosen}
                quantization_config = None
        return find(config, quantization_config, *arguments, **settings)

    find_quantizer.of_llm_barber = True  # type: ignore[attr-defined]
    return find_quantizer


def _folder_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what a folder's config.json may say; a warning names the rest, since only the caller chooses how to load."""
    ignored = sorted(entry.keys() - ENTRY_KEYS)
    if ignored:
        warnings.warn(
            f"{KEY} in config.json has {', '.join(map(repr, ignored))}, which is ignored: the caller chooses how a "
            f"packed folder is loaded, by {KEY}=PackedConfig(…)",
            stacklevel=4,
        )
    return {name: entry[name] for name in ("quant_method", WEIGHTS) if entry.get(name) is not None}


def _is_of_packed(settings: Mapping[str, Any]) -> bool:
    """Tell whether a caller's dict holds settings of `PackedConfig`, not of another method."""
    return bool(settings.get("quant_method", QUANT_METHOD) == QUANT_METHOD)


def _is_packed_folder(name: str | None) -> bool:
    return bool(name) and (Path(str(name)) / PACKED_INDEX).is_file()
