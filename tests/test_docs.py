"""The documentation agrees with the code; its links lead somewhere. Nothing here needs Sphinx."""

import ast
import re
from pathlib import Path

import pytest

import llm_barber
from llm_barber import CompareConfig, PruneConfig, RunReport
from llm_barber.model.architecture import ARCHITECTURES
from llm_barber.record.layers import BlockResult, LayerResult, LinearResult
from llm_barber.settings.compare import ROWS, CompareRow
from llm_barber.settings.presets import (
    GUARD,
    PATTERN_SWAPS,
    PATTERN_TARGET_MIX,
    PRESETS,
    SOLVED_TARGET_MIX,
    SWAPS,
    TARGET_MIX,
    TUNING_GUARD,
    Initial,
    Preset,
)
from llm_barber.settings.refining import passes_over, sequences_a_step
from tests.conftest import FAMILIES, make_config
from tests.helpers.pages import (
    CONTRIBUTING,
    CURRENT,
    DOCS,
    FENCE,
    INDENTED,
    PAGES,
    ROOT,
    anchors,
    from_code,
    options,
    prose,
    typed_commands,
)
from tests.test_structure import ROOMS

SOURCE = ROOT / "src" / "llm_barber"
FOREIGN = {"--retain_reconstruction", "--weight_sparsity", "--reallocation"}  # options of other programs
TORCHRUN = {"--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"}
PARTS = {"Guide", "Reference", "Method", "Results", "Notebook", "Project"}
TUNING, FAMILIES_PAGE = DOCS / "method" / "tuning.md", DOCS / "reference" / "families.md"


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def words(page: Path) -> str:
    return " ".join(page.read_text(encoding="utf-8").split())


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_have_the_options_that_pages_give_them(page: Path) -> None:
    for command, flags in typed_commands(page.read_text(encoding="utf-8")):
        if command == "report" or command in options():
            assert set(flags) <= options()[command] | {"--help"}, f"{command} has not all of {flags}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_have_lines_of_their_own(page: Path) -> None:
    """Code whose lines were joined, as prose is, has a backslash within a line, or two commands on it."""
    text = page.read_text(encoding="utf-8")
    for block in (*FENCE.findall(text), *INDENTED.findall(text)):
        for line in block.splitlines():
            assert not re.search(r"\\ +\S", line), line
            assert len(re.findall(r"\bMODEL OUT\b", line)) <= 1, line


@pytest.mark.parametrize("page", CURRENT, ids=named)
def test_every_option_that_a_page_names_exists(page: Path) -> None:
    option_names = set().union(*options().values()) | FOREIGN | TORCHRUN
    text = re.sub(
        r"^.*(?:make|pip|torchrun|git|srun|#SBATCH|python benchmarks).*$", "", page.read_text(), flags=re.MULTILINE
    )
    spans = re.findall(r"`(--[a-z][\w-]*)", text)
    assert set(spans) <= option_names


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^[\w/.-]+$", index, re.MULTILINE))
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md")} - {"index"}
    assert listed == pages
    assert set(re.findall(r"^:caption: (\w+)$", index, re.MULTILINE)) == PARTS


