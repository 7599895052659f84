"""N:M in rows whose length M does not divide: the tail after the last whole group stays dense."""

from pathlib import Path

import pytest
import torch

from llm_barber import InspectConfig, RebuildConfig, inspect, rebuild
from llm_barber.errors import ModelError
from llm_barber.masking.find_patterns import holds
from llm_barber.masking.pattern import parse_pattern
from tests.conftest import make_model, read_folder
from tests.helpers.targeted_runs import run

TAILS = [
    {"initial": "magnitude", "rebuild_ratio": 1},
    {"initial": "wanda", "granularity": "block", "rebuild_ratio": 1},
    {"initial": "sparsegpt", "granularity": "linear", "rebuild_ratio": 0.5},
    {"initial": "sparsegpt", "keep_updates": True, "rebuild": False},
    {"initial": "dsnot"},
    {"initial": "alps", "rebuild_ratio": 0.5},
    {"preset": "mask"},
    {"preset": "best"},
]


@pytest.mark.parametrize("settings", TAILS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_tails_stay_dense(tmp_path: Path, model: Path, tokens: Path, settings: dict[str, object]) -> None:
    """Rows of 32 and 64 inputs in groups of 9: tails of 5 and 1."""
    report = run(model, tmp_path / "out", tokens, pattern="4:9", allow_dense_tail=True, **settings)
    changes = settings.get("preset") == "best" or settings.get("keep_updates")
    dense, written = read_folder(model), read_folder(tmp_path / "out")
    for layer in report.layers:
        for linear in layer.linears:
            name = f"model.layers.{layer.index}.{linear.name}.weight"
            rows, columns = dense[name].shape
            groups = written[name][:, : columns // 9 * 9].reshape(rows, -1, 9)
            assert (groups.count_nonzero(dim=2) == 4).all()
            tail = written[name][:, columns // 9 * 9 :]
            assert tail.all() if changes else torch.equal(tail, dense[name][:, columns // 9 * 9 :])
            assert (linear.pruned, linear.pattern) == (5 * rows * (columns // 9), "4:9")
    assert "after the last whole group of M dense" in report.changes
    assert not inspect(InspectConfig(model=tmp_path / "out", dense=str(model))).problems
    if not changes:
        again = rebuild(
            RebuildConfig(
                dense=model, pruned=tmp_path / "out", output=tmp_path / "again", calibration=tokens, rebuild_ratio=1
            )
        )
        assert again.swapped > 0
        assert again.sparsity == report.sparsity


@pytest.mark.parametrize("with_record", [True, False])
def test_rebuild_keeps_each_linears_pattern_with_tails(
    tmp_path: Path, model: Path, tokens: Path, with_record: bool
) -> None:
    model = make_model(tmp_path / "wide", "llama", hidden_size=36, intermediate_size=70, num_attention_heads=6)
    sparsities = {"q_proj": "2:4", "mlp": "4:8", "k_proj": 0.5}
    settings = {"initial": "magnitude", "exclude": ("v_proj",), "allow_dense_tail": True}
    run(model, tmp_path / "out", tokens, sparsities=sparsities, **settings)
    if not with_record:
        (tmp_path / "out" / "barber.json").unlink()
    rebuilt = rebuild(
        RebuildConfig(
            dense=model, pruned=tmp_path / "out", output=tmp_path / "again", calibration=tokens, rebuild_ratio=1
        )
    )
    written = read_folder(tmp_path / "again")
    for layer in rebuilt.layers:
        for linear in layer.linears:
            kind = linear.name.split(".")
            expected = {"q_proj": "2:4", "mlp": "4:8"}.get(kind[0]) or {"q_proj": "2:4"}.get(kind[1])
            assert linear.pattern == expected, linear.name
            if expected:
                assert linear.grown > 0
                assert holds(parse_pattern(expected), written[f"model.layers.{layer.index}.{linear.name}.weight"] != 0)


def test_groups_longer_than_a_row(tmp_path: Path, model: Path, tokens: Path) -> None:
    with pytest.raises(ModelError, match="pattern 20:40 is longer than the 32 inputs of"):
        run(model, tmp_path / "out", tokens, pattern="20:40", allow_dense_tail=True)
