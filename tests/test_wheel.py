"""The built wheel holds what the package needs. `make package` installs one and uses it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(folder: Path) -> Path:
    """The wheel of the sources as they are."""
    source = folder / "source"
    source.mkdir()
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    settings = (ROOT / "pyproject.toml").read_text()
    assert '"-O3"' in settings
    (source / "pyproject.toml").write_text(settings.replace('"-O3"', '"-O0"'))  # compiles in a tenth of the time
    shutil.copytree(ROOT / "src" / "llm_barber", source / "src" / "llm_barber")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


@pytest.mark.timeout(300)
def test_the_wheel_is_whole(tmp_path: Path) -> None:
    wheel = build(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("py.typed", "data/wikipedia-leads.txt", "data/wikitext2-raw-test.txt", "data/LICENSES.md"):
        assert f"llm_barber/{name}" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert not any("tests" in name for name in names)
    if shutil.which("cc"):  # the wheel is whole without a C compiler
        assert any(name.startswith("llm_barber/native/_packed") for name in names)
