"""The application that commands join, and what they share."""

from typing import Annotated, Any

import typer

app = typer.Typer(
    name="llm-barber",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Prune a large language model in one shot, then rebuild its mask block by block (arXiv 2408.10631).",
    epilog="Exit codes: 0 done, 1 a problem with files or models, 2 wrong options, 130 interrupted.",
)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from llm_barber import __version__

        print(__version__)
        raise typer.Exit


def names(given: str | None) -> tuple[str, ...]:
    """The names of a list with commas."""
    return tuple(name.strip() for name in (given or "").split(",") if name.strip())


def print_json(value: Any) -> None:
    """Print a value as indented JSON on stdout."""
    import json

    print(json.dumps(value, indent=1))
