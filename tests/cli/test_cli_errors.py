"""Errors of the command line: settings as the user types them, all problems at once, --debug."""

import re
from enum import EnumType, StrEnum
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Lt

from llm_barber.cli import _main
from llm_barber.cli.typed import as_typed
from llm_barber.errors import SettingsError
from llm_barber.messages import Message
from tests.helpers.commands import ARGUMENTS, CONFIGS, parameters


def call(*arguments: object) -> int:
    return _main([str(argument) for argument in arguments])


def wrong_numbers() -> list[tuple[str, str, str]]:
    """List every option with a bound, as command, setting and a number beyond the bound."""
    cases = []
    for command, config in CONFIGS.items():
        for name, field in config.model_fields.items():
            bounds = [bound for bound in field.metadata if isinstance(bound, Ge | Gt | Lt)]
            option = parameters(command).get(name)
            if bounds and option is not None:
                bound = bounds[0]
                number: Any = bound.ge - 1 if isinstance(bound, Ge) else bound.gt if isinstance(bound, Gt) else bound.lt
                cases.append((command, name, str(number)))
    return cases


@pytest.mark.parametrize(("command", "name", "number"), wrong_numbers())
def test_a_number_beyond_its_bound_names_the_option(
    tmp_path: Path, command: str, name: str, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / f"no-{argument}" for argument in ARGUMENTS[command]]
    option = f"--{name.replace('_', '-')}"
    assert call(command, *paths, f"{option}={number}") == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {option}: {number} is too ")
    assert re.search(
        rf"^error: {option}: \S+ is too (small|large): (the (least|most) is|it must be (above|below)) -?\d", shown
    )


def options_of(*kinds: type) -> list[tuple[str, str]]:
    """List every option with one value, which is of one of these types, as command and setting."""
    return [
        (command, name)
        for command, config in CONFIGS.items()
        for name, field in config.model_fields.items()
        if name in parameters(command)
        and get_origin(field.annotation) is not tuple
        and any(kind in (field.annotation, *get_args(field.annotation)) for kind in kinds)
    ]


@pytest.mark.parametrize(("command", "name"), options_of(int, float))
def test_text_in_place_of_a_number_is_told_in_our_words(
    tmp_path: Path, command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / f"no-{argument}" for argument in ARGUMENTS[command]]
    option = f"--{name.replace('_', '-')}"
    assert call(command, *paths, f"{option}=half") == 2
    assert re.match(rf"error: {option}: 'half' is not a (whole )?number(;|\n)", capsys.readouterr().err)


@pytest.mark.parametrize(("command", "name"), options_of(*StrEnum.__subclasses__()))
def test_an_unknown_choice_is_told_with_the_choices(
    tmp_path: Path, command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / f"no-{argument}" for argument in ARGUMENTS[command]]
    option = f"--{name.replace('_', '-')}"
    annotation = CONFIGS[command].model_fields[name].annotation
    kind = next(kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, EnumType))
    assert call(command, *paths, f"{option}=xyz") == 2
    assert capsys.readouterr().err.startswith(f"error: {option}: 'xyz' is not one of {', '.join(map(str, kind))}")


@pytest.mark.parametrize(
    ("command", "name"), [(command, name) for command, config in CONFIGS.items() for name in config.model_fields]
)
def test_every_setting_is_named_as_it_is_typed(command: str, name: str) -> None:
    """Settings are named by their argument or option; if the command has neither, by the setting's name."""
    fields = CONFIGS[command].model_fields
    paths = [key for key in ("model", "prompt", "dense", "pruned", "output", "folder") if key in fields]
    values: dict[str, Any] = {**dict.fromkeys(paths, "somewhere"), name: object()}
    with pytest.raises(SettingsError) as caught:
        CONFIGS[command](**values)
    option = f"--{name.replace('_', '-')}" if name in parameters(command) else name
    assert isinstance(caught.value.message, Message)
    shown = caught.value.message.rendered(as_typed([command]))
    assert shown.startswith(f"{ARGUMENTS[command].get(name, option)}: ")
    assert "Input" not in shown, "pydantic's words"
    assert str(caught.value).startswith(name)


