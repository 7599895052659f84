"""The process that runs llama.cpp for the payoff benchmark, by the Python that has `llama-cpp-python`.

`payoff_peers.py` starts it. It reads a command from each line of its input, as JSON, and answers with a line of JSON.
It needs nothing but llama-cpp-python and NumPy.
"""

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp as c
import numpy as np

KINDS = {"BF16": 32, "Q8_0": 7, "Q4_K_M": 15}  # llama_ftype
SHOWN = (3, 4)  # levels of messages: warnings and errors


class Model:
    """A GGUF file, loaded."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        self.model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
        if not self.model:
            raise ValueError(f"{path} cannot be loaded")
        settings = c.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = threads
        settings.no_perf = True
        self.context = c.llama_init_from_model(self.model, settings)
        if not self.context:
            raise ValueError(f"no context of {context} tokens")
        self.vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))

    def close(self) -> None:
        c.llama_free(self.context)
        c.llama_model_free(self.model)

    def decode(self, prompt: list[int], tokens: int) -> float:
        """Seconds of greedy decoding, the prompt included."""
        start = time.perf_counter()
        c.llama_memory_clear(c.llama_get_memory(self.context), True)
        self._run(prompt, every=False)
        for _ in range(tokens - 1):
            self._run([int(self._logits(-1).argmax())], every=False)
        self._logits(-1).argmax()
        return time.perf_counter() - start

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits after each token, float32, (tokens, vocabulary)."""
        c.llama_memory_clear(c.llama_get_memory(self.context), True)
        self._run(tokens, every=True)
        pointer = c.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, shape=(len(tokens), self.vocabulary))

    def _run(self, tokens: list[int], every: bool) -> None:
        """Process tokens; logits of each, or of the last one."""
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

    def _logits(self, number: int) -> np.ndarray:
        return np.ctypeslib.as_array(c.llama_get_logits_ith(self.context, number), shape=(self.vocabulary,))


def quantise(source: str, target: str, kind: str, threads: int) -> None:
    """Write a GGUF file again, in another type; also from one that is quantised."""
    settings = c.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.allow_requantize = KINDS[kind], threads, True
    if c.llama_model_quantize(source.encode(), target.encode(), settings):
        raise ValueError(f"{source} cannot be quantised to {kind}")


def resident() -> int:
    """Bytes of this process in memory, those of mapped files included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Server:
    """Carries out commands."""

    def __init__(self) -> None:
        self.model: Model | None = None

    def answer(self, do: str, **arguments: Any) -> Any:
        if do == "about":
            return {"llama-cpp-python": c.__version__, "system": c.llama_print_system_info().decode()}
        if do == "quantise":
            return quantise(**arguments)
        if do == "load":
            if self.model is not None:
                self.model.close()
            before, start = resident(), time.perf_counter()
            self.model = Model(**arguments)
            seconds = time.perf_counter() - start
            self.model.decode([1], 1)  # touches all weights
            return {"seconds": seconds, "memory": resident() - before}
        assert self.model is not None
        if do == "threads":
            return c.llama_set_n_threads(self.model.context, arguments["count"], arguments["count"])
        if do == "decode":
            return self.model.decode(**arguments)
        if do == "logits":
            return np.save(arguments["path"], self.model.logits(arguments["tokens"]))
        raise ValueError(do)


@c.llama_log_callback
def log(level: int, text: bytes, _: Any) -> None:
    """Show warnings and errors."""
    if level in SHOWN:
        sys.stderr.write(text.decode(errors="replace"))


def main() -> None:
    c.llama_log_set(log, ctypes.c_void_p(0))
    c.llama_backend_init()
    server = Server()
    for line in sys.stdin:
        try:
            answer = {"result": server.answer(**json.loads(line))}
        except ValueError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
