"""The model card of a pruned model: `OUT/README.md`."""

from pathlib import Path

from llm_barber.record.report import RunReport

CITATION = """@article{su2024llmbarber,
  title={LLM-Barber: Block-Aware Rebuilder for Sparsity Mask in One-Shot for Large Language Models},
  author={Su, Yupeng and Guan, Ziyi and Liu, Xiaoqun and Jin, Tianlai and Wu, Dongkuan and Chen, Zhengfei and
          Chesi, Graziano and Wong, Ngai and Yu, Hao},
  journal={arXiv preprint arXiv:2408.10631},
  year={2024}
}"""
USE = {
    "dense": (
        "from transformers import {kind}, AutoTokenizer",
        "",
        'model = {kind}.from_pretrained("THIS_FOLDER")',
    ),
    "packed": (
        "import llm_barber  # pip install llm-barber; or: llm-barber unpack THIS_FOLDER DENSE",
        "from transformers import AutoTokenizer",
        "",
        'model = llm_barber.load("THIS_FOLDER")',
    ),
}
STORED = {
    "dense": "The numbers of zeros are real, the format is dense: the file is no smaller and runs no faster than the "
    "original by itself.",
    "packed": "Pruned linears are stored without their zeros (`llm-barber unpack` brings the dense files back): the "
    "file is smaller, and the model runs no faster than the original by itself.",
}


def model_card(report: RunReport) -> str:
    """`OUT/README.md`: what was done, a table by linear, how to load it, the citation."""
    name = Path(report.model).name if Path(report.model).exists() else report.model
    header = ["---", "library_name: transformers", "tags: [pruning, sparsity, llm-barber]"]
    if "/" in report.model and not Path(report.model).exists():
        header.insert(1, f"base_model: {report.model}")
    how = f"initial mask: {report.method}; {report.changes}"
    lines = [
        *header,
        "---",
        "",
        f"# {name}, {report.sparsity:.1%} of its linears' weights pruned",
        "",
        f"Pruned by [LLM-Barber](https://arxiv.org/abs/2408.10631) {report.versions['llm-barber']} in one shot, "
        f"without training. Kept weights are {report.kept_weights.words}; pruned ones are zero.",
        "",
        "| | |",
        "|---|---|",
        f"| model | {report.model} |",
        f"| method | {how} |",
        *([f"| tuning | {report.tuning} |"] if report.tuning is not None else []),
        f"| pattern | {report.pattern} |",
        f"| weights pruned | {report.pruned:,} of {report.weights:,} in linears ({report.sparsity:.2%}) |",
        f"| calibration | {report.calibration.source}, {report.calibration.sequences} windows of "
        f"{report.calibration.tokens} tokens, seed {report.settings.get('seed')} |",
        f"| computed in | {report.dtype} on {report.device} |",
        f"| time, peak memory | {report.seconds['total']:.1f} s, {report.peak_memory / 2**30:.2f} GiB |",
        "",
        STORED[_format(report)],
        "",
        "## By linear",
        "",
        "| linear | weights | pruned | sparsity | swapped |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {total.name} | {total.weights:,} | {total.pruned:,} | {total.sparsity:.2%} | {total.grown:,} |"
        for total in report.by_linear()
    ]
    before_after = [
        (layer.index, block) for layer in report.layers for block in layer.blocks if block.error_before is not None
    ]
    if before_after:
        lines += [
            "",
            "## Reconstruction error by block",
            "",
            "| layer | block | before | after |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {index} | {block.name} | {block.error_before:.4g} | {block.error_after:.4g} |"
            for index, block in before_after
        ]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        _use(report, _format(report)),
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        "```",
        "",
        "`barber.json` has every setting and count; `llm-barber inspect THIS_FOLDER` checks the weights against it.",
        "",
        "## Citation",
        "",
        "```bibtex",
        CITATION,
        "```",
        "",
    ]
    return "\n".join(lines)


def card_of_format(card: str, report: RunReport, stored: str) -> str:
    """A card's text with what it says of the format, "dense" or "packed", as it is now; all else stays."""
    for other in STORED.keys() - {stored}:
        card = card.replace(STORED[other], STORED[stored]).replace(_use(report, other), _use(report, stored))
    return card


def _format(report: RunReport) -> str:
    return str(report.settings.get("format", "dense"))


def _use(report: RunReport, stored: str) -> str:
    """How the model is loaded: lines of Python."""
    return "\n".join(USE[stored]).format(kind=report.loaded_by)
