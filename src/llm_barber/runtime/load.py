"""Load a pruned checkpoint as a transformers model, with linears dense or packed in memory."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import SettingsError
from llm_barber.loading.configuration import load_config, load_generation_config, unusable_configuration
from llm_barber.model.device import resolve_device
from llm_barber.model.empty import auto_class, join_tied_linears, parameters_on_meta
from llm_barber.progress import Progress, Silent
from llm_barber.record.verification import verify_folder
from llm_barber.runtime.choice import KeepPacked
from llm_barber.runtime.choice import check as check_keep_packed
from llm_barber.runtime.filling import Filling, fill
from llm_barber.runtime.registry import PackedConfig, PackedQuantizer, mark
from llm_barber.runtime.semi_structured import check_device, convert


def load(
    model: str | Path,
    keep_packed: KeepPacked = False,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    semi_structured: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Load a checkpoint folder as a transformers model, one tensor after the other.

    Parameters take gradients as transformers has it; with packed or semi-structured linears none does.

    Args:
        model: folder (packed or not), hub id or GGUF file.
        keep_packed: True keeps the weights of linears packed in memory where that is smaller; "auto" those that are
            faster so on this CPU, which it times in less than a second (docs/guide/packed.md). `model.keep_packed` says
            which are, by name; given back here, it repeats the choice. On CUDA this is untested on a real GPU.
        dtype: of the weights; None: the checkpoint's.
        device: as in `prune`.
        semi_structured: convert linears that hold 2:4 with PyTorch's `to_sparse_semi_structured`, where dtype and shape
            allow; `model.semi_structured` and a warning say which stay dense and why. Untested on a real GPU.
        verify: compare every file with the record of the run first, which reads the folder once more.
        progress: told of each parameter that is loaded; None: of none.

    Raises:
        ModelError: the checkpoint is damaged, or does not have what its configuration says; no linear can be
            semi-structured.
        VerificationError: with `verify`, the folder differs from its record.
        SettingsError: an unknown device; `semi_structured` without a GPU for it, or with `keep_packed`; `keep_packed`
            names a linear that the model does not have, or is "auto" on a GPU.
    """
    progress = progress or Silent()
    target = resolve_device(device)
    _check_settings(target, keep_packed, semi_structured)
    source = CheckpointSource(str(model))
    if verify:
        verify_folder(source, progress)
    config = load_config(source)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise SettingsError(f"dtype is {dtype!r}, not a dtype of PyTorch", "e.g. torch.bfloat16")
    dtype = dtype or config.dtype or torch.float32
    try:
        with parameters_on_meta():
            loaded: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype)
    except Exception as error:  # transformers raises whatever odd settings make it raise
        raise unusable_configuration(source.model, error) from error
    loaded.tie_weights()
    join_tied_linears(loaded)
    fill(loaded, source, Filling(dtype, target, keep_packed, progress, has_buffers=True))
    generation_config = load_generation_config(source.folder)
    if generation_config is not None:
        loaded.generation_config = generation_config
    loaded = loaded.to(target).eval()
    if keep_packed:
        mark(loaded, PackedQuantizer(PackedConfig(keep_packed)))
    if semi_structured:
        loaded.requires_grad_(False)  # training would change the other weights alone
        loaded.semi_structured = convert(loaded)
    return loaded


def _check_settings(device: torch.device, keep_packed: KeepPacked, semi_structured: bool) -> None:
    """Refuse settings that the device does not allow."""
    check_keep_packed(keep_packed, device)
    if semi_structured:
        if any(keep_packed.values()) if isinstance(keep_packed, Mapping) else keep_packed:
            raise SettingsError("keep_packed and semi_structured exclude each other", "choose one of them")
        check_device(device, torch.cuda.get_device_capability(device) if device.type == "cuda" else None)
