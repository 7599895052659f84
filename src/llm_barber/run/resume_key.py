"""Key of a run: all that its result depends on. A run resumes only a run with the same key."""

from typing import Any

from llm_barber.method.held_out import JUDGE_REVISION
from llm_barber.run.prepared_run import PreparedRun
from llm_barber.settings.presets import REVISIONS, Preset
from llm_barber.usage import versions

# Settings that do not change the result.
NOT_IN_KEY = {
    "output", "overwrite", "resume", "report", "batch_size", "memory", "device_memory", "activations_off_device",
}  # fmt: skip
# Settings whose effect is known by the files and tokens that they lead to.
KNOWN_BY_CONTENT = {
    "model", "dense", "pruned", "revision", "pruned_revision", "bos", "calibration", "samples", "seqlen", "seed",
}  # fmt: skip
# Settings that have the same effect from the user and from the preset.
LEFT_TO_PRESET = {
    "rebuild", "refine", "reconstruct", "allocation", "initial", "sparsity", "granularity", "rebuild_ratio", "guard",
    "tune_passes", "tune_windows", "reorder",
}  # fmt: skip


def resume_key(prepared: PreparedRun) -> dict[str, Any]:
    """Everything that the result depends on, each part by the name that a message gives it.

    `settings`: as they are for this run. `given`: as the user gave them; a message about other settings shows these.
    """
    config, job = prepared.config, prepared.job
    given = config.model_dump(mode="json", exclude=NOT_IN_KEY | KNOWN_BY_CONTENT)
    if given.get("sparsities"):  # the first match counts
        given["sparsities"] = [list(line) for line in given["sparsities"].items()]
    left_to_preset = set(LEFT_TO_PRESET)
    if not job.prunes_head:  # the head has a default mix of its own, which a given mix replaces
        left_to_preset.add("target_mix")
    if prepared.initial_masks.has_one_target:  # the default depends on the pattern, a given number is for every pattern
        left_to_preset.add("swaps")
    else:  # linears with N:M have a default of their own, which a given granularity replaces
        left_to_preset.discard("granularity")
    resolved = {name: value for name, value in prepared.resolved.items() if name in left_to_preset}
    revisions: dict[str, Any] = {"revision of the methods": REVISIONS if config.refines else REVISIONS[Preset.PAPER]}
    initial = prepared.initial_masks.method
    if initial is not None and initial.revision > 1:
        revisions[f"revision of the method {initial}"] = initial.revision
    if prepared.refine_settings is not None and prepared.refine_settings.of_layers:
        revisions["revision of the held-out windows"] = JUDGE_REVISION
    key = {
        "command": prepared.command,
        "given": given,
        "settings": given | resolved | revisions | {"preset": config.preset_name},
        "model's files": prepared.source_files.key,
    }
    if prepared.pruned_files is not None:
        key["pruned model's files"] = prepared.pruned_files.key
    return key | {
        "calibration text": [job.tokens.digest, *job.tokens.input_ids.shape],
        "device": job.skeleton.device.type,
        "dtype": str(job.skeleton.dtype),
        "version of a library": versions(),
    }
