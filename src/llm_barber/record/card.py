"""The model card of a pruned model: `OUT/README.md`."""

import os

from llm_barber.checkpoint.hub import is_hub_id
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
        "from transformers import {kind}, AutoTokenizer",
        "",
        "llm_barber.register()  # without it, transformers finds no weights here",
        'model = {kind}.from_pretrained("THIS_FOLDER")',
    ),
}
USE["rounded"] = USE["packed"]
STORED = {
    "dense": "The numbers of zeros are real, the format is dense: the file is no smaller and runs no faster than the "
    "original by itself.",
    "packed": "Pruned linears are stored without their zeros (`llm-barber unpack` brings the dense files back): the "
    "file is smaller, and the model runs no faster than the original by itself.",
    "rounded": "Pruned linears are stored without their zeros, and **their kept weights are rounded**: "
    "`llm-barber unpack` writes a dense model of the rounded weights, not the one that was packed.",
}


def model_card(report: RunReport, stored: str | None = None) -> str:
    """Content of `OUT/README.md`: the settings, a table by linear, how to load the model, the citation.

    Args:
        report: the record.
        stored: a key of `STORED`; None: the format that the run was asked for.
    """
    stored = stored or str(report.settings.get("format", "dense"))
    lines = [
        *_front_matter(report),
        "",
        *_summary(report),
        "",
        STORED[stored],
        "",
        *_table_of_linears(report),
        *_table_of_errors(report),
        "",
        "## Use",
        "",
        "```python",
        _use(report, stored),
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


def _front_matter(report: RunReport) -> list[str]:
    """YAML that the hub reads."""
    name = report.model.partition("@")[0]
    of_hub = "/" in name and is_hub_id(report.model) and not os.path.exists(report.model)
    base_model = [f"base_model: {name}"] if of_hub else []
    return ["---", *base_model, "library_name: transformers", "tags: [pruning, sparsity, llm-barber]", "---"]


def _summary(report: RunReport) -> list[str]:
    is_local = os.path.isabs(report.model) or os.path.exists(report.model)
    name = os.path.basename(report.model) if is_local else report.model
    return [
        f"# {name}, {report.sparsity:.1%} of its linears' weights pruned",
        "",
        f"Pruned by [LLM-Barber](https://arxiv.org/abs/2408.10631) {report.versions['llm-barber']} in one shot, "
        f"{report.training}. {_kept(report)}",
        "",
        "| | |",
        "|---|---|",
        f"| model | {name} |",
        f"| method | initial mask: {report.method}; {report.changes} |",
        *([f"| tuning | {report.tuning} |"] if report.tuning is not None else []),
        f"| pattern | {report.pattern} |",
        f"| weights pruned | {report.pruned:,} of {report.weights:,} in linears ({report.sparsity:.2%}) |",
        f"| calibration | {report.calibration.source}, {report.calibration.sequences} windows of "
        f"{report.calibration.tokens} tokens, seed {report.settings.get('seed')} |",
        f"| computed in | {report.dtype} on {report.device} |",
        f"| time, peak memory | {report.seconds['total']:.1f} s, {report.peak_memory / 2**30:.2f} GiB |",
    ]


def _table_of_linears(report: RunReport) -> list[str]:
    return [
        "## By linear",
        "",
        "| linear | weights | pruned | sparsity | swapped |",
        "|---|---|---|---|---|",
        *(
            f"| {total.name} | {total.weights:,} | {total.pruned:,} | {total.sparsity:.2%} | {total.grown:,} |"
            for total in report.by_linear()
        ),
    ]


def _table_of_errors(report: RunReport) -> list[str]:
    """Reconstruction errors of the blocks where they were measured; no lines if there are none."""
    blocks = [
        (layer.index, block) for layer in report.layers for block in layer.blocks if block.error_before is not None
    ]
    if not blocks:
        return []
    return [
        "",
        "## Reconstruction error by block",
        "",
        "| layer | block | before | after |",
        "|---|---|---|---|",
        *(
            f"| {index} | {block.name} | {block.error_before:.4g} | {block.error_after:.4g} |"
            for index, block in blocks
        ),
    ]


def card_of_format(card: str, before: RunReport, report: RunReport, stored: str) -> str:
    """Change a card's sentences about the format and the kept weights; all else stays.

    Args:
        card: its content.
        before: the record that the card was written of.
        report: the record now.
        stored: a key of `STORED`.
    """
    card = card.replace(_kept(before), _kept(report))
    for other in STORED.keys() - {stored}:
        card = card.replace(STORED[other], STORED[stored]).replace(_use(report, other), _use(report, stored))
    return card


def _kept(report: RunReport) -> str:
    """Sentence about the kept weights."""
    return f"Kept weights are {report.kept_values}; pruned ones are zero."


def _use(report: RunReport, stored: str) -> str:
    """Lines of Python that load the model."""
    return "\n".join(USE[stored]).format(kind=report.loaded_by)
