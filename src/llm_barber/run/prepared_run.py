"""A run, opened and checked, before its first layer."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from llm_barber.loading.job import Job
from llm_barber.masking.pattern import NofM, Unstructured
from llm_barber.method.initial_masks import InitialMasks, prunes_layers
from llm_barber.method.rebuild import RebuildSettings
from llm_barber.method.reordering import MovableChannels, movable_channels
from llm_barber.progress import Progress
from llm_barber.record.report import KeptWeights, SourceFiles
from llm_barber.settings.base import USUAL_SAMPLES, USUAL_SEQLEN
from llm_barber.settings.presets import PRESETS, Allocation, Initial, Preset, PresetSettings, Reconstruct
from llm_barber.settings.prune import PruneConfig, RunSettings
from llm_barber.settings.refining import RefineSettings
from llm_barber.text.suffixes import TOKEN_FILE_SUFFIX

FEW_NUMBERS = 1.0  # numbers of a layer's output for each of its weights (docs/results/index.md)


@dataclass(frozen=True)
class PreparedRun:
    """A run whose models, text and settings are opened and checked.

    Args:
        model: the dense model, as it was named.
        config: settings of the command.
        job: the opened dense model.
        initial_masks: gives the initial masks.
        rebuild_settings: None: masks are not rebuilt.
        method: method of the initial masks.
        label: the initial masks, for people.
    """

    model: str
    config: RunSettings
    job: Job
    initial_masks: InitialMasks
    rebuild_settings: RebuildSettings | None
    method: str
    label: str

    @property
    def command(self) -> str:
        """`prune` or `rebuild`."""
        return self.config.command

    @cached_property
    def refine_settings(self) -> RefineSettings | None:
        """Settings of refining and tuning; None: the run does neither."""
        return RefineSettings.of(self.config, self.pattern, *self.job.tokens.input_ids.shape)

    @cached_property
    def source_files(self) -> SourceFiles:
        """The dense model's files, as they are when this is first read."""
        return SourceFiles(key=self.job.source.key, written=self.job.source.written)

    @cached_property
    def pruned_files(self) -> SourceFiles | None:
        """The files of a rebuild's pruned model, as they are when this is first read; None: another command."""
        return self.initial_masks.source_files

    @property
    def array_bytes(self) -> int:
        """Bytes of one array of calibration activations, of all processes."""
        hidden: int = self.job.config.hidden_size
        return self.job.tokens.input_ids.numel() * hidden * self.job.skeleton.dtype.itemsize

    @property
    def updated_bytes(self) -> int:
        """Bytes, at most, of updated weights that the work folder keeps beside the output, in the compute dtype."""
        if self.config.runs_what_it_writes:
            return 0
        shapes = self.job.linear_shapes(self.job.source).values()
        return sum(math.prod(shape) for shape in shapes) * self.job.skeleton.dtype.itemsize

    @cached_property
    def movable_channels(self) -> list[list[MovableChannels]]:
        """Channels that may change places, by layer; [] if there are none."""
        by_layer = movable_channels(self.initial_masks)
        return by_layer if any(by_layer) else []

    @property
    def reorders(self) -> bool:
        """True if channels are reordered before the first layer is pruned."""
        return self.config.reorders and bool(self.movable_channels)

    @property
    def preset(self) -> Preset | None:
        """Preset that the run amounts to.

        None: no preset, or a preset that tunes with other numbers or another initial method.
        """
        config = self.config
        numbers = (config.guard, config.target_mix, config.tune_passes, config.tune_windows, config.swaps)
        other_method = self.initial_masks.method not in (None, Initial.WANDA)
        if config.refines and (other_method or any(number is not None for number in numbers)):
            return None
        steps = PresetSettings(
            self.rebuild_settings is not None, config.refinement, config.reconstruction, self.allocation, self.reorders
        )
        for preset, preset_steps in PRESETS.items():
            if self.initial_masks.budget is None:
                preset_steps = replace(preset_steps, allocation=Allocation.UNIFORM)
            if not self.movable_channels:
                preset_steps = replace(preset_steps, reorder=False)
            if steps == preset_steps:
                return preset
        return None

    @property
    def resolved(self) -> dict[str, Any]:
        """Values of the settings that the user may leave to the preset, the method, the text or the device."""
        rebuilt, refined, config = self.rebuild_settings, self.refine_settings, self.config
        sequences, tokens = self.job.tokens.input_ids.shape
        resolved: dict[str, Any] = {
            "preset": self.preset, "rebuild": rebuilt is not None, "refine": config.refinement,
            "reconstruct": config.reconstruction, "allocation": self.allocation, "samples": sequences, "seqlen": tokens,
            "batch_size": self.job.batch_size,
        }  # fmt: skip
        if self.reorders:
            resolved["reorder"] = True
        if self.initial_masks.method is not None:
            resolved["initial"] = self.initial_masks.method
        if isinstance(self.initial_masks.target, Unstructured):
            resolved["sparsity"] = self.initial_masks.target.sparsity
        if rebuilt is not None:
            resolved |= {"granularity": rebuilt.granularity, "rebuild_ratio": rebuilt.ratio}
        if refined is not None:
            resolved |= {
                "target_mix": refined.target_mix, "guard": config.held_out_share,
                "swaps": refined.swaps_of(self.pattern) or None,
                "tune_passes": refined.passes or None,
                "tune_windows": refined.sequences_a_step if refined.of_layers else None,
            }  # fmt: skip
        return resolved

    @property
    def pattern(self) -> NofM | None:
        """N:M of most weights that are pruned; of a rebuild, of the first layer that was pruned."""
        return self.initial_masks.pattern

    @property
    def allocation(self) -> Allocation:
        """Allocation of sparsity over the linears."""
        return Allocation.UNIFORM if self.initial_masks.budget is None else self.config.allocated_by

    def warn_of_settings(self, progress: Progress) -> None:
        """Warn of effects of the settings that a user would not expect."""
        if self._turned_off_only_the_rebuild:
            progress.warn(
                f"--no-rebuild without --preset means --preset {Preset.PAPER}: Wanda's mask as it is. The default, "
                f"--preset {Preset.MASK}, makes no rebuild anyway"
            )
        if self.refine_settings is not None and not self.refine_settings.held_out and self.config.guard != 0:
            progress.warn("there is one calibration window, so none is held out to check refining: give more --samples")
        if self.refine_settings is not None and self.refine_settings.of_layers:
            self._warn_of_little_text(progress)

    @property
    def _turned_off_only_the_rebuild(self) -> bool:
        """True if only a switched off rebuild makes the preset `paper`, and nothing else improves the mask."""
        config = self.config
        chosen = (config.preset, config.initial, config.allocation) if isinstance(config, PruneConfig) else (True,)
        return config.rebuild is False and not config.refines and all(choice is None for choice in chosen)

    def _warn_of_little_text(self, progress: Progress) -> None:
        """Warn where tuning gets less text than usual, and less than one number of a layer's output for each weight."""
        sequences, tokens = self.job.tokens.input_ids.shape
        if sequences * tokens >= USUAL_SAMPLES * USUAL_SEQLEN:
            return
        layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in self.job.skeleton.layers]
        numbers = sequences * tokens * self.job.config.hidden_size / max(layers)
        if numbers < FEW_NUMBERS:
            has_all = self.config.calibration.endswith(TOKEN_FILE_SUFFIX)  # whose number of windows is its own
            more = "more text" if has_all else "more --samples or a larger --seqlen"
            progress.warn(
                f"the calibration text is little for this model: with {sequences} × {tokens} tokens a layer's output "
                f"has {numbers:.2g} numbers for each of its weights. Masks get better with {more} "
                "(docs/guide/presets.md)"
            )

    @property
    def refinement(self) -> str | None:
        """Refining and tuning, for people; None: the run does neither."""
        settings, head = self.refine_settings, self.job.prunes_head
        if settings is None:
            return None
        parts = [settings.words] if prunes_layers(self.initial_masks) else []
        if head and (settings.of_layers or not parts):  # otherwise the head is refined as the linears are
            parts.append(settings.words_of_head)
        return "; ".join(parts)


def kept_weights(config: RunSettings) -> KeptWeights:
    """Values of the kept weights: dense, updated, solved or tuned."""
    if config.keeps_updates:
        return KeptWeights.UPDATED
    none = config.reconstruction is Reconstruct.NONE
    return KeptWeights.DENSE if none else KeptWeights(config.reconstruction.value)
