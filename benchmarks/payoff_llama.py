"""Measure a GGUF file by llama.cpp, or write logits: the part of `payoff.py` that runs where llama-cpp-python is.

It reads a request as JSON from its input and answers with a line of JSON. It needs nothing but llama-cpp-python and
NumPy. Requests: {"source", "target", "kind"} quantises a file, which may be quantised; {"path", "threads", "prompt",
"tokens"} loads it and times decoding and prefill; with "logits" it writes the prompt's logits to that file instead.
"""

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp as c
import numpy as np

KINDS = {"BF16": 32, "Q8_0": 7, "Q4_K_M": 15}  # llama_ftype
CONTEXT = 2048  # tokens
ROUNDS = 3


class Model:
    """A GGUF file, loaded; `seconds` that it took."""

    def __init__(self, path: str, threads: int) -> None:
        began = time.perf_counter()
        model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
        settings = c.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = CONTEXT
        settings.n_threads = settings.n_threads_batch = threads
        self.context = c.llama_init_from_model(model, settings) if model else None
        if not self.context:
            raise ValueError(f"{path} cannot be loaded")
        self.vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
        self.seconds = time.perf_counter() - began

    def start(self) -> None:
        """Forget the text so far."""
        c.llama_memory_clear(c.llama_get_memory(self.context), True)

    def run(self, tokens: list[int], every: bool = False) -> np.ndarray:
        """Process tokens; logits of each, float32, (tokens, vocabulary), or of the last one, (1, vocabulary)."""
        batch = c.llama_batch_init(len(tokens), 0, 1)
        first = c.llama_memory_seq_pos_max(c.llama_get_memory(self.context), 0) + 1
        for number, token in enumerate(tokens):
            batch.token[number], batch.pos[number] = token, first + number
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, 0
            batch.logits[number] = every or number == len(tokens) - 1
        batch.n_tokens = len(tokens)
        code = c.llama_decode(self.context, batch)
        c.llama_batch_free(batch)
        if code:
            raise ValueError(f"llama_decode: {code}")
        rows = len(tokens) if every else 1
        return np.ctypeslib.as_array(c.llama_get_logits(self.context), shape=(rows, self.vocabulary))

    def times(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        """Seconds of prefill, and of greedy decoding after it."""
        self.start()
        began = time.perf_counter()
        token = int(self.run(prompt).argmax())
        middle = time.perf_counter()
        for _ in range(tokens):
            token = int(self.run([token]).argmax())
        return middle - began, time.perf_counter() - middle


def quantise(source: str, target: str, kind: str) -> dict[str, Any]:
    """Write a GGUF file again, in another type."""
    settings = c.llama_model_quantize_default_params()
    settings.ftype, settings.allow_requantize = KINDS[kind], True
    if c.llama_model_quantize(source.encode(), target.encode(), settings):
        raise ValueError(f"{source} cannot be quantised to {kind}")
    return {}


def measure(path: str, threads: int, prompt: list[int], tokens: int = 0, logits: str = "") -> dict[str, Any]:
    """Speeds, in tokens a second, the fastest of some rounds after one that warms up; or nothing but logits."""
    model = Model(path, threads)
    if logits:
        np.save(logits, model.run(prompt, every=True))
        return {}
    rounds = [model.times(prompt, tokens) for _ in range(ROUNDS + 1)][1:]
    prefill, decode = (min(seconds) for seconds in zip(*rounds, strict=True))
    return {"load": model.seconds, "prefill": len(prompt) / prefill, "decode": tokens / decode}


@c.llama_log_callback
def silent(level: int, text: bytes, _: Any) -> None:
    """Show nothing of what llama.cpp says."""


if __name__ == "__main__":
    c.llama_log_set(silent, ctypes.c_void_p(0))
    c.llama_backend_init()
    request = json.loads(sys.stdin.read())
    print(json.dumps((quantise if "kind" in request else measure)(**request)))
