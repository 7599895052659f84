"""Prose of pages that benchmarks write."""

import textwrap

WIDTH = 100  # of prose


def wrapped(text: str, indent: str = "") -> str:
    """Wrap prose; further lines begin with the indent."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
