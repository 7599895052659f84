"""Open a model for a run and check all that can be checked before its first layer."""

from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from llm_barber.checkpoint.hub import warn_of_revision
from llm_barber.checkpoint.output import check_output
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError, SettingsError
from llm_barber.loading.configuration import check_positions, load_config
from llm_barber.loading.job import Job
from llm_barber.loading.opening import check_tensors, open_skeleton, warn_of_lacking_buffers
from llm_barber.loading.tokenizer import check_vocabulary, load_tokenizer
from llm_barber.messages import as_option
from llm_barber.model.device import resolve_batch_size, resolve_device, resolve_dtype
from llm_barber.model.structure import find_architecture
from llm_barber.parallel.ranks import Ranks, local_rank
from llm_barber.progress import Progress
from llm_barber.settings.presets import Allocation
from llm_barber.settings.prune import RunSettings
from llm_barber.settings.targets import Targets
from llm_barber.text.calibration import CalibrationTokens, check_calibration, check_text_fits, load_calibration
from llm_barber.text.suffixes import TOKEN_FILE_SUFFIX


def read_calibration(settings: RunSettings, folder: Path) -> CalibrationTokens:
    """Calibration windows by a run's settings, with the tokenizer of the model in `folder`.

    Raises:
        CalibrationError: the text is unknown, unreadable or too short.
        HubError: the hub is needed and cannot be reached.
    """
    find_tokenizer = partial(load_tokenizer, folder)
    chosen = settings.samples, settings.seqlen, settings.seed, settings.bos
    return load_calibration(settings.calibration, find_tokenizer, *chosen)


def open_job(
    model: str, settings: RunSettings, targets: Targets | None, progress: Progress, ranks: Ranks | None = None
) -> Job:
    """Open a model and check all that can be checked before computing.

    Args:
        model: folder, hub id or GGUF file.
        settings: of the run.
        targets: sparsity or N:M of each linear; None: not known yet.
        progress: is told of stages and warnings.
        ranks: the processes of the run. The first process of each machine opens the model before the others do, so that
            they find the files that it has fetched or converted.

    Raises:
        BarberError: whatever is wrong with the model, the calibration text or the device.
    """
    ranks = ranks or Ranks()
    if local_rank():
        ranks.wait()
    job = _open_job(model, settings, targets, progress, ranks)
    if not local_rank():
        ranks.wait()
    return job


def _open_job(model: str, settings: RunSettings, targets: Targets | None, progress: Progress, ranks: Ranks) -> Job:
    device = _choose_device(settings, ranks, progress)
    dtype = resolve_dtype(settings.dtype, device)
    if ranks.is_first:  # other processes write nothing, and may see the folder that the first process is making
        check_output(settings.output, settings.overwrite)
    check_calibration(settings.calibration)  # before a model is downloaded
    warn_of_revision("revision", settings.revision, model, progress)
    progress.stage(f"opening {model}")
    source = CheckpointSource(model, settings.revision)
    config = load_config(source)
    architecture = find_architecture(config, settings.structure)
    text_config = config.get_text_config()  # of a model with images the language model's
    tokens = _read_windows(settings, text_config, source.folder, progress)
    sequences, seqlen = tokens.input_ids.shape
    ranks.shares(sequences, 0)  # refuses fewer sequences than processes
    skeleton = open_skeleton(source, config, architecture, device, dtype)
    needs_head = settings.allocated_by is Allocation.LOSS or settings.prunes_head
    check_tensors(skeleton, source, with_head=needs_head)
    warn_of_lacking_buffers(skeleton.model, source, progress)
    batch_size = resolve_batch_size(settings.batch_size, seqlen, sequences, device)
    job = Job(
        source, text_config, architecture, tokens, skeleton, batch_size, ranks, settings.prunes_head,
    )  # fmt: skip
    _check_head(job)
    if ranks.is_first:
        check_output(settings.output, settings.overwrite, job.bytes)
    _check_targets(job, targets)
    return job


def _choose_device(settings: RunSettings, ranks: Ranks, progress: Progress) -> torch.device:
    """The device that this process computes on.

    Raises:
        SettingsError: there is no such device, or several processes would share it.
    """
    if ranks.count > 1 and settings.device.startswith("cuda:"):
        shared = f"{ranks.count} processes cannot share {settings.device}"
        raise SettingsError(shared, "leave out --device")
    device = resolve_device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif settings.device_memory is not None:
        progress.warn("--device-memory counts for nothing without a GPU; --memory bounds the host's")
    if device.type == "cpu" and settings.activations_off_device:
        progress.warn("--activations-off-device counts for nothing without a GPU")
    return device


def _read_windows(
    settings: RunSettings, config: PreTrainedConfig, folder: Path, progress: Progress
) -> CalibrationTokens:
    """The calibration windows, which the model has positions and a vocabulary for.

    Raises:
        CalibrationError: they cannot be read, or do not fit the model.
        SettingsError: the text is too long for the memory.
    """
    if not settings.calibration.endswith(TOKEN_FILE_SUFFIX):  # such a file has its own length
        check_positions(config, settings.seqlen)
    if settings.memory is not None:
        check_text_fits(settings.calibration, settings.samples, settings.seqlen, settings.memory)
    progress.stage(f"reading calibration text {settings.calibration}")
    tokens = read_calibration(settings, folder)
    sequences, seqlen = tokens.input_ids.shape
    for name, value in (("samples", sequences), ("seqlen", seqlen)):
        if getattr(settings, name) not in (value, type(settings).model_fields[name].default):
            progress.warn(
                f"{as_option(name)} {getattr(settings, name)} counts for nothing: {settings.calibration} has "
                f"{sequences} windows of {seqlen} tokens, and all are taken"
            )
    check_positions(config, seqlen, setting=None)
    check_vocabulary(config, tokens.input_ids)
    return tokens


def _check_head(job: Job) -> None:
    """Refuse to prune an output head whose name in the checkpoint is the embedding's.

    Raises:
        ModelError: it is.
    """
    head, source = job.head_location.tensor, job.source
    if job.prunes_head and any(source.location(name).tensor == head for name in job.skeleton.outside_names):
        raise ModelError(
            f"{source.model} keeps its embedding as {head}, which the pruned output head would be",
            "save it again with transformers' save_pretrained, or leave out --prune-head",
        )


def _check_targets(job: Job, targets: Targets | None) -> None:
    """Refuse a checkpoint without a linear's weight, and targets that fit no linear.

    Raises:
        ModelError: a weight is missing, or M of N:M does not divide a row.
        SettingsError: a target fits no linear, or nothing is left to prune.
    """
    shapes, skeleton = job.linear_shapes(job.source), job.skeleton
    if targets is None:
        return
    layers = [[job.linear_name(index, linear) for linear in job.linears(index)] for index in range(job.layer_count)]
    head = {skeleton.head_name: tuple(skeleton.head.weight.shape)} if job.prunes_head else {}
    targets.check([{name: shapes[f"{name}.weight"] for name in names} for names in layers], head)
