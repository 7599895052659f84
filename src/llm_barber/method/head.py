"""The output head, pruned on request: the step after the last decoder layer.

Its mask is the initial method's, refined if the run refines. It is not rebuilt, since the head belongs to no block. A
head that is tied to the embedding gets weights of its own; the embedding, which tokens are looked up in, stays dense.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from llm_barber.checkpoint.locations import parameters_in
from llm_barber.loading.job import Job
from llm_barber.masking.gram import TargetMoments
from llm_barber.masking.rebuild import Rebuilt
from llm_barber.method.initial_masks import InitialMasks
from llm_barber.method.layer import PrunedLayer
from llm_barber.method.outcome import BlockOutcome, block_result
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.method.refine_linear import Objective, refine_linear
from llm_barber.model.architecture import Block
from llm_barber.model.block import DecoderLayer
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.streams import DENSE, HIDDEN, ActivationStreams
from llm_barber.settings.refining import RefineSettings

BLOCK = "head"


class _End(nn.Module):
    """The model after its decoder layers, as a layer: states to logits.

    States are (sequences, tokens, hidden).
    """

    def __init__(self, skeleton: Skeleton, name: str) -> None:
        super().__init__()
        self.add_module(name, skeleton.head)
        self._finish = skeleton.finish

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of the states."""
        return self._finish(hidden)


def prune_head(
    job: Job,
    tensors: Mapping[str, Tensor],
    initial_masks: InitialMasks,
    refine_settings: RefineSettings | None,
    streams: ActivationStreams,
) -> PrunedLayer:
    """Prune the output head on what the pruned decoder layers give it.

    Args:
        job: the opened model.
        tensors: the head's, by the checkpoint's names; empty if the checkpoint has the embedding only.
        initial_masks: gives its mask.
        refine_settings: None: the run does not refine.
        streams: the last decoder layer's output; for a target mix, the dense model's, too.
    """
    skeleton = job.skeleton
    (name,) = job.linears(job.layer_count)
    if not skeleton.tails:
        _learn_what_layers_return(job, streams)
    weight = _fill_outside(job, tensors)
    layer = DecoderLayer(_End(skeleton, name), (name,), lambda *_: {})
    pruned = initial_masks(job.layer_count, layer, {name: weight}, streams)[name]
    initial_keep = pruned.keep
    if refine_settings is not None:
        settings = refine_settings.of_head
        pruned = _refine(layer, name, pruned.with_mask(pruned.keep), weight, settings, streams)
    skeleton.drop_outside()
    final = {name: pruned.final}
    outcome = BlockOutcome({name: pruned}, {name: Rebuilt.between(initial_keep, pruned.keep)})
    result = block_result(Block(BLOCK, name, (name,)), outcome, final)
    return PrunedLayer({job.head_location.tensor: final[name]}, [result])


def _fill_outside(job: Job, tensors: Mapping[str, Tensor]) -> Tensor:
    """Give the model its parameters outside the layers.

    Returns the output head's weight as stored, on the device.
    """
    skeleton = job.skeleton
    locations = {name: job.source.location(name) for name in skeleton.outside_names_and_head}
    parameters = parameters_in(tensors, locations)
    parameters |= job.source.read_parameters(name for name in locations if name not in parameters)
    head = next(name for name in locations if job.is_head(name))
    skeleton.fill_outside(parameters)
    return parameters[head].to(skeleton.device)


def _learn_what_layers_return(job: Job, streams: ActivationStreams) -> None:
    """Run the last layer once, so that the structure of its output is known.

    A run that resumes with the head alone has run no layer.
    """
    last = job.layer_count - 1
    layer, _ = job.open_layer(last, job.source.read(job.layer_tensors[last]))
    layer.output(streams.read(HIDDEN, next(streams.batches())))
    job.skeleton.tails[last] = layer.tail
    job.skeleton.release_layer(last)


def _refine(
    layer: DecoderLayer,
    name: str,
    pruned: PrunedLinear,
    weight: Tensor,
    settings: RefineSettings,
    streams: ActivationStreams,
) -> PrunedLinear:
    """Refine the head as a linear, on its inputs in the sparse model.

    For a target mix, its inputs in the dense model are needed, too.
    """
    objectives: list[Objective | None] = []
    for batches in streams.split():
        moments = TargetMoments(weight.shape[1], streams.device, crossed=settings.target_mix > 0)
        for batch in batches:
            prefixes = ("", DENSE) if settings.target_mix else ("",)
            inputs = [layer.inputs_of([name], streams.read(prefix + HIDDEN, batch), {})[name] for prefix in prefixes]
            moments.update(inputs[0], inputs[1] if settings.target_mix else None)
        streams.ranks.add(moments)
        objectives.append(Objective.of(moments, settings.target_mix))
    training, held_out = objectives
    return pruned if training is None else refine_linear(pruned, weight, training, held_out, settings)
