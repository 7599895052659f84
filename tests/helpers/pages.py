"""The pages of the documentation, as tests read them."""

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOK = DOCS / "notebook"
CURRENT = [page for page in PAGES if NOTEBOOK not in page.parents and page.name != "CHANGELOG.md"]  # no history
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    .*\n?)+", re.MULTILINE)


@cache
def from_code() -> Any:
    """The extension that writes pages from the code."""
    spec = importlib.util.spec_from_file_location("from_code", DOCS / "extensions" / "from_code.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def options() -> dict[str, set[str]]:
    """All options of each command."""
    return {
        name: {
            option
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
            if option.startswith("--") and option != "--help"
        }
        for name, command in from_code().commands().items()
    }


def typed_commands(text: str) -> list[tuple[str, list[str]]]:
    """Each `llm-barber COMMAND` of a page's code, with the options that follow it on its line."""
    text = re.sub(r"\\\n\s*", " ", text)  # one line, where the shell has one
    lines = [line for block in (*FENCE.findall(text), *INDENTED.findall(text)) for line in block.splitlines()]
    lines += re.findall(r"`((?:llm-barber|torchrun)[^`]*)`", text.replace("\n", " "))
    commands = []
    for line in lines:
        match = re.search(r"(?:llm-barber|-m llm_barber) ([a-z]+)([^#]*)", line)
        if match and not line.strip().startswith(("#", "<")):
            commands.append((match.group(1), re.findall(r"(?<![\w-])--[a-z][a-z-]*", match.group(2))))
    return commands


def prose(text: str) -> str:
    """A page without tables, code blocks, comments and links' targets."""
    text = INDENTED.sub("", FENCE.sub("", text))
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(("|", "<!--")))
    return re.sub(r"\]\([^)]*\)", "]", text)


def anchors(text: str) -> set[str]:
    """The headings of a page, as links name them."""
    slugs: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        slugs.add(slug if slug not in slugs else f"{slug}-1")
    return slugs
