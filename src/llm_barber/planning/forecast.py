"""The forecast of a run (`llm-barber plan`): work by stage, peak memory, time, and what sets the pace."""

import json
from dataclasses import asdict, fields, replace

import torch
from pydantic import BaseModel, ConfigDict

from llm_barber.errors import ModelError, SettingsError
from llm_barber.loading.job import sequences_together
from llm_barber.loading.naming import check_conversions
from llm_barber.loading.opening import check_positions, make_skeleton
from llm_barber.model.architecture import ARCHITECTURES, Block, kind_of
from llm_barber.model.device import free_device_memory, resolve_device, resolve_dtype
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.structure import find_architecture
from llm_barber.planning.configuration import read_configuration
from llm_barber.planning.costs import Costs, run_costs
from llm_barber.planning.limits import device_room, left_for_activations
from llm_barber.planning.machine import KINDS, Rates, measured_rates, named_rates
from llm_barber.planning.memory import in_files, peak_held
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.shapes import ModelShapes, model_shapes
from llm_barber.progress import Progress, Silent
from llm_barber.settings.plan import PlanConfig
from llm_barber.text.calibration import READ_BYTES, READING_BYTES, text_size, token_shape
from llm_barber.text.suffixes import TOKEN_FILE_SUFFIX
from llm_barber.usage import current_memory

# Of a named machine, where nothing else is said: bytes/s, and of a process that has done nothing yet, bytes.
MEMORY_BANDWIDTH, LINK, DISK = 2e12, 10e9, 2e9
DEVICE_MEMORY = 80e9  # bytes of a named GPU's, where nothing is said
IN_LAYERS = ("initial", "rebuild", "refine", "tune", "propagate")  # stages
NETWORK = 10e9  # bytes/s between processes of any machine, where nothing is said: it is not measured
BARE_PROCESS = {"cpu": 0.65 * 2**30, "cuda": 2.0 * 2**30}
VOCABULARY_BYTES = 350  # that a tokenizer takes for each token that it knows, as seen with 49,152 and 262,144


class StageForecast(BaseModel):
    """A stage's work in the process that has the most of it, and its seconds by what sets the pace.

    Of what is done while a GPU computes layers (`keep`) the seconds are those by which it takes longer.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    flops: float
    bytes_read: float
    bytes_written: float
    seconds: float
    seconds_by_kind: dict[str, float]


class ProcessesForecast(BaseModel):
    """With so many processes; memory is bytes of each of them, `device_memory` None where the host computes.

    `on_device`: bytes of the latter that calibration activations take, which stay there; `in_files`: of those that
    `--memory` leaves no place for.
    """

    model_config = ConfigDict(frozen=True)

    processes: int
    stages: tuple[StageForecast, ...]
    host_memory: float
    device_memory: float | None
    on_device: float
    in_files: float

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def bottleneck(self) -> str:
        """What takes the most of the time: compute, memory, link, network or disk."""
        kinds = {kind: sum(stage.seconds_by_kind[kind] for stage in self.stages) for kind in KINDS.values()}
        return max(kinds, key=lambda kind: kinds[kind])


class Forecast(BaseModel):
    """What `plan` found. `rates`: amounts a second of each kind of work; `measured`: are they this machine's?"""

    model_config = ConfigDict(frozen=True)

    model: str
    architecture: str
    structure: tuple[str, ...]
    layers: int
    parameters: int
    weights: int
    settings: str
    sequences: int
    tokens: int
    batch_size: int
    device: str
    dtype: str
    measured: bool
    rates: dict[str, float]
    runs: tuple[ProcessesForecast, ...]

    def to_json(self) -> str:
        """Indented JSON with a final newline."""
        record = self.model_dump(mode="json")
        for shown, run in zip(record["runs"], self.runs, strict=True):
            shown |= {"seconds": run.seconds, "bottleneck": run.bottleneck}
        return json.dumps(record, indent=1) + "\n"


