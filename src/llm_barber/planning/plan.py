"""Forecast a run (`llm-barber plan`): work by stage, peak memory, time and bottleneck."""

from dataclasses import asdict, dataclass, replace

import torch
from transformers import PreTrainedConfig

from llm_barber.errors import ModelError, SettingsError
from llm_barber.loading.configuration import check_positions
from llm_barber.loading.naming import check_conversions
from llm_barber.loading.opening import make_skeleton
from llm_barber.model.architecture import ARCHITECTURES
from llm_barber.model.device import free_device_memory, resolve_batch_size, resolve_device, resolve_dtype
from llm_barber.model.structure import find_architecture
from llm_barber.planning.configuration import read_configuration
from llm_barber.planning.costs import run_costs
from llm_barber.planning.description import settings_in_words, structure_lines
from llm_barber.planning.forecast import Forecast, ProcessesForecast, StageForecast
from llm_barber.planning.limits import device_room, left_for_activations
from llm_barber.planning.measured_rates import measured_rates
from llm_barber.planning.memory import in_files, peak_footprint
from llm_barber.planning.rates import Rates, disk_rates, named_rates
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.shapes import ModelShapes, model_shapes
from llm_barber.planning.waiting import waiting_seconds, with_files_kept
from llm_barber.progress import Progress, Silent
from llm_barber.settings.checked import takes
from llm_barber.settings.plan import DEVICE_MEMORY, DISK, LINK, MEMORY_BANDWIDTH, NETWORK, PlanConfig
from llm_barber.text.calibration import READ_BYTES, READING_BYTES, text_size, token_shape
from llm_barber.text.suffixes import TOKEN_FILE_SUFFIX
from llm_barber.usage import current_memory

BARE_PROCESS = {"cpu": 0.65 * 2**30, "cuda": 2.0 * 2**30}  # bytes of a process that has only imported its libraries
VOCABULARY_BYTES = 350  # of a tokenizer for each of its tokens, measured with 49,152 and 262,144 tokens


@dataclass(frozen=True)
class HostMemory:
    """Host memory of a process before its first layer, bytes.

    `bare`: once the calibration text is read. `reading`: the peak while it is read.
    """

    bare: int
    reading: int


@takes(PlanConfig)
def plan(config: PlanConfig, progress: Progress | None = None) -> Forecast:
    """Forecast the costs of a run from the model's configuration; takes seconds, downloads no weights.

    Raises:
        BarberError: the configuration is missing, or not of a supported model; the device is not there.
    """
    progress = progress or Silent()
    progress.stage(f"reading the configuration of {config.model}")
    config = _with_windows_of_file(config)
    _check_settings(config, progress)
    device, dtype = _device_and_dtype(config)
    model_config = read_configuration(config.model, config.revision)
    stored = _stored_dtype(model_config)  # before the empty model sets another
    architecture = find_architecture(model_config, config.structure)
    has_file = config.calibration.endswith(TOKEN_FILE_SUFFIX)
    check_positions(model_config.get_text_config(), config.seqlen, None if has_file else "seqlen")
    skeleton = make_skeleton(model_config, architecture, torch.device("cpu"), dtype, config.model)
    check_conversions(skeleton.model, architecture.layers)
    model = model_shapes(skeleton)
    _check_pattern(config, model)
    free = _free_device_memory(config, device)
    batch = resolve_batch_size(config.batch_size, config.seqlen, config.samples, device)
    host_memory = _host_memory(config, model, device)
    recipe = Recipe.of(config, batch, dtype, stored, device)
    recipe = replace(recipe, reorders=recipe.reorders and bool(architecture.channels))
    rates = _rates(config, model, recipe, dtype, device, progress)
    runs = tuple(_forecast(config, model, recipe.among(count), rates, host_memory, free) for count in config.processes)
    _warn_of_device_memory(config, runs, free, progress)
    return Forecast(
        model=config.model,
        architecture=model_config.model_type,
        structure=structure_lines(skeleton, architecture is ARCHITECTURES.get(model_config.model_type)),
        layers=len(model.layers),
        parameters=model.parameters,
        weights=model.weights,
        settings=settings_in_words(recipe),
        sequences=config.samples,
        tokens=config.seqlen,
        batch_size=batch,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        measured=config.flops is None,
        rates=asdict(rates),
        runs=runs,
    )


def _with_windows_of_file(config: PlanConfig) -> PlanConfig:
    """Take number and length of the windows from a file of calibration tokens, which has its own."""
    if not config.calibration.endswith(TOKEN_FILE_SUFFIX):
        return config
    samples, seqlen = token_shape(config.calibration)
    return config.model_copy(update={"samples": samples, "seqlen": seqlen})


def _check_settings(config: PlanConfig, progress: Progress) -> None:
    if config.include or config.exclude or config.skip_layers or config.sparsities:
        progress.warn("the plan counts every linear as pruned: a run that leaves linears dense takes less")
    if max(config.processes) > config.samples:
        raise SettingsError(
            f"{max(config.processes)} processes cannot share {config.samples} windows",
            "plan fewer, or give more --samples",
        )


