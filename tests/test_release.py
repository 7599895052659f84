"""A release can be made: the version has one source, and CI runs every Python that the package names."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import yaml

import llm_barber

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_is_that_of_pyproject_and_stands_nowhere_else() -> None:
    assert llm_barber.__version__ == version("llm-barber")
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["version"])
    quoted = re.compile(rf"""version\W{{1,4}}{re.escape(PROJECT["version"])}""")
    files = [*(ROOT / "src").rglob("*.py"), ROOT / "CITATION.cff", *(ROOT / "docs").glob("*.py")]
    assert [path for path in files if quoted.search(path.read_text(encoding="utf-8"))] == []
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_ci_runs_each_python_of_the_classifiers() -> None:
    prefix = "Programming Language :: Python :: 3."
    classified = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if text.startswith(prefix)]
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]["test"]
    assert job["strategy"]["matrix"]["python-version"] == classified
    assert PROJECT["requires-python"] == f">={classified[0]}"
    assert job["steps"][-1]["run"] == ".ci/run"
    assert (ROOT / ".ci" / "run").is_file()