def forecast(config: PlanConfig, progress: Progress | None = None) -> Forecast:
    """Say what a run will cost, from the configuration alone; takes seconds, downloads no weights.

    Raises:
        BarberError: the configuration is missing, or not of a supported model; the device is not there.
    """
    progress = progress or Silent()
    progress.stage(f"reading the configuration of {config.model}")
    if config.calibration.endswith(TOKEN_FILE_SUFFIX):  # which has the windows it has
        samples, seqlen = token_shape(config.calibration)
        config = config.model_copy(update={"samples": samples, "seqlen": seqlen})
    if config.include or config.exclude or config.skip_layers or config.sparsities:
        progress.warn("counted as if every linear were pruned: what is left out, or left dense, takes less")
    if max(config.processes) > config.samples:
        raise SettingsError(
            f"{max(config.processes)} processes cannot share {config.samples} windows",
            "plan fewer, or give more --samples",
        )
    own = config.flops is None
    # A named machine is taken to compute in bfloat16 on a GPU, whatever this one is.
    device = resolve_device(config.device) if own else torch.device(_named_device(config.device))
    dtype = resolve_dtype(config.dtype if own or config.dtype != "auto" else "bfloat16", device)
    described = read_configuration(config.model, config.revision)
    known = (one.dtype for one in (described, described.get_text_config()) if isinstance(one.dtype, torch.dtype))
    stored = next(known, torch.float32)  # before the empty model sets another
    architecture = find_architecture(described, config.structure)
    check_positions(described.get_text_config(), config.seqlen)
    skeleton = make_skeleton(described, architecture, torch.device("cpu"), dtype, config.model)
    check_conversions(skeleton.model, architecture.layers)
    model = model_shapes(skeleton)
    _check_pattern(config, model)
    free = 0.0  # of the device's memory
    if device.type == "cuda":
        free = free_device_memory(device, config.device_memory) if own else config.device_memory or DEVICE_MEMORY
    batch = sequences_together(config, skeleton, device, config.samples, config.seqlen, int(free))
    before = current_memory() if own else int(BARE_PROCESS[device.type])
    text = text_size(config.calibration, config.samples * config.seqlen)
    tokenizer = VOCABULARY_BYTES * model.vocabulary if text else 0
    bare = before + tokenizer + READ_BYTES * text
    reading = before + tokenizer + READING_BYTES * text
    recipe = Recipe.of(config, batch, dtype, stored, device)
    network = config.network or NETWORK
    if config.flops is None:
        progress.stage("measuring this machine")
        rates = measured_rates(model, recipe, dtype, device, network)
        rates = rates if config.bandwidth is None else replace(rates, read=config.bandwidth, written=config.bandwidth)
    else:
        memory, link = config.memory_bandwidth or MEMORY_BANDWIDTH, config.link or LINK
        disk = config.bandwidth or DISK
        rates = named_rates(config.flops, config.float32_flops, memory, link, network, disk, dtype)
    runs = tuple(
        _with_processes(model, recipe.among(count), rates, bare, reading, free, config) for count in config.processes
    )
    most = max((run.device_memory or 0 for run in runs), default=0)
    if most > free:
        asked = "--device-memory: " if config.device_memory is not None else ""
        progress.warn(
            f"{asked}{free / 2**30:.1f} GiB of the GPU's memory will hardly do: {most / 2**30:.1f} GiB are held"
        )
    return Forecast(
        model=config.model,
        architecture=described.model_type,
        structure=_structure(skeleton, architecture is ARCHITECTURES.get(described.model_type)),
        layers=len(model.layers),
        parameters=model.parameters,
        weights=model.weights,
        settings=_words(recipe),
        sequences=config.samples,
        tokens=config.seqlen,
        batch_size=batch,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        measured=own,
        rates=asdict(rates),
        runs=runs,
    )


def _named_device(name: str) -> str:
    """The kind of device of a named machine, which need not be here."""
    kind = name.partition(":")[0]
    if name == "auto":
        return "cuda"
    return kind if kind in BARE_PROCESS else str(resolve_device(name).type)


