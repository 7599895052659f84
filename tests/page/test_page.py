"""The page of a run: the report's numbers, in one file that needs no other, without overflow in a browser."""

import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from llm_barber import EvaluateConfig, PruneConfig, evaluate, inspect, prune
from llm_barber.errors import ModelError, OutputError
from llm_barber.evaluation.result import Evaluation
from llm_barber.page.environment import SPACE, duration, memory, model_name, number, percent, with_error
from llm_barber.page.run_page import run_page
from llm_barber.page.write import keep_with_model, read_evaluation, write_page
from llm_barber.record.layers import BlockResult, LayerResult, LinearResult
from llm_barber.record.report import RunReport
from llm_barber.settings.tools import InspectConfig
from tests.conftest import Listener, change_json
from tests.helpers.text import add_tokenizer


def make_linear(name: str, layer: int, rebuilt: bool, equal: bool) -> LinearResult:
    return LinearResult(
        name=name,
        shape=(40, 50),
        pruned=1000 if equal else 1000 + 12 * layer % 1000,
        zeros=1000 if equal else 1000 + 12 * layer % 1000,
        beneficial_pairs=700 * rebuilt,
        grown=(37 + 6 * layer) * rebuilt,
        dropped=(30 + 6 * layer) * rebuilt,
    )


def make_report(depth: int = 2, rebuilt: bool = True, equal: bool = False, **changes: Any) -> RunReport:
    blocks = {"attention": ("self_attn.q_proj", "self_attn.o_proj"), "mlp": ("mlp.up_proj",)}
    values: dict[str, Any] = {
        "command": "prune",
        "model": "/models/Tiny-1B",
        "output": "/models/pruned",
        "settings": {"seed": 7, "samples": 4, "sparsity": None, "overwrite": True},
        "initial": "magnitude",
        "method": "magnitude",
        "pattern": "unstructured",
        "granularity": "block" if rebuilt else None,
        "rebuild_ratio": 0.1 if rebuilt else None,
        "calibration": {"source": "c4", "sequences": 4, "tokens": 2048, "sha256": "c0ffee" * 10},
        "device": "cuda:0",
        "dtype": "bfloat16",
        "versions": {"python": "3.11.7", "llm-barber": "0.1.0", "torch": "2.6.0"},
        "layers": tuple(
            LayerResult(
                index=layer,
                seconds=1.5 + layer,
                blocks=tuple(
                    BlockResult(
                        name=block,
                        error_before=0.0123456 * (1 + layer) if rebuilt else None,
                        error_after=0.0098765 if rebuilt else None,
                        linears=tuple(make_linear(linear, layer, rebuilt, equal) for linear in linears),
                    )
                    for block, linears in blocks.items()
                ),
            )
            for layer in range(depth)
        ),
        "seconds": {"embed": 0.5, "layers": 3.0, "read": 0.25, "write": 0.15, "total": 4.0},
        "peak_memory": 3 * 2**30,
        "peak_device_memory": 2**31,
        "files": {"model-00001-of-00001.safetensors": "beef" * 16},
    }
    return RunReport(**values | changes)


def make_evaluation() -> Evaluation:
    text = {"windows": 141, "seqlen": 2048, "begins_with_bos": True, "against": None}
    other = {"perplexity": 8.25, "perplexity_ratio": 1.25, "divergence": 0.1875, "top_agreement": 0.8125}
    task = {"metric": "acc_norm", "examples": 1172, "shots": 25, "source": "arc.jsonl", "against": None}
    paired = {"value": 0.5, "difference": -0.0321, "standard_error": 0.0099}
    return Evaluation.model_validate(
        {
            "model": "/models/pruned",
            "against": "/models/Tiny-1B",
            "device": "cuda:0",
            "dtype": "bfloat16",
            "versions": {"torch": "2.6.0"},
            "texts": [
                text | {"text": "wikitext2", "perplexity": 10.3125, "sha256": "abcd" * 16, "against": other},
                text | {"text": "c4", "perplexity": 12345.6, "sha256": "ef01" * 16},
            ],
            "tasks": [
                task
                | {"task": "arc", "value": 0.4679, "standard_error": 0.0146, "sha256": "dead" * 16, "against": paired},
                task | {"task": "piqa", "value": 0.75, "standard_error": 0.01, "sha256": None},
            ],
        }
    )


