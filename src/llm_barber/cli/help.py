"""The text of `--help`: usage, description, panels of options in two columns, examples.

Typer's help has five columns: on a terminal of 80 characters it cuts options' names, and takes twice the lines.
"""

from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

OUTPUT = "Output"  # the panel of options without one


class HelpCommand(TyperCommand):
    """A command whose `--help` shows its options panel by panel."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help on stdout."""
        _print_help(ctx, self, "[OPTIONS]", {})


class HelpGroup(TyperGroup):
    """The program, whose `--help` shows each command with a one-line description."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help on stdout."""
        rows = [(name, _paragraphs(command.help)[0]) for name, command in self.commands.items()]
        _print_help(ctx, self, "COMMAND [OPTIONS] …", {"Commands": rows})


def _print_help(ctx: Any, command: Any, usage: str, panels: dict[str, list[tuple[str, str]]]) -> None:
    """Print a help text on stdout; each panel has rows of names and their help, in columns of equal widths."""
    for parameter in command.get_params(ctx):
        if parameter.param_type_name == "argument":
            usage += f" {parameter.metavar}"
            panels.setdefault("Arguments", []).append((parameter.metavar, parameter.help))
        else:
            names = "/".join((*sorted(parameter.opts, key=len, reverse=True), *parameter.secondary_opts))  # --help/-h
            panel = getattr(parameter, "rich_help_panel", None) or OUTPUT
            panels.setdefault(panel, []).append((f"{names} {parameter.metavar or ''}".rstrip(), parameter.help))
    console = Console(highlight=False)
    for paragraph in (f"Usage: {ctx.command_path} {usage}", *_paragraphs(command.help)):
        console.print(Text(paragraph), end="\n\n")
    width = max(len(names) for rows in panels.values() for names, _ in rows)
    for title, rows in panels.items():
        table = Table.grid(expand=True)
        table.add_column(width=width + 2, no_wrap=True, style="bold cyan")
        table.add_column(ratio=1, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(Panel(table, title=title, title_align="left", border_style="dim"))
    for paragraph in _paragraphs(command.epilog):
        console.print(Text(paragraph), soft_wrap=True)


def _paragraphs(text: str | None) -> list[str]:
    """Split a text at blank lines, and join the lines of each paragraph."""
    return [" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n")]
