"""Write a fine-tuned model as a plain checkpoint that continues the record of the pruned one; merge adapters."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llm_barber.checkpoint.companions import CARD_NAME, PAGE_NAME, RECORD_NAME
from llm_barber.checkpoint.output import check_output
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.checkpoint.writer import CheckpointWriter
from llm_barber.errors import BarberError, ModelError, SettingsError, first_line
from llm_barber.progress import Progress, Silent
from llm_barber.record.card import model_card
from llm_barber.record.file import read_record, recorded_structure
from llm_barber.record.report import RunReport
from llm_barber.record.verification import folder_problems, refuse
from llm_barber.runtime.held_zeros import hold_zeros, unwrapped
from llm_barber.settings.base import check_apart, output_folder
from llm_barber.tools.linears import find_linears
from llm_barber.tools.trained_copy import NO_FOLDER, TrainedCopy, TrainedModel


def merge_adapter(
    peft_model: nn.Module,
    output: str | Path | None = None,
    pruned: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Merge the active adapters of a PEFT model into its pruned linears; pruned weights stay exactly zero.

    LoRA's product is merged where a weight is kept, which is what the model computes while `hold_zeros` holds its
    zeros, up to rounding. The adapters are gone afterwards, and the model is an ordinary one of transformers.

    Args:
        peft_model: of PEFT, with LoRA or IA3; not sharded.
        output: folder to write, as `save_finetuned` does; None: nothing is written.
        pruned: as of `save_finetuned`.
        overwrite: as of `save_finetuned`.
        progress: as of `save_finetuned`.

    Raises:
        SettingsError: it is no PEFT model, it is sharded, or an adapter would fill pruned weights.
        ModelError: nothing is pruned; merged weights are NaN or Inf; also as `save_finetuned`.
        VerificationError: as `save_finetuned`.
        OutputError: as `save_finetuned`.
    """
    if not _is_peft(peft_model):
        raise SettingsError(
            f"a {type(peft_model).__name__} has no adapter to merge",
            "give the model that get_peft_model or PeftModel.from_pretrained made (pip install peft)",
        )
    if any(hasattr(parameter, "to_local") for parameter in peft_model.parameters()):
        raise SettingsError(
            "the model is sharded, and adapters are merged in one process",
            "save the adapter with Trainer's save_model(), and load it with PeftModel.from_pretrained",
        )
    if output is not None:
        of_base = peft_model.get_base_model().config._name_or_path  # type: ignore[operator,union-attr]
        check_output(_folder_to_write(output, pruned or of_base), overwrite)
    held = hold_zeros(peft_model, pruned)
    try:
        merged: PreTrainedModel = peft_model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    except ValueError as error:
        raise ModelError(
            f"the adapter cannot be merged: {first_line(error)}", "train it again, with a lower rate"
        ) from error
    finally:
        held.remove()
    if output is not None:
        save_finetuned(merged, output, pruned, overwrite, progress)
    return merged


