"""The built wheel holds what the package needs, and works in an environment of its own."""

import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import make_model, save_tokens

ROOT = Path(__file__).parent.parent


def build(folder: Path) -> Path:
    """The wheel of the sources as they are."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src" / "llm_barber", source / "src" / "llm_barber")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


@pytest.mark.timeout(300)
def test_wheel_is_whole_and_works_in_an_environment_of_its_own(tmp_path: Path) -> None:
    """A new environment with the wheel; its dependencies are borrowed from this one, which has them installed."""
    wheel = build(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("py.typed", "data/wikipedia-leads.txt", "data/wikitext2-raw-test.txt", "data/LICENSES.md"):
        assert f"llm_barber/{name}" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert not any("tests" in name for name in names)
    if shutil.which("cc"):  # the wheel is whole without a C compiler
        assert any(name.startswith("llm_barber/native/_packed") for name in names)
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site_packages = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    zipfile.ZipFile(wheel).extractall(site_packages)  # which is all that pip does with a wheel of these files
    (site_packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    code = "import llm_barber.text.calibration as c; print(c.__file__, len(c.read_text('builtin')))"
    output = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert str(site_packages) in output
    model = make_model(tmp_path / "model", "llama")
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    command = [python, "-m", "llm_barber", "prune", str(model), str(tmp_path / "out"), "--calibration", str(tokens)]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
