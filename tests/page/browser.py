"""Measure a page in a real browser: widths, colours, and the messages of the console."""

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from html import unescape
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the path")

WRAPPER = """<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<iframe src="page.html" width="1280" height="800"></iframe><iframe src="page.html" width="400" height="800"></iframe>
<script>
addEventListener("load", () => {
  const measured = [...document.querySelectorAll("iframe")].map(frame => {
    const inside = frame.contentWindow, root = frame.contentDocument.documentElement;
    const closed = root.scrollWidth;
    frame.contentDocument.querySelectorAll("details").forEach(details => { details.open = true; });
    const style = inside.getComputedStyle(frame.contentDocument.body);
    return {
      width: inside.innerWidth, closed: closed, open: root.scrollWidth, page: style.backgroundColor, ink: style.color,
      figures: [...frame.contentDocument.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().width),
    };
  });
  document.documentElement.setAttribute("data-measured", JSON.stringify(measured));
});
</script>
"""


def measure(page: str, folder: Path, dark: bool) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Measure a page in frames of 1280 and 400 pixels (no window is that narrow); return the console's lines, too."""
    assert BROWSER is not None
    (folder / "page.html").write_text(page)
    (folder / "wrapper.html").write_text(WRAPPER)
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--window-size=1700,900", "--enable-logging=stderr", "--dump-dom", (folder / "wrapper.html").as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    measured = re.search(r'data-measured="([^"]*)"', result.stdout)
    assert measured, result.stderr
    return json.loads(unescape(measured[1])), [line for line in result.stderr.splitlines() if "CONSOLE" in line]
