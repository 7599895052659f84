"""Settings of the documentation's build (`make docs`)."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extensions"))

project = "LLM-Barber"
author = "the LLM-Barber contributors"
extensions = ["myst_parser", "from_code"]
html_theme = "furo"
html_title = "LLM-Barber"
html_show_copyright = False
html_css_files = ["wide.css"]
html_static_path = ["extensions/static"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
nitpicky = True
smartquotes = False  # They would make one dash of an option's two.
# Results are pages that `benchmarks/` writes whole; they have long tables and nothing that Sphinx could highlight.
highlight_language = "none"
exclude_patterns = ["extensions"]