def save_finetuned(
    model: nn.Module,
    output: str | Path,
    pruned: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RunReport:
    """Write a fine-tuned model as a checkpoint with the names, dtypes and shards of the pruned one.

    Its record, `barber.json`, continues that of the pruned checkpoint and says which tensors were trained. Weights that
    were trained in a wider dtype are rounded to the checkpoint's. Of a model that processes share, each process calls
    this, and the first writes.

    Args:
        model: the trained model of transformers, without adapters.
        output: folder to write; it appears when it is complete.
        pruned: folder of the pruned checkpoint that was trained; None: the folder from which transformers loaded it.
        overwrite: replace `output` when the new checkpoint is complete.
        progress: told of each shard; None: of none.

    Returns:
        The record.

    Raises:
        SettingsError: the model has adapters, is none of transformers, or `output` is the pruned checkpoint.
        ModelError: the pruned checkpoint has no record, is packed, or is another model; nothing was trained; a weight
            is NaN or Inf.
        VerificationError: the pruned checkpoint differs from its record, or pruned weights are not zero.
        OutputError: the output cannot be written.
    """
    progress = progress or Silent()
    plain = _plain_model(model)
    source = CheckpointSource(str(pruned or plain.config._name_or_path or _no_folder()))
    output = _folder_to_write(output, source.folder)
    record = _record_to_continue(source)
    check_output(output, overwrite, source.bytes)
    refuse(source.model, folder_problems(source, record, progress))
    trained = TrainedModel(plain, source)
    copy = TrainedCopy(find_linears(source, recorded_structure(record), record.prunes_head, progress), record)
    if not _is_distributed():
        return _write(output, overwrite, trained, copy, progress)
    torch.distributed.barrier()  # all have looked at the output before it is written
    result: list[Any] = [None, None]  # the record; or an error's class, message and hint
    try:
        if torch.distributed.get_rank() == 0:
            result[0] = _write(output, overwrite, trained, copy, progress)
    except BarberError as error:
        result[1] = (type(error), str(error.message), str(error.hint))
    trained.gather_rest()
    torch.distributed.broadcast_object_list(result)
    if result[1] is not None:
        kind, text, hint = result[1]
        raise kind(text, hint)
    written: RunReport = result[0]
    return written


def _write(output: Path, overwrite: bool, trained: TrainedModel, copy: TrainedCopy, progress: Progress) -> RunReport:
    """Write the copy of a checkpoint shard by shard, with its record, card and page."""
    source = trained.source
    files = source.shards
    with CheckpointWriter(output, len(files), overwrite, source.bytes) as writer:
        progress.start("writing", len(files))
        for file in files:
            before = source.read(source.members(file))
            after = trained.shard(file, before)
            for name, tensor in after.items():
                copy.compare(name, before[name], tensor)
            writer.write_shard(after, file, source.metadata(file))
            writer.wait_for_shards()
            progress.advance(file)
        copy.refuse_filled()
        for path in source.companions():
            writer.copy(path, source.folder)
        amended = copy.amended(source, output, writer.digests)
        writer.write_file(RECORD_NAME, amended.to_json().encode())
        writer.write_file(CARD_NAME, model_card(amended, stored="dense").encode())
        if (source.folder / PAGE_NAME).is_file():
            from llm_barber.page.run_page import run_page  # matplotlib takes a second to import

            writer.write_file(PAGE_NAME, run_page(amended).encode())
        writer.finish()
    return amended


def _folder_to_write(output: str | Path, pruned: str | Path) -> Path:
    """The absolute path of an output that lies apart from the pruned checkpoint.

    Raises:
        SettingsError: it is no folder's name, a folder in use, or not apart.
    """
    try:
        folder = output_folder(output)
    except ValueError as error:
        raise SettingsError(f"output: {error}", "choose another output folder") from error
    check_apart(folder, str(pruned), "the pruned checkpoint")
    return folder


def _is_peft(model: nn.Module) -> bool:
    if "peft" not in sys.modules:
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _plain_model(model: nn.Module) -> PreTrainedModel:
    """The model of transformers inside of what wraps it.

    Raises:
        SettingsError: there is none, or it has adapters.
    """
    model = unwrapped(model)
    has_adapters = any(hasattr(module, "base_layer") for module in model.modules())
    if _is_peft(model) or has_adapters:
        raise SettingsError("the model has adapters", "merge them first: llm_barber.merge_adapter(model, OUTPUT)")
    if not isinstance(model, PreTrainedModel):
        raise SettingsError(f"a {type(model).__name__} is no model of transformers", "give the trained model itself")
    return model


def _no_folder() -> str:
    raise SettingsError("transformers did not load the model from a folder", NO_FOLDER)


def _record_to_continue(source: CheckpointSource) -> RunReport:
    if source.packed:
        raise ModelError(
            f"{source.model} is packed, and a fine-tuned checkpoint has the form of the pruned one",
            "unpack it, and name the dense folder: llm-barber unpack FOLDER DENSE, then pruned=DENSE",
        )
    record = read_record(source.folder)
    if record is None:
        raise ModelError(
            f"{source.model} has no {RECORD_NAME} that could be continued",
            f"{NO_FOLDER}; without one, model.save_pretrained() writes the model",
        )
    return record


def _is_distributed() -> bool:
    """True if several processes train together."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
