"""Forecast a run (`llm-barber plan`): least work, and the time and memory that a rehearsal says it takes."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from llm_barber.loading.configuration import check_positions
from llm_barber.loading.naming import check_conversions
from llm_barber.loading.opening import make_skeleton
from llm_barber.messages import counted
from llm_barber.method.allocation import LOSS_TOKENS, loss_windows
from llm_barber.model.architecture import ARCHITECTURES, kind_of
from llm_barber.model.device import experts_per_token, resolve_device, resolve_dtype
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.structure import find_architecture
from llm_barber.planning.configuration import read_configuration
from llm_barber.planning.description import settings_in_words, structure_lines
from llm_barber.planning.forecast import Expected, Forecast
from llm_barber.planning.rehearsal import Rehearsal, extended_seconds, rehearse, rehearsed_layers, shortened
from llm_barber.progress import Progress, Silent
from llm_barber.settings.base import takes
from llm_barber.settings.plan import PlanConfig
from llm_barber.settings.presets import Allocation
from llm_barber.settings.prune import PruneConfig
from llm_barber.settings.refining import RefineSettings
from llm_barber.text.calibration import READ_BYTES, READING_BYTES, text_size, token_shape
from llm_barber.text.suffixes import TOKEN_FILE_SUFFIX
from llm_barber.usage import current_memory

WINDOWS_A_STEP = 4  # of tuning: the two rehearsals differ by a multiple, so that further windows have whole steps
# Least products for each of a pass forward: of a pass back, since a layer's first inputs need no gradient, and of a
# pass that gathers the inputs of linears, since it needs no output of a block's last linear.
BACKWARD, GATHERING = 1.5, 0.6
VOCABULARY_BYTES = 350  # of a tokenizer for each of its tokens, measured with 49,152 and 262,144 tokens


@takes(PlanConfig)
def plan(config: PlanConfig, progress: Progress | None = None) -> Forecast:
    """Forecast the costs of a run from the model's configuration; downloads no weights.

    With `tflops` or `gbps` the plan is for another machine: it has counts and the least time. Otherwise the run is
    rehearsed on this machine, with a few layers of random weights and a few windows.

    Raises:
        BarberError: the configuration is missing, or not of a supported model; the device is not there; the rehearsal
            meets what the run would meet.
    """
    progress = progress or Silent()
    progress.stage(f"reading the configuration of {config.model}")
    has_file = config.calibration.endswith(TOKEN_FILE_SUFFIX)
    if has_file:
        samples, seqlen = token_shape(config.calibration)
        config = config.model_copy(update={"samples": samples, "seqlen": seqlen})
    if config.include or config.exclude or config.skip_layers or config.sparsities:
        progress.warn("the plan counts every linear as pruned: a run that leaves linears dense takes less")
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    model_config = read_configuration(config.model, config.revision)
    stored = _stored_dtype(model_config)  # before the empty model sets another
    architecture = find_architecture(model_config, config.structure)
    check_positions(model_config.get_text_config(), config.seqlen, None if has_file else "seqlen")
    skeleton = make_skeleton(model_config, architecture, torch.device("cpu"), dtype, config.model)
    check_conversions(skeleton.model, architecture.layers)
    refine = RefineSettings.of(config, config.target, config.samples, config.seqlen)
    forecast = Forecast(
        model=config.model,
        architecture=model_config.model_type,
        structure=structure_lines(skeleton, architecture is ARCHITECTURES.get(model_config.model_type)),
        layers=len(skeleton.layers),
        parameters=sum(parameter.numel() for parameter in skeleton.model.parameters()),
        weights=sum(count for count, _ in _linears(skeleton)),
        settings=settings_in_words(config, refine),
        sequences=config.samples,
        tokens=config.seqlen,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        **_least_work(config, refine, skeleton, stored),
    )
    if config.tflops is not None or config.gbps is not None:
        return forecast.model_copy(update={"least_seconds": _least_seconds(config, forecast)})
    expected = _expected(config, refine, skeleton, stored, progress)
    return forecast.model_copy(update={"expected": expected})


def _stored_dtype(model_config: PreTrainedConfig) -> torch.dtype:
    """The dtype of the checkpoint's weights, as the configuration has it; float32 where it has none."""
    configs = (model_config, model_config.get_text_config())
    return next((config.dtype for config in configs if isinstance(config.dtype, torch.dtype)), torch.float32)


def _linears(skeleton: Skeleton) -> list[tuple[int, float]]:
    """Weights of each prunable linear, and the share of the tokens that it sees: those routed to an expert."""
    chosen, linears = experts_per_token(skeleton.model.config), []
    for index, layer in enumerate(skeleton.layers):
        names = skeleton.linears(index)
        kinds = [kind_of(name) for name in names]
        for name, kind in zip(names, kinds, strict=True):
            share = min(1.0, chosen / kinds.count(kind)) if "*" in kind else 1.0
            linears.append((layer.get_submodule(name).get_parameter("weight").numel(), share))
    return linears


