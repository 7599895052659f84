"""The tables of single linears on the page of the payoff benchmark."""

from typing import Any

from payoff_cells import Spread, newest_code
from quality_sections import wrapped

from llm_barber.comparison.tables import Row, markdown_table, target_title

NOTE = (
    "Weights are read from memory, not from a cache: packed copies of {caches:g} times the last-level cache of "
    "{size} MiB take turns. *Limit*: bytes of the dense weight over those of the packed. *Kernel*: time within C "
    "against a dense kernel of the same instructions, which reaches the share of the measured read bandwidth under "
    "*read*. *n rows*: `PackedLinear` against PyTorch's dense linear with n rows of inputs; u: unpacked first. µs: "
    "`PackedLinear` with the fewest rows, minimum / median / maximum."
)


def kernel_section(cells: dict[str, dict[str, Any]]) -> list[str]:
    """A table for each dtype and number of threads, of the fastest measurements."""
    settings = next(iter(cells.values()))["settings"]
    note = NOTE.format(caches=settings["caches"], size=settings["last_level_cache"] >> 20)
    newest = newest_code(cells)
    older = sum(cell["code"] != newest for cell in cells.values())
    if older:
        note += f" {older} of {len(cells)} products were measured with an earlier version of this program."
    lines = ["## Single linears", "", wrapped(note)]
    results = {tuple(name.split(" ")): cell["result"] for name, cell in cells.items()}
    for dtype, threads in dict.fromkeys((key[1], key[6]) for key in results):
        shown = {key: result for key, result in results.items() if (key[1], key[6]) == (dtype, threads)}
        counts = sorted({int(key[4]) for key in shown})
        rows = [
            Row(f"{shape.replace('x', ' × ')}, {target_title(target)}", cells_of, (False,) * len(cells_of))
            for shape, target in dict.fromkeys((key[0], key[2]) for key in shown)
            for cells_of in [
                linear_cells({int(k[4]): r for k, r in shown.items() if (k[0], k[2]) == (shape, target)}, counts)
            ]
        ]
        headings = ["", "limit", "kernel", "read", *(f"{count} row{'s' * (count > 1)}" for count in counts), "µs"]
        title = f"{dtype}, {threads} thread{'s' * (threads != '1')}"
        lines += ["", f"### {title}", "", *markdown_table(headings, rows)]
    return lines


def linear_cells(by_rows: dict[int, dict[str, Any]], counts: list[int]) -> tuple[str, ...]:
    """Cells of a linear: limit, kernel and share of read with the fewest rows, `PackedLinear` by rows, microseconds."""
    first = by_rows[min(by_rows)]
    fastest = {side: seconds["minimum"] for side, seconds in first["seconds"].items()}
    dense, kernel, read = (fastest.get(side) for side in ("dense", "kernel", "read"))
    return (
        f"{first['bytes'] / first['packed_bytes']:.2f}",
        f"{dense / kernel:.2f}" if dense and kernel else "–",
        f"{read / dense:.0%}" if dense and read else "–",
        *(linear_ratio(by_rows[count]) if count in by_rows else "–" for count in counts),
        Spread(**first["seconds"]["packed"]).shown(1e6),
    )


def linear_ratio(result: dict[str, Any]) -> str:
    """Speed of `PackedLinear` over PyTorch's."""
    seconds = result["seconds"]
    return f"{seconds['pytorch']['minimum'] / seconds['packed']['minimum']:.2f}" + (
        "" if result["multiplied"] else " u"
    )
