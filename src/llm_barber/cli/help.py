"""The text of `--help`: usage, description, panels of options in two columns, examples.

Typer's help has separate columns for types, choices and defaults, and imports a Markdown renderer: it takes twice the
lines, and starts later.
"""

from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from llm_barber.cli.options import OUTPUT

ARGUMENTS, OPTIONS, COMMANDS = "Arguments", "Options", "Commands"
FEW_PARAMETERS = 14  # most parameters of a command whose options share a single panel
Rows = list[tuple[str, str]]  # names as the user types them, and the help text


class HelpCommand(TyperCommand):
    """A command whose `--help` shows its options panel by panel."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help on stdout."""
        parameters = self.get_params(ctx)
        panels: dict[str, Rows] = {}
        for parameter in parameters:
            if parameter.param_type_name == "argument":
                panel = ARGUMENTS
            elif len(parameters) <= FEW_PARAMETERS:
                panel = OPTIONS
            else:
                panel = getattr(parameter, "rich_help_panel", None) or OUTPUT
            panels.setdefault(panel, []).append(_row(parameter))
        usage = " ".join([ctx.command_path, "[OPTIONS]", *(names for names, _ in panels.get(ARGUMENTS, []))])
        _print_help(usage, self.help, panels, self.epilog)


class HelpGroup(TyperGroup):
    """The program, whose `--help` shows each command with a one-line description."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help on stdout."""
        commands: Rows = []
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None:
                commands.append((name, _paragraphs(command.help)[0]))
        options: Rows = [_row(option) for option in self.get_params(ctx)]
        usage = f"{ctx.command_path} COMMAND [OPTIONS] …"
        _print_help(usage, self.help, {COMMANDS: commands, OPTIONS: options}, self.epilog)


def _row(parameter: Any) -> tuple[str, str]:
    """Row of a panel: an argument or option as the user types it, and its help text."""
    return _names(parameter), (getattr(parameter, "help", None) or "").removesuffix(".")


def _names(parameter: Any) -> str:
    """Show an argument or option as the user types it: `MODEL`, `--samples N`, `--bos/--no-bos`."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar)
    names = "/".join((*sorted(parameter.opts, key=len, reverse=True), *parameter.secondary_opts))  # --help/-h
    return names if parameter.is_flag or not parameter.metavar else f"{names} {parameter.metavar}"


def _paragraphs(text: str | None) -> list[str]:
    """Split a text at blank lines, and join the lines of each paragraph."""
    return [" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n")]


def _print_help(usage: str, description: str | None, panels: dict[str, Rows], epilog: str | None) -> None:
    """Print a help text on stdout, its panels with columns of equal widths."""
    console = Console(highlight=False)
    for paragraph in (f"Usage: {usage}", *_paragraphs(description)):
        console.print(Text(paragraph))
        console.print()
    width = max(len(names) for rows in panels.values() for names, _ in rows)
    for title, rows in panels.items():
        table = Table.grid(expand=True)
        table.add_column(width=width + 2, no_wrap=True, style="bold cyan")
        table.add_column(ratio=1, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(Panel(table, title=title, title_align="left", border_style="dim"))
    for paragraph in _paragraphs(epilog):
        console.print(Text(paragraph), soft_wrap=True)