def _least_work(
    config: PlanConfig, refine: RefineSettings | None, skeleton: Skeleton, stored: torch.dtype
) -> dict[str, Any]:
    """FLOPs of the linears' products, and bytes of weight files, that a run takes at least.

    Attention, Gram matrices, ranking and the output head come on top.
    """
    by_loss = config.allocated_by is Allocation.LOSS
    dense_passes = config.reorders + (config.allocated_by is not Allocation.UNIFORM)
    forward = 1.0 + GATHERING * config.method.reads_inputs + dense_passes  # at last the pruned layer's output
    if by_loss:
        windows = min(config.samples, loss_windows(config.seqlen))
        forward += (1 + BACKWARD) * windows / config.samples
    if config.rebuilds:  # with sparse weights, with dense weights, back
        forward += 2 + 1
    if refine is not None:
        forward += refine.follows_dense
        forward += (1 + BACKWARD) * refine.passes * (1 - refine.held_out / config.samples)
    size = stored.itemsize * sum(parameter.numel() for parameter in skeleton.model.parameters())
    routed = sum(count * share for count, share in _linears(skeleton))
    return {
        "flops": 2 * routed * config.samples * config.seqlen * forward,
        "bytes_read": size * (1 + dense_passes + by_loss),
        "bytes_written": size,
    }


def _least_seconds(config: PlanConfig, forecast: Forecast) -> float:
    """Seconds for the larger of both: all products at `tflops`, all weight files at `gbps`."""
    moved = forecast.bytes_read + forecast.bytes_written
    return max(
        forecast.flops / (1e12 * config.tflops) if config.tflops else 0.0,
        moved / (1e9 * config.gbps) if config.gbps else 0.0,
    )


def _expected(
    config: PlanConfig, refine: RefineSettings | None, skeleton: Skeleton, stored: torch.dtype, progress: Progress
) -> Expected:
    """Rehearse the run with fewer windows and layers; extend its time and memory."""
    layers, count = rehearsed_layers(list(skeleton.layers)), len(skeleton.layers)
    windows = _rehearsed_windows(config)
    progress.stage(f"rehearsing with {counted(layers[1], 'layer')} and {' and '.join(map(str, windows))} windows")
    settings = {name: getattr(config, name) for name in PruneConfig.model_fields}
    settings |= {"include": (), "exclude": (), "skip_layers": (), "sparsities": {}}
    if refine is not None and refine.of_layers:  # by default they depend on the number of windows
        settings |= {"tune_passes": refine.passes, "tune_windows": refine.sequences_a_step}
    model_config = shortened(skeleton.model.config, count, layers[1])
    rehearsals = rehearse(model_config, stored, PruneConfig.model_construct(**settings), windows)
    host, device = _peaks(config, refine, skeleton, rehearsals[-1], (windows[-1], layers[1]))
    return Expected(
        layers=layers[1],
        windows=windows,
        stages=extended_seconds(rehearsals, windows, layers, (config.samples, count)),
        host_memory=host if config.memory is None else min(host, config.memory),
        device_memory=device if resolve_device(config.device).type == "cuda" else None,
    )


def _rehearsed_windows(config: PlanConfig) -> tuple[int, ...]:
    """Numbers of windows of both rehearsals: few, but as many as fill a batch and the allocation's share."""
    few = max(2, -(-LOSS_TOKENS // config.seqlen))
    many = few + WINDOWS_A_STEP * -(-few // WINDOWS_A_STEP)
    return tuple(sorted({min(few, config.samples), min(many, config.samples)}))


def _peaks(
    config: PlanConfig,
    refine: RefineSettings | None,
    skeleton: Skeleton,
    rehearsal: Rehearsal,
    rehearsed: tuple[int, int],
) -> tuple[int, int]:
    """Peak bytes on host and device: those of the rehearsal, and the activations of further windows and layers.

    While layers are pruned, `RefineSettings.arrays` arrays hold all windows; before, those that a layer starts from and
    the one that passes through the dense model. The allocation by the loss keeps its windows' input of every layer.
    Rehearsals read no text, and have no tokenizer.
    """
    window = config.seqlen * skeleton.model.config.get_text_config().hidden_size * skeleton.dtype.itemsize
    arrays = RefineSettings.arrays(refine)
    passing = 3 if refine is not None and refine.follows_dense else 2
    kept_inputs = min(config.samples, loss_windows(config.seqlen)) if config.allocated_by is Allocation.LOSS else 0
    stays = resolve_device(config.device).type == "cuda" and not config.activations_off_device
    size = text_size(config.calibration, config.samples * config.seqlen)
    tokenizer = VOCABULARY_BYTES * skeleton.model.config.get_text_config().vocab_size if size else 0
    hosts, devices = [current_memory() + tokenizer + READING_BYTES * size], []
    for part in rehearsal.passes:
        pruning = part is rehearsal.passes[-1]
        activations = (arrays if pruning else passing) * (config.samples - rehearsed[0]) * window
        inputs = 0 if pruning else kept_inputs * (len(skeleton.layers) - rehearsed[1]) * window
        hosts.append(part.host + tokenizer + READ_BYTES * size + inputs + (0 if stays else activations))
        devices.append(part.device + (activations if stays else 0))
    return max(hosts), max(devices)
