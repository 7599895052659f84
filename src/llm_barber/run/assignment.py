"""What a run is to do, and what its result and its memory depend on."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from llm_barber.loading.job import Job
from llm_barber.masking.pattern import NofM, Unstructured
from llm_barber.messages import message
from llm_barber.method.initial_masks import InitialMasks, prunes_layers
from llm_barber.method.rebuild import RebuildSettings
from llm_barber.planning.recipe import Recipe
from llm_barber.progress import Progress
from llm_barber.record.report import KeptWeights, SourceFiles
from llm_barber.settings.initial import Initial
from llm_barber.settings.presets import PRESETS, REVISIONS, Allocation, Preset, PresetSettings, Reconstruct
from llm_barber.settings.refining import RefineSettings
from llm_barber.settings.run import RunSettings
from llm_barber.usage import versions

# Settings that do not change the result.
UNLIKE = {"output", "overwrite", "resume", "report", "batch_size", "memory", "device_memory", "activations_off_device"}
# Settings whose effect is known by the files and tokens that they lead to.
KNOWN_BY_CONTENT = {
    "model", "dense", "pruned", "revision", "pruned_revision", "bos", "calibration", "samples", "seqlen", "seed",
}  # fmt: skip
# Settings that lead to the same whether they are given or the preset says so.
LEFT_TO_PRESET = {
    "rebuild", "refine", "reconstruct", "allocation", "initial", "sparsity", "granularity", "rebuild_ratio", "guard",
    "tune_passes",
}  # fmt: skip


@dataclass(frozen=True)
class Assignment:
    """What a run is to do.

    Args:
        command: `prune` or `rebuild`.
        model: the dense one, as it was named.
        config: its settings.
        job: opened and checked.
        initial: gives the initial masks.
        rebuild_settings: None: masks are not rebuilt.
        method: of the initial mask.
        label: the same for people.
    """

    command: str
    model: str
    config: RunSettings
    job: Job
    initial: InitialMasks
    rebuild_settings: RebuildSettings | None
    method: str
    label: str

    @cached_property
    def refine_settings(self) -> RefineSettings | None:
        """What is done beyond the rebuild."""
        return RefineSettings.of(self.config, self.pattern, *self.job.tokens.input_ids.shape)

    @cached_property
    def source_files(self) -> SourceFiles:
        """The dense model's files, as they are when this is first asked for."""
        return SourceFiles(key=self.job.source.key, written=self.job.source.written)

    @cached_property
    def pruned_files(self) -> SourceFiles | None:
        """The files of the pruned model of a rebuild, as they are when this is first asked for."""
        return self.initial.source_files

    @property
    def recipe(self) -> Recipe:
        """What its memory depends on."""
        job, (sequences, tokens) = self.job, self.job.tokens.input_ids.shape
        layers = [job.source.tensors[name] for names in job.layer_tensors for name in names]
        return Recipe(
            sequences=sequences,
            tokens=tokens,
            batch=job.batch_size,
            itemsize=job.skeleton.dtype.itemsize,
            stored=round(sum(one.bytes for one in layers) / sum(math.prod(one.shape) for one in layers)),
            on_cpu=job.skeleton.device.type == "cpu",
            initial=self.initial.method or Initial.MAGNITUDE,  # which gathers no statistics either
            pattern=None,
            allocation=self.allocation,
            granularity=self.rebuild_settings.granularity if self.rebuild_settings else None,
            refine=self.refine_settings,
            prunes_head=job.prunes_head,
            processes=job.ranks.count,
        )

    @property
    def preset(self) -> Preset | None:
        """The one whose steps are taken; None: others, or a tuning preset's with settings of one's own."""
        config = self.config
        own = (config.guard, config.target_mix, config.tune_passes, config.swaps)
        other_method = self.initial.method not in (None, Initial.WANDA)
        if config.refines and (other_method or any(one is not None for one in own)):
            return None
        steps = PresetSettings(
            self.rebuild_settings is not None, config.refinement, config.reconstruction, self.allocation
        )
        for name, one in PRESETS.items():
            if steps == (one if self.initial.budget is not None else replace(one, allocation=Allocation.UNIFORM)):
                return name
        return None

    @property
    def resolved(self) -> dict[str, Any]:
        """What those settings are that were left to the preset, the method, the text or the device."""
        rebuilt, refined, config = self.rebuild_settings, self.refine_settings, self.config
        sequences, tokens = self.job.tokens.input_ids.shape
        found: dict[str, Any] = {
            "preset": self.preset, "rebuild": rebuilt is not None, "refine": config.refinement,
            "reconstruct": config.reconstruction, "allocation": self.allocation, "samples": sequences, "seqlen": tokens,
            "batch_size": self.job.batch_size,
        }  # fmt: skip
        if self.initial.method is not None:
            found["initial"] = self.initial.method
        if isinstance(self.initial.target, Unstructured):
            found["sparsity"] = self.initial.target.sparsity
        if rebuilt is not None:
            found |= {"granularity": rebuilt.granularity, "rebuild_ratio": rebuilt.ratio}
        if refined is not None:
            found |= {
                "target_mix": refined.target_mix, "guard": config.held_out_share,
                "swaps": refined.swaps_of(self.pattern) or None,
                "tune_passes": refined.passes or None,
            }  # fmt: skip
        return found

    @property
    def pattern(self) -> NofM | None:
        """N:M of most weights that are pruned, or of the first layer of those that were pruned before."""
        return self.initial.pattern

    @property
    def allocation(self) -> Allocation:
        """How sparsity is spread over the linears."""
        return Allocation.UNIFORM if self.initial.budget is None else self.config.allocated_by

    def warn_of_settings(self, progress: Progress) -> None:
        """Say what they lead to that a user would not expect."""
        if self.refine_settings is not None and not self.refine_settings.held_out and self.config.guard != 0:
            progress.warn(
                message("no window can be held out of one: all of the refining is kept, unchecked; give more {samples}")
            )

    @property
    def refinement(self) -> str | None:
        """What is done beyond the rebuild, for people; None: nothing."""
        settings, head = self.refine_settings, self.job.prunes_head
        if settings is None:
            return None
        parts = [settings.words] if prunes_layers(self.initial) else []
        if head and (settings.of_layers or not parts):  # else what is done to it is what is done to linears
            parts.append(settings.words_of_head)
        return "; ".join(parts)