def table(page: str, caption: str) -> list[list[str]]:
    """The cells of a table, row by row, its headings first."""
    match = re.search(rf'aria-label="{re.escape(caption)}"><table>(.*?)</table>', page, re.DOTALL)
    assert match, caption
    rows = re.findall(r"<tr>(.*?)</tr>", match[1], re.DOTALL)
    return [[unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def cards(page: str) -> dict[str, tuple[str, str]]:
    """The cards at the top: label → value and note."""
    matches = re.findall(r"<dt>(.*?)</dt>\s*<dd>(.*?)(?:<small>(.*?)</small>)?</dd>", page)
    return {label: (value, note) for label, value, note in matches}


def test_cards_say_what_the_report_says() -> None:
    shown = cards(run_page(make_report()))
    assert shown["Model"][0] == "/models/Tiny-1B"
    assert shown["Weights pruned"] == ("6,036", "of 12,000")  # 3 linears of 1,000 and of 1,012
    assert shown["Sparsity"][0] == f"50.30{SPACE}%"
    assert shown["Swapped"] == ("240", f"2.000{SPACE}% of the weights")  # 3 · (37 + 43)
    assert shown["Method"] == ("magnitude", "rebuilt within each block, ratio 0.1")
    assert shown["Time"][0] == f"4.000{SPACE}s"
    assert shown["Peak memory"] == (f"3.000{SPACE}GiB", f"2.000{SPACE}GiB on the device")
    assert (shown["Device"][0], shown["Computed in"][0]) == ("cuda:0", "bfloat16")


def test_tables_say_what_the_report_says() -> None:
    page = run_page(make_report())
    swapped = table(page, "Share of weights that came back, by layer and linear")
    assert swapped[0] == ["layer", "self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"]
    assert swapped[1:] == [["0", *[f"1.850{SPACE}%"] * 3], ["1", *[f"2.150{SPACE}%"] * 3]]  # 37 and 43 of 2,000
    sparsities = table(page, "Sparsity by layer and linear")
    assert [row[1] for row in sparsities[1:]] == [f"50.00{SPACE}%", f"50.60{SPACE}%"]
    totals = table(page, "Totals of each linear over all layers")
    assert totals[1] == [
        "self_attn.q_proj", "4,000", "2,012", f"50.30{SPACE}%", "1,400", "80", "66", f"2.000{SPACE}%",
    ]  # fmt: skip
    errors = table(page, "Reconstruction error by layer and block")
    assert errors[1] == ["0", "attention", "0.01235", "0.009876", f"-20.0{SPACE}%"]
    assert [row[:2] for row in errors[1:]] == [["0", "attention"], ["1", "attention"], ["0", "mlp"], ["1", "mlp"]]
    stages = table(page, "Seconds by stage")
    assert [row[0] for row in stages[1:]] == ["layers", "embed", "read", "write", "other", "total"]
    assert stages[1][3:] == ["3.000", f"75.00{SPACE}%"]
    assert stages[5][3:] == ["0.1000", f"2.50{SPACE}%"]
    assert [row[2] for row in table(page, "Seconds by layer")[1:]] == ["1.500", "2.500"]


def test_settings_calibration_and_files() -> None:
    page = run_page(make_report())
    facts = dict(re.findall(r'<tr><th scope="row">([^<]*)</th><td>(?:<code class="hash">)?([^<]*)', page))
    assert facts["seed"] == "7"
    assert facts["overwrite"] == "yes"
    assert "sparsity" not in facts  # None: not set
    assert (facts["source"], facts["windows"], facts["tokens a window"]) == ("c4", "4", "2,048")
    assert facts["sha256"] == "c0ffee" * 10
    assert facts["torch"] == "2.6.0"
    assert table(page, "Files")[1] == ["model-00001-of-00001.safetensors", "beef" * 16]


def test_evaluation_with_everything_that_it_depends_on() -> None:
    page = run_page(make_report(), make_evaluation())
    assert table(page, "Perplexity and what it depends on")[1:] == [
        ["wikitext2", "10.31", "2,048", "141", "yes", "bfloat16", "abcd" * 16],
        ["c4", "12,346", "2,048", "141", "yes", "bfloat16", "ef01" * 16],
    ]
    assert table(page, "Perplexity ratio, divergence and agreement")[1:] == [
        ["wikitext2", "8.250", "10.31", "1.250", "0.1875", f"81.25{SPACE}%"]
    ]
    assert table(page, "Tasks")[1:] == [
        ["arc", "acc_norm", f"46.79 ± 1.46{SPACE}%", f"50.00{SPACE}%", f"-3.21 ± 0.99{SPACE}%", "1,172", "25"],
        ["piqa", "acc_norm", f"75.00 ± 1.00{SPACE}%", "–", "–", "1,172", "25"],
    ]
    assert table(page, "Sources of the tasks")[1:] == [
        ["arc", "acc_norm", "arc.jsonl", "dead" * 16],
        ["piqa", "acc_norm", "arc.jsonl", "–"],
    ]


def test_runs_that_rebuilt_or_swapped_nothing_say_so() -> None:
    page = run_page(make_report(rebuilt=False, equal=True))
    assert "Nothing was rebuilt or refined: the mask is that of magnitude." in page
    assert "Nothing was rebuilt or refined, so nothing was swapped." in page
    assert f"Every linear of every layer has the same sparsity, 50.00{SPACE}%." in page
    assert cards(page)["Swapped"] == ("–", "nothing was rebuilt or refined")
    assert page.count("<img") == 0
    assert "came back" not in page
    assert 'id="evaluation"' not in page
    report = make_report(depth=1)
    for linear in report.linears:  # frozen, all the way down
        object.__setattr__(linear, "grown", 0)
    object.__setattr__(report.layers[0].blocks[0], "error_after", 0.0)
    page = run_page(report)
    assert "Nothing was swapped: in comparison groups" in page
    assert "1 error is zero or not recorded" in page
    assert table(page, "Reconstruction error by layer and block")[1][3:] == ["0.000", f"-100.0{SPACE}%"]


def test_what_tuning_gained() -> None:
    report = make_report(depth=3)
    assert "What tuning gained" not in run_page(report)
    for layer, errors in zip(report.layers, ((2.0, 1.0, 1.5), (), (4.0, 5.0)), strict=True):
        object.__setattr__(layer, "held_out", errors)
    page = run_page(report)
    assert "(pass 2 in 1 layer, none in 1 layer)" in page
    assert table(page, "Distance on held-out windows by layer and pass")[1:] == [
        ["0", "2.000", "1.000", "1.500", "2"], ["2", "4.000", "5.000", "–", "none"],
    ]  # fmt: skip
    assert page.count("<img") == 4
    for layer in report.layers:
        object.__setattr__(layer, "held_out", (1.0, 2.0))
    assert run_page(report).count("<img") == 3  # nothing was gained: no figure


def test_names_are_escaped_and_the_page_needs_no_other_file() -> None:
    attack = '/models/<script>alert("1")</script>'
    linear = LinearResult(name='<img src=x onerror="1">$x$', shape=(2, 2), pruned=2, zeros=2, grown=1, dropped=1)
    block = BlockResult(name='"><b>$', error_before=1.0, error_after=0.5, linears=(linear,))
    layer = LayerResult(index=0, seconds=1.0, blocks=(block,))
    report = make_report(model=attack, method=attack, settings={"model": attack}, layers=(layer,))
    page = run_page(report, make_evaluation().model_copy(update={"against": attack}))
    assert cards(page)["Model"][0] == "/models/&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;"
    assert not re.findall(r"<(?:script|b>|img src|link(?! rel=\"icon\" href=\"data:,\")|iframe|object)", page)
    assert set(re.findall(r"""(?:src|href)=["']?([^"'#,]*)""", page)) == {
        "data:", "data:image/svg+xml;base64", "https://arxiv.org/abs/2408.10631", "x onerror=&",
    }  # fmt: skip


def test_the_same_report_gives_the_same_bytes_in_any_style() -> None:
    page = run_page(make_report(depth=126), make_evaluation())
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert run_page(make_report(depth=126), make_evaluation()) == page
        assert dict(matplotlib.rcParams) == before
    assert len(page) < 1e6


def test_the_page_loads_neither_pyplot_nor_transformers() -> None:
    code = "import sys, llm_barber.page.run_page; print({'matplotlib.pyplot', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("formatted", "text"),
    [
        (number(None), "–"), (number(0.0), "0.000"), (number(28.5449), "28.54"), (number(516.59), "516.6"),
        (number(12345.6), "12,346"), (number(106168320), "106,168,320"), (number(3.34797e-5), "3.348e-05"),
        (number(999.96), "1,000"), (number(float("inf")), "inf"), (percent(0.0194498, 3), f"1.945{SPACE}%"),
        (percent(-0.25, 1, sign=True), f"-25.0{SPACE}%"),
        (with_error(0.02, 0.0158, sign=True), f"+2.00 ± 1.58{SPACE}%"), (duration(7.33001), f"7.330{SPACE}s"),
        (duration(45296), "12:34:56"), (memory(int(0.6785 * 2**30)), f"0.6785{SPACE}GiB"),
        (model_name("org/model"), "org/model"), (model_name("/a/b/model/"), "model"), (model_name("/"), "/"),
    ],
)  # fmt: skip
def test_formats(formatted: str, text: str) -> None:
    assert formatted == text


@pytest.fixture
def pruned(llama: Path, tokens: Path, tmp_path: Path) -> Path:
    add_tokenizer(llama)
    prune(PruneConfig(model=llama, output=tmp_path / "pruned", calibration=tokens, preset="paper"))
    return tmp_path / "pruned"


def test_a_run_has_a_page_with_the_evaluations_of_its_model(pruned: Path, llama: Path, tmp_path: Path) -> None:
    first = (pruned / "report.html").read_text()
    assert "record of a prune run" in first
    assert 'id="evaluation"' not in first
    assert write_page(pruned) == pruned / "report.html"
    assert write_page(pruned, tmp_path / "other.html").read_text() == first
    texts = []
    for name in ("one", "two"):
        texts.append(str(tmp_path / f"{name}.txt"))
        (tmp_path / f"{name}.txt").write_text(name * 30)
    listener = Listener()
    for text in (*texts, texts[0]):
        keep_with_model(evaluate(EvaluateConfig(model=pruned, text=(text,), seqlen=16)), listener)
    stored = read_evaluation(pruned)
    assert stored is not None
    assert [text.text for text in stored.texts] == texts
    assert 'id="evaluation"' in (pruned / "report.html").read_text()
    assert not listener.warnings
    # Against another model it is another evaluation, which replaces the stored one.
    keep_with_model(evaluate(EvaluateConfig(model=pruned, against=llama, text=(texts[0],), seqlen=16)), listener)
    stored = read_evaluation(pruned)
    assert stored is not None
    assert [text.text for text in stored.texts] == texts[:1]
    assert "was measured in another way" in listener.warnings[0]
    assert inspect(InspectConfig(model=pruned, dense=llama)).problems == ()
    # Nothing is written for a model without a record.
    keep_with_model(evaluate(EvaluateConfig(model=llama, text=(texts[0],), seqlen=16)), listener)
    assert not (llama / "evaluation.json").exists()


def test_an_evaluation_is_kept_without_a_page(tmp_path: Path, llama: Path, tokens: Path) -> None:
    """Of a run that was to write none, and beside a page of somebody else."""
    out = tmp_path / "out"
    prune(PruneConfig(model=llama, output=out, calibration=tokens, initial="wanda", report=False))
    evaluation = Evaluation(model=str(out), against=None, device="cpu", dtype="float32", versions={}, texts=())
    told = Listener()
    keep_with_model(evaluation, told)
    assert read_evaluation(out) == evaluation
    assert not (out / "report.html").exists()
    assert not told.warnings
    (out / "report.html").write_text("of somebody else")
    keep_with_model(evaluation, told)
    (warning,) = told.warnings
    assert warning.startswith(f"the evaluation is kept in {out / 'evaluation.json'}, but the page does not show it: ")
    assert (out / "report.html").read_text() == "of somebody else"


def test_pages_that_cannot_be_written(pruned: Path, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no record"):
        write_page(llama)
    with pytest.raises(ModelError, match="is not a folder"):
        write_page(tmp_path / "none")
    with pytest.raises(OutputError, match="cannot write"):
        write_page(pruned, tmp_path / "no" / "such" / "page.html")
    os.mkfifo(pruned / "a-pipe")
    for name in ("model-00001-of-00003.safetensors", "barber.json", ".", "a-pipe"):
        with pytest.raises(OutputError, match="is not a page of this program|not a regular file"):
            write_page(pruned, pruned / name)
    (pruned / "evaluation.json").write_text("{")
    with pytest.raises(ModelError, match="evaluation.json is damaged"):
        write_page(pruned)
    change_json(pruned / "barber.json", layers=[])
    with pytest.raises(ModelError, match="is not a record of this program"):
        write_page(pruned)
