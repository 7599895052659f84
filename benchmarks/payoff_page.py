"""Write `docs/results/payoff*.md` from the kept cells: tables, and what they say."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from payoff_cells import RESULTS, newest_code, read_cells
from payoff_kernel_tables import OLDER, kernel_section
from payoff_peers import TYPES
from payoff_quality import KeptRow, kept_rows
from payoff_sides import DENSE
from quality_sections import wrapped

from llm_barber.comparison.tables import Row, target_title
from llm_barber.comparison.written import markdown_table

DOCS = Path(__file__).parents[1] / "docs" / "results"
PAGES = {"avx512bf16": "payoff.md", "amx": "payoff-amx.md"}  # by the instructions of the processor
PROCESSORS = {"avx512bf16": "with AVX-512 and no AMX", "amx": "with AMX"}
TITLES = {
    "packed": "packed",
    "int8": "packed, int8",
    "auto": "packed by `auto`",
}  # sides that are shown, with all quantised ones
PEER = "llama.cpp"
CAVEATS = (
    "The models were dequantised from 4-bit files, so that quantising them again loses less than quantising a model as "
    "it was trained. Pruning has no such help.",
    "Two models share a pruned row. One, pruned by magnitude, gives speed, bytes and memory, which do not depend on "
    "the mask. The other, pruned to the same sparsity by the preset or method in brackets, gives perplexity and KL.",
    "Speeds are tokens per second, the fastest measurement; the dense row shows its fastest of all. Each side took "
    "turns with dense PyTorch in bfloat16: in brackets is the ratio to the dense turns beside it, of the fastest "
    "measurements and of the medians. `models.json` beside the results has the slowest, too. llama.cpp is another "
    "program, which gains by doing less around the products as well.",
    "Rows with int8 values have the perplexity and KL of the same model before rounding; rounding adds the little that "
    "[packed models](../guide/packed.md) gives.",
    "`auto` times each shape of linear while the model is loaded, and leaves dense what is not faster packed.",
    "When the memory of a shared machine is busy, a dense product loses more than a packed one, so that ratios of "
    "packed rows are too good: [the notebook](../notebook/packed-speed.md) says which.",
    "Memory is what loading adds to a process; of llama.cpp with a context of 1024 tokens. Dense PyTorch and llama.cpp "
    "map their files and read them when they first compute; packed weights are read and checked while they load.",
)
Kept = dict[str, dict[str, Any]]  # cells by their names


@dataclass
class Entry:
    """A row of a model's table.

    `faster` and `prefill`: ratio against dense by threads, of fastest and medians. `decode_rate` and `prefill_rate`:
    tokens per second by threads. `older`: measured with an earlier version of the program than the newest cell.
    """

    title: str
    quantised: bool
    loading: dict[str, float]
    faster: dict[int, tuple[float, float]] = field(default_factory=dict)
    prefill: dict[int, tuple[float, float]] = field(default_factory=dict)
    decode_rate: dict[int, float] = field(default_factory=dict)
    prefill_rate: dict[int, float] = field(default_factory=dict)
    perplexity: float | None = None
    divergence: float | None = None
    preset: str = ""
    older: bool = False


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write them to")


def run(options: argparse.Namespace, folder: Path | None) -> None:
    """Write the pages of `PAGES` whose processors were measured, and print the first paragraph of each."""
    folder = folder or RESULTS
    quality = read_cells(folder / "quality.json")
    measured = {name: read_cells(folder / name / "models.json") for name in PAGES}
    if not quality or not any(measured.values()):
        raise SystemExit("measure first: payoff.py models and payoff.py quality, both with --llama")
    written = [name for name in PAGES if measured[name]]
    for name in written:
        kernels = read_cells(folder / name / "kernels.json")
        said, lines = page(name, written, measured[name], kernels, quality)
        path = options.docs / PAGES[name]
        path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
        print(f"{path} is written. It begins:\n\n{said}\n")


def page(
    instructions: str, written: Sequence[str], models: Kept, kernels: Kept, quality: Kept
) -> tuple[str, list[str]]:
    """Say in words what the cells of a processor show, and make its page; `written`: instructions with a page."""
    tables = {name: entries(name, models, quality) for name in dict.fromkeys(cell.split(" ")[0] for cell in models)}
    verdicts = {name: verdict(name, rows) for name, rows in tables.items()}
    sentences = [sentence for said in verdicts.values() for sentence in said]
    unknown = [name for name, said in verdicts.items() if kept_rows(name) and not said]
    if unknown:
        sentences.append(f"Not judged, since the quality of quantised models was not measured: {listed(unknown)}.")
    title = f"# Prune, quantise, or both? On a processor {PROCESSORS[instructions]}"
    others = [f"[{PROCESSORS[name]}]({PAGES[name]})" for name in written if name != instructions]
    said = wrapped(" ".join(sentences))
    lines = ["<!-- written by benchmarks/payoff.py page -->", title, "", said, ""]
    if others:
        lines += [wrapped(f"The same on a processor {listed(others)}."), ""]
    older = [OLDER] * any(row.older for rows in tables.values() for row in rows)
    lines += [wrapped(f"- {caveat}", "  ") for caveat in (*CAVEATS, *older, *surroundings(models))]
    for name, rows in tables.items():
        lines += ["", f"## {name}", "", *model_tables(rows)]
    if kernels:
        lines += ["", *kernel_section(kernels)]
    return said, lines


def entries(model: str, cells: Kept, quality: Kept) -> list[Entry]:
    """Rows of a model in bfloat16: dense, quantised, packed."""
    prefix, made = f"{model} bfloat16 ", {}
    kept = kept_rows(model)
    for name, cell in cells.items():
        if name.startswith(prefix) and name.endswith(" loading"):
            side = name.removeprefix(prefix).removesuffix(" loading")
            if side.partition(" ")[0] in (DENSE, PEER, *TITLES):
                made[side] = entry(side, cell["result"], kept, quality.get(f"{model} {side.removeprefix(f'{PEER} ')}"))
    newest = newest_code(cells)
    for name, cell in cells.items():
        side, _, threads = name.removeprefix(prefix).partition(" threads ")
        if name.startswith(prefix) and threads and side in made:
            result, settings, count = cell["result"], cell["settings"], int(threads)
            made[side].faster[count] = ratios(result["decoding"])
            made[side].prefill[count] = ratios(result["prefill"])
            for row, of in ((made[side], "side"), (made.get(DENSE), DENSE)):
                if row is not None:
                    note_rate(row.decode_rate, count, settings["decode"] / result["decoding"][of]["minimum"])
                    note_rate(row.prefill_rate, count, settings["prefill"] / result["prefill"][of]["minimum"])
            made[side].older |= not made[side].quantised and cell["code"] != newest
    return sorted(made.values(), key=lambda row: (row.title != "dense PyTorch", "" if row.quantised else row.title))


def note_rate(rates: dict[int, float], threads: int, rate: float) -> None:
    """Keep the best rate of a number of threads: the dense side was measured with every other one."""
    rates[threads] = max(rate, rates.get(threads, 0.0))


def entry(side: str, loading: dict[str, float], kept: Sequence[KeptRow], measured: dict[str, Any] | None) -> Entry:
    """The row of a side, without its speeds."""
    kind, _, target = side.partition(" ")
    if kind == DENSE:
        return Entry("dense PyTorch", False, loading)
    if kind == PEER:
        result = measured["result"] if measured else {}
        return Entry(side, True, loading, perplexity=result.get("perplexity"), divergence=result.get("divergence"))
    best = min((row for row in kept if row.target == target), key=lambda row: row.divergence, default=None)
    made = Entry(f"{target_title(target)}, {TITLES.get(kind, kind)}", False, loading)
    if best is not None:
        made.perplexity, made.divergence, made.preset = best.perplexity, best.divergence, best.preset
    return made


def ratios(seconds: dict[str, dict[str, float]]) -> tuple[float, float]:
    """Speed of a side over that of the dense model, of the fastest measurements and of the medians."""
    dense, side = seconds[DENSE], seconds["side"]
    return dense["minimum"] / side["minimum"], dense["median"] / side["median"]


def verdict(model: str, rows: Iterable[Entry]) -> list[str]:
    """Sentences on a model that compare its pruned rows with the quantised dense models; losses first.

    A quantised model beats a pruned row if it is smaller, nearer to the dense model and, with any threads, faster at
    decoding.
    """
    known = [row for row in rows if row.divergence is not None and row.faster]
    pruned = [row for row in known if not row.quantised]
    quantised = [row for row in known if row.quantised and not row.title.endswith(TYPES[0])]
    if not pruned or not quantised:
        return []
    beaten = {row.title: [other.title for other in quantised if beats(other, row)] for row in pruned}
    sentences = []
    lost = [title for title, others in beaten.items() if others]
    by_all = [other.title for other in quantised if all(other.title in others for others in beaten.values())]
    if by_all:
        verb = "are each" if len(by_all) > 1 else "is"
        return [
            f"On {model}, quantise: {listed(by_all)} {verb} smaller, nearer to the dense model and faster at decoding "
            "than every pruned row whose quality was measured."
        ]
    kept = [row for row in pruned if not beaten[row.title]]
    if lost:
        winners = " or ".join(dict.fromkeys(other for title in lost for other in beaten[title]))
        others = quoted(lost) if len(lost) <= len(kept) else f"every pruned row but {quoted([r.title for r in kept])}"
        sentences.append(
            f"On {model}, quantise: {winners} is smaller, nearer to the dense model and faster at decoding than "
            f"{others}."
        )
    return sentences + [f"On {model}, {quoted([row.title])} {against(row, quantised)}." for row in kept]


def beats(quantised: Entry, pruned: Entry) -> bool:
    """Test whether a quantised model is smaller, nearer to the dense model and, with any threads, faster."""
    assert quantised.divergence is not None
    assert pruned.divergence is not None
    return (
        quantised.loading["disk"] < pruned.loading["disk"]
        and quantised.divergence < pruned.divergence
        and all(
            quantised.faster[threads] > pruned.faster[threads]
            for threads in quantised.faster
            if threads in pruned.faster
        )
    )


def against(row: Entry, quantised: Sequence[Entry]) -> str:
    """Say what a pruned row has over each quantised model, and its KL beside theirs."""
    parts = []
    for other in quantised:
        better = ["smaller"] * (row.loading["disk"] < other.loading["disk"])
        both = row.faster.keys() & other.faster.keys()
        better += ["faster at decoding"] * any(row.faster[threads] > other.faster[threads] for threads in both)
        better += ["nearer to the dense model"] * (row.divergence < other.divergence)  # type: ignore[operator]
        distances = f"at a KL of {row.divergence:.3f} against {other.divergence:.3f}"
        parts.append(f"is {listed(better or ['not better'])} than {other.title}, {distances}")
    return listed(parts)


def quoted(titles: Sequence[str]) -> str:
    """Join titles of rows, which have commas.

    Example: "50 %, packed", "2:4, packed" -> “50 %, packed” and “2:4, packed”.
    """
    return listed([f"“{title}”" for title in titles])


def listed(words: Sequence[str]) -> str:
    """Join words.

    Example: a, b, c -> "a, b and c".
    """
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def model_tables(rows: Sequence[Entry]) -> list[str]:
    """The tables of a model: what each row takes and how near it is to the dense model; how fast it is."""
    dense = next((row.loading["disk"] for row in rows if row.title == "dense PyTorch"), None)
    sizes, speeds = [], []
    threads = sorted({count for row in rows for count in row.faster})
    for row in rows:
        loading, title = row.loading, row.title + " *" * row.older
        cells = [f"{loading['disk'] / 1e6:,.0f}", f"{100 * loading['disk'] / dense:.0f} %" if dense else "–"]
        cells.append(f"{row.perplexity:.2f}" + f" (`{row.preset}`)" * bool(row.preset) if row.perplexity else "–")
        cells.append(f"{row.divergence:.3f}" if row.divergence is not None else "–")
        cells += [f"{loading['memory'] / 1e6:,.0f}", f"{loading['seconds']:.1f}"]
        sizes.append(Row(title, tuple(cells), (False,) * len(cells)))
        cells = [
            speed_cell(rates.get(count), ratios_of.get(count))
            for rates, ratios_of in ((row.decode_rate, row.faster), (row.prefill_rate, row.prefill))
            for count in threads
        ]
        speeds.append(Row(title, tuple(cells), (False,) * len(cells)))
    headings = [f"{kind}, {count} thread{'s' * (count > 1)}" for kind in ("decode", "prefill") for count in threads]
    return [
        *markdown_table(["", "disk MB", "of dense", "perplexity", "KL", "memory MB", "load s"], sizes),
        "",
        *markdown_table(["tokens per second", *headings], speeds),
    ]


def speed_cell(rate: float | None, against_dense: tuple[float, float] | None) -> str:
    """Tokens per second, and the ratios to dense.

    Example: 40.13, (1.93, 1.91) -> "40.1 (1.93, 1.91)".
    """
    if rate is None:
        return "–"
    shown = f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
    return shown if against_dense is None else f"{shown} ({against_dense[0]:.2f}, {against_dense[1]:.2f})"


def surroundings(cells: Kept) -> list[str]:
    """Lines that name machines, instructions, versions and days of the cells."""
    days = sorted({cell["date"][:10] for cell in cells.values()})
    measured = " to ".join(dict.fromkeys((days[0], days[-1])))
    lines = {
        f"{cell['machine']}, instructions {cell['instructions']}; measured {measured}; "
        + ", ".join(f"{package} {number}" for package, number in cell["versions"].items())
        + "."
        for cell in cells.values()
    }
    return sorted(lines)
