"""Settings of refining, resolved to numbers: swaps, least squares, tuning; and the steps of tuning."""

import math
from dataclasses import dataclass, replace

from llm_barber.masking.pattern import NofM, Pattern, as_fraction
from llm_barber.messages import counted
from llm_barber.model.streams import ActivationStreams
from llm_barber.settings.presets import (
    FEWEST_PASSES,
    LITTLE_TEXT,
    PASSES_OF_LITTLE_TEXT,
    PATTERN_SWAPS,
    PATTERN_TARGET_MIX,
    SEQUENCES_A_STEP,
    SOLVED_TARGET_MIX,
    SWAPS,
    TARGET_MIX,
    TUNE_TOKENS,
    Reconstruct,
    Refine,
)
from llm_barber.settings.prune import RunSettings


@dataclass(frozen=True)
class RefineSettings:
    """Settings of refining each linear and of tuning whole layers.

    `swaps`: most swaps a row; None: the default, 0: none. `solve`: least squares.
    `target_mix`: 0: dense linears on the pruned model's activations, 1: on the dense model's (`docs/method/tuning.md`).
    `passes`: over the windows that tune layers, their masks, kept weights or both (`tune.py`). `sequences_a_step`: most
    windows of a step of tuning. `held_out`: calibration windows, the last ones. `head_mix`: the target mix of the
    output head, whose mask is swapped, not tuned.
    """

    swaps: int | None
    target_mix: float
    solve: bool
    held_out: int
    passes: int = 0
    tunes_masks: bool = False
    tunes_weights: bool = False
    head_mix: float = TARGET_MIX
    sequences_a_step: int = SEQUENCES_A_STEP

    @classmethod
    def of(cls, config: RunSettings, pattern: Pattern | None, sequences: int, seqlen: int) -> "RefineSettings | None":
        """Resolve the settings of a run; None: no refining.

        Args:
            config: settings of the run.
            pattern: pattern of most pruned weights, or of a checkpoint that was pruned before.
            sequences: number of calibration windows.
            seqlen: tokens a window.
        """
        solve = config.reconstruction is not Reconstruct.NONE
        if not config.refines:
            return None
        mix = _default_mix(config, pattern) if config.target_mix is None else config.target_mix
        share = config.held_out_share
        masks, weights = config.refinement is Refine.TUNE, config.reconstruction is Reconstruct.TUNE
        passes = passes_over(sequences * seqlen) * (masks + weights)
        return cls(
            swaps=config.swaps if config.refinement is Refine.SWAPS else 0,
            target_mix=mix,
            solve=solve and not masks,  # which moves masks after linears are solved
            held_out=min(max(math.ceil(as_fraction(share) * sequences), share > 0), sequences - 1),
            passes=(config.tune_passes or passes) if masks or weights else 0,
            tunes_masks=masks,
            tunes_weights=weights,
            head_mix=TARGET_MIX if config.target_mix is None and masks else mix,
            sequences_a_step=config.tune_windows or sequences_a_step(sequences * seqlen),
        )

    @property
    def of_linears(self) -> bool:
        """True if linears are refined one by one, by swaps or least squares."""
        return self.swaps != 0 or self.solve

    @property
    def of_layers(self) -> bool:
        """True if whole layers are tuned."""
        return self.tunes_masks or self.tunes_weights

    @property
    def aims_at_dense_layers(self) -> bool:
        """True if tuning's target needs the dense layer's output on what the pruned model gives it."""
        return self.of_layers and self.target_mix < 1

    @property
    def follows_dense(self) -> bool:
        """True if the target needs the dense model's own activations, which then go through the layers, too."""
        return self.target_mix > 0

    @property
    def of_head(self) -> "RefineSettings":
        """Settings for the output head: swaps and least squares, as it belongs to no layer that could be tuned."""
        swaps, solve = None if self.tunes_masks else self.swaps, self.solve or self.tunes_weights
        return replace(self, swaps=swaps, solve=solve, target_mix=self.head_mix)

    @classmethod
    def arrays(cls, settings: "RefineSettings | None") -> int:
        """Number of arrays of all calibration activations that exist at once (`model/streams.py`).

        Three: the layer's input, the first block's output, and the dense block's output or the next layer's input. If
        dense activations are followed, the same of them, and the output that swaps compare the last block's with. If
        layers are tuned, the output that a layer is tuned towards.
        """
        if settings is None:
            return 3
        followed = (4 if settings.of_linears else 3) if settings.target_mix else 0
        return 3 + followed + (1 if settings.of_layers else 0)

    def swaps_of(self, pattern: NofM | None) -> int:
        """Most swaps of a row."""
        if self.swaps is None:
            return SWAPS if pattern is None else PATTERN_SWAPS
        return self.swaps

    @property
    def words_of_head(self) -> str:
        """The refining of the output head in words, for records and tables."""
        return f"the output head: {replace(self.of_head, passes=0, tunes_masks=False, tunes_weights=False).words}"

    @property
    def words(self) -> str:
        """The refining of decoder layers in words, for records and tables."""
        most_swaps = f"{SWAPS} (with N:M {PATTERN_SWAPS})" if self.swaps is None else str(self.swaps)
        tuned = ["masks"] * self.tunes_masks + ["weights"] * self.tunes_weights
        parts = [
            f"at most {most_swaps} exact swaps a row" if self.swaps != 0 else "",
            "least squares of the kept weights" if self.solve else "",
            f"{self.passes} pass{'es that tune' if self.passes > 1 else ' that tunes'} {' and '.join(tuned)}"
            if tuned
            else "",
        ]
        windows = counted(self.held_out, "window")
        return f"{', '.join(filter(None, parts))} (target mix {self.target_mix:g}, {windows} held out)"

    def step_count(self, sequences: int) -> int:
        """Number of steps in a pass of tuning: the same for any number of processes, so that the result is the same."""
        return math.ceil((sequences - self.held_out) / self.sequences_a_step)

    def steps(self, streams: ActivationStreams) -> list["Step"]:
        """Steps of a pass of tuning: each has sequences from all over the text, so that processes share its work.

        If a step has fewer sequences than there are processes, processes take turns.
        """
        training, border = streams.all_sequences - streams.held_out, streams.held_out_start
        count = self.step_count(streams.all_sequences)
        return [
            Step(range((step - streams.first_sequence) % count, border, count), len(range(step, training, count)))
            for step in range(count)
        ]

    def batch_sizes(self, streams: ActivationStreams) -> set[int]:
        """Batch sizes that the layers are called with; tuning calls them with one sequence after the other."""
        training, held_out = streams.split()
        return {batch.stop - batch.start for batch in (*training, *held_out)} | ({1} if self.of_layers else set())


@dataclass(frozen=True)
class Step:
    """A step of tuning: the sequences of this process, and their number in all processes."""

    local_sequences: range
    sequences: int


def sequences_a_step(tokens: int) -> int:
    """Most windows of a step of tuning over a text of so many tokens."""
    return 1 if tokens < LITTLE_TEXT else SEQUENCES_A_STEP


def passes_over(tokens: int) -> int:
    """Passes of tuning over a text of so many tokens; masks and weights together get twice as many."""
    return PASSES_OF_LITTLE_TEXT if tokens < LITTLE_TEXT else max(TUNE_TOKENS // tokens, FEWEST_PASSES)


def windows_in_key(windows: int) -> dict[str, int]:
    """Give a kept result's key the windows of a step: nothing for the most, which earlier versions took."""
    return {"tune_windows": windows} if windows < SEQUENCES_A_STEP else {}


def _default_mix(config: RunSettings, pattern: Pattern | None) -> float:
    if config.refinement is Refine.TUNE:
        return PATTERN_TARGET_MIX if isinstance(pattern, NofM) else TARGET_MIX
    solved = config.refinement is Refine.NONE and config.reconstruction is Reconstruct.LEAST_SQUARES
    return SOLVED_TARGET_MIX if solved else TARGET_MIX