def _structure(skeleton: Skeleton, known: bool) -> tuple[str, ...]:
    """Where the decoder layers are and what their blocks are, in lines; kinds of layers together."""
    lines = [f"layers: {skeleton.architecture.layers}, {'as recorded' if known else 'found by structure'}"]
    kinds: dict[tuple[Block, ...], list[int]] = {}
    for index, blocks in enumerate(skeleton.blocks):
        alike = (replace(one, linears=tuple(dict.fromkeys(kind_of(name) for name in one.linears))) for one in blocks)
        kinds.setdefault(tuple(alike), []).append(index)
    for blocks, layers in kinds.items():
        of = "" if len(kinds) == 1 else f"layers {ranges(layers)}: "
        for block in blocks:
            linears = ", ".join(name.removeprefix(f"{block.output}.") for name in block.linears)
            lines.append(f"{of}{block.name} ({block.output}): {linears}")
    return tuple(lines)


def ranges(numbers: list[int]) -> str:
    """Ascending numbers as people write them: 0-2, 5."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found)


def _check_pattern(config: PlanConfig, model: ModelShapes) -> None:
    """Refuse an N:M that does not divide a row, as `prune` does."""
    size = 1 if config.allow_dense_tail else getattr(config.target, "of", 1)
    for layer in model.layers:
        for block in layer.blocks + ((model.head_block,) if config.prune_head else ()):
            for _, columns in block.linears:
                if columns % size:
                    raise ModelError(
                        f"pattern {config.target} does not divide the {columns} inputs of a linear",
                        "give --allow-dense-tail, choose an N:M whose M divides every row, or use --sparsity",
                    )


def _with_processes(
    model: ModelShapes, recipe: Recipe, rates: Rates, bare: int, reading: int, free: float, config: PlanConfig
) -> ProcessesForecast:
    """`bare`: bytes of a process that has read the text; `reading`: most of one that reads it; `free`: the device's."""
    if not config.activations_off_device:
        recipe = replace(recipe, room=device_room(free, model, recipe))
    if config.memory is not None:
        recipe = replace(recipe, for_activations=left_for_activations(config.memory, bare, model, recipe))
    costs = run_costs(model, recipe)
    held = peak_held(model, recipe)
    return ProcessesForecast(
        processes=recipe.processes,
        stages=_stages(costs, rates, recipe),
        host_memory=max(bare + held.host, reading),
        device_memory=None if recipe.on_cpu else held.device,
        on_device=recipe.on_device(model.hidden),
        in_files=in_files(model, recipe),
    )


def _stages(costs: Costs, rates: Rates, recipe: Recipe) -> tuple[StageForecast, ...]:
    seconds = {one.name: rates.seconds(getattr(costs, one.name)) for one in fields(costs)}
    # Hashing, and copying to the system's pages, take a CPU that computes as long as if it did nothing else.
    waits = recipe.on_cpu or not recipe.repeatable
    meanwhile = 0.0 if waits else sum(sum(seconds[name].values()) for name in IN_LAYERS)
    kept = sum(seconds["keep"].values())
    longer = max(0.0, kept - meanwhile) / kept if kept else 0.0
    seconds["keep"] = {kind: longer * value for kind, value in seconds["keep"].items()}
    return tuple(
        StageForecast(
            name=name,
            flops=getattr(costs, name).flops,
            bytes_read=getattr(costs, name).read,
            bytes_written=getattr(costs, name).written,
            seconds=sum(by_kind.values()),
            seconds_by_kind=by_kind,
        )
        for name, by_kind in seconds.items()
    )


def _words(recipe: Recipe) -> str:
    """What the run does, for people."""
    parts = [
        f"allocation by {recipe.allocation}" if recipe.allocation.value != "uniform" else "",
        recipe.initial.value,
        f"rebuilt within each {recipe.granularity}" if recipe.granularity else "",
        recipe.refine.words if recipe.refine else "",
        str(recipe.pattern) if recipe.pattern else "",
        "the output head, too" if recipe.prunes_head else "",
    ]
    return ", ".join(filter(None, parts))
