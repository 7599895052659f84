"""Targets of linears: include, exclude, skip-layers and sparsities by linear, in settings and files."""

from pathlib import Path

import pytest

from llm_barber import PruneConfig, prune
from llm_barber.errors import ModelError, SettingsError
from llm_barber.masking.pattern import NofM, Unstructured
from llm_barber.settings.targets import EXAMPLE, Targets, parse_target, read_targets

HALF = Unstructured(0.5)


def test_each_part_by_hand() -> None:
    targets = Targets(
        HALF,
        include=(r"mlp\.", "q_proj"),
        exclude=("up_proj$",),
        skip_layers=(0, -1),
        exceptions={r"layers\.1\.mlp\.down": "2:4", "down": 0.25, "gate": 0},
    )
    expected = {
        (0, "m.layers.0.mlp.gate_proj"): None,  # skipped
        (1, "m.layers.1.mlp.down_proj"): NofM(2, 4),  # the first expression that matches
        (2, "m.layers.2.mlp.down_proj"): Unstructured(0.25),
        (2, "m.layers.2.mlp.gate_proj"): None,  # 0
        (2, "m.layers.2.mlp.up_proj"): None,  # excluded
        (2, "m.layers.2.self_attn.q_proj"): HALF,
        (2, "m.layers.2.self_attn.k_proj"): None,  # not included
        (3, "m.layers.3.self_attn.q_proj"): None,  # the last
    }
    assert {key: targets.of(*key, layers=4) for key in expected} == expected
    numbered = Targets(HALF, exceptions={"1": 0.25, "-1": 0})
    assert [numbered.of(index, f"m.layers.{index}.up", 12) for index in (0, 1, 10, 11)] == [
        HALF, Unstructured(0.25), HALF, None,
    ]  # fmt: skip
    assert numbered.of(12, "head", 12) == HALF
    allocated = Targets(HALF, exceptions={"down": 0.25}, allocated={"up": 0.6})
    assert allocated.of(1, "up", 2) == Unstructured(0.6, over_linear=True)
    assert allocated.of(2, "up", 2) == HALF  # the allocation does not apply to the head
    assert allocated.of(1, "down", 2) == Unstructured(0.25)


def test_targets_are_read_from_numbers_and_text() -> None:
    assert parse_target(0.5) == HALF
    assert parse_target(0) is None
    assert parse_target("2:4") == NofM(2, 4)
    assert read_targets({"a": "0.25", "b": 0, 1: "2:4"}) == {"a": 0.25, "b": 0, "1": "2:4"}


def test_bad_input(tmp_path: Path, model: Path, tokens: Path) -> None:
    good = {"model": model, "output": tmp_path / "out", "calibration": tokens}
    for settings, words in (
        ({"include": ("q[",)}, "'q\\[' is not a regular expression"),
        ({"exclude": ("(",)}, "is not a regular expression"),
        ({"sparsities": {"q_proj": 1.5}}, "sparsity 1.5 is not between 0 and 1"),
        ({"sparsities": {"q_proj": "4:2"}}, "must keep at least 1"),
        ({"sparsities": {"q_proj": True}}, "q_proj: True is neither a sparsity"),
        ({"sparsities": {0: 1.5}}, "0: sparsity 1.5 is not between 0 and 1"),
        ({"sparsities": tmp_path / "none.yaml"}, "none.yaml cannot be read"),
        ({"skip_layers": ("x",)}, "--skip-layers"),
    ):
        with pytest.raises(SettingsError, match=words):
            PruneConfig(**good, **settings)
    for content in ("- a\n- b\n", "just words", "{", "\x00"):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(SettingsError, match=r"bad\.yaml (cannot be read|is not a mapping)"):
            PruneConfig(**good, sparsities=tmp_path / "bad.yaml")
    for settings, words in (
        ({"include": ("c_attn",)}, "--include: no linear's name matches 'c_attn'"),
        ({"exclude": ("c_attn",)}, "--exclude: no linear's name matches 'c_attn'"),
        ({"sparsities": {"c_attn": 0.5}}, "--sparsities: no linear's name matches 'c_attn'"),
        ({"sparsities": {"3": 0.5}}, "--sparsities: there is no decoder layer 3"),
        ({"sparsities": {"0": 0.5, "-3": 0.2}}, "--sparsities names one layer twice"),
        ({"skip_layers": (3,)}, "there is no decoder layer 3"),
        ({"skip_layers": (0, 1, -1)}, "leave nothing to prune"),
    ):
        with pytest.raises(SettingsError, match=words) as caught:
            prune(PruneConfig(**good, **settings))
        assert caught.value.hint
    with pytest.raises(
        ModelError, match=r"pattern 2:5 does not divide the 32 inputs of model\.layers\.0\.self_attn\.q"
    ):
        prune(PruneConfig(**good, sparsities={"q_proj": "2:5"}))
    assert not list(tmp_path.glob("out*"))


def test_a_file_with_two_targets_of_a_linear_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sparsities.yaml").write_text("q_proj: 0.5\n1: 0.25\nk_proj: 2:4\n")
    assert read_targets(tmp_path / "sparsities.yaml") == {"q_proj": 0.5, "1": 0.25, "k_proj": "2:4"}
    (tmp_path / "sparsities.yaml").write_text("q_proj: 0.5\nq_proj: 0.2\n")
    with pytest.raises(ValueError, match="q_proj is there twice"):
        read_targets(tmp_path / "sparsities.yaml")


def test_the_example_in_the_error_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "example.yaml").write_text(EXAMPLE + "\n")
    assert read_targets(tmp_path / "example.yaml") == {r"mlp\.down_proj$": 0.4}


def test_files_that_yaml_cannot_read_safely(tmp_path: Path) -> None:
    good = {"model": "m", "output": tmp_path / "out"}
    path = tmp_path / "bad.yaml"
    bomb = "a: &a [x, x]\n" + "".join(
        f"{outer}: &{outer} [*{inner}, *{inner}]\n" for inner, outer in zip("abcd", "bcde", strict=True)
    )
    for content, words in (
        ("[" * 5000, "bad.yaml cannot be read: "),
        ('a: "\\ud800"', "bad.yaml|sparsities"),
        (bomb, "a: .* is neither a sparsity"),
        ("'a{99999999999999}': 0.5", "is not a regular expression"),
        (f"{'9' * 5000}: 1.5", "cannot be read"),
    ):
        path.write_text(content)
        with pytest.raises(SettingsError, match=words):
            PruneConfig(**good, sparsities=path)
    for name, words in (("~nobody-here/x.yaml", "cannot be read"), ("/dev/null", "is a device, not a regular file")):
        with pytest.raises(SettingsError, match=words):
            PruneConfig(**good, sparsities=name)
