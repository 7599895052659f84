"""Let a model write, token after token, and note when each token comes. transformers chooses the tokens."""

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, TextStreamer
from transformers.generation.streamers import BaseStreamer

from llm_barber.tools.generation import Speed


class Clock(BaseStreamer):  # type: ignore[misc]
    """Note each new token and the time when it came.

    Args:
        text: streamer that gets the tokens, too; its time is not counted.
    """

    def __init__(self, text: BaseStreamer | None = None) -> None:
        self.tokens: list[int] = []
        self._text = text
        self._began: float | None = None
        self._times: list[float] = []
        self._uncounted = 0.0  # seconds of the streamer of text

    def put(self, value: Tensor) -> None:
        """Take the prompt, (1, tokens), at the first call, then each new token, (1,)."""
        called = time.perf_counter()
        if self._began is None:
            self._began = called
        else:
            self._times.append(called - self._uncounted)
            self.tokens += value.flatten().tolist()
        if self._text is not None:
            self._text.put(value)
            self._uncounted += time.perf_counter() - called

    def end(self) -> None:
        """Hand out the text that the streamer of text still keeps."""
        if self._text is not None:
            self._text.end()

    def prefill_seconds(self) -> float:
        """Seconds from the prompt to the first new token."""
        assert self._began is not None
        return self._times[0] - self._began

    def decode_seconds(self) -> float:
        """Seconds from the first new token to the last."""
        return self._times[-1] - self._times[0]


class PiecewiseText(TextStreamer):  # type: ignore[misc]
    """Hand each finished piece of text to a function."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on a piece of text, unless it is empty."""
        if text:
            self._on_text(text)


class CountedTokens(BaseStreamer):  # type: ignore[misc]
    """Call a function for each new token."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self._on_token = on_token
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Call the function, but not for the prompt."""
        if not self._is_prompt:
            self._on_token()
        self._is_prompt = False

    def end(self) -> None:
        """Do nothing."""


class GivenTokens(LogitsProcessor):  # type: ignore[misc]
    """Let a model write these tokens, whatever it would choose.

    Args:
        prompt: number of tokens of the prompt.
        tokens: ids to write.
    """

    def __init__(self, prompt: int, tokens: Sequence[int]) -> None:
        self._prompt, self._tokens = prompt, tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores, (1, vocabulary), of which the next token's is the only finite one."""
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._tokens[input_ids.shape[1] - self._prompt]] = 0
        return forced


def settings_of_generation(
    new_tokens: int, temperature: float = 0.0, ends: Collection[int] = (), pad: int = 0
) -> GenerationConfig:
    """Settings for transformers: the most likely token, or drawn from all tokens at a temperature.

    Args:
        new_tokens: most tokens to write.
        temperature: 0: the most likely token.
        ends: ids of tokens that end a text.
        pad: id for transformers, which wants one; one sequence is never padded.
    """
    drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        **(drawing if temperature else {"do_sample": False}),
    )


def decode(
    model: PreTrainedModel, prompt: Tensor, settings: GenerationConfig, clock: Clock, tokens: Sequence[int] = ()
) -> bool:
    """Let a model write; returns False if Ctrl-C ended it.

    Args:
        model: the model; its own settings of generation are replaced.
        prompt: token ids, int64, (1, tokens).
        settings: of the generation.
        clock: gets the tokens.
        tokens: ids to write whatever the model would choose; none: the model chooses.
    """
    model.generation_config = settings  # what is not set here would come from the model's own file
    forced = LogitsProcessorList([GivenTokens(prompt.shape[1], tokens)] if tokens else [])
    prompt = prompt.to(model.device)
    try:
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=settings,
            logits_processor=forced,
            streamer=clock,
        )
    except KeyboardInterrupt:
        clock.end()
        return False
    return True


def speeds(prompt_tokens: int, clocks: Sequence[Clock]) -> tuple[Speed, Speed | None]:
    """Speeds of prefill and decoding over some runs that wrote equally many tokens."""
    prefill = Speed(tokens=prompt_tokens, seconds=tuple(clock.prefill_seconds() for clock in clocks))
    after_first = len(clocks[0].tokens) - 1
    if not after_first:
        return prefill, None
    return prefill, Speed(tokens=after_first, seconds=tuple(clock.decode_seconds() for clock in clocks))
