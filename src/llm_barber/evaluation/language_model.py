"""A streamed model as lm-eval's language model. Needs the extra `eval`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from torch import Tensor

from llm_barber.errors import TaskError
from llm_barber.evaluation.branches import Branched, Tokens, branched, make_batch
from llm_barber.evaluation.streamed import MaskError, StreamedModel
from llm_barber.loading.tokenizer import check_vocabulary
from llm_barber.model.device import resolve_batch_size
from llm_barber.progress import Progress
from llm_barber.text.windows import tokens_of

PASS_BYTES = 2**30  # of activations in memory; more requests take another pass over the model's layers
# Largest difference of states, relative to their norm, that the order of sums explains.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
NOT_SHARED = "the model heeds no mask between endings: computing the questions' contexts anew for each ending"
Request = tuple[tuple[str, str], list[int], list[int]]  # texts, context and continuation as token ids


class StreamedLanguageModel(TemplateLM):  # type: ignore[misc]
    """Answers lm-eval's requests for log-likelihoods.

    Requests that read the same tokens share a sequence; those that begin alike share their beginning, if the model
    heeds the mask that keeps them apart. The longest of them is computed both ways to see that.
    """

    shares_contexts = True  # as long as the model is not known to ignore the mask

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
        if self.shares_contexts:
            try:
                return self._answers(list(branched(readers)), readers, requests)
            except MaskError:
                self.shares_contexts = False
                self.progress.stage(NOT_SHARED)
        return self._answers([Branched(tokens) for tokens in readers], readers, requests)

    def _answers(
        self, rows: list[Branched], readers: Mapping[Tokens, list[int]], requests: Sequence[Request]
    ) -> list[tuple[float, bool]]:
        """Answers to all requests, in their order.

        Raises:
            MaskError: sequences with branches get other states than sequences by themselves.
        """
        rows.sort(key=lambda row: len(row.tokens), reverse=True)
        check = _check_of(rows)
        answers: dict[int, tuple[float, bool]] = {}
        for number, batches in enumerate(self._passes(rows)):
            checked = [[row] for row in check] if number == 0 else []
            states = self.model.hidden_states([make_batch(batch) for batch in checked + batches], self.progress)
            if checked:
                self._compare(check[0], *states[:2])
            self.progress.start("scoring answers", len(batches))
            for batch, hidden in zip(batches, states[len(checked) :], strict=True):
                answers |= self._score(batch, hidden, readers, requests)
                self.progress.advance("")
        return [answers[number] for number in range(len(requests))]

    def _compare(self, branching: Branched, states: Tensor, plain_states: Tensor) -> None:
        """Compare the states of the last branch with those of the same tokens in a sequence of their own.

        Raises:
            MaskError: they differ by more than rounding.
        """
        plain = plain_states[0, len(branching.beginning) :].float()
        shared = states[0, branching.indices()[-1][len(branching.beginning) :]].float()
        if not (shared - plain).norm() <= ROUNDING[self.model.skeleton.dtype] * plain.norm():  # NaN differs, too
            raise MaskError

    def _passes(self, rows: Sequence[Branched]) -> Iterator[list[list[Branched]]]:
        """Batches of sequences of similar length for each pass over the layers.

        The activations of a pass, and its masks, fit `PASS_BYTES`.
        """
        room = max(1, PASS_BYTES // self.model.skeleton.dtype.itemsize)  # numbers
        device = self.model.skeleton.device
        batches: list[list[Branched]] = []
        used = start = 0
        while start < len(rows):
            length = len(rows[start].tokens)
            size = resolve_batch_size(self.requested_batch_size, length, len(rows) - start, device)
            batch = list(rows[start : start + size])
            mask = 0 if all(row.is_plain for row in batch) else length
            needed = len(batch) * length * (self.model.config.hidden_size + mask)
            if batches and used + needed > room:
                yield batches
                batches, used = [], 0
            batches.append(batch)
            used += needed
            start += size
        if batches:
            yield batches

    def _score(
        self,
        batch: Sequence[Branched],
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
        for row, states in zip(batch, hidden, strict=True):
            for tokens, indices in zip(row.sequences, row.indices(), strict=True):
                for number in readers[tokens]:
                    continuation = requests[number][2][-len(tokens) :]
                    rows.append(states[indices[len(tokens) - len(continuation) :]])
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


def _check_of(rows: Sequence[Branched]) -> tuple[Branched, ...]:
    """The sequences with branches whose last branch ends last, and that branch as a sequence of its own.

    The last to end: layers may look back over so many tokens only. Empty: no sequence branches.
    """
    branching = [row for row in rows if not row.is_plain and row.branches[-1]]
    if not branching:
        return ()
    longest = max(branching, key=lambda row: len(row.sequences[-1]))
    return longest, Branched(longest.sequences[-1])
