"""Logits of a whole model, computed decoder layer by decoder layer: what could be pruned can be evaluated."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError
from llm_barber.job import check_tensors, load_config, make_skeleton
from llm_barber.model.architecture import find_architecture
from llm_barber.model.block import DecoderLayer
from llm_barber.model.device import resolve_batch_size
from llm_barber.model.streams import HIDDEN, ActivationStreams
from llm_barber.progress import Progress


class StreamedModel:
    """A checkpoint whose logits are wanted; one decoder layer is in memory at a time.

    Args:
        model: folder, hub id or GGUF file.
        device: where it is computed.
        dtype: what in.

    Raises:
        ModelError: it is missing, damaged or of an unsupported architecture.
        HubError: the hub cannot be reached.
    """

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype) -> None:
        self.source = CheckpointSource(model)
        self.config = load_config(self.source)
        architecture = find_architecture(self.source.model_type)
        self.skeleton = make_skeleton(self.config, architecture, device, dtype, model)
        self.base_prefix = str(self.skeleton.model.base_model_prefix)
        check_tensors(self.skeleton, self.source)

    def logits(self, tokens: Tensor, batch_size: int | None, progress: Progress) -> Iterator[Tensor]:
        """Logits of each window in order, float32, (tokens, vocabulary).

        Args:
            tokens: int64, (windows, tokens).
            batch_size: windows computed together; None: chosen by the device.
            progress: told of each layer.

        Raises:
            ModelError: a logit is NaN or Inf.
        """
        skeleton = self.skeleton
        windows, length = tokens.shape
        size = resolve_batch_size(batch_size, length, windows, skeleton.device)
        streams = ActivationStreams(windows, size, skeleton.device)
        skeleton.fill_outside(self.source.read_parameters(skeleton.every_outside_name, self.base_prefix))
        for batch in streams.batches():
            skeleton.embed(tokens[batch], partial(streams.write, HIDDEN, batch))
        progress.start(f"evaluating {self.source.model}", len(skeleton.layers))
        for index in range(len(skeleton.layers)):
            prefix = skeleton.layer_prefix(index)
            names = [prefix + name for name in skeleton.layer_names(index)]
            weights = self.source.read_parameters(names, self.base_prefix)
            module = skeleton.load_layer(index, {name.removeprefix(prefix): one for name, one in weights.items()})
            layer = DecoderLayer(module, (), partial(skeleton.arguments, index))
            for batch in streams.batches():
                streams.write(HIDDEN, batch, layer.output(streams.read(HIDDEN, batch)))
            skeleton.release_layer(index)
            progress.advance("")
        for window in range(windows):
            one = slice(window, window + 1)
            logits = skeleton.finish(streams.read(HIDDEN, one), tokens[one])[0].float()
            if not all(torch.isfinite(end) for end in torch.aminmax(logits)):
                raise ModelError(
                    f"{self.source.model} gives NaN or Inf logits in window {window}",
                    "compute with a wider range: --dtype bfloat16 or float32; if it was, the model is broken",
                )
            yield logits
        skeleton.drop_outside()