@pytest.mark.parametrize("page", CURRENT, ids=named)
def test_files_that_pages_name_exist(page: Path) -> None:
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|c|json))`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists() or (SOURCE / name).exists(), name


@pytest.mark.parametrize("page", [DOCS / "method" / "paper.md", CONTRIBUTING], ids=named)
def test_functions_are_in_the_files_that_pages_say(page: Path) -> None:
    pairs = re.findall(r"`([a-z_]+/[a-z_]+\.py)`,? `(\w+)`", page.read_text(encoding="utf-8"))
    assert len(pairs) >= 3
    for file, name in pairs:
        assert re.search(rf"^ *(?:def|class) {name}\b|^{name}\b", (SOURCE / file).read_text(), re.MULTILINE), (
            file,
            name,
        )


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_prose_is_wrapped(page: Path) -> None:
    for line in prose(page.read_text(encoding="utf-8")).splitlines():
        assert len(line) <= 100, line
        assert not line.startswith("%"), "a comment, which built pages leave out"


def test_guides_and_reference_are_generated_without_sphinx() -> None:
    code = from_code()
    text = code.command_line()
    for command, names in options().items():
        assert f"\n## {command}\n" in f"\n{text}"
        assert all(f"`{name}`" in text for name in names)
    api = code.python_api()
    assert all(f"\n### {name}\n" in api for name in llm_barber.__all__)
    assert all(f"`{name}`" in api for name in (*PruneConfig.model_fields, *CompareConfig.model_fields))
    signatures = re.findall(r"```python\n(.*?)```", api, re.DOTALL)
    assert len(signatures) > 10
    for signature in signatures:  # Sphinx warns of what is not Python
        ast.parse(f"def {signature.strip()}: ...")
    marks = {mark for page in DOCS.rglob("*.md") for mark in code.MARK.findall(page.read_text(encoding="utf-8"))}
    assert marks == set(code.GENERATED)


def test_links_of_files_at_the_root_lead_to_pages() -> None:
    inside = from_code().inside_the_docs
    assert (
        inside("[a](docs/guide/faq.md), [b](CONTRIBUTING.md#words)")
        == "[a](/guide/faq.md), [b](/contributing.md#words)"
    )
    assert inside("[c](../../CONTRIBUTING.md), [d](CITATION.cff)") == "[c](/contributing.md), d"


def test_presets_are_what_the_page_says() -> None:
    page = TUNING.read_text(encoding="utf-8")
    for preset in Preset:
        (row,) = re.findall(rf"^\| `{preset}` \|.*$", page, re.MULTILINE)
        _, _, order, allocation, _, rebuild, refine, reconstruct, _ = (cell.strip() for cell in row.split("|"))
        settings = PRESETS[preset]
        assert order == ("one that keeps more" if settings.reorder else "the model's")
        assert allocation == {"uniform": "uniform", "loss": "by the loss"}[settings.allocation]
        assert rebuild == ("yes" if settings.rebuild else "no")
        assert refine == {"none": "no", "tune": "masks tuned"}[settings.refine]
        assert (reconstruct == "no") == (settings.reconstruct == "none")
    assert PruneConfig(model="model", output="out").preset_name is Preset.MASK
    assert "`mask` is the default" in page


def test_defaults_are_what_pages_say() -> None:
    text = words(TUNING)
    assert (
        f"The default is {TARGET_MIX}; {PATTERN_TARGET_MIX} where masks of N:M are tuned; {SOLVED_TARGET_MIX} for"
        in text
    )
    assert (1 / TUNING_GUARD, 1 / GUARD) == (32, 8)
    assert "one in 32 where masks are tuned, at least one; one in eight where" in text
    assert f"at most {SWAPS} swaps a row, and {PATTERN_SWAPS} with N:M" in text
    assert [passes_over(tokens) for tokens in (2**20, 21_846, 21_845, 16_385, 16_384, 16_383)] == [2, 2, 3, 3, 4, 3]
    assert [sequences_a_step(tokens) for tokens in (16_384, 16_383)] == [4, 1]
    for row in ("21,846 or more | 2 | 4", "16,385 to 21,845 | 3 | 4", "16,384 | 4 | 4", "less | 3 | 1"):
        assert f"| {row} |" in TUNING.read_text()
    assert "four, or one with less than 16,384 tokens of text" in words(DOCS / "guide" / "big-models.md")
    help_of_passes = PruneConfig.model_fields["tune_passes"].description or ""
    assert "(default: 2, or 3 to 4 with less than 21,846 tokens; for masks" in help_of_passes
    fields = PruneConfig.model_fields
    start = words(DOCS / "guide" / "quickstart.md")
    assert f"`--samples {fields['samples'].default} --seqlen {fields['seqlen'].default}`" in start
    assert f"`--calibration {fields['calibration'].default}` (default, needs no network)" in start
    assert "(default 0.5)" in start
    assert "(default: 0.5)" in (fields["sparsity"].description or "")


def test_an_example_of_sparsities_is_read(tmp_path: Path) -> None:
    page = (DOCS / "guide" / "quickstart.md").read_text(encoding="utf-8")
    (example,) = (block for block in INDENTED.findall(page) if "mlp.down_proj: 0.4" in block)
    path = tmp_path / "sparsities.yaml"
    path.write_text("\n".join(line[4:] for line in example.splitlines()))
    config = PruneConfig(model="model", output="out", sparsities=path)
    assert len(config.sparsities) == 3


def test_the_quickstart_names_every_method() -> None:
    page = (DOCS / "guide" / "quickstart.md").read_text(encoding="utf-8")
    (methods,) = re.findall(r"`--initial (\S+)`, rebuilt", page)
    assert sorted(methods.split(r"\|")) == sorted(Initial)


def test_compare_has_the_rows_that_the_guide_says() -> None:
    text = words(DOCS / "guide" / "evaluate.md")
    assert [method.value for method in ROWS] == [
        "magnitude", "sparsegpt", "sparsegpt-updates", "wanda", "ria", "dsnot", "mask", "best",
    ]  # fmt: skip
    assert (
        "magnitude, SparseGPT (its mask, and its updates), Wanda, RIA, DSnoT and the presets `mask` and `best`" in text
    )
    assert all(f"`{method}`" in text for method in CompareRow if method not in ROWS)


def test_contributing_says_where_everything_is() -> None:
    """Paths of the table exist, what it names in a file is defined there, and headings that it links to are below."""
    page = CONTRIBUTING.read_text(encoding="utf-8")
    table = page[page.index("| you look for | it is in |") : page.index("## The rooms")]
    rows = dict(re.findall(r"^\| (.*?) \| (.*) \|$", table, re.MULTILINE))
    for row in (
        "where a weight is ranked", "where a swap is decided", "where a shard becomes durable", "where to add a method",
        "where to add a family", "where to add a page",
    ):  # fmt: skip
        assert row in rows
    for row, answer in rows.items():
        spans = re.findall(r"`([^`]+)`", answer)
        names = [span for span in spans if re.fullmatch(r"\w+", span)]
        sources = []
        for span in set(spans) - set(names):
            path = next((root / span for root in (SOURCE, ROOT) if (root / span).exists()), None)
            assert path is not None, (row, span)
            sources += [path.read_text(encoding="utf-8")] if path.is_file() else []
        for name in names:
            definition = re.compile(rf"^ *(def|class) {name}\b", re.MULTILINE)
            assert any(definition.search(source) for source in sources), (row, name)
        assert set(re.findall(r"\]\(#([\w-]+)\)", answer)) <= anchors(page)


def test_contributing_names_the_targets_of_make() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = set(re.findall(r"^    make ([\w-]+)", CONTRIBUTING.read_text(encoding="utf-8"), re.MULTILINE))
    phony = set(re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split())
    assert listed == phony - {"clean"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in phony)


def test_contributing_has_the_rooms_in_their_order() -> None:
    page = CONTRIBUTING.read_text(encoding="utf-8")
    table = page[page.index("| room | what it has |") : page.index("The root has")]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == ROOMS


def test_contributing_says_where_methods_have_their_names() -> None:
    page = CONTRIBUTING.read_text(encoding="utf-8")
    section = page[page.index("## Add a method") : page.index("## Add an architecture")]
    for kind in (Initial, CompareRow):
        assert f"`{kind.__module__.removeprefix('llm_barber.').replace('.', '/')}.py`" in section


def test_the_page_of_the_record_has_every_key() -> None:
    page = (DOCS / "reference" / "barber-json.md").read_text(encoding="utf-8")
    named = {name for span in re.findall(r"`([^`]+)`", page) for name in re.findall(r"\w+", span)}
    for kind in (RunReport, LayerResult, BlockResult, LinearResult):
        assert set(kind.model_fields) <= named


def test_families_are_those_of_the_tests() -> None:
    page = FAMILIES_PAGE.read_text(encoding="utf-8")
    first_cells = re.findall(r"^\| ([^|]*`[^|]*)\|", page, re.MULTILINE)
    listed = {name for cell in first_cells for name in re.findall(r"`([\w-]+)`", cell)} - {"model_type"}
    tested = {make_config(family).model_type for family in FAMILIES}
    assert listed == tested, "docs/reference/families.md: the table has the families of tests/conftest.py"
    assert f"{len(tested)} model types are tested, in {len(FAMILIES)} configurations" in words(FAMILIES_PAGE)
    assert f"{len(ARCHITECTURES)} of these have an entry" in page
