"""Tables of `generate`: speed and memory, and two models side by side."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm_barber.cli.progress import CONTROL
from llm_barber.messages import counted
from llm_barber.settings.generate import GenerateConfig
from llm_barber.tools.generation import GeneratedText, Generation, Speed
from llm_barber.usage import readable_bytes

NOTHING = "–"


def show_generation(generation: Generation, config: GenerateConfig) -> None:
    """Print speed and memory of one model on stderr, or two models on stdout."""
    if config.against is None:
        _show_speed(generation, config.max_new_tokens)
    else:
        _show_both(generation)


def _show_speed(generation: Generation, most_tokens: int) -> None:
    """End the line of the text, and print speed and memory below it, on stderr.

    `most_tokens`: that the text was allowed to have.
    """
    result = generation.generated
    if not result.text.endswith("\n"):
        print(flush=True)
    console = Console(stderr=True, highlight=False, markup=False)
    console.print()
    if not result.text.strip():
        console.print("the model wrote no text")
    elif not result.ended and not generation.interrupted:
        full = len(result.tokens) < most_tokens
        reason = "the model's context is full" if full else "--max-new-tokens lets it write more"
        console.print(f"stopped after {counted(len(result.tokens), 'token')}: {reason}")
    console.print(f"prefill: {counted(result.prefill.tokens, 'token')} at {_speed(result.prefill)}")
    if result.decode is not None:
        console.print(f"decode: {counted(result.decode.tokens, 'token')} at {_speed(result.decode)}")
    grown = "" if result.peak_memory is None else f"; the process grew by {readable_bytes(result.peak_memory)}"
    console.print(f"memory: weights {readable_bytes(result.weight_bytes)}{grown}")
    console.print(f"{_computed(generation)}{_packed(result)}", soft_wrap=True)


def _show_both(generation: Generation) -> None:
    """Print both texts side by side, a table of speeds and memory with ratios, and what they were measured on."""
    console = Console(highlight=False, markup=False)
    results = [result for result in (generation.generated, generation.against) if result is not None]
    texts = Table(show_lines=True)
    for result in results:
        texts.add_column(Text(result.model), ratio=1, overflow="fold")
    texts.add_row(*(Text(_shown(result)) for result in results))
    console.print(texts)
    table = Table()
    for heading in ("", *(result.model for result in results), *(["ratio"] if len(results) > 1 else [])):
        table.add_column(Text(heading), justify="right" if heading else "left", overflow="fold")
    speeds = {"decode, tokens/s": "decode", "prefill, tokens/s": "prefill"}
    for title, name in speeds.items():
        values = [None if (speed := getattr(result, name)) is None else speed.per_second for result in results]
        table.add_row(title, *_row(values, lambda value: f"{value:,.1f}"))
    for title, name in {"weights": "weight_bytes", "memory growth": "peak_memory"}.items():
        table.add_row(title, *_row([getattr(result, name) for result in results], readable_bytes))
    console.print(table)
    for line in _notes(generation):
        console.print(line, soft_wrap=True)


def _row(values: Sequence[float | None], readable: Callable[[float], str]) -> list[str]:
    """Cells of a row: a value of each model, and the first model's share of the second's."""
    cells = [NOTHING if value is None else readable(value) for value in values]
    if len(values) > 1:
        first, second = values
        cells.append(f"{first / second:.2f}" if first is not None and second else NOTHING)
    return cells


def _notes(generation: Generation) -> list[str]:
    """Lines that say on what the numbers were measured."""
    template = " with the chat template" if generation.chat else ""
    prefill, decoding = generation.generated.prefill, generation.generated.decode
    rounds, tokens = len(prefill.seconds), 1 + (decoding.tokens if decoding else 0)
    times = f"fastest of {rounds} rounds" if rounds > 1 else "one round"
    return [
        f"prompt: {counted(prefill.tokens, 'token')}{template}",
        f"speeds: {times} of {counted(tokens, 'token')}, in turn",
        f"{_computed(generation)}{_packed(generation.generated)}",
    ]


def _computed(generation: Generation) -> str:
    return f"{generation.dtype} on {generation.machine}"


def _packed(result: GeneratedText) -> str:
    if not result.packed_linears:
        return ""
    return f"; {result.packed_linears:,} of {result.linears:,} linears packed in memory"


def _speed(speed: Speed) -> str:
    return f"{speed.per_second:,.1f} tokens/s"


def _shown(result: GeneratedText) -> str:
    """A model's text for a cell; it ends with an ellipsis if the model did not end it."""
    text = CONTROL.sub("\ufffd", result.text.strip())
    if not text:
        return "(no text)"
    return text if result.ended else f"{text} …"
