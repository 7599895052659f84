"""A streamed model as lm-eval's language model. Needs the extra `eval`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from torch import Tensor

from llm_barber.errors import TaskError
from llm_barber.evaluation.streamed import StreamedModel
from llm_barber.loading.opening import check_vocabulary
from llm_barber.model.device import resolve_batch_size
from llm_barber.progress import Progress
from llm_barber.text.windows import tokens_of

PASS_BYTES = 2**30  # of activations in memory; more requests take another pass over the model's layers
Tokens = tuple[int, ...]
Request = tuple[tuple[str, str], list[int], list[int]]  # texts, context and continuation as token ids


class StreamedLanguageModel(TemplateLM):  # type: ignore[misc]
    """Answers lm-eval's requests for log-likelihoods; requests that read the same tokens share a sequence."""

    def __init__(self, model: StreamedModel, tokenizer: Any, batch_size: int | None, progress: Progress) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.requested_batch_size = batch_size
        self.progress = progress

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            TaskError: the tokenizer has no such token.
        """
        end = self.tokenizer.eos_token_id
        if not isinstance(end, int):
            raise TaskError(
                "the model's tokenizer has no token that ends a text, which tasks need",
                "add eos_token to tokenizer_config.json",
            )
        return end

    @cached_property
    def prefix_token_id(self) -> int:
        """The first token of a text without context."""
        begin = self.tokenizer.bos_token_id
        return begin if isinstance(begin, int) else self.eot_token_id

    @cached_property
    def max_length(self) -> int:
        """Number of the model's positions."""
        return int(getattr(self.model.config, "max_position_embeddings", 2048))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; None: with special tokens where the tokenizer adds them."""
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return tokens_of(string, self.tokenizer, **special)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and True where greedy decoding gives the continuation."""
        result: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return result

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        readers: dict[Tokens, list[int]] = {}  # numbers of the requests that read a sequence
        for number, (_texts, context, continuation) in enumerate(requests):
            check_vocabulary(self.model.config, torch.tensor(context + continuation))
            # The continuation's last token is predicted, not read.
            tokens = tuple((context + continuation)[-(self.max_length + 1) : -1])
            readers.setdefault(tokens, []).append(number)
        answers: dict[int, tuple[float, bool]] = {}
        passes = list(self._passes(sorted(readers, key=len, reverse=True)))
        for batches in passes:
            states = self.model.hidden_states([_padded(batch) for batch in batches], self.progress)
            for batch, hidden in zip(batches, states, strict=True):
                answers |= self._score(batch, hidden, readers, requests)
        return [answers[number] for number in range(len(requests))]

    def _passes(self, sequences: Sequence[Tokens]) -> Iterator[list[list[Tokens]]]:
        """Batches of sequences of similar length for each pass over the layers.

        The activations of a pass fit `PASS_BYTES`.
        """
        room = max(1, PASS_BYTES // (self.model.config.hidden_size * self.model.skeleton.dtype.itemsize))
        device = self.model.skeleton.device
        batches: list[list[Tokens]] = []
        used = start = 0
        while start < len(sequences):
            length = len(sequences[start])
            size = resolve_batch_size(self.requested_batch_size, length, len(sequences) - start, device)
            batch = list(sequences[start : start + size])
            if batches and used + len(batch) * length > room:
                yield batches
                batches, used = [], 0
            batches.append(batch)
            used += len(batch) * length
            start += size
        if batches:
            yield batches

    def _score(
        self,
        batch: Sequence[Tokens],
        hidden: Tensor,
        readers: Mapping[Tokens, list[int]],
        requests: Sequence[Request],
    ) -> dict[int, tuple[float, bool]]:
        """Answers to the requests that read a batch, by their numbers.

        `hidden` are its last hidden states, (sequences, tokens, hidden).

        The last k positions of a sequence predict a continuation of k tokens.
        """
        rows: list[Tensor] = []
        predicted: list[int] = []
        owners: list[tuple[int, int]] = []
        for tokens, states in zip(batch, hidden, strict=True):
            for number in readers[tokens]:
                continuation = requests[number][2][-len(tokens) :]
                rows.append(states[len(tokens) - len(continuation) : len(tokens)])
                predicted += continuation
                owners.append((number, len(continuation)))
        following = torch.tensor(predicted, device=self.model.skeleton.device).unsqueeze(1)
        log_likelihoods: list[float] = []
        greedy: list[bool] = []
        size = self.model.positions_at_once
        for part, tokens_part in zip(torch.split(torch.cat(rows), size), torch.split(following, size), strict=True):
            logits = self.model.logits(part, "a task")
            log_likelihoods += (logits.gather(1, tokens_part).squeeze(1) - logits.logsumexp(1)).tolist()
            greedy += (logits.argmax(1, keepdim=True) == tokens_part).squeeze(1).tolist()
        answers = {}
        start = 0
        for number, length in owners:
            end = start + length
            answers[number] = (math.fsum(log_likelihoods[start:end]), all(greedy[start:end]))
            start = end
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Raise: no task asks for it, and `evaluate --text` measures perplexity."""
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Raise: tasks that generate text are refused before."""
        raise NotImplementedError


def _padded(batch: Sequence[Tokens]) -> Tensor:
    """Token ids, int64, (sequences, tokens), zeros after shorter sequences.

    Causal attention does not read the zeros.
    """
    rows = [torch.tensor(tokens, dtype=torch.int64) for tokens in batch]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