def run_key(work: Assignment) -> dict[str, Any]:
    """What a run's result depends on, each by the name that a message can say.

    `settings` as they are for it, `given` as the user has them, who is told of these.
    """
    config, job = work.config, work.job
    given = config.model_dump(mode="json", exclude=UNLIKE | KNOWN_BY_CONTENT)
    left = set(LEFT_TO_PRESET)
    if not job.prunes_head:  # which has a mix of its own, unless one is given
        left.add("target_mix")
    if work.initial.has_one_target:  # else one that is given is for every pattern
        left.add("swaps")
    resolved = {name: one for name, one in work.resolved.items() if name in left}
    methods = {"revision of the methods": REVISIONS if config.refines else REVISIONS[Preset.PAPER]}
    key = {
        "command": work.command,
        "given": given,
        "settings": given | resolved | methods | {"preset": config.preset_name},
        "model's files": work.source_files.key,
    }
    if work.pruned_files is not None:
        key["pruned model's files"] = work.pruned_files.key
    return key | {
        "calibration text": [job.tokens.digest, *job.tokens.input_ids.shape],
        "device": job.skeleton.device.type,
        "dtype": str(job.skeleton.dtype),
        "version of a library": versions(),
    }


def kept_weights(config: RunSettings) -> KeptWeights:
    """What became of the weights that are kept."""
    if config.keeps_updates:
        return KeptWeights.UPDATED
    none = config.reconstruction is Reconstruct.NONE
    return KeptWeights.DENSE if none else KeptWeights(config.reconstruction.value)