def _device_and_dtype(config: PlanConfig) -> tuple[torch.device, torch.dtype]:
    """Resolve device and compute dtype.

    A named machine computes in bfloat16, on a GPU, whatever this machine has.
    """
    if config.flops is None:
        device = resolve_device(config.device)
        return device, resolve_dtype(config.dtype, device)
    device = torch.device(_named_device(config.device))
    return device, resolve_dtype("bfloat16" if config.dtype == "auto" else config.dtype, device)


def _named_device(name: str) -> str:
    """The kind of device of a named machine; it may be a kind that this machine does not have."""
    kind = name.partition(":")[0]
    if name == "auto":
        return "cuda"
    return kind if kind in BARE_PROCESS else str(resolve_device(name).type)


def _stored_dtype(model_config: PreTrainedConfig) -> torch.dtype:
    """The dtype of the checkpoint's weights, as the configuration has it; float32 where it has none."""
    configs = (model_config, model_config.get_text_config())
    return next((config.dtype for config in configs if isinstance(config.dtype, torch.dtype)), torch.float32)


def _check_pattern(config: PlanConfig, model: ModelShapes) -> None:
    """Refuse an N:M whose M does not divide a row, as `prune` does."""
    size = 1 if config.allow_dense_tail else getattr(config.target, "of", 1)
    for layer in model.layers:
        for block in layer.blocks + ((model.head_block,) if config.prune_head else ()):
            for _, columns in block.linears:
                if columns % size:
                    raise ModelError(
                        f"pattern {config.target} does not divide the {columns} inputs of a linear",
                        "give --allow-dense-tail, choose an N:M whose M divides every row, or use --sparsity",
                    )


def _free_device_memory(config: PlanConfig, device: torch.device) -> float:
    """Bytes of the GPU's memory that the run may take; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    if config.flops is None:
        return free_device_memory(device, config.device_memory)
    return config.device_memory or DEVICE_MEMORY


def _host_memory(config: PlanConfig, model: ModelShapes, device: torch.device) -> HostMemory:
    process = current_memory() if config.flops is None else int(BARE_PROCESS[device.type])
    text = text_size(config.calibration, config.samples * config.seqlen)
    tokenizer = VOCABULARY_BYTES * model.vocabulary if text else 0
    return HostMemory(process + tokenizer + READ_BYTES * text, process + tokenizer + READING_BYTES * text)


def _rates(
    config: PlanConfig,
    model: ModelShapes,
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> Rates:
    """Rates of this machine, measured; with `flops` those of a named machine."""
    network = config.network or NETWORK
    if config.flops is None:
        progress.stage("measuring this machine")
        rates = measured_rates(model, recipe, dtype, device, network)
        disk = config.bandwidth
        return rates if disk is None else replace(rates, **disk_rates(disk))
    memory, link = config.memory_bandwidth or MEMORY_BANDWIDTH, config.link or LINK
    return named_rates(config.flops, config.float32_flops, memory, link, network, config.bandwidth or DISK, dtype)


def _forecast(
    config: PlanConfig, model: ModelShapes, recipe: Recipe, rates: Rates, host_memory: HostMemory, free: float
) -> ProcessesForecast:
    """Forecast a run with the recipe's number of processes; `free`: bytes of the GPU's memory."""
    if not config.activations_off_device:
        recipe = replace(recipe, room=device_room(free, model, recipe))
    if config.memory is not None:
        left = left_for_activations(config.memory, host_memory.bare, model, recipe)
        recipe = replace(recipe, activation_memory=left)
    footprint = peak_footprint(model, recipe)
    return ProcessesForecast(
        processes=recipe.processes,
        stages=_stages(model, rates, recipe),
        host_memory=max(host_memory.bare + footprint.host, host_memory.reading),
        device_memory=None if recipe.on_cpu else footprint.device,
        on_device=recipe.on_device(model.hidden),
        in_files=in_files(model, recipe),
    )


def _stages(model: ModelShapes, rates: Rates, recipe: Recipe) -> tuple[StageForecast, ...]:
    costs = with_files_kept(run_costs(model, recipe), model, rates, recipe)
    seconds = waiting_seconds(costs, model, rates, recipe)
    return tuple(
        StageForecast(
            name=name,
            flops=getattr(costs, name).flops,
            bytes_read=getattr(costs, name).read,
            bytes_written=getattr(costs, name).written + getattr(costs, name).kept,
            seconds=sum(by_kind.values()),
            seconds_by_kind=by_kind,
        )
        for name, by_kind in seconds.items()
    )


def _warn_of_device_memory(
    config: PlanConfig, runs: tuple[ProcessesForecast, ...], free: float, progress: Progress
) -> None:
    needed = max(run.device_memory or 0 for run in runs)
    if needed > free:
        setting = "--device-memory: " if config.device_memory is not None else ""
        progress.warn(
            f"{setting}the run needs {needed / 2**30:.1f} GiB of the GPU's memory, and has {free / 2**30:.1f} GiB"
        )
