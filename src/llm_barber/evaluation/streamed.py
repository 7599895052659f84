"""Predictions of a whole model, computed decoder layer by decoder layer.

Any model that can be pruned within the memory can be evaluated within it.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError
from llm_barber.loading.configuration import load_config
from llm_barber.loading.opening import check_tensors, layer_locations, open_skeleton
from llm_barber.model.architecture import StructureOptions
from llm_barber.model.block import DecoderLayer
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.structure import find_architecture
from llm_barber.progress import Progress
from llm_barber.record.file import read_record, recorded_structure

CPU_LOGITS_BYTES = 24 * 2**20
GPU_LOGITS_BYTES = 512 * 2**20


class StreamedModel:
    """A checkpoint to predict with: the embedding, the head and one decoder layer are in memory at a time.

    Args:
        model: folder, hub id or GGUF file.
        device: that computes the model.
        dtype: compute dtype.
        structure: where its decoder layers are; None or empty: as its record says, as known of its family, or as
            found by a trial run.

    Raises:
        ModelError: the model is missing, damaged or of an unsupported architecture.
        HubError: the hub cannot be reached.
    """

    def __init__(
        self, model: str, device: torch.device, dtype: torch.dtype, structure: StructureOptions | None = None
    ) -> None:
        self.source = CheckpointSource(model)
        config = load_config(self.source)
        self.config = config.get_text_config()
        if structure is None or structure == StructureOptions():
            structure = recorded_structure(read_record(self.source.folder))
        architecture = find_architecture(config, structure)
        self.skeleton: Skeleton = open_skeleton(self.source, config, architecture, device, dtype)
        check_tensors(self.skeleton, self.source, with_head=True)
        self.skeleton.fill_outside(self.source.read_parameters(self.skeleton.outside_names_and_head))

    def hidden_states(self, batches: Sequence[Tensor], progress: Progress) -> list[Tensor]:
        """The last decoder layer's output for each batch.

        Of shape (sequences, tokens, hidden), in the compute dtype, in host memory.

        Args:
            batches: token ids, int64, (sequences, tokens), each batch of a shape of its own.
            progress: told of each layer.
        """
        skeleton = self.skeleton
        states: list[Tensor] = []
        for tokens in batches:
            skeleton.embed(tokens, lambda hidden: states.append(hidden.cpu()))
        progress.start(f"evaluating {self.source.model}", len(skeleton.layers))
        for index in range(len(skeleton.layers)):
            weights = self.source.read_locations(layer_locations(skeleton, self.source, index))
            layer = DecoderLayer(skeleton.load_layer(index, weights), (), partial(skeleton.arguments, index))
            for number, hidden in enumerate(states):
                states[number] = layer.output(hidden.to(skeleton.device)).cpu()
            skeleton.tails[index] = layer.tail
            skeleton.release_layer(index)
            progress.advance("")
        return states

    @property
    def positions_at_once(self) -> int:
        """Number of positions whose logits are computed together.

        They fit a CPU's cache, which is four times as fast, or take little of a GPU's memory.
        """
        room = CPU_LOGITS_BYTES if self.skeleton.device.type == "cpu" else GPU_LOGITS_BYTES
        return max(1, room // (4 * int(self.config.vocab_size)))

    @torch.no_grad()
    def logits(self, hidden: Tensor, where: str) -> Tensor:
        """Logits of some positions, float32, (positions, vocabulary).

        Args:
            hidden: last hidden states, (positions, hidden).
            where: name of the positions, for the message.

        Raises:
            ModelError: a logit is NaN or Inf.
        """
        logits = self.skeleton.finish(hidden.to(self.skeleton.device).unsqueeze(0))[0].float()
        if not all(torch.isfinite(end) for end in torch.aminmax(logits)):
            raise ModelError(
                f"{self.source.model} gives NaN or Inf logits in {where}",
                "compute with a wider range: --dtype bfloat16 or float32; if it was, the model is broken",
            )
        return logits