def test_values_that_look_like_settings_are_shown_as_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "target_mix"
    folder.mkdir()
    assert call("prune", folder, folder) == 2
    assert capsys.readouterr().err.startswith(f"error: OUT is MODEL itself ({folder}): ")
    assert call("prune", folder, "out", "--pattern", "tune_passes: refine tune") == 2
    assert "pattern 'tune_passes: refine tune' is not N:M" in capsys.readouterr().err
    assert call("compare", folder, tmp_path / "out", "--methods", "target_mix") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: --methods: 'target_mix' is not one of magnitude, sparsegpt, ")


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("compare", "--seeds a", "--seeds: 'a' is not a whole number"),
        ("compare", "--seeds 0,1.5", "--seeds: '1.5' is not a whole number"),
        ("compare", "--seeds ,", "--seeds: ',' names nothing: name at least one"),
        ("compare", "--targets ,", "--targets: ',' names nothing: name at least one"),
        ("compare", "--methods ,,", "--methods: ',,' names nothing: name at least one"),
        ("compare", "--tasks ,", "--tasks: ',' names nothing: name at least one"),
        ("evaluate", "--tasks ,", "--tasks: ',' names nothing: name at least one"),
        ("prune", "--skip-layers ,", "--skip-layers: ',' is not numbers with commas between them, like 0,-1"),
    ],
)
def test_a_list_with_a_wrong_item_or_without_items_is_one_problem(
    tmp_path: Path, command: str, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / f"no-{argument}" for argument in ARGUMENTS[command]]
    assert call(command, *paths, *options.split()) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: {message}"
    assert hint.startswith(f"hint: {message.partition(': ')[0]}: ")  # what the option takes


def test_an_empty_list_from_python() -> None:
    with pytest.raises(SettingsError, match=r"(?m)^methods: is empty: name at least one$"):
        CONFIGS["compare"](model="m", output="o", methods=())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("prune", "OUT is MODEL itself"), ("convert", "OUT is MODEL itself"), ("pack", "PACKED is PRUNED itself"),
        ("unpack", "OUT is PACKED itself"),
    ],
)  # fmt: skip
def test_arguments_are_named_as_the_help_names_them(
    tmp_path: Path, command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(command, tmp_path, tmp_path) == 2
    assert capsys.readouterr().err.startswith(f"error: {message} ({tmp_path}): ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--include", "q_proj", "--exclude", "q_proj"),
            "--include, --exclude, --skip-layers and --sparsities leave nothing to prune",
        ),
        (("--exclude", "target_mix"), "--exclude: no linear's name matches 'target_mix'"),
        (("--skip-layers", "7"), "--skip-layers: there is no decoder layer 7"),
        (("--device", "tpu"), "--device: unknown device 'tpu'"),
        (("--dtype", "int8"), "--dtype: 'int8' is not one of auto, "),
        (("--layers", "nothing.there"), "--layers nothing.there is not the path of a list of decoder layers"),
        (("--keep-updates",), "--keep-updates needs --initial sparsegpt or alps: wanda updates no weights"),
        (
            ("--preset", "paper", "--guard", "0.5"),
            "--guard needs --refine or --reconstruct, which --preset paper does not",
        ),
        (("--memory", "1MiB", "--preset", "paper"), "--memory: 1 MiB is too little"),
    ],
)
def test_settings_that_do_not_fit_are_named_as_they_are_typed(
    tmp_path: Path,
    llama: Path,
    tokens: Path,
    options: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("prune", llama, tmp_path / "out", "--calibration", tokens, "--quiet", *options) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_usage_error_names_the_help_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("prune", "model", "--sparsity") == 2
    assert capsys.readouterr().err.endswith("hint: see llm-barber prune --help\n")


def test_a_switch_that_is_off_is_named_with_no(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("rebuild", "dense", "pruned", tmp_path / "out", "--no-rebuild") == 2
    error = "error: --no-rebuild, --refine none and --reconstruct none leave nothing to do\n"
    assert capsys.readouterr().err.startswith(error)


@pytest.mark.parametrize(
    ("options", "code"), [(("--sparsity", "1.5"), 2), (("--calibration", "nothing"), 1), (("--what",), 2)]
)
def test_debug_adds_a_traceback_and_changes_nothing_else(
    tmp_path: Path, llama: Path, options: tuple[str, ...], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("prune", llama, tmp_path / "out", "--quiet", *options)
    assert call(*arguments) == code
    without = capsys.readouterr().err
    assert without.startswith("error: ")
    assert "\nhint: " in without
    assert call(*arguments, "--debug") == code
    debugged = capsys.readouterr().err
    assert debugged.endswith(without)
    assert debugged.count("hint: ") == 1
    assert debugged.startswith("Traceback ") is (options != ("--what",))  # typer reports unknown options itself


def test_debug_shows_the_traceback_of_a_defect(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("this is new")

    monkeypatch.setattr("llm_barber.run.commands.prune", broken)
    assert call("prune", llama, tmp_path / "out", "--quiet", "--debug") == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback ")
    assert "\nerror: unexpected RuntimeError: this is new\nhint: this is a defect" in shown
