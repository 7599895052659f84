"""The tables of single linears on the page of the payoff benchmark."""

from typing import Any

from payoff_cells import Spread, newest_code
from payoff_kernels import SHAPES
from quality_sections import wrapped

from llm_barber.comparison.tables import Row, target_title
from llm_barber.comparison.written import markdown_table

NOTE = (
    "Weights come from memory: there are so many copies, which take turns, that they fill the last-level cache of "
    "{size} MiB {caches:g} times. Columns: *limit*: bytes of the dense bfloat16 or float32 weight over bytes of the "
    "packed one. *Kernel*: speed within C over that of a dense kernel of the same instructions; *reading*: over the "
    "speed of reading the dense weight and doing nothing else. The dense kernel reaches the share under *dense / "
    "reading* of that speed. *n rows*: speed of the packed linear over that of PyTorch's dense one with n rows of "
    "inputs; u: the weight is unpacked first. *µs*: the packed linear with the fewest rows, minimum / median / "
    "maximum."
)
OLDER = "Rows with * were measured with an earlier version of this program."


def kernel_section(cells: dict[str, dict[str, Any]]) -> list[str]:
    """A table for each dtype and number of threads, of the fastest measurements."""
    settings = next(iter(cells.values()))["settings"]
    note = NOTE.format(caches=settings["caches"], size=settings["last_level_cache"] >> 20)
    newest = newest_code(cells)
    older = {tuple(name.split(" ")) for name, cell in cells.items() if cell["code"] != newest}
    note += f" {OLDER}" * bool(older)
    lines = ["## Single linears", "", wrapped(note)]
    results = {tuple(name.split(" ")): cell["result"] for name, cell in cells.items()}
    for dtype, threads in sorted({(key[1], key[6]) for key in results}, key=lambda each: (each[0], int(each[1]))):
        shown = {key: result for key, result in results.items() if (key[1], key[6]) == (dtype, threads)}
        counts = sorted({int(key[4]) for key in shown})
        rows = [
            Row(title_of(shape, target, shown.keys() & older), cells_of, (False,) * len(cells_of))
            for shape, target in sorted({(key[0], key[2]) for key in shown}, key=order)
            for cells_of in [
                linear_cells({int(k[4]): r for k, r in shown.items() if (k[0], k[2]) == (shape, target)}, counts)
            ]
        ]
        headings = [
            "",
            "limit",
            "kernel",
            "reading",
            "dense / reading",
            *(f"{count} row{'s' * (count > 1)}" for count in counts),
            "µs",
        ]
        title = f"{dtype}, {threads} thread{'s' * (threads != '1')}"
        lines += ["", f"### {title}", "", *markdown_table(headings, rows)]
    return lines


def order(weight: tuple[str, str]) -> tuple[int, str, bool, str]:
    """Sort by shape, those of the benchmark first; sparsities before patterns."""
    shape, target = weight
    shapes = SHAPES.split(",")
    return shapes.index(shape) if shape in shapes else len(shapes), shape, ":" in target, target


def title_of(shape: str, target: str, older: set[tuple[str, ...]]) -> str:
    """Title of a row; with a star if one of its products is among the `older` ones."""
    star = any((key[0], key[2]) == (shape, target) for key in older)
    return f"{shape.replace('x', ' × ')}, {target_title(target)}" + " *" * star


def linear_cells(by_rows: dict[int, dict[str, Any]], counts: list[int]) -> tuple[str, ...]:
    """Cells of a linear: limit, kernel against dense and reading with the fewest rows, ratios by rows, microseconds."""
    first = by_rows[min(by_rows)]
    fastest = {side: seconds["minimum"] for side, seconds in first["seconds"].items()}
    dense, kernel, read = (fastest.get(side) for side in ("dense", "kernel", "read"))
    return (
        f"{first['bytes'] / first['packed_bytes']:.2f}",
        f"{dense / kernel:.2f}" if dense and kernel else "–",
        f"{read / kernel:.2f}" if kernel and read else "–",
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
